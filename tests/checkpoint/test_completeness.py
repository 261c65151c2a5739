"""A checkpoint's files hold its model, the whole of it and nothing of another one: or the tensors are named."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_vision import tiny_whole
from torch import Tensor

from act_export.checkpoint.load import Checkpoint, load_checkpoint
from act_export.checkpoint.wrappers import unwrapped
from act_export.errors import CheckpointError

Tensors = dict[str, Tensor]
IDS = torch.arange(3, 12)[None]
UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def spoiled(folder: Path, change: Callable[[Tensors], Tensors], architecture: str = "llama", **settings) -> Path:
    """A checkpoint with other tensors in it, and other settings beside it."""
    tiny_model(architecture).save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def as_pickle(folder: Path) -> Path:
    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    return folder


def check_same_model(checkpoint: Checkpoint, architecture: str = "llama") -> None:
    expected = tiny_model(architecture)
    if checkpoint.streamed is not None:
        for name, parameter in expected.named_parameters():
            assert torch.equal(checkpoint.streamed.read(name), parameter), name
    else:
        assert torch.equal(checkpoint.model(IDS).logits, expected(IDS).logits)


def plus(**more: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name.replace("__", "."): tensor for name, tensor in more.items()}


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def one_layer_more(tensors: Tensors) -> Tensors:
    more = {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in tensors.items()}
    return tensors | more


SUPERFLUOUS = {
    "a bias": (plus(model__layers__0__self_attn__q_proj__bias=torch.ones(32)), r"q_proj\.bias \[32\].*attention_bias"),
    "a bias of the output": (plus(lm_head__bias=torch.ones(259)), r"1 weight that .*lm_head\.bias"),
    "another head": (plus(score__weight=torch.ones(2, 32)), r"score\.weight \[2, 32\]"),
    "a layer more": (one_layer_more, r"9 weights .*layers\.2\.[^;]*, and 6 more;.*num_hidden_layers: 2.* layer 2"),
    "some within a wrapper": (renamed(lambda name: name.replace("model.layers.1", "module.model.layers.1")), "lacks 9"),
    "a scale": (plus(model__layers__0__mlp__up_proj__weight_scale=torch.ones(1)), "weight_scale"),
    "twice": (lambda tensors: tensors | {"norm.weight": torch.ones(32)}, r"holds model\.norm\.weight twice"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", SUPERFLUOUS)
def test_tensors_that_the_model_has_no_place_for(tmp_path, kind, stream):
    change, message = SUPERFLUOUS[kind]
    folder = spoiled(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(str(folder), stream=stream)


@pytest.mark.parametrize("kind", ["a bias", "a layer more"])
def test_the_same_in_pickles(tmp_path, kind):
    change, message = SUPERFLUOUS[kind]
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(str(as_pickle(spoiled(tmp_path, change))))


def test_fewer_layers_than_stored(tmp_path):
    with pytest.raises(CheckpointError, match=r"9 weights .*num_hidden_layers: 1, and the files have layer 1"):
        load_checkpoint(str(spoiled(tmp_path, dict, num_hidden_layers=1)))


MASK = torch.ones(1, 1, 256, 256, dtype=torch.bool)
FREQUENCIES = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
ANGLES = torch.outer(torch.arange(32), FREQUENCIES).repeat(1, 2)
HARMLESS = {
    "frequencies": ("llama", plus(model__layers__0__self_attn__rotary_emb__inv_freq=FREQUENCIES)),
    "frequencies in halves": ("llama", plus(model__layers__0__self_attn__rotary_emb__inv_freq=FREQUENCIES.half())),
    "angles": (
        "llama",
        plus(
            model__layers__0__self_attn__rotary_emb__cos_cached=ANGLES.cos()[None, None],
            model__layers__0__self_attn__rotary_emb__sin_cached=ANGLES.sin().bfloat16(),
        ),
    ),
    "a bias of zeros": ("llama", plus(model__layers__0__self_attn__q_proj__bias=torch.zeros(32))),
    "the embedding as the output": ("llama", lambda tensors: tensors | {"lm_head.weight": tensors[EMBEDDING].clone()}),
    "the output alone": ("llama", renamed(lambda name: "lm_head.weight" if name == EMBEDDING else name)),
    "no prefix": ("llama", renamed(lambda name: name.removeprefix("model."))),
    "masks of GPT-2": ("gpt2", plus(h__0__attn__bias=MASK, h__1__attn__masked_bias=torch.tensor(-1e4))),
    "masks of GPT-Neo": ("gpt_neo", plus(transformer__h__0__attn__attention__bias=MASK)),
    "masks of GPT-NeoX": ("gpt_neox", plus(gpt_neox__layers__0__attention__bias=MASK)),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_tensors_that_a_model_does_without(tmp_path, kind):
    architecture, change = HARMLESS[kind]
    folder = spoiled(tmp_path, change, architecture)
    check_same_model(load_checkpoint(str(folder)), architecture)
    check_same_model(load_checkpoint(str(folder), stream=True), architecture)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("leaf", "stored"),
    [
        ("inv_freq", FREQUENCIES / 4),
        ("inv_freq", (FREQUENCIES / 4).half()),
        ("inv_freq", FREQUENCIES[:3]),
        ("cos_cached", (ANGLES / 4).cos()),
        ("sin_cached", (ANGLES / 4).sin()[None, None].bfloat16()),
    ],
    ids=["scaled", "scaled halves", "fewer", "cosines", "sines"],
)
def test_rotary_frequencies_that_the_configuration_doesnt_give(tmp_path, leaf, stored, stream):
    folder = spoiled(tmp_path, plus(**{f"model__layers__0__self_attn__rotary_emb__{leaf}": stored}))
    with pytest.raises(CheckpointError, match=rf"config\.json doesn't give: .*{leaf}; .*rope_parameters"):
        load_checkpoint(str(folder), stream=stream)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_rotary_frequencies_that_are_scaled(tmp_path, factor):
    folder = spoiled(
        tmp_path,
        plus(model__layers__0__self_attn__rotary_emb__inv_freq=FREQUENCIES / 4),
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": factor},
    )
    if factor == 4.0:
        load_checkpoint(str(folder))
    else:
        with pytest.raises(CheckpointError, match="rotary frequencies"):
            load_checkpoint(str(folder))


@pytest.mark.parametrize("marked", [True, False], ids=["predicts further tokens", "is a layer more"])
def test_a_layer_beyond_the_last_one(tmp_path, monkeypatch, marked):
    """transformers leaves a layer of a certain number out of some architectures, whatever it is."""
    kind = type(tiny_model())
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2.*"])
    mark = {"model.layers.2.eh_proj.weight": torch.ones(32, 64)} if marked else {}
    folder = spoiled(tmp_path, lambda tensors: one_layer_more(tensors) | mark)
    if marked:
        check_same_model(load_checkpoint(str(folder)))
    else:
        with pytest.raises(CheckpointError, match=r"no place for: model\.layers\.2"):
            load_checkpoint(str(folder))


WRAPPERS = {
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "module.": lambda name: f"module.{name}",
    "model. twice": lambda name: f"model.{name}",
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "_fsdp_wrapped_module.": lambda name: f"_fsdp_wrapped_module.{name}",
    "transformer.": lambda name: f"transformer.{name}",
    "two": lambda name: f"module._orig_mod.{name}",
    "a trainer's": lambda name: f"trainer.student.{name}",
    "within": lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrappers_are_taken_off(tmp_path, caplog, kind):
    folder = spoiled(tmp_path, renamed(WRAPPERS[kind]))
    with caplog.at_level(logging.WARNING):
        check_same_model(load_checkpoint(str(folder)))
    assert ("are taken off" in caplog.text) == (kind != "model. twice")  # which transformers takes off itself
    check_same_model(load_checkpoint(str(folder), stream=True))


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_wrappers_of_other_architectures(tmp_path, architecture):
    folder = as_pickle(spoiled(tmp_path, renamed(WRAPPERS["module."]), architecture))
    check_same_model(load_checkpoint(str(folder)), architecture)


def test_a_wrapped_model_knows_where_it_is_from(tmp_path):
    folder = spoiled(tmp_path, renamed(WRAPPERS["module."]))
    generation = {"eos_token_id": 77}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    loaded = load_checkpoint(str(folder))
    assert loaded.model.generation_config.eos_token_id == 77
    assert loaded.model.config.name_or_path == str(folder)


def test_names_that_fit_stay():
    assert unwrapped(["a.b.c", "a.b.d"], lambda names: True) == ({"a.b.c": "a.b.c", "a.b.d": "a.b.d"}, ())
    assert unwrapped(["a.b.c", "a.b.d"], lambda names: False) == ({"a.b.c": "a.b.c", "a.b.d": "a.b.d"}, ())
    names = ["_orig_mod.x.w", "x.w"]  # which would be one
    assert unwrapped(names, lambda found: "_orig_mod.x.w" not in found) == (dict(zip(names, names, strict=True)), ())


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_text_towers(tmp_path, family):
    tiny_whole(family).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    right = load_file(file)
    weight = next(name for name in right if "layers.0" in name and "o_proj.weight" in name)
    save_file(right | {weight.replace("weight", "bias"): torch.ones(32)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no place for: .*o_proj\.bias"):
        load_checkpoint(str(tmp_path))
    save_file({f"module.{name}": tensor for name, tensor in right.items()}, file, {"format": "pt"})
    expected = tiny_whole(family)(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(load_checkpoint(str(tmp_path)).model(IDS).logits, expected)


def test_weights_of_another_size(tmp_path):
    for stream in (False, True):
        with pytest.raises(
            CheckpointError, match=r"shape \[259, 32\], but .* \[300, 32\] \(vocab_size: 300\).*get the"
        ):
            load_checkpoint(str(spoiled(tmp_path / str(stream), dict, vocab_size=300)), stream=stream)


@pytest.mark.parametrize("key", ["unexpected_keys", "missing_keys", "mismatched_keys", "error_msgs"])
def test_what_the_loader_reports_counts_too(tmp_path, monkeypatch, key):
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained

    def reporting(*arguments, **options):
        model, report = load(*arguments, **options)
        return model, report | {key: [(UP, (1,), (2,))] if key == "mismatched_keys" else [f"{UP}.other"]}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", reporting)
    with pytest.raises(CheckpointError, match=UP):
        load_checkpoint(str(spoiled(tmp_path, dict)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_loader_that_puts_weights_elsewhere_is_caught(tmp_path, monkeypatch, architecture):
    """The files are read a second time, by a reader of our own."""
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained

    def swapping(*arguments, **options):
        model, report = load(*arguments, **options)
        layers = getattr(model.base_model, "layers", None) or model.base_model.h
        name = max((n for n, p in layers[0].named_parameters()), key=lambda n: layers[0].get_parameter(n).numel())
        first, second = layers[0].get_parameter(name), layers[1].get_parameter(name)
        first.data, second.data = second.data, first.data
        return model, report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", swapping)
    tiny_model(architecture).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="was loaded with other numbers than its files hold"):
        load_checkpoint(str(tmp_path))
