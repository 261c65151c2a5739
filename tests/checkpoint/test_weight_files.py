"""Files of weights: an index has no say over other folders, pickles run nothing, and headers are what the bytes are."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from act_export.checkpoint.load import load_checkpoint
from act_export.checkpoint.stored.safetensors_file import stored_tensors
from act_export.errors import CheckpointError

INDICES = {"pytorch_model.bin.index.json": ".bin", "model.safetensors.index.json": ".safetensors"}
NORM = "model.norm.weight"


@pytest.fixture
def folder(checkpoint_folder, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint_folder, tmp_path / "checkpoint"))


def refused(folder: Path, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(str(folder))


def move_weights(folder: Path, place: str, index: str) -> None:
    """The weights in a file that an index names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (torch.save if place.endswith(".bin") else save_file)(tensors, folder / place)
    content = {"metadata": {}, "weight_map": dict.fromkeys(tensors, place)}
    (folder / index).write_text(json.dumps(content))


@pytest.mark.parametrize(("index", "suffix"), INDICES.items())
def test_an_index_of_one_file(folder, index, suffix):
    expected = load_checkpoint(str(folder)).identity
    move_weights(folder, f"model-00001-of-00001{suffix}", index)
    assert load_checkpoint(str(folder)).identity == expected


@pytest.mark.parametrize(("index", "suffix"), INDICES.items())
def test_an_index_that_leads_out_of_its_folder(folder, index, suffix):
    move_weights(folder, f"../weights{suffix}", index)
    refused(folder, rf"{index} of .*'\.\./weights{suffix}' leads out of")


@pytest.mark.parametrize(("index", "suffix"), INDICES.items())
def test_an_index_that_names_a_link_out_of_its_folder(folder, index, suffix):
    move_weights(folder, f"model-1{suffix}", index)
    (folder / f"model-1{suffix}").rename(folder.parent / "weights")
    (folder / f"model-1{suffix}").symlink_to("../weights")
    refused(folder, r"is a link to .*weights, out of")


def test_an_index_of_files_of_another_kind(folder):
    move_weights(folder, "a.safetensors", "pytorch_model.bin.index.json")
    refused(folder, r"names 'a\.safetensors', which is no \.bin file")


def test_an_index_that_transformers_cant_read(folder):
    move_weights(folder, "model-1.safetensors", "model.safetensors.index.json")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": json.loads(path.read_text())["weight_map"]}))
    refused(folder, "has no metadata, without which transformers loads nothing")


def in_two_files(folder: Path) -> None:
    index = "model.safetensors.index.json"
    move_weights(folder, "model-00001-of-00002.safetensors", index)
    first, second = (folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    tensors = load_file(first)
    save_file({NORM: tensors.pop(NORM)}, second)
    save_file(tensors, first)
    places = dict.fromkeys(tensors, first.name) | {NORM: second.name}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def add(folder: Path, file: str, name: str) -> None:
    path = folder / file
    save_file(load_file(path) | {name: torch.ones(32)}, path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: add(folder, "model-00001-of-00002.safetensors", NORM), f"'{NORM}' is in .* it can't be told"),
        (lambda folder: add(folder, "model-00001-of-00002.safetensors", "more"), r"no place for: more \[32\]"),
        (
            lambda folder: save_file({"a": torch.ones(1)}, folder / "model-00003-of-00003.safetensors"),
            r"holds model-00003-of-00003\.safetensors, which .* doesn't name",
        ),
        (
            lambda folder: save_file({"a": torch.ones(1)}, folder / "shard-00000-model-00001-of-00001.safetensors"),
            "a part of a checkpoint of several processes",
        ),
    ],
    ids=["a tensor twice", "a tensor more", "a file more", "a distributed file"],
)
def test_files_beside_the_index(folder, change, said):
    in_two_files(folder)
    load_checkpoint(str(folder))
    change(folder)
    refused(folder, said)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_index_that_names_more_than_the_files_hold(folder, stream):
    in_two_files(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= {"lm_head.weight": "model-00001-of-00002.safetensors"}  # of a tied model
    del index["weight_map"][NORM]  # which its file holds
    index["weight_map"]["other"] = "model-00002-of-00002.safetensors"
    path.write_text(json.dumps(index))
    assert load_checkpoint(str(folder), stream=stream).identity.num_layers == 2


class Intruder:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_that_run_code(folder, tmp_path, zipped):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    content = tensors | {"more": Intruder(tmp_path / "mark")}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refused(folder, r"pytorch_model\.bin holds something else .*asks for posix\.system, which could run code")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    refused(folder, r"pytorch_model\.bin holds something else than weights")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"state_dict": {"a": torch.ones(1)}}, "holds 'state_dict', a dict, instead of named weights"),
        ([torch.ones(1)], "holds a list instead of named weights"),
        ({1: torch.ones(1)}, "holds 1, a Tensor"),
        ({"a": torch.ones(1, 1).expand(10**6, 10**6)}, "in 4 bytes, so its numbers aren't all there"),
        ({"a": torch.ones(2, 2).to_sparse()}, "holds 'a', a Tensor, instead of named weights"),
    ],
)
def test_pickles_of_something_else(folder, content, said):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    refused(folder, said)


def test_pickles_of_old(folder):
    expected = load_checkpoint(str(folder)).identity
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert load_checkpoint(str(folder)).identity == expected


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("pickled", [True, False])
def test_weights_of_other_types(folder, dtype, pickled):
    tensors = load_file(folder / "model.safetensors")
    tensors[NORM] = tensors[NORM].to(dtype)
    (folder / "model.safetensors").unlink()
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, rf"{NORM} in .* is stored as .*; weights must be float32")


def file_of(text: str, size: int) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + bytes(size)


def header(**offsets: list[int]) -> str:
    return json.dumps(
        {
            name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
            for name, (begin, end) in offsets.items()
        }
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (file_of(header(a=[0, 8], b=[4, 12]), 12), "'b' begins in the bytes of another tensor"),
        (file_of(header(a=[0, 8], b=[0, 8]), 8), "begins in the bytes of another tensor"),
        (file_of(header(a=[0, 4], b=[8, 12]), 12), "'b' begins after bytes of no tensor"),
        (file_of(header(a=[4, 8]), 8), "'a' begins after bytes of no tensor"),
        (file_of(header(a=[0, 8]), 12), "has 4 bytes after its last tensor"),
        (file_of(header(a=[0, 4])[:-1] + "," + header(a=[0, 4])[1:], 4), "broken header: it names 'a' twice"),
        (file_of('{"a": {"dtype": "U8", "shape": [' + "1," * 99 + '1], "data_offsets": [0, 1]}}', 1), "broken header"),
        (file_of('{"a": {"dtype": "U8", "shape": [1' + "0" * 300 + ', 0], "data_offsets": [0, 0]}}', 0), "broken"),
        (file_of("[" * 100_000, 0), "nested too deeply"),
    ],
)
def test_headers_that_the_bytes_arent(tmp_path, content, said):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        stored_tensors(path)
