import ctypes
import platform
from importlib.util import find_spec

import pytest

# Where it can be installed, its absence is a failure.
if find_spec("triton") is None and (platform.system(), platform.machine()) != ("Linux", "x86_64"):
    pytest.skip("Triton can't be installed on this platform", allow_module_level=True)

from fake_driver import FakeDriver, Libraries, build, has_driver


@pytest.fixture(scope="session")
def libraries() -> Libraries:
    return build()


@pytest.fixture(scope="session")
def loaded_driver(libraries) -> FakeDriver:
    if has_driver():
        pytest.skip("this machine has a CUDA driver, which this process may have loaded: tools/check_gpu uses it")
    return FakeDriver(libraries)


@pytest.fixture
def driver(loaded_driver) -> FakeDriver:
    """The stand-in for a driver, as good as new; what a test allocates it has to free."""
    loaded_driver.library.FakeCudaFailAllocations(ctypes.c_int64(2**62))
    before = loaded_driver.library.FakeCudaLiveAllocations()
    yield loaded_driver
    assert loaded_driver.library.FakeCudaLiveAllocations() == before
    assert loaded_driver.library.FakeCudaContexts() == 0
