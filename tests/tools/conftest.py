import ctypes
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))  # what is there imports its neighbours by name


@pytest.fixture
def without_gpu() -> None:
    """Skips a test of what is said where there is no GPU."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    pytest.skip("there is a CUDA driver")
