"""Rotary scaling of GGUF files: applied exactly, also in what is exported, or refused by the key."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gguf_files import logits_of, tiny_model, write

from act_export.checkpoint.gguf import convert as module
from act_export.checkpoint.load import load_checkpoint
from act_export.errors import CheckpointError
from act_export.export import build_model
from act_export.runtime import Session


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")


def llama3(factor: float, low: float, high: float, original: int) -> list[float]:
    """Divisors of Llama 3, as llama.cpp's converter writes them, for heads of 16 and base 10000."""
    found = []
    for pair in range(8):
        wave = 2 * math.pi * 10000 ** (2 * pair / 16)
        smooth = (original / wave - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        found.append(1.0 if wave < original / high else factor if wave > original / low else between)
    return found


OWN = [1 + 0.37 * pair for pair in range(8)]
TWICE = [2 * each for each in OWN]
LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
LONG = {"rope_factors_short.weight": OWN, "rope_factors_long.weight": TWICE}
LONG_KEYS = {"rope.scaling.attn_factor": 1.19, "rope.scaling.original_context_length": 32}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": OWN,
    "attention_factor": 1.0,
    "original_max_position_embeddings": 512,
}

# name -> architecture, rope_parameters of the truth, keys, tensors
APPLIED = {
    "llama3": (
        "llama",
        {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 64},
        {},
        {"rope_freqs.weight": llama3(32, 1, 4, 64)},
    ),
    "llama3 of 8192": (
        "llama",
        {"rope_type": "llama3", **LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192},
        {"rope.scaling.type": "none", "context_length": 131072},
        {"rope_freqs.weight": llama3(8, 1, 4, 8192)},
    ),
    "factors of 1": ("llama", {"rope_type": "default"}, {}, {"rope_freqs.weight": [1.0] * 8}),
    "factors of its own": ("llama", {**LONGROPE, "long_factor": OWN}, {}, {"rope_freqs.weight": OWN}),
    "none": ("llama", {"rope_type": "default"}, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
    "linear": (
        "qwen2",
        {"rope_type": "linear", "factor": 4.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {},
    ),
    "a factor alone": ("llama", {"rope_type": "linear", "factor": 4.0}, {"rope.scaling.factor": 4.0}, {}),
    "scale_linear": ("llama", {"rope_type": "linear", "factor": 4.0}, {"rope.scale_linear": 4.0}, {}),
    "yarn": ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, YARN, {}),
    "yarn with betas": (
        "llama",
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        },
        {**YARN, "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0},
        {},
    ),
    "longrope": (
        "phi3",
        {**LONGROPE, "long_factor": TWICE, "attention_factor": 1.19, "original_max_position_embeddings": 32},
        LONG_KEYS,
        LONG,
    ),
    "longrope of llama": (
        "llama",
        {**LONGROPE, "long_factor": TWICE, "attention_factor": 1.19, "original_max_position_embeddings": 32},
        {"rope.scaling.type": "longrope", **LONG_KEYS},
        LONG,
    ),
    "base": ("starcoder2", {"rope_type": "default", "rope_theta": 500.0}, {"rope.freq_base": 500.0}, {}),
}

EXPORTED_TOO = ("factors of its own", "yarn", "linear", "longrope")


def case(tmp_path, name):
    architecture, rotary, keys, tensors = APPLIED[name]
    changes = {"original_max_position_embeddings": 32} if architecture == "phi3" else {}
    changes |= {"max_position_embeddings": keys["context_length"]} if "context_length" in keys else {}
    model = tiny_model(architecture, rope_parameters={"rope_theta": 10000.0, **rotary}, **changes)
    stored = {each: np.array(values, np.float32) for each, values in tensors.items()}
    return model, write(tmp_path / "model.gguf", model, architecture, keys=keys, tensors=stored)


@pytest.mark.parametrize("name", APPLIED)
def test_scaling_is_applied(tmp_path, name):
    """Of texts shorter and longer than the original context."""
    model, path = case(tmp_path, name)
    found = load_checkpoint(str(path)).model
    for length in (20, 200):
        torch.testing.assert_close(logits_of(found, length), logits_of(model, length), atol=1e-4, rtol=0)


@pytest.mark.in_turn(2)
@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "name", ["llama3", "longrope of llama", *(pytest.param(name, marks=pytest.mark.slow) for name in EXPORTED_TOO)]
)
def test_scaling_is_in_what_is_exported(tmp_path, name):
    model, path = case(tmp_path, name)
    exported = tmp_path / "model.onnx"
    build_model(load_checkpoint(str(path)), None, exported, source="tiny")
    ids = torch.randint(3, 259, (1, 40), generator=torch.Generator().manual_seed(2)).numpy()
    with Session.open(exported) as session:
        logits = session.run(ids, np.ones_like(ids)).logits
    np.testing.assert_allclose(logits, logits_of(model).numpy(), atol=2e-4)


@pytest.mark.parametrize(
    ("architecture", "keys", "tensors", "said"),
    [
        ("llama", {"rope.scaling.type": "llama3"}, {}, r"llama\.rope\.scaling\.type = 'llama3'; none, linear, yarn"),
        ("llama", {"rope.scaling.type": "dynamic", "rope.scaling.factor": 2.0}, {}, r"scaling\.type = 'dynamic'"),
        ("llama", {"rope.scaling.type": "longrope"}, {}, r"scaling\.type = 'longrope'; it needs the tensors"),
        ("llama", {"rope.scaling.factor": -2.0}, {}, r"scaling\.factor = -2\.0"),
        (
            "llama",
            {"rope.scaling.factor": 2.0},
            {"rope_freqs.weight": OWN},
            r"scaling\.factor = 2\.0; .*beside tensors",
        ),
        ("llama", {"rope.scaling.attn_factor": 1.5}, {}, r"attn_factor = 1\.5"),
        ("llama", {}, {"rope_factors_long.weight": OWN}, r"one of rope_factors_long\.weight and"),
        ("llama", {**YARN, "rope.scaling.attn_factor": 1.5}, {}, r"attn_factor = 1\.5"),
        ("llama", {**YARN, "rope.scaling.yarn_log_multiplier": 0.1}, {}, r"yarn_log_multiplier = 0\.1"),
        ("llama", {**YARN, "rope.scaling.yarn_ext_factor": 0.5}, {}, r"yarn_ext_factor = 0\.5"),
        ("llama", {**YARN, "rope.scaling.yarn_attn_factor": 0.5}, {}, r"yarn_attn_factor = 0\.5"),
        ("llama", {"rope.freq_base": 0.0}, {}, r"freq_base = 0\.0; a number above 0"),
        ("llama", {"rope.dimension_sections": [1, 2, 3]}, {}, r"rope\.dimension_sections = \[1, 2, 3\]"),
        ("gemma3", YARN, {}, r"gemma3\.rope\.scaling\.type = 'yarn'; linear scaling is known"),
        ("gpt2", {"rope.scaling.factor": 2.0}, {}, r"gpt2\.rope\.scaling\.factor = 2\.0"),
        ("phi3", {"rope.dimension_count": 7}, {}, r"phi3\.rope\.dimension_count = 7"),
    ],
)
def test_scaling_that_cant_be_applied_is_refused(tmp_path, architecture, keys, tensors, said):
    stored = {each: np.array(values, np.float32) for each, values in tensors.items()}
    path = write(tmp_path / "model.gguf", tiny_model(architecture), architecture, keys=keys, tensors=stored)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(str(path))


def test_gemma3_scales_its_full_layers_alone(tmp_path):
    rotary = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 777.0},
    }
    model = tiny_model("gemma3", rope_parameters=rotary)
    keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base_swa": 777.0}
    found = load_checkpoint(str(write(tmp_path / "model.gguf", model, "gemma3", keys=keys))).model
    torch.testing.assert_close(logits_of(found), logits_of(model), atol=1e-4, rtol=0)
