"""Sharded checkpoints whose files don't fit together are refused, loaded whole or streamed."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from shards_on_disk import INDEX, change_index, first_shard, save_in_shards

from act_export.checkpoint.load import load_checkpoint
from act_export.checkpoint.stored.files import tensors_of
from act_export.errors import CheckpointError

NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path):
    return save_in_shards(tmp_path)


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def stream(request):
    return request.param


def refuses(folder, stream: bool, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(str(folder), stream=stream)
    assert str(folder) in str(error.value)


def test_all_tensors_are_found(folder):
    found = tensors_of(folder)
    assert NORM in found
    assert len({tensor.file for tensor in found.values()}) >= 3


def test_a_missing_shard(folder, stream):
    name = first_shard(folder).name
    first_shard(folder).unlink()
    refuses(folder, stream, f"lacks {name}")


def test_a_truncated_shard(folder, stream):
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-10])
    refuses(folder, stream, rf"{shard.name} is cut short")


def test_a_corrupt_header(folder, stream):
    shard = first_shard(folder)
    content = bytearray(shard.read_bytes())
    content[8:20] = b"\xff" * 12
    shard.write_bytes(content)
    refuses(folder, stream, rf"{shard.name} has a broken header")


def test_an_index_that_names_a_tensor_twice(folder, stream):
    path = folder / INDEX
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"weight_map": {', f'"weight_map": {{"{NORM}": "x.safetensors", ', 1), "utf-8")
    refuses(folder, stream, rf"names '{NORM}' twice")


def test_an_index_of_other_places(folder):
    """Which file holds what, the files say."""
    expected = {name: tensor.file for name, tensor in tensors_of(folder).items()}
    change_index(folder, lambda places: places.update({NORM: min(places.values())}))
    moved = min(load_file(first_shard(folder)))
    change_index(folder, lambda places: places.update({moved: max(places.values())}))
    assert {name: tensor.file for name, tensor in tensors_of(folder).items()} == expected


def test_an_index_that_leaves_its_folder(folder):
    change_index(folder, lambda places: places.update({NORM: "../model.safetensors"}))
    with pytest.raises(CheckpointError, match=r"'\.\./model\.safetensors' leads out of"):
        tensors_of(folder)


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index(folder, stream, content):
    (folder / INDEX).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"get the file|no JSON object"):
        load_checkpoint(str(folder), stream=stream)


def test_a_tensor_of_another_shape(folder):
    shard = next(path for path in folder.glob("*.safetensors") if NORM in load_file(path))
    save_file(load_file(shard) | {NORM: torch.ones(31)}, shard, {"format": "pt"})
    refuses(folder, True, rf"{NORM} in .* has shape \[31\], but by config\.json .* has \[32\]")


def test_a_tensor_that_is_missing(folder):
    shard = next(path for path in folder.glob("*.safetensors") if NORM in load_file(path))
    tensors = load_file(shard)
    del tensors[NORM]
    save_file(tensors, shard, {"format": "pt"})
    change_index(folder, lambda places: places.pop(NORM))
    with pytest.raises(CheckpointError, match=rf"lacks 1 of the model's weights, e\.g\. {NORM}"):
        load_checkpoint(str(folder), stream=True)


def test_weights_without_a_configuration(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_checkpoint(str(folder), stream=True)


def test_a_configuration_without_weights(folder):
    for path in folder.glob("model*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        load_checkpoint(str(folder), stream=True)


def test_a_float_type_that_is_too_small(folder):
    shard = first_shard(folder)
    tensors = load_file(shard)
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match="stored as F8_E4M3; weights must be float32, bfloat16 or float16"):
        load_checkpoint(str(folder), stream=True)
