"""What is streamed is what transformers loads."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from shards_on_disk import change_index, save_in_shards

from act_export.checkpoint.load import Checkpoint, load_checkpoint
from act_export.checkpoint.streamed.weights import model_with_weights
from act_export.export.lazy_weights import hollow_tensors, is_large

# Plain, tied, transposed in the checkpoint, with a prefix to be renamed, with experts to be joined, with sinks.
ARCHITECTURES = ("llama", "gpt2", "gemma3_text", "bloom", "mixtral", "qwen3_moe", "gpt_oss")


def streamed(folder) -> Checkpoint:
    checkpoint = load_checkpoint(str(folder), stream=True)
    assert checkpoint.streamed is not None
    return checkpoint


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_as_loaded_whole(tmp_path, architecture):
    folder = save_in_shards(tmp_path, architecture)
    whole, found = load_checkpoint(str(folder)), streamed(folder)
    assert found.identity == whole.identity
    assert found.names == whole.names
    assert found.model.config.to_dict() == whole.model.config.to_dict()
    assert found.model.generation_config.to_dict() == whole.model.generation_config.to_dict()
    assert not found.model.training
    expected, stand_ins = (dict(each.model.named_parameters()) for each in (whole, found))
    assert stand_ins.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(found.streamed.read(name), parameter), name
        assert stand_ins[name].dtype == torch.float32
        expected_values = torch.zeros_like(parameter) if is_large(parameter.shape) else parameter
        assert torch.equal(stand_ins[name], expected_values)
    for one, other in zip(whole.model.named_buffers(), found.model.named_buffers(), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
    ids = torch.arange(9)[None]
    again = model_with_weights(found.model.config, found.streamed, found.model)
    assert torch.equal(again(ids).logits, whole.model(ids).logits)


def test_large_weights_take_no_memory_of_their_own(tmp_path):
    model = streamed(save_in_shards(tmp_path)).model
    places = {parameter.data_ptr() for parameter in model.parameters() if is_large(parameter.shape)}
    assert len(places) == 1
    assert hollow_tensors([]) == []


def tied_model(folder, change):
    """A checkpoint whose configuration ties the embeddings and which stores the output matrix too."""
    save_in_shards(folder)
    shard = next(path for path in folder.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(path))
    tensors = load_file(shard)
    tensors["lm_head.weight"] = change(tensors["model.embed_tokens.weight"]).contiguous()
    save_file(tensors, shard, {"format": "pt"})
    change_index(folder, lambda places: places.update({"lm_head.weight": shard.name}))
    return folder


@pytest.mark.parametrize("change", [torch.clone, torch.neg], ids=["equal", "different"])
def test_tied_weights_that_are_stored_twice(tmp_path, change):
    folder = tied_model(tmp_path, change)
    whole, found = load_checkpoint(str(folder)), streamed(folder)
    assert found.identity == whole.identity
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(found.streamed.read(name), whole.model.get_parameter(name))
    again = model_with_weights(found.model.config, found.streamed, found.model)
    assert torch.equal(again.lm_head.weight, whole.model.lm_head.weight)
    assert torch.equal(again.model.embed_tokens.weight, whole.model.model.embed_tokens.weight)


def test_by_either_name_of_a_tied_weight(tmp_path):
    found = streamed(save_in_shards(tmp_path))
    names = ("lm_head.weight", "model.embed_tokens.weight")
    assert torch.equal(*map(found.streamed.read, names))
    assert found.model.lm_head.weight is found.model.model.embed_tokens.weight
