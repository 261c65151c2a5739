"""The kernels compile for every target, on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from act_export.ops.cuda.specs import DTYPES, TARGETS, specs

SHARED_BYTES = {80: 101_376, 90: 232_448, 100: 232_448}  # of a block; 80 also serves 8.6 and 8.9, which have less


def build(*arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "act_export.ops.cuda.build", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def rows(table: str) -> list[dict[str, str]]:
    header, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return [dict(zip(header, line, strict=True)) for line in lines]


# float16 compiles to what bfloat16 does, with other multiplications.
TYPES = ["bf16", "fp32", pytest.param("fp16", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=TYPES)
def dtype(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=["64", "128"])
def size(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def compiled(dtype, size) -> list[dict[str, str]]:
    targets = ("--targets", *map(str, TARGETS))
    return rows(build("--table", "--no-general", "--types", dtype, "--head-sizes", size, *targets))


@pytest.mark.sampled(1)
def test_every_kernel_compiles_for_every_target(compiled, dtype, size):
    names = {spec.name for spec in specs() if _size(spec.name) == f".{size}" and f".{dtype}." in spec.name}
    assert {(row["kernel"], row["target"]) for row in compiled} == {
        (name, f"sm_{target}") for name in {*names, "select"} for target in TARGETS
    }


@pytest.mark.sampled(1)
def test_no_register_is_spilled(compiled):
    assert [row for row in compiled if row["stack, bytes"] != "0"] == []


@pytest.mark.sampled(1)
def test_shared_memory_is_there(compiled):
    for row in compiled:
        assert int(row["shared memory, bytes"]) <= SHARED_BYTES[int(row["target"].removeprefix("sm_"))], row


@pytest.mark.sampled(1)
@pytest.mark.parametrize("general", [False, True])
def test_ptx_for_other_gpus(tmp_path, general):
    """Read by drivers of CUDA 12.0 and newer."""
    from act_export.ops.cuda.catalogue import read_catalogue

    file = tmp_path / "kernels.bin"
    less = () if general else ("--no-general",)
    build("--out", str(file), "--targets", "0", "--types", "bf16", "--head-sizes", "64", *less)
    images = read_catalogue(file)
    expected = {spec.name for spec in specs() if spec.name == "select" or spec.name.split(".")[1] == "bf16"}
    sizes = ("", ".64", ".general64", ".odd64") if general else ("", ".64")
    assert {image.name for image in images} == {name for name in expected if _size(name) in sizes}
    for image in images:
        assert b".version 8.0" in image.image
        assert b".target sm_80" in image.image
        assert image.hidden_pointers == 2


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
