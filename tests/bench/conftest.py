import ctypes

import pytest


@pytest.fixture
def without_gpu() -> None:
    """Skips a test of what is said where there is no GPU."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    pytest.skip("there is a CUDA driver")
