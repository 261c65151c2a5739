"""Models that can't be calibrated are refused with the reason, by their configuration alone."""

from __future__ import annotations

import re

import pytest
import torch
from tiny import ROUTED, VOCABULARY, tiny_model
from tiny_models import tiny_config
from transformers import AutoConfig

from act_export.attention.call import positions
from act_export.attention.hook import attention_hook, check_supported
from act_export.attention.reference_attention import ReferenceAttention
from act_export.checkpoint.load import load_checkpoint
from act_export.checkpoint.support import why_unsupported, why_unsupported_model
from act_export.errors import ActExportError, CheckpointError

LATENT = "multi-head latent attention, whose cache holds compressed"
STATE = "keep a state instead of keys"
REASONS = {
    "bart": "encoder-decoder",
    "t5": "encoder-decoder",
    "prophetnet": "encoder-decoder",
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "minicpm3": LATENT,
    "mamba": STATE,
    "mamba2": STATE,
    "falcon_mamba": STATE,
    "jamba": STATE,
    "recurrent_gemma": STATE,
    "qwen3_next": STATE,
    "minimax": STATE,
    "rwkv": STATE,
    "xlstm": STATE,
    "falcon_h1": "type hybrid, which keep a state beside keys",
    "llama4": "type chunked_attention, whose tokens see their own chunk alone",
    "llama4_text": "type chunked_attention, whose tokens see their own chunk alone",
    "bert": "an encoder, .* is_decoder: true",
    "roberta": "an encoder",
    "mllama": "attends to the output of another model",
}


@pytest.mark.parametrize("architecture", REASONS)
def test_a_configuration_is_refused_with_the_reason(architecture):
    reason = why_unsupported(AutoConfig.for_model(architecture))
    assert reason is not None
    assert reason.startswith(architecture)
    assert re.search(REASONS[architecture], reason), reason


def test_convolutions_are_named():
    config = AutoConfig.for_model("lfm2", layer_types=["conv", "full_attention"], num_hidden_layers=2)
    assert "layers of type conv, which have no attention map" in str(why_unsupported(config))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_causal": False}, "isn't causal"),
        ({"add_cross_attention": True}, "attends to the output of another model"),
        ({"layers_block_type": ["attention", "mamba"]}, f"type mamba, which {STATE}"),
        ({"layer_types": ["full_attention", "novel"]}, "layers of type novel; only full and sliding-window attention"),
    ],
)
def test_a_setting_is_refused_with_the_reason(changes, reason):
    config = tiny_config("llama")
    for name, value in changes.items():
        setattr(config, name, value)
    assert reason in str(why_unsupported(config))


@pytest.mark.parametrize("architecture", [*ROUTED, "bloom", "falcon", "gpt_neo", "mpt", "gpt_oss", "mixtral", "gptj"])
def test_what_is_not_known_is_tried(architecture):
    assert why_unsupported(tiny_config(architecture)) is None


def test_a_decoder_beside_an_encoder_is_refused_by_its_modules():
    model = tiny_model("bart", decoder_layers=2, decoder_attention_heads=4)
    assert not model.config.is_encoder_decoder
    assert "attend to the output of an encoder" in str(why_unsupported_model(model))


def test_refused_before_anything_runs(monkeypatch):
    model = tiny_model("llama")
    model.config.kv_lora_rank = 512
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(ActExportError, match=LATENT):
        check_supported(model)
    with pytest.raises(ActExportError, match=LATENT), attention_hook(model, ReferenceAttention(None)):
        pytest.fail("the block was entered")


def test_refused_before_weights_are_read(tmp_path):
    AutoConfig.for_model("rwkv").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="rwkv has recurrent layers"):
        load_checkpoint(str(tmp_path))


def test_an_encoder_that_was_built_as_a_decoder_is_the_same_model():
    model = tiny_model("bert", is_decoder=True)
    torch.manual_seed(0)
    ids, mask = torch.randint(3, VOCABULARY, (2, 25)), torch.ones(2, 25, dtype=torch.long)
    mask[0, :9] = 0
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
        with attention_hook(model, ReferenceAttention(None)) as hooked:
            ours = hooked(ids, mask).logits
    torch.testing.assert_close(ours[mask.bool()], own[mask.bool()], atol=5e-5, rtol=0)
