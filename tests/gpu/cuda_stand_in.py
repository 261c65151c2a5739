#!/usr/bin/env python3
"""Libraries that stand in for CUDA's, so that ONNX Runtime opens a CUDA session on a machine without a GPU.

    tests/gpu/cuda_stand_in.py PROVIDER FOLDER [--include DIRECTORY]

PROVIDER is libonnxruntime_providers_cuda.so of the package onnxruntime-gpu, made for the same major version of CUDA as
the headers (default: /usr/local/cuda/include). A process started with LD_LIBRARY_PATH=FOLDER then has one device, with
host memory as device memory. ONNX Runtime chooses providers and kernels for the nodes of a graph and inserts its copies
as it does on a GPU, which is what can be looked at; its kernels do nothing, so what they compute is zeros and garbage.
CUDA_STAND_IN_BYTES is the size of the device's memory (default: 80 GiB): allocations beyond it fail as on a full GPU.
FOLDER also gets a libcuda.so.1, empty, as the provider is linked with it; another one may be put in its place.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
LOADED_LATER = {"cudnn": "libcudnn.so.9", "cufft": "libcufft.so.12"}  # by dlopen, where not linked
OURS = re.compile(r"lib(cuda|cudart|cublas|cublasLt|cudnn|cufft|curand|nvrtc)\.so\.\d+")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("provider", type=Path, help="libonnxruntime_providers_cuda.so")
    parser.add_argument("folder", type=Path, help="where the libraries go")
    parser.add_argument("--include", type=Path, default=Path("/usr/local/cuda/include"), help="(default: %(default)s)")
    arguments = parser.parse_args()
    if not (arguments.include / "cuda_runtime_api.h").exists():
        parser.error(f"--include {arguments.include}: no cuda_runtime_api.h there; give the folder of CUDA's headers")
    if not arguments.provider.exists():
        parser.error(f"{arguments.provider} doesn't exist; it is in onnxruntime/capi of the package onnxruntime-gpu")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, functions in sorted(wanted(arguments.provider).items()):
        build(arguments.folder / name, functions, arguments.include)
        print(f"{arguments.folder / name}: {len(functions)} functions")
    print(f"Use: LD_LIBRARY_PATH={arguments.folder.resolve()}")
    return 0


def wanted(provider: Path) -> dict[str, set[str]]:
    """File name of each library the provider wants -> the functions it wants from it."""
    dynamic = output("readelf", "-dW", provider)
    functions: defaultdict[str, set[str]] = defaultdict(set)
    for name in re.findall(r"NEEDED.*\[(.*)\]", dynamic):
        if OURS.fullmatch(name):
            functions[name] = set()
    runtime = next((name for name in functions if name.startswith("libcudart.")), None)
    if runtime is None:
        sys.exit(f"{provider} isn't linked with libcudart; give onnxruntime-gpu's libonnxruntime_providers_cuda.so")
    for symbol in output("nm", "-D", "--undefined-only", provider).split():
        function, _, library = symbol.partition("@")
        if OURS.fullmatch(library):
            functions[library].add(function)
        elif re.fullmatch(r"cu[A-Z]\w+", symbol):
            functions[runtime].add(symbol)  # of the driver; here they can't be missed, whatever libcuda.so.1 it is
    for prefix, library in LOADED_LATER.items():
        if not any(name.startswith(f"lib{prefix}.") for name in functions):
            names = re.findall(rb"(?<=\0)" + prefix.encode() + rb"[A-Z]\w+(?=\0)", provider.read_bytes())
            functions[library] = {name.decode() for name in names}
    return dict(functions)


def build(library: Path, functions: Iterable[str], include: Path) -> None:
    """Builds a library whose functions succeed without doing anything, or do what the C source says."""
    name = library.name
    with tempfile.TemporaryDirectory() as scratch:
        sources = [SOURCE] if name.startswith("libcudart.") else []
        rest = Path(scratch, "rest.c")
        rest.write_text("static char object;\n" + "".join(map(definition, sorted(functions))))
        versions = Path(scratch, "versions")
        versions.write_text(f"{name} {{ global: *; }};\n" if not name.startswith("libcuda.") else "{ global: *; };\n")
        command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", f"-I{include}"]
        command += [f"-Wl,-soname,{name}", f"-Wl,--version-script,{versions}", "-o", str(library)]
        subprocess.run([*command, *sources, rest], check=True)


def definition(function: str) -> str:
    """C source of a function that succeeds, unless another source defines it."""
    kind, parameters, body = "int", "void", "return 0;"
    if function == "cublasLtMatmulAlgoGetHeuristic":
        parameters = ", ".join(f"void *a{i}" for i in range(7)) + ", int asked, void *results, int *count"
        body = "*count = 0; return 0;"
    elif function == "cudnnGetVersion":
        kind, body = "unsigned long", "return 91000;"
    elif re.search(r"Get(Last)?(ErrorString|StatusName|StatusString)$", function):
        kind, body = "const char *", 'return "status of the CUDA stand-in";'
    elif re.match(r"(cublas|cublasLt|cudnn)\w*Create", function) and function != "cudnnBackendCreateDescriptor":
        parameters, body = "void **handle", "*handle = &object; return 0;"
    return f"__attribute__((weak)) {kind} {function}({parameters}) {{ {body} }}\n"


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
