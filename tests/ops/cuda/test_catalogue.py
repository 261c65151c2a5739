"""The file of compiled kernels: written, read, and refused where it is damaged."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from act_export.ops.cuda.catalogue import CatalogueError, KernelImage, read_catalogue, write_catalogue

IMAGE = KernelImage("forward.bf16.128", 90, "ppilf", 2, 256, 100_000, "forward", b"machine code")


def test_what_is_written_is_read(tmp_path):
    images = [
        IMAGE,
        replace(IMAGE, target=0, image=b"// text\0"),
        replace(IMAGE, name="select", symbol="select_0d1d", parameters="", hidden_pointers=0, image=bytes(1000)),
        replace(IMAGE, name="x", threads=32, shared_bytes=0, image=b"x"),
    ]
    write_catalogue(tmp_path / "kernels", images)
    assert read_catalogue(tmp_path / "kernels") == images


def test_images_are_aligned_and_end_with_a_zero(tmp_path):
    images = [replace(IMAGE, name=f"kernel{size}", image=b"i" * size) for size in range(1, 40)]
    write_catalogue(tmp_path / "kernels", images)
    content = (tmp_path / "kernels").read_bytes()
    found = [match.span() for match in re.finditer(rb"(?<![a-z])i+(?=\0)", content)]
    assert [end - start for start, end in found] == list(range(1, 40))
    assert all(start % 16 == 0 for start, _ in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name is ''"),
        ({"name": "f\u00fcr"}, "expected printable ASCII"),
        ({"symbol": "a\nb"}, r"symbol is 'a\\nb'"),
        ({"parameters": "pxi"}, "parameters has 'x'"),
        ({"target": 1000}, "target is 1000"),
        ({"hidden_pointers": -1}, "hidden_pointers is -1"),
        ({"threads": 0}, "threads is 0, expected whole warps"),
        ({"threads": 100}, "threads is 100, expected whole warps"),
        ({"threads": 1056}, "threads is 1056, expected 0 to 1024"),
        ({"shared_bytes": 1 << 21}, "shared_bytes is 2097152"),
        ({"image": b""}, "the image is empty"),
    ],
)
def test_bad_images(changes, message):
    with pytest.raises(CatalogueError, match=message):
        replace(IMAGE, **changes)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "one kernel at least"),
        ([IMAGE, IMAGE], "'forward.bf16.128' is there 2 times for sm_90"),
        ([IMAGE, replace(IMAGE, target=80, parameters="pp")], "parameters 'pp' for sm_80 and 'ppilf'"),
    ],
)
def test_bad_catalogues_are_not_written(images, message, tmp_path):
    with pytest.raises(CatalogueError, match=message):
        write_catalogue(tmp_path / "kernels", images)
    assert not (tmp_path / "kernels").exists()


def damaged(content):
    """(change, message) of each kind of damage."""
    yield b"", "is not a catalogue"
    yield b"ACTCUDA0" + content[8:], "is not a catalogue"
    yield content[:-1], f"has {len(content) - 1} bytes, but its header says {len(content)}"
    yield content[:8] + b"\2" + content[9:], "kernel 1 of 2"
    target = 24
    yield content[:target] + b"\xff\xff" + content[target + 2 :], "target is 65535"
    name_size = target + 16
    yield content[:name_size] + b"\xff\xff" + content[name_size + 2 :], "not inside the file|can't decode"
    offset = target + 32
    yield content[:offset] + b"\x08" + content[offset + 1 :], "is not inside the file"
    size = offset + 8
    yield content[:size] + b"\xff" + content[size + 1 :], "an image of 255 bytes"


def test_damage_is_found(tmp_path):
    write_catalogue(tmp_path / "kernels", [IMAGE])
    for number, (content, message) in enumerate(damaged((tmp_path / "kernels").read_bytes())):
        path = tmp_path / f"damaged{number}"
        path.write_bytes(content)
        with pytest.raises(CatalogueError, match=message):
            read_catalogue(path)


def test_the_build_needs_no_other_part_of_the_package():
    code = "import sys, act_export.ops.cuda.catalogue; print(*sorted(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "onnx", "onnxruntime", "onnx_ir", "transformers"} & set(output.split())
