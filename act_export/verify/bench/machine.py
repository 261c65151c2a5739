"""The machine that a benchmark ran on, and the versions of what ran."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from act_export.runtime.cuda import cuda_version
from act_export.runtime.cuda_driver import CudaDriver, Gpu
from act_export.runtime.device import Device, import_onnxruntime

_PACKAGES = ("act-export", "onnxruntime", "onnxruntime-gpu", "numpy", "torch", "transformers")


@dataclass(frozen=True)
class Machine:
    """Where something was measured.

    Attributes:
        processor: Its name, as the system knows it.
        architecture: Of the processor.
        cores: That the system has.
        usable_cores: Of those, that this process may use.
        memory_bytes: Of the system.
        versions: Of Python and of the packages that matter, by name; with a GPU also the CUDA that ONNX Runtime was
            built with.
        gpu: That it was measured on; None for the CPU.
    """

    processor: str
    architecture: str
    cores: int
    usable_cores: int
    memory_bytes: int
    versions: dict[str, str]
    gpu: Gpu | None = None


def describe_machine(device: Device | None = None) -> Machine:
    """This machine, with the GPU where the device is one.

    Raises:
        CudaDriverError: If the driver can't describe it.
    """
    gpu, cuda = None, {}
    if device is not None and device.is_cuda:
        gpu = CudaDriver().describe(device.index)
        cuda = {"CUDA of ONNX Runtime": cuda_version(import_onnxruntime()) or "unknown"}
    return Machine(
        processor=_processor(),
        architecture=platform.machine(),
        cores=os.cpu_count() or 1,
        usable_cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        versions={"python": platform.python_version(), **_versions(), **cuda},
        gpu=gpu,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return fields.get("model name") or platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
