"""MODEL -> a loaded checkpoint, or an error that says what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny import save_checkpoint, tiny_model
from tiny_models import VARIANTS
from tiny_vision import CONFIGURATIONS, tiny_whole, tower_checkpoint

from act_export.checkpoint.gguf.built_in import built_in_gguf
from act_export.checkpoint.gguf.convert import converted
from act_export.checkpoint.identity import fingerprint, identify, layers_and_heads, shape_of
from act_export.checkpoint.load import load_checkpoint
from act_export.checkpoint.tokenizer import load_tokenizer_of
from act_export.errors import CheckpointError


def test_a_folder(checkpoint_folder):
    loaded = load_checkpoint(str(checkpoint_folder))
    assert (loaded.identity.architecture, loaded.identity.num_layers, loaded.identity.num_heads) == ("llama", 2, 4)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.padding_side == "left"
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())


def test_a_folder_without_a_tokenizer(tmp_path):
    assert load_checkpoint(str(save_checkpoint(tmp_path, tokenizer=False))).tokenizer is None


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma2", "qwen3", "phi3", "smollm3"])
def test_layers_and_heads(architecture):
    assert layers_and_heads(tiny_model(architecture).config) == (2, 4)


@pytest.mark.parametrize("architecture", sorted({variant.architecture for variant in VARIANTS}))
def test_the_shape_that_a_configuration_tells_is_the_models(architecture):
    model = tiny_model(architecture)
    assert shape_of(model.config) == replace(identify(model), fingerprint=None)


@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_the_shape_of_a_model_of_several_parts_is_its_text_towers(family):
    whole = tiny_whole(family)
    assert shape_of(whole.config) == replace(tower_checkpoint(whole).identity, fingerprint=None)


def test_fingerprint_follows_the_weights_not_their_type():
    model = tiny_model()
    same = fingerprint(model)
    assert fingerprint(tiny_model()) == same
    assert fingerprint(tiny_model(seed=1)) != same
    assert fingerprint(tiny_model().to(torch.bfloat16)) == same


def test_fingerprint_sees_one_layer(checkpoint_folder):
    model = tiny_model()
    before = fingerprint(model)
    model.model.layers[1].mlp.up_proj.weight.data *= 1.5
    assert fingerprint(model) != before


@pytest.mark.parametrize("source", ["/nowhere/at/all", "nothing", "./missing", "a/b/c"])
def test_missing_models(source):
    with pytest.raises(CheckpointError, match=r"there is no model .*smollm2-135m"):
        load_checkpoint(source)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_checkpoint(str(tmp_path))
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(CheckpointError, match=r"pass the file itself: .*weights\.gguf"):
        load_checkpoint(str(tmp_path))


def test_a_folder_without_weights(checkpoint_folder, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint_folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="no weights"):
        load_checkpoint(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff" * 64])
def test_corrupt_weights(tmp_path, content):
    save_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="can't load"):
        load_checkpoint(str(tmp_path))


def test_truncated_weights(tmp_path):
    path = save_checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="can't load"):
        load_checkpoint(str(tmp_path))


def test_missing_tensors(tmp_path):
    from safetensors.torch import load_file, save_file

    path = save_checkpoint(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of the model's weights, e\.g\. model\.layers\.1\.mlp\.up_proj"):
        load_checkpoint(str(tmp_path))


def test_a_corrupt_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and then nothing of use")
    with pytest.raises(CheckpointError, match="can't load"):
        load_checkpoint(str(path))


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "model.bin"
    path.touch()
    with pytest.raises(CheckpointError, match=r"not a \.gguf file"):
        load_checkpoint(str(path))


@pytest.mark.parametrize("model_type", ["t5", "vit", "clip"])
def test_not_a_causal_language_model(tmp_path, model_type):
    save_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(CheckpointError, match=r"causal language model|encoder-decoder|can't load"):
        load_checkpoint(str(tmp_path))


def test_an_unknown_architecture(tmp_path):
    save_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(CheckpointError, match="no_such_model"):
        load_checkpoint(str(tmp_path))


def test_the_built_in_model_without_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match=r"act-export\[smollm2\]"):
        load_checkpoint("smollm2-135m")


def test_tokenizer_of_a_missing_folder():
    with pytest.raises(CheckpointError, match="there is no model nothing: no such folder"):
        load_tokenizer_of("nothing")


@pytest.mark.real
def test_the_converted_checkpoint_is_kept(smollm2, monkeypatch):
    """A second load starts from the cache: the GGUF reader isn't needed any more."""
    assert (smollm2.identity.num_layers, smollm2.identity.num_heads) == (30, 9)
    folder = converted(built_in_gguf("smollm2-135m"))
    assert (folder / "model.safetensors").is_file()
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", pytest.fail)
    assert converted(built_in_gguf("smollm2-135m")) == folder
