"""Compiles the kernels ahead of time, for every target, without a GPU: `python -m act_export.ops.cuda.build`."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from act_export.ops.cuda.toolkit import tool

# Before Triton is imported: machine code without line numbers is a third of the size, and the compiler may fuse
# multiplications and additions. Drivers of CUDA 12 take what the assembler of CUDA 12 makes, Triton's own choice for
# compute capability 9.0 and above is that of CUDA 13.
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
os.environ["TRITON_PTXAS_BLACKWELL_PATH"] = str(tool("ptxas"))

from act_export.ops.cuda.catalogue import KernelImage, write_catalogue
from act_export.ops.cuda.specs import (
    DTYPES,
    HEAD_SIZES,
    MAP_ROWS,
    PTX_TARGET,
    SWIZZLED_BYTES,
    TARGETS,
    KernelSpec,
    specs,
)

PTX = 0  # the target of images that the driver compiles
_PTX_VERSION = 80  # what drivers of CUDA 12.0 read
_SWIZZLE_128 = 3  # TMA's number of it
_LETTERS = {"i32": "i", "i64": "l", "fp32": "f"}


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel.

    Attributes:
        image: For the catalogue.
        registers: Of a thread; None for PTX.
        stack_bytes: Of a thread, where spilled registers go; None for PTX.
        buffers: Tiles in shared memory that its loops load ahead, by how many of each there are, largest first.
    """

    image: KernelImage
    registers: int | None
    stack_bytes: int | None
    buffers: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """One kernel for one target; the spec is found by name in the process that compiles it."""

    name: str
    target: int


def jobs(targets: Iterable[int], head_sizes: Iterable[int], dtypes: Iterable[str], *, general: bool) -> Iterator[Job]:
    """What to compile: machine code of the kernels with a head size of their own, PTX of all."""
    wanted_sizes, wanted_types = set(head_sizes), set(dtypes)
    for target in targets:
        for spec in specs(target or PTX_TARGET):
            parts = spec.name.split(".")
            if len(parts) > 1:
                kind = parts[2].rstrip("0123456789")
                size = int(parts[2].removeprefix(kind))
                if parts[1] not in wanted_types or size not in wanted_sizes:
                    continue
                if kind and not (general and target == PTX):
                    continue
            yield Job(spec.name, target)


def compile_job(job: Job) -> Compiled:
    """Compiles one kernel.

    Raises:
        RuntimeError: If Triton can't, with the kernel's name.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon import GluonASTSource, GluonJITFunction

    spec = next(spec for spec in specs(job.target or PTX_TARGET) if spec.name == job.name)
    names = list(spec.signature)
    source = (GluonASTSource if isinstance(spec.function, GluonJITFunction) else ASTSource)(
        fn=spec.function,
        signature=spec.signature,
        constexprs={(names.index(name),): value for name, value in spec.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in spec.aligned},
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    if job.target == PTX:
        options["ptx_version"] = _PTX_VERSION
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", spec.architecture, 32), options=options)
    except Exception as error:
        raise RuntimeError(f"{job.name} for {_target_name(job.target)} doesn't compile: {error}") from error
    ptx = compiled.asm["ptx"]
    letters = parameter_letters(spec)
    code = b"" if job.target == PTX else compiled.asm["cubin"]
    if job.target not in (PTX, spec.architecture):
        code = assemble(ptx, job.target)
    metadata = compiled.metadata
    if getattr(metadata, "global_scratch_size", 0):
        raise RuntimeError(f"{job.name} for {_target_name(job.target)} needs scratch memory that nothing gives it")
    _check_maps(spec, getattr(metadata, "tensordesc_meta", None) or [])
    image = KernelImage(
        name=job.name,
        target=job.target,
        parameters=letters,
        hidden_pointers=_entry_parameters(ptx) - len(letters),
        threads=_threads(ptx, metadata.num_warps),
        shared_bytes=metadata.shared,
        symbol=metadata.name,
        image=code or ptx.encode() + b"\0",
    )
    registers, stack_bytes = _resources(code) if code else (None, None)
    ahead = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x[bf]", compiled.asm["ttgir"])
    return Compiled(image, registers, stack_bytes, tuple(sorted(map(int, ahead), reverse=True)))


def parameter_letters(spec: KernelSpec) -> str:
    """The launch parameters of a kernel in order, a letter each as in `KernelImage`.

    Behind the map of a matrix Triton puts its two dimensions and its two strides.
    """

    def letters(kind: str) -> str:
        if kind.startswith("tensordesc"):
            return "tiill"
        return "p" if kind.startswith("*") else _LETTERS[kind]

    return "".join(letters(kind) for kind in spec.signature.values() if kind != "constexpr")


def _check_maps(spec: KernelSpec, made: Sequence[dict[str, object]]) -> None:
    """That the maps are as csrc/attention_cuda.cc makes them: boxes of half rows or whole ones, swizzled.

    Raises:
        RuntimeError: The compiler wants others.
    """
    box = [MAP_ROWS, SWIZZLED_BYTES // 2]
    expected = {"swizzle": _SWIZZLE_128, "elem_size": 2, "block_size": box, "fp4_padded": False, "is_im2col": False}
    wanted = sum(kind.startswith("tensordesc") for kind in spec.signature.values())
    if len(made) != wanted:
        raise RuntimeError(f"{spec.name} takes {wanted} maps of tensors, but the compiler tells of {len(made)}")
    for found in made:
        if {key: found.get(key) for key in expected} != expected:
            raise RuntimeError(f"{spec.name} wants maps of tensors with {found}, the launch makes them with {expected}")


def _entry_parameters(ptx: str) -> int:
    entry = re.search(r"\.entry[^(]*\(([^)]*)\)", ptx)
    assert entry is not None
    return entry.group(1).count(".param")


def _threads(ptx: str, num_warps: int) -> int:
    required = re.search(r"\.reqntid\s+(\d+)", ptx)
    return int(required.group(1)) if required else 32 * num_warps


def assemble(ptx: str, target: int) -> bytes:
    """Machine code from PTX of an older architecture."""
    with tempfile.TemporaryDirectory() as folder:
        source, code = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx, encoding="utf-8")
        command = [str(tool("ptxas")), f"--gpu-name=sm_{target}", str(source), "-o", str(code)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"ptxas for sm_{target}: {result.stderr}")
        return code.read_bytes()


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as cuobjdump tells."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool("cuobjdump")), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump tells no registers: {text}")
    return int(found.group(1)), int(found.group(2))


def _target_name(target: int) -> str:
    return f"sm_{target}" if target else "PTX"


def table(compiled: Sequence[Compiled]) -> str:
    """Registers, stack and shared memory of each kernel and target, in Markdown."""
    lines = [
        "| kernel | target | threads | registers | stack, bytes | shared memory, bytes | image, bytes | buffers |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in compiled:
        image = one.image
        registers = "" if one.registers is None else one.registers
        stack = "" if one.stack_bytes is None else one.stack_bytes
        lines.append(
            f"| {image.name} | {_target_name(image.target)} | {image.threads} | {registers} | {stack} | "
            f"{image.shared_bytes} | {len(image.image)} | {' '.join(map(str, one.buffers))} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles, writes the catalogue, and prints the table where asked to."""
    parser = argparse.ArgumentParser(prog="python -m act_export.ops.cuda.build", description=__doc__)
    parser.add_argument("--out", type=Path, help="The catalogue to write; left out, kernels are only compiled.")
    parser.add_argument(
        "--targets", type=int, nargs="+", default=[*TARGETS, PTX], choices=[*TARGETS, PTX], help="0 is PTX."
    )
    parser.add_argument("--head-sizes", type=int, nargs="+", default=list(HEAD_SIZES), choices=HEAD_SIZES)
    parser.add_argument("--types", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--no-general", action="store_true", help="Leave out the kernels for any head size.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="Processes.")
    parser.add_argument("--table", action="store_true", help="Print registers, stack and shared memory.")
    options = parser.parse_args(arguments)
    wanted = list(jobs(options.targets, options.head_sizes, options.types, general=not options.no_general))
    compiled = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for done, one in enumerate(pool.map(compile_job, wanted), 1):
            compiled.append(one)
            if sys.stderr.isatty():
                print(
                    f"\r{done} of {len(wanted)} kernels", end="\n" * (done == len(wanted)), file=sys.stderr, flush=True
                )
    if options.table:
        print(table(compiled))
    if options.out is not None:
        write_catalogue(options.out, [one.image for one in compiled])


if __name__ == "__main__":
    main()
