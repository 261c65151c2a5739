"""What a machine needs before anything else is worth running on its GPU."""

from __future__ import annotations

import pytest
from test_gpu_kernels import has_machine_code

from act_export.ops.library import library_info
from act_export.runtime.cuda import cuda_version, prepare_cuda
from act_export.runtime.cuda_driver import CudaDriver
from act_export.runtime.device import import_onnxruntime

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(60)]


def test_driver_and_gpu(record_property):
    """Fails where other tests are skipped: without a GPU no run of them is a success."""
    gpu = CudaDriver().describe(0)
    for name, value in vars(gpu).items():
        record_property(name, value)
    assert float(gpu.capability) >= 8


def test_onnxruntime(gpu, record_property):
    """One of its two packages alone, built with a CUDA that the driver supports."""
    onnxruntime = import_onnxruntime()
    record_property("onnxruntime", f"{onnxruntime.__version__}, CUDA {cuda_version(onnxruntime)}")
    prepare_cuda(onnxruntime, 0, native=True)


def test_library(gpu, record_property):
    found = library_info()
    record_property("kernels", ", ".join(found.cuda))
    assert has_machine_code(gpu.capability, found.cuda) or "ptx" in found.cuda
