"""The kernels compile for every target, on a machine without a GPU, to the instructions that make them fast."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import compiled
import pytest

import act_export.ops.cuda
from act_export.ops.cuda.build import _check_maps, assemble
from act_export.ops.cuda.catalogue import KernelImage, read_catalogue
from act_export.ops.cuda.hopper import CONSUMER_REGISTERS, LOADER_REGISTERS
from act_export.ops.cuda.specs import DTYPES, HOPPER, TARGETS, specs
from act_export.ops.cuda.toolkit import tool

SHARED_BYTES = {80: 101_376, 90: 232_448, 100: 232_448}  # of a block; 80 also serves 8.6 and 8.9, which have less
ABI_VERSION = 8  # where an ELF file has the version of its ABI
OTHERS = (86, 89, 103, 120)  # GPUs without machine code of their own: the driver compiles PTX for the last two
SIZES = {"p": 8, "i": 4, "l": 8, "f": 4, "t": 128}  # of parameters, by the catalogue's letters
MAP_ALIGNMENT = 64  # of parameters that are maps of tensors; of others it is their size
FIRST_PARAMETER = 0x210  # where it is in constant memory, of Hopper: alignments count there
REGISTERS = 65536  # of a multiprocessor
# Loops that run over all keys, or all queries: how many kinds of tiles each has, which are to be loaded ahead.
HOT_LOOPS = {"forward": 2, "columns": 1, "decode_split": 2}


def build(*arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "act_export.ops.cuda.build", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


class Kernels:
    """What `build` makes with these arguments: the rows of its table and its catalogue, compiled once."""

    def __init__(self, *arguments: str) -> None:
        def make(folder: Path) -> None:
            (folder / "table").write_text(build("--table", "--out", str(folder / "kernels.bin"), *arguments))

        sources = Path(act_export.ops.cuda.__path__[0])
        folder = compiled.compiled("cuda_kernels", (metadata.version("triton"), sources, *arguments), make)
        header, _, *lines = (
            [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]
            for line in (folder / "table").read_text().splitlines()
        )
        self.rows = [dict(zip(header, line, strict=True)) for line in lines]
        self.images = read_catalogue(folder / "kernels.bin")


def inspect(image: KernelImage, option: str, folder: Path) -> str:
    """What cuobjdump says of machine code."""
    file = folder / "kernel.cubin"
    file.write_bytes(image.image)
    return subprocess.run([tool("cuobjdump"), option, file], capture_output=True, text=True, check=True).stdout


# float16 compiles to what bfloat16 does, with other multiplications.
TYPES = ["bf16", "fp32", pytest.param("fp16", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=TYPES)
def dtype(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=["64", "128"])
def size(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def made(dtype, size) -> Kernels:
    return Kernels("--no-general", "--types", dtype, "--head-sizes", size, "--targets", *map(str, TARGETS))


@pytest.mark.sampled(1)
def test_every_kernel_compiles_for_every_target(made, dtype, size):
    expected = {
        (spec.name, f"sm_{target}")
        for target in TARGETS
        for spec in specs(target)
        if spec.name == "select" or (_size(spec.name) == f".{size}" and f".{dtype}." in spec.name)
    }
    assert {(row["kernel"], row["target"]) for row in made.rows} == expected


@pytest.mark.sampled(1)
def test_no_register_is_spilled(made):
    assert [row for row in made.rows if row["stack, bytes"] != "0"] == []


@pytest.mark.sampled(1)
def test_shared_memory_is_there(made):
    for row in made.rows:
        assert int(row["shared memory, bytes"]) <= SHARED_BYTES[int(row["target"].removeprefix("sm_"))], row


@pytest.mark.sampled(1)
def test_hot_loops_load_ahead(made):
    """While a tile is worked on, the next one of each kind is on its way: there are two buffers of each at least."""
    for row in made.rows:
        kinds = HOT_LOOPS.get(row["kernel"].partition(".")[0], 0)
        buffers = [int(count) for count in row["buffers"].split()]
        assert len([count for count in buffers if count >= 2]) >= kinds, row


@pytest.mark.sampled(1)
def test_drivers_of_cuda_12_take_the_images(made):
    for image in made.images:
        assert image.image[ABI_VERSION] == abi(image.target), image.name


@pytest.mark.sampled(1)
def test_parameters_are_where_the_driver_puts_them(made, tmp_path):
    """It takes their sizes from the image, and the launch from the catalogue."""
    for image in made.images:
        text = inspect(image, "-elf", tmp_path)
        found = re.findall(
            r"EIATTR_KPARAM_INFO.*?Ordinal\s*:\s*(\w+).*?Offset\s*:\s*(\w+).*?Size\s*:\s*(\w+)", text, re.DOTALL
        )
        offset, expected = 0, []
        for ordinal, letter in enumerate(image.parameters + "p" * image.hidden_pointers):
            size = SIZES[letter]
            alignment = min(size, MAP_ALIGNMENT)
            offset = -(-(FIRST_PARAMETER + offset) // alignment) * alignment - FIRST_PARAMETER
            expected.append((ordinal, offset, size))
            offset += size
        assert sorted(tuple(int(number, 0) for number in one) for one in found) == expected, image.name


@pytest.mark.sampled(1)
def test_hopper_multiplies_on_its_tensor_cores(made, dtype, tmp_path):
    """Half types in groups of four warps, float32 as on older GPUs; rows are stored in vectors, none locally."""
    instruction = "HMMA" if dtype == "fp32" else "HGMMA"
    for image in made.images:
        kernel = image.name.partition(".")[0]
        if image.target == 90 and kernel in ("forward", "columns", "correct"):
            code = inspect(image, "-sass", tmp_path)
            assert re.search(rf"\b{instruction}\b", code), image.name
            assert not re.search(r"\b(LDL|STL)\b", code), image.name
            if kernel != "columns":  # its sums are few
                stores = re.findall(r"\bSTG\.E(\.128)?", code)
                assert stores.count(".128") > len(stores) / 2, f"{image.name} stores single numbers"


@pytest.mark.sampled(1)
@pytest.mark.parametrize("general", [False, True])
def test_ptx_for_other_gpus(general):
    """Read by drivers of CUDA 12.0 and newer."""
    images = ptx(general).images
    expected = {spec.name for spec in specs() if spec.name == "select" or spec.name.split(".")[1] == "bf16"}
    sizes = ("", ".64", ".general64", ".odd64") if general else ("", ".64")
    assert {image.name for image in images} == {name for name in expected if _size(name) in sizes}
    for image in images:
        assert b".version 8.0" in image.image
        assert b".target sm_80" in image.image
        assert image.hidden_pointers == 2


@pytest.mark.sampled(1)
@pytest.mark.parametrize("target", OTHERS)
def test_ptx_assembles_for_other_gpus(target):
    for image in ptx(general=False).images:
        assert assemble(image.image.rstrip(b"\0").decode(), target)[ABI_VERSION] == abi(target)


@pytest.mark.sampled(1)
def test_the_kernel_for_hopper(made, dtype, size, tmp_path):
    """Each consumer's loops multiply what they have to, and the softmax of a tile stands beside a product that runs."""
    images = [image for image in made.images if image.name.startswith("hopper.")]
    assert len(images) == (0 if dtype == "fp32" else 1)
    for image in images:
        code = inspect(image, "-sass", tmp_path)
        (row,) = (row for row in made.rows if row["kernel"] == image.name)
        assert int(row["registers"]) * image.threads <= REGISTERS
        assert image.threads == 3 * 128
        assert code.count("UTMALDG.2D") == 2  # keys and values; four warps take the boxes of a tile
        assert re.findall(r"USETMAXREG\.\S+ (?:UP\d, )?(0x\w+)", code).count(hex(LOADER_REGISTERS.value)) == 1
        assert re.findall(r"USETMAXREG\.\S+ (?:UP\d, )?(0x\w+)", code).count(hex(CONSUMER_REGISTERS.value)) == 2
        assert "SYNCS.PHASECHK.TRANS64.TRYWAIT" in code
        assert not re.search(r"\b(LDL|STL)\b", code)
        # A consumer: the first product; a loop with masks and one without; the last product.
        steps = ["q", "0", "e", "qv", "1", "0", "e", "qv", "1", "e", "0", "v", "0"]
        assert pipeline(code, int(size)) == 2 * steps


def pipeline(code: str, size: int) -> list[str]:
    """In machine code, in order: q and v, first and second products of a tile of 128 columns; 1 and 0, waits for all
    products but so many; e, exponentials of a tile."""
    found = []
    for instruction, operand in re.findall(r"\b(HGMMA|WARPGROUP\.DEPBAR|MUFU\.EX2)\S* ([^;]*);", code):
        if instruction == "HGMMA":
            found.append("q" if operand.split(",")[1].strip().startswith("gdesc") else "v")
        else:
            found.append("e" if instruction == "MUFU.EX2" else operand.rpartition("0x")[2].strip())
    steps = ["".join(group) for group in _runs(found)]
    counts = {"q": size // 16, "v": 128 // 16}
    shown = []
    for step in steps:
        if step[0] in "qv":
            assert len(step) == counts[step[0]], f"{len(step)} instructions of {step[0]}"
            if step[0] == "v" and shown and shown[-1] == "q":
                shown[-1] = "qv"
                continue
        elif step[0] == "e" and len(step) < 64:  # of maxima and sinks
            continue
        shown.append(step[0])
    return shown


def _runs(letters: list[str]) -> list[list[str]]:
    return [list(group) for _, group in itertools.groupby(letters)]


@pytest.mark.sampled(1)
def test_stores_are_fenced_before_tensor_cores_read_them(made, dtype, tmp_path):
    """Of what threads store: a fence, and a barrier for all of them, before the arrival or the product."""
    for image in made.images:
        if image.name.startswith("hopper."):
            code = inspect(image, "-sass", tmp_path)
            pattern = r"\b(STS\.128 \[R|FENCE|BAR\.SYNC|SYNCS\.ARRIVE|HGMMA)"
            order = [found.strip("[R ") for found, _ in itertools.groupby(re.findall(pattern, code))]
            behind = [order[i + 1 : i + 4] for i, found in enumerate(order) if found.startswith("STS")]
            assert len(behind) == 4  # queries of two consumers, keys and values
            assert all(one[:2] == ["FENCE", "BAR.SYNC"] for one in behind), behind
            assert sorted(one[2] for one in behind) == ["HGMMA", "HGMMA", "SYNCS.ARRIVE", "SYNCS.ARRIVE"]


@pytest.mark.parametrize("wrong", [{"swizzle": 2}, {"block_size": [64, 64]}, {"elem_size": 4}, {"is_im2col": True}])
def test_maps_that_the_launch_does_not_make_are_refused(wrong):
    spec = next(spec for spec in specs(HOPPER) if spec.name == "hopper.bf16.128")
    made = {"swizzle": 3, "elem_size": 2, "block_size": [128, 64], "fp4_padded": False, "is_im2col": False}
    _check_maps(spec, [made, made])
    with pytest.raises(RuntimeError, match=r"hopper\.bf16\.128 wants maps of tensors with "):
        _check_maps(spec, [made, {**made, **wrong}])


def abi(target: int) -> int:
    """Of machine code that drivers of CUDA 12 take; CUDA 13 makes 8 for all, and Blackwell has never had another."""
    return 7 if target < 100 else 8


def ptx(general: bool) -> Kernels:
    less = () if general else ("--no-general",)
    return Kernels("--targets", "0", "--types", "bf16", "--head-sizes", "64", *less)


def test_what_it_refuses():
    with pytest.raises(AssertionError, match="invalid choice: 96"):
        build("--head-sizes", "96")
    with pytest.raises(AssertionError, match="invalid choice: 70"):
        build("--targets", "70")


def _size(name: str) -> str:
    """ ".64", ".general64" or ".odd64" of "forward.bf16.64"; "" of a kernel that is for all."""
    parts = name.split(".")
    return f".{parts[2]}" if len(parts) > 1 else ""


def test_types_are_those_of_the_operator():
    assert set(DTYPES) == {"fp16", "bf16", "fp32"}
