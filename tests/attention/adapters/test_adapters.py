"""Models with an attention of their own: the same models under the hook, and themselves again afterwards."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from close import assert_logits_close
from hooked import assert_same_model, padded_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CALIBRATION, tiny_checkpoint, tiny_model
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from act_export.attention.adapters import ADAPTERS, adapted
from act_export.attention.adapters.falcon import alibi_of_positions
from act_export.attention.call import positions
from act_export.attention.hook import attention_hook, check_supported
from act_export.attention.reference_attention import ReferenceAttention
from act_export.attention.transformers_interface import ATTENTION_NAME
from act_export.errors import ActExportError
from act_export.export import build_model
from act_export.runtime import Session
from act_export.runtime.generate import generate

OLD_FALCON = {"new_decoder_architecture": False, "num_ln_in_parallel_attn": None}
SIX_HEADS = {"hidden_size": 48, "num_attention_heads": 6}  # ALiBi's slopes of a power of two have another formula
MODELS = {
    "bloom": ("bloom", {}),
    "bloom, six heads, other residual": (
        "bloom",
        {"hidden_size": 48, "n_head": 6, "apply_residual_connection_post_layernorm": True},
    ),
    "falcon, new decoder": ("falcon", {}),
    "falcon, new decoder, one norm": ("falcon", {"num_ln_in_parallel_attn": 1, "bias": True}),
    "falcon, one key head": ("falcon", {**OLD_FALCON, "multi_query": True}),
    "falcon, one key head, ALiBi": ("falcon", {**OLD_FALCON, "multi_query": True, "alibi": True}),
    "falcon, new decoder, ALiBi": ("falcon", {"alibi": True}),
    "falcon, ALiBi, six heads": (
        "falcon",
        {**OLD_FALCON, **SIX_HEADS, "num_kv_heads": 6, "multi_query": False, "alibi": True, "parallel_attn": False},
    ),
    "gpt_neo": ("gpt_neo", {}),
    "mpt": ("mpt", {}),
    "mpt, six heads, clipped": (
        "mpt",
        {"d_model": 48, "n_heads": 6, "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.3, "alibi_bias_max": 16}},
    ),
}
TOLERANCE = 2e-5  # in float32: some of these models give no numbers in float64
models = pytest.mark.parametrize("name", MODELS)


def model_of(name):
    architecture, changes = MODELS[name]
    return tiny_model(architecture, **changes)


@models
def test_without_calibration_it_is_the_same_model(name):
    assert_same_model(model_of(name), TOLERANCE)


@models
def test_a_padded_row_is_calibrated_as_if_alone(name):
    model = model_of(name)
    ids, mask = padded_batch()
    with torch.no_grad():
        with attention_hook(model, ReferenceAttention(CALIBRATION)) as hooked:
            together = hooked(ids, mask).logits
            alone = hooked(ids[:1, 9:], mask[:1, 9:]).logits
        with attention_hook(model, ReferenceAttention(None)) as hooked:
            plain = hooked(ids, mask).logits
    assert_logits_close(together[0, 9:], alone[0], TOLERANCE)
    assert (plain - together).abs().max() > 1e-2  # the calibration does something here


@pytest.mark.parametrize("architecture", ADAPTERS)
def test_the_model_is_itself_again_whatever_happens(architecture):
    model, other = tiny_model(architecture), tiny_model(architecture)
    ids, mask = padded_batch()
    before = dict(model.config.to_dict(), implementation=model.config._attn_implementation)
    own = model(input_ids=ids, attention_mask=mask).logits
    with suppress(ZeroDivisionError), attention_hook(model, ReferenceAttention(None)) as hooked:
        hooked(ids, mask)
        assert torch.equal(other(input_ids=ids, attention_mask=mask).logits, own)  # nothing of the class is touched
        raise ZeroDivisionError
    assert dict(model.config.to_dict(), implementation=model.config._attn_implementation) == before
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, own)


def test_a_forward_of_a_module_of_its_own_comes_back():
    model = tiny_model("mpt")
    module = model.transformer.blocks[1].attn
    module.forward = forward = module.forward
    with adapted(model, ADAPTERS["mpt"], ATTENTION_NAME):
        assert module.forward is not forward
    assert vars(module)["forward"] is forward


def test_window_of_local_layers_alone():
    reference = ReferenceAttention(None)
    model = tiny_model("gpt_neo")
    ids, mask = padded_batch()
    with torch.no_grad(), attention_hook(model, reference) as hooked:
        hooked(ids, mask)
    assert reference.sliding_windows == {0: -1, 1: model.config.window_size}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("falcon, new decoder", (2, 8), (2, 8)),
        ("falcon, one key head", (1, 8), (1, 8)),
        ("falcon, ALiBi, six heads", (6, 16), (6, 8)),
        ("bloom", (4, 16), (4, 8)),
    ],
)
def test_the_cache_holds_what_heads_share_once(name, key, value):
    ids, mask = padded_batch()
    with torch.no_grad(), attention_hook(model_of(name), ReferenceAttention(None)) as hooked:
        state = hooked(ids, mask).state[1]
    assert (state.key.shape[1], state.key.shape[3]) == key
    assert (state.value.shape[1], state.value.shape[3]) == value


@settings(max_examples=30)
@given(heads=st.integers(1, 130), padding=st.integers(0, 5), length=st.integers(1, 3000))
def test_falcon_rounds_its_bias_as_transformers_does(heads, padding, length):
    mask = torch.ones(1, padding + length, dtype=torch.long)
    mask[:, :padding] = 0
    theirs = build_alibi_tensor(mask, heads, torch.float32).view(heads, -1)
    assert torch.equal(alibi_of_positions(positions(mask), heads)[0].T, theirs)


def test_bloom_that_computes_in_slices_is_refused():
    model = tiny_model("bloom", slow_but_exact=True, pretraining_tp=2)
    with pytest.raises(ActExportError, match="slow_but_exact"):
        check_supported(model)


@pytest.mark.slow
def test_generates_what_transformers_generates(tmp_path):
    """Left padding, step by step, with keys larger than values."""
    checkpoint = tiny_checkpoint("bloom")
    ids, mask = padded_batch(14)
    whole = checkpoint.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    build_model(checkpoint, None, tmp_path / "model.onnx")
    prompts = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
    for native in (True, False):
        with Session.open(tmp_path / "model.onnx", native=native) as session:
            assert [(part.heads, part.size) for part in session.state_inputs[:2]] == [(4, 16), (4, 8)]
            found = generate(session, prompts, max_new_tokens=8, stop_tokens=())
            assert found == whole[:, 14:].tolist()
