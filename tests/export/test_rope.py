"""Rotary scaling of every kind: exported logits are PyTorch's, below and above the lengths where frequencies change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_checkpoint, tiny_model
from tiny_models import tiny_config

from act_export.export import build_model
from act_export.export.rope import context_of, recomputed_beyond, traceable_rotation
from act_export.runtime import Session

LIMIT = 24
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0], "factor": 4.0}
KINDS = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {"rope_type": "longrope", **LONG, "original_max_position_embeddings": LIMIT},
}


def _rope(rope: dict) -> dict:
    return {"rope_parameters": {"rope_theta": 10000.0, **rope}}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_that_depend_on_the_run(kind, tmp_path):
    """Prompts below, at and above the limit, a ragged batch over it, and steps that cross it."""
    longest = LIMIT if kind == "dynamic" else 4 * LIMIT
    changes = {"max_position_embeddings": longest, **_rope(KINDS[kind])}
    build_model(tiny_checkpoint(**changes), None, tmp_path / "model.onnx")
    random = np.random.default_rng(0)
    with Session.open(tmp_path / "model.onnx") as session:
        assert session.limits.context == 4 * LIMIT
        for length in (LIMIT - 5, LIMIT, LIMIT + 1, 3 * LIMIT):
            model = tiny_model(**changes)  # transformers' own remembers the lengths before
            ids = random.integers(3, 200, (2, length))
            mask = np.ones_like(ids)
            mask[1, :7] = 0
            positions = np.maximum(mask.cumsum(-1) - 1, 0)
            with torch.no_grad():
                expected = model(
                    input_ids=torch.from_numpy(ids),
                    attention_mask=torch.from_numpy(mask),
                    position_ids=torch.from_numpy(positions),
                ).logits
            found = session.run(ids, mask).logits
            np.testing.assert_allclose(found[mask == 1], expected.numpy()[mask == 1], atol=2e-4)
        model, cache, past = tiny_model(**changes), session.allocate(1), None
        ids = random.integers(3, 200, (1, LIMIT + 6))
        for start, end in [(0, LIMIT - 3), *((at, at + 1) for at in range(LIMIT - 3, LIMIT + 6))]:
            with torch.no_grad():
                outputs = model(torch.from_numpy(ids[:, start:end]), past_key_values=past, use_cache=True)
            past = outputs.past_key_values
            np.testing.assert_allclose(cache.step(ids[:, start:end])[0, -1], outputs.logits[0, -1].numpy(), atol=2e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text"])
def test_the_rotation_that_is_traced_is_the_modules(architecture):
    """Also in a model with a rotary embedding for each kind of layer, of which one is dynamic."""
    dynamic, plain = {"rope_theta": 10000.0, **KINDS["dynamic"]}, {"rope_type": "default", "rope_theta": 1000.0}
    nested = {"full_attention": dynamic, "sliding_attention": plain}
    rope = nested if architecture == "gemma3_text" else dynamic
    changes = {"max_position_embeddings": LIMIT, "rope_parameters": rope}
    for length in (LIMIT - 1, LIMIT, LIMIT + 1, 2 * LIMIT):
        ids = torch.arange(3, 3 + length)[None]
        model = tiny_model(architecture, **changes)
        with torch.no_grad():
            expected = model(ids).logits
            again = tiny_model(architecture, **changes)
            with traceable_rotation(again):
                found = [again(each).logits for each in (torch.arange(3, 3 + 3 * LIMIT)[None], ids)][1]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "default"}, LIMIT),
        ({"rope_type": "dynamic", "factor": 4.0}, 4 * LIMIT),
        ({"rope_type": "dynamic", "factor": 2.5}, 60),
        ({"rope_type": "linear", "factor": 4.0}, LIMIT),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6}, LIMIT),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
)
def test_how_long_a_sequence_may_be(rope, context):
    assert context_of(tiny_config("llama", max_position_embeddings=LIMIT, **_rope(rope))) == context


def test_who_computes_a_sequence_again():
    longrope = {"original_max_position_embeddings": LIMIT, **_rope(KINDS["longrope"])}
    assert recomputed_beyond(tiny_model("phi3", **longrope)) == LIMIT
    assert recomputed_beyond(tiny_model("phi3", original_max_position_embeddings=LIMIT)) is None
    assert recomputed_beyond(tiny_model(**longrope)) is None
