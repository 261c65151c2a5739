"""The tools of the CUDA toolkit that Triton brings along."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def tool(name: str) -> Path:
    """The path of a tool, e.g. "ptxas"; Triton isn't imported.

    Raises:
        RuntimeError: Triton isn't installed.
    """
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        raise RuntimeError("the kernels are compiled by Triton, which isn't installed: pip install triton")
    return Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
