"""What a GPU machine without a network needs beside the repository, in one folder that git ignores."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from plan import ROOT
from prune_provider import PROVIDER, prune_provider

FOLDER = ROOT / ".gpu"
MOST_BYTES = 60 << 20  # of the repository and the folder: what travels to a machine is limited
SITE, LIBRARIES = "site.tar.xz", "libraries.tar.xz"
NAMES = ("libact_ops.so", "libcuda_harness.so", "kernels.bin")
_LEFT_OUT = (
    *("onnxruntime/tools", "onnxruntime/transformers", "onnxruntime/quantization", "onnxruntime/datasets"),
    "onnxruntime/capi/libonnxruntime.so",  # of programs in C; Python's binding has it inside
)


class PackError(Exception):
    """What is to be carried isn't there, or is too much."""


def pack(onnxruntime: Path, kernels: Path | None, jobs: int, folder: Path = FOLDER) -> str:
    """Fills the folder; returns a table of what travels.

    Args:
        onnxruntime: A wheel of onnxruntime-gpu, for the Python of the machine.
        kernels: A catalogue that was compiled before; None compiles one for Hopper and PTX.
        jobs: Processes of the compiler.
        folder: Where it goes.

    Raises:
        PackError: It isn't such a wheel, or all of it is more than `MOST_BYTES`.
        subprocess.CalledProcessError: Something doesn't build.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        built = build(Path(scratch, "build"), kernels, jobs)
        _archive(folder / LIBRARIES, ((built[name], name) for name in NAMES))
        site = unpack_wheel(onnxruntime, Path(scratch, "site"))
        _archive(folder / SITE, ((site / name, name) for name in sorted(os.listdir(site))))
    sizes = {"repository": repository_bytes(), **{path.name: path.stat().st_size for path in sorted(folder.iterdir())}}
    lines = ["| what | MiB |", "| --- | --- |"]
    lines += [f"| {name} | {size / 2**20:.1f} |" for name, size in {**sizes, "all": sum(sizes.values())}.items()]
    if sum(sizes.values()) > MOST_BYTES:
        raise PackError("\n".join([*lines, f"That is more than {MOST_BYTES >> 20} MiB: leave something out"]))
    return "\n".join(lines)


def build(folder: Path, kernels: Path | None, jobs: int) -> dict[str, Path]:
    """The native library and the harness with real kernels, and their catalogue, by name."""
    folder.mkdir()
    catalogue = folder / "kernels.bin"
    if kernels is None:
        if missing := [name for name in ("triton", "cmake") if find_spec(name) is None]:
            raise PackError(
                f"{sys.executable} has no {' and no '.join(missing)}: take one that has, as tools/setup makes "
                "(.venv/bin/python tools/check_gpu pack ...)"
            )
        command = [sys.executable, "-m", "act_export.ops.cuda.build", "--out", str(catalogue), "--jobs", str(jobs)]
        subprocess.run([*command, "--targets", "90", "0"], cwd=ROOT, check=True)
    else:
        catalogue.write_bytes(kernels.read_bytes())
    cmake = [sys.executable, "-m", "cmake"]
    source = ROOT / "tests" / "ops" / "csrc" / "cuda"
    configure = [*cmake, "-S", str(source), "-B", str(folder), f"-DACT_CUDA_KERNELS={catalogue}"]
    for step in (configure, [*cmake, "--build", str(folder), "--parallel", str(jobs)]):
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            raise PackError(f"{' '.join(step)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return {path.name: path for name in NAMES for path in folder.rglob(name)}


def unpack_wheel(wheel: Path, folder: Path) -> Path:
    """ONNX Runtime's Python files and its provider with Hopper's kernels alone; no metadata, beside another package's.

    Raises:
        PackError: It is no wheel of onnxruntime-gpu.
    """
    if not zipfile.is_zipfile(wheel):
        raise PackError(f"{wheel} is no wheel: pip download --no-deps onnxruntime-gpu, for the machine's Python")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("onnxruntime/")]
        if f"onnxruntime/capi/{PROVIDER}" not in names:
            raise PackError(f"{wheel} has no {PROVIDER}: give one of onnxruntime-gpu")
        archive.extractall(
            folder, [name for name in names if not name.startswith(_LEFT_OUT) and "tensorrt" not in name]
        )
    prune_provider(folder / "onnxruntime" / "capi" / PROVIDER)
    return folder


def unpack(folder: Path, target: Path) -> dict[str, str]:
    """On the machine: puts everything where it is found, and returns the variables of the steps' environment.

    The native library goes beside its package, where act-export isn't installed.

    Raises:
        FileNotFoundError: The folder wasn't carried.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in (SITE, LIBRARIES):
        with tarfile.open(folder / name) as archive:
            archive.extractall(target, filter="data")
    if not list(metadata.distributions(name="act-export")):
        (ROOT / "act_export" / "ops" / NAMES[0]).write_bytes((target / NAMES[0]).read_bytes())
    torch = find_spec("torch")
    nvidia = Path(torch.origin).parents[1] / "nvidia" if torch is not None and torch.origin else Path()
    libraries = [str(nvidia / part / "lib") for part in ("cu13", "cudnn")]
    before = filter(None, [os.environ.get("LD_LIBRARY_PATH")])
    return {
        "PYTHONPATH": str(target),
        "LD_LIBRARY_PATH": os.pathsep.join([*libraries, *before]),
        "CHECK_GPU_HARNESS": str(target / NAMES[1]),
        "CHECK_GPU_KERNELS": str(target / NAMES[2]),
    }


def repository_bytes() -> int:
    """Of all files that git knows or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    paths = {ROOT / name for name in names if name}
    return sum(path.stat().st_size for path in paths if path.is_file())


def _archive(path: Path, files: Iterable[tuple[Path, str]]) -> None:
    with tarfile.open(path, "w:xz", preset=9) as archive:
        for file, name in files:
            archive.add(file, name)
