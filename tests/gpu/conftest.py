"""What runs on a GPU: `pytest -m gpu`. The same tests run on the CPU where they are quick, which shows them right."""

from __future__ import annotations

import pytest
from fresh_process import pytest_runtest_makereport, pytest_runtest_protocol  # noqa: F401, hooks

from act_export.runtime.cuda_driver import CudaDriver, CudaDriverError, Gpu
from act_export.runtime.device import Device

LIMIT_S = 300  # of a test on the GPU
ON_GPU = [pytest.mark.gpu, pytest.mark.timeout(LIMIT_S)]


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    try:
        return CudaDriver().describe(0)
    except CudaDriverError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=[pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=ON_GPU)])
def device(request: pytest.FixtureRequest) -> Device:
    """The CPU, and by `-m gpu` the GPU."""
    if request.param == "cuda":
        request.getfixturevalue("gpu")
    return Device.parse(request.param)
