#!/usr/bin/env python3
"""What this Python and machine have of what a GPU needs, as JSON: tools/gpu_environment.py [--library FILE]"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from act_export.ops.library import library_info, library_path
from act_export.runtime.cuda import cuda_version
from act_export.runtime.cuda_driver import CudaDriver
from act_export.runtime.device import Device

PACKAGES = ("onnxruntime-gpu", "onnxruntime", "onnx", "ml_dtypes", "numpy", "torch", "triton", "cmake")
MODEL_PACKAGES = ("transformers", "safetensors", "accelerate", "onnxscript", "onnx_ir", "typer", "rich")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, help="native library (default: the installed one)")
    parser.add_argument("--device", type=Device.parse, default=Device("cuda"), help="(default: cuda)")
    arguments = parser.parse_args()
    print(json.dumps(describe(arguments.library, arguments.device)))
    return 0


def describe(library: Path | None, device: Device) -> dict[str, Any]:
    """Everything by name; what can't be told is an error's text under `problems`."""
    problems: dict[str, str] = {}

    def attempt(name: str, find: Callable[[], Any]) -> Any:
        try:
            return find()
        except Exception as error:  # whatever is missing belongs into the report
            problems[name] = f"{type(error).__name__}: {error}"
            return None

    onnxruntime = attempt("ONNX Runtime", lambda: import_module("onnxruntime"))
    found = {
        "python": platform.python_version(),
        "packages": versions(PACKAGES),
        "model_packages": versions(MODEL_PACKAGES),
        "providers": onnxruntime.get_available_providers() if onnxruntime else [],
        "onnxruntime_cuda": cuda_version(onnxruntime) if onnxruntime else "",
        "gpu": attempt("GPU", lambda: asdict(CudaDriver().describe(device.index))) if device.is_cuda else None,
        "torch_cuda": attempt("torch", lambda: bool(import_module("torch").cuda.is_available())),
        "library": attempt("library", lambda: describe_library(library)),
    }
    return found | {"problems": problems}


def describe_library(library: Path | None) -> dict[str, Any]:
    info = library_info(library or library_path())
    return {"path": str(info.path.resolve()), "cuda": list(info.cuda)}


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
