"""Reading .safetensors files: as the safetensors package does, and what is refused."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from act_export.checkpoint.stored.safetensors_file import stored_tensors
from act_export.errors import CheckpointError

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 99),
)
def test_what_was_saved_is_read(tmp_path_factory, shapes, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"t{i}": torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(shapes)}
    path = tmp_path_factory.mktemp("tensors") / "a.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    found = stored_tensors(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape)
        assert torch.equal(found[name].read(), tensor)
        assert found[name].read().dtype == dtype


def test_a_sample_is_of_the_same_numbers(tmp_path):
    tensor = torch.randn(40, 50)
    save_file({"a": torch.zeros(3), "b": tensor}, tmp_path / "a.safetensors")
    stored = stored_tensors(tmp_path / "a.safetensors")["b"]
    for count in (1, 7, 64, 2000):
        picks = torch.linspace(0, tensor.numel() - 1, count).long()
        assert torch.equal(stored.sample(picks), tensor.flatten()[picks])


def test_integers_are_listed_but_not_read(tmp_path):
    save_file({"a": torch.arange(4)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a in .*a\.safetensors is stored as I64; weights must be float32"):
        stored_tensors(tmp_path / "a.safetensors")["a"].read()


WHOLE = save({"a": torch.ones(8, 4)})
LENGTH = struct.unpack("<Q", WHOLE[:8])[0]


def with_header(**entry: object) -> bytes:
    header = {"a": {"dtype": "F32", "shape": [8, 4], "data_offsets": [0, 128]} | entry}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(128)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"cut short \(0 bytes\)"),
        (WHOLE[:5], r"cut short \(5 bytes\)"),
        (WHOLE[: 8 + LENGTH // 2], "cut short"),
        (WHOLE[: 8 + LENGTH], r"cut short: it has \d+ bytes, and a ends at"),
        (WHOLE[:-1], r"cut short: it has \d+ bytes, and a ends at"),
        (struct.pack("<Q", 2**40) + WHOLE[8:], "no .safetensors file"),
        (WHOLE[:8] + b"x" * LENGTH, "broken header"),
        (struct.pack("<Q", 4) + b"[1] ", "no JSON object"),
        (with_header(data_offsets=[0, 64]), r"F32 of shape \[8, 4\], takes bytes 0 to 64"),
        (with_header(data_offsets=[-128, 0]), "broken header"),
        (with_header(shape=[8, -4]), "broken header"),
        (with_header(dtype="F1"), "broken header"),
        (with_header(shape="8x4"), "broken header"),
    ],
)
def test_broken_files(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        stored_tensors(path)
    assert str(path) in str(error.value)
    assert "get the file again" in str(error.value)


def test_a_file_that_isnt_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"can't read .*none\.safetensors"):
        stored_tensors(tmp_path / "none.safetensors")


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(8, 4)}, path)
    stored = stored_tensors(path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"a\.safetensors ends inside a"):
        stored.read()
