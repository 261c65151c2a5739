import ctypes
from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("Triton isn't installed", allow_module_level=True)

from fake_driver import FakeDriver, Libraries, build


@pytest.fixture(scope="session")
def libraries(tmp_path_factory) -> Libraries:
    return build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="session")
def loaded_driver(libraries) -> FakeDriver:
    try:
        return FakeDriver(libraries)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def driver(loaded_driver) -> FakeDriver:
    """The stand-in for a driver, as good as new; what a test allocates it has to free."""
    loaded_driver.library.FakeCudaFailAllocations(ctypes.c_int64(2**62))
    before = loaded_driver.library.FakeCudaLiveAllocations()
    yield loaded_driver
    assert loaded_driver.library.FakeCudaLiveAllocations() == before
    assert loaded_driver.library.FakeCudaContexts() == 0
