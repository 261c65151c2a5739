"""GGUF files become the same model, or are refused with what is wrong: weights, shards, keys, quantisations."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf_files import MODELS, WIDE, as_kind, logits_of, pieces, random_blocks, tiny_model, write
from transformers import AutoModelForCausalLM

from act_export.calibration.file import Calibration, CalibrationError
from act_export.checkpoint.fetch import is_gguf
from act_export.checkpoint.gguf import convert as module
from act_export.checkpoint.gguf.convert import converted, remarks_of, shape_of
from act_export.checkpoint.gguf.shards import read_gguf
from act_export.checkpoint.gguf.witness import compare
from act_export.checkpoint.identity import identify
from act_export.checkpoint.load import load_checkpoint
from act_export.errors import CheckpointError

KINDS = gguf.GGMLQuantizationType
PLAIN = ("F16", "BF16")
BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS")
SAMPLED = {"BF16", "Q4_K", "IQ4_NL"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr(module, "cache_folder", lambda: folder)
    return folder


def loaded(path):
    return AutoModelForCausalLM.from_pretrained(converted(path)).eval()


@pytest.mark.parametrize("architecture", MODELS)
def test_every_architecture_is_the_model_that_was_written(tmp_path, architecture):
    model = tiny_model(architecture)
    path = write(tmp_path / "model.gguf", model, architecture)
    folder = converted(path)
    torch.testing.assert_close(logits_of(loaded(path)), logits_of(model), atol=1e-4, rtol=0)
    report = compare(path, folder)
    assert shape_of(read_gguf(path)[0]) == replace(identify(model), fingerprint=None)
    assert report.parameters == len(list(model.parameters()))
    assert report.largest_difference <= 1e-6
    assert report.rotary_difference <= 1e-5
    assert remarks_of(folder) == ()


def test_a_calibration_that_isnt_for_the_model_is_refused_before_it_is_converted(tmp_path, cache):
    path = write(tmp_path / "model.gguf", tiny_model(), "llama")
    with pytest.raises(CalibrationError, match="layer 2 is out of range; the model has layers 0 to 1"):
        load_checkpoint(str(path), fits=[Calibration({1: (0,)}), Calibration({2: (0,)})])
    assert not cache.exists()


@pytest.mark.parametrize(
    ("architecture", "changes", "keys"),
    [
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, {}),
        ("llama", {"head_dim": 32}, {}),
        ("llama", {}, {"attention.sliding_window": 512, "logit_scale": 1.0, "expert_count": 0, "vocab_size": 260}),
        ("qwen3", {}, {"attention.scale": 32**-0.5}),
        ("gemma2", {"attn_logit_softcapping": 7.0, "final_logit_softcapping": 3.0}, {}),
        ("gemma3", {"final_logit_softcapping": 3.0}, {"final_logit_softcapping": 3.0}),
        ("gemma3", {"sliding_window_pattern": 3}, {"attention.sliding_window_pattern": 3}),
        ("stablelm", {"use_parallel_residual": True}, {}),
        ("stablelm", {"partial_rotary_factor": 1.0, "use_qkv_bias": False}, {}),
        ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": None}, {}),
        ("starcoder2", {"sliding_window": 8}, {"attention.sliding_window": 8}),
        ("nemotron", {"partial_rotary_factor": 1.0}, {}),
    ],
)
def test_what_the_keys_say_is_applied(tmp_path, architecture, changes, keys):
    model = tiny_model(architecture, **changes)
    path = write(tmp_path / "model.gguf", model, architecture, keys=keys)
    torch.testing.assert_close(logits_of(loaded(path)), logits_of(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "kind", [each if each in SAMPLED else pytest.param(each, marks=pytest.mark.slow) for each in (*PLAIN, *BLOCKS)]
)
def test_every_quantisation(tmp_path, kind):
    """Values are those of another reader too: transformers has formulas of its own for blocks."""
    chosen = KINDS[kind]
    model = tiny_model("llama", **WIDE)
    quantise = as_kind(chosen) if kind in PLAIN else random_blocks(chosen)
    path = write(tmp_path / "model.gguf", model, quantise=quantise)
    report = compare(path, converted(path))
    assert report.kinds[kind] == report.tensors - report.kinds["F32"] == 9
    assert report.largest_difference == 0
    if kind in PLAIN or kind in ("Q5_0", "Q5_1"):
        return
    dequant = pytest.importorskip("transformers.integrations.gguf.dequant")
    stored = next(each for each in gguf.GGUFReader(path).tensors if each.name == "blk.0.ffn_up.weight")
    values = dequant.dequantize(torch.from_numpy(np.array(stored.data)), int(chosen)).reshape(256, 256)
    found = dict(loaded(path).named_parameters())["model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(found.detach(), values, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F32", *PLAIN, "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"])
@pytest.mark.parametrize("architecture", MODELS)
def test_every_architecture_in_every_quantisation(tmp_path, architecture, kind):
    chosen = KINDS[kind]
    quantise = None if kind == "F32" else as_kind(chosen) if kind in PLAIN else random_blocks(chosen)
    path = write(tmp_path / "model.gguf", tiny_model(architecture), architecture, quantise=quantise)
    report = compare(path, converted(path))
    assert report.largest_difference <= 1e-6
    print(f"{architecture} {kind}: {report.tensors} tensors, {report.parameters} parameters")


@pytest.mark.parametrize("given", [0, 1, 2])
def test_shards_are_one_model(tmp_path, given):
    model = tiny_model()
    write(tmp_path / "model.gguf", model, most_tensors=9)
    paths = sorted(tmp_path.glob("model-*.gguf"))
    assert len(paths) == 3
    torch.testing.assert_close(logits_of(loaded(paths[given])), logits_of(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_shard_that_is_missing(tmp_path, cache, lost):
    write(tmp_path / "model.gguf", tiny_model(), most_tensors=9)
    paths = sorted(tmp_path.glob("model-*.gguf"))
    paths.pop(lost).unlink()
    for path in paths:
        with pytest.raises(CheckpointError, match=rf"1 of them aren't beside it: model-0000{lost + 1}-of-00003\.gguf"):
            converted(path)
    assert not cache.exists()


def test_shards_that_dont_belong_together(tmp_path):
    for name, model in (("model", tiny_model()), ("other", tiny_model(num_hidden_layers=3))):
        write(tmp_path / f"{name}.gguf", model, most_tensors=12)
    given, second = sorted(tmp_path.glob("model-*.gguf"))[:2]
    second.write_bytes(sorted(tmp_path.glob("other-*.gguf"))[1].read_bytes())
    with pytest.raises(CheckpointError, match=r"doesn't belong to .*: split\."):
        converted(given)
    given.rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"the others are found by its name; call it NAME-00001-of-"):
        converted(tmp_path / "renamed.gguf")


ROTATION = {"rope_freqs.weight": np.ones(8)}


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("llama", {"leave_out": {"blk.1.ffn_up.weight"}}, r"lacks 1 of the model's tensors: blk\.1\.ffn_up\.weight"),
        ("llama", {"leave_out": {"output_norm.weight"}}, r"lacks 1 .*: output_norm\.weight"),
        ("llama", {"leave_out": {"token_embd.weight"}}, r"no tensor token_embd\.weight"),
        ("qwen2moe", {"leave_out": {"blk.0.ffn_up_exps.weight"}}, r"lacks 1 .*: blk\.0\.ffn_up_exps\.weight"),
        ("llama", {"tensors": {"blk.0.attn_q_norm.weight": np.ones(16)}}, r"aren't known to have: blk\.0\.attn_q_norm"),
        ("llama", {"tensors": {"cls.weight": np.ones((4, 64))}}, r"aren't known to have: cls\.weight"),
        ("qwen2", {"tensors": ROTATION}, r"aren't known to have: rope_freqs\.weight"),
        (
            "llama",
            {"tensors": {"blk.1.attn_v.weight": np.ones((16, 64))}},
            r"blk\.1\.attn_v\.weight has shape \[16, 64\]",
        ),
        ("llama", {"tensors": {"rope_freqs.weight": np.ones(7)}}, r"rope_freqs\.weight has shape"),
        (
            "llama",
            {"tensors": {"rope_freqs.weight": np.zeros(8)}},
            r"rope_freqs\.weight has numbers that aren't above 0",
        ),
        (
            "llama",
            {"tensors": {"blk.0.ffn_norm.weight": np.full(64, np.nan)}},
            r"blk\.0\.ffn_norm\.weight has weights that",
        ),
        (
            "llama",
            {"tensors": {"blk.0.ffn_norm.weight": np.full(64, np.inf)}},
            r"blk\.0\.ffn_norm\.weight has weights that",
        ),
        ("llama", {"keys": {"block_count": 10**9}}, r"llama\.block_count = 1000000000; the tensors are of 2 layers"),
        ("llama", {"keys": {"block_count": 1}}, r"llama\.block_count = 1; the tensors are of 2 layers"),
        ("llama", {"keys": {"block_count": None}}, r"has no llama\.block_count"),
        (
            "llama",
            {"keys": {"attention.head_count": 10**9}},
            r"llama\.attention\.head_count_kv = 2; there are 1000000000",
        ),
        ("llama", {"keys": {"attention.head_count_kv": 4}}, r"attn_k has 64 rows, not the 32"),
        (
            "llama",
            {"keys": {"embedding_length": 10**9}},
            r"embedding_length = 1000000000; token_embd\.weight has 64 col",
        ),
        ("llama", {"keys": {"context_length": 2**32 - 1}}, r"llama\.context_length = 4294967295"),
        ("llama", {"keys": {"vocab_size": 100}}, r"llama\.vocab_size = 100; token_embd\.weight has 260 rows"),
        ("llama", {"keys": {"attention.layer_norm_rms_epsilon": float("nan")}}, r"layer_norm_rms_epsilon = nan"),
        (
            "llama",
            {"keys": {"attention.layer_norm_rms_epsilon": None}},
            r"has no llama\.attention\.layer_norm_rms_epsilon",
        ),
        (
            "llama",
            {"keys": {"attention.head_count_kv": [2, 1]}},
            r"head_count_kv = \[2, 1\]; models are verified whose layers",
        ),
        ("llama", {"keys": {"rope.dimension_count": 8}}, r"llama\.rope\.dimension_count = 8"),
        ("gemma2", {"keys": {"attention.value_length": 16}}, r"gemma2\.attention\.value_length = 16"),
        *(
            ("llama", {"keys": {name: value}}, rf"llama\.{name} = .*may change what the model computes")
            for name, value in {
                "attention.causal": False,
                "attention.clamp_kqv": 8.0,
                "attention.max_alibi_bias": 8.0,
                "attn_logit_softcapping": 50.0,
                "expert_count": 8,
                "expert_used_count": 2,
                "final_logit_softcapping": 30.0,
                "logit_scale": 0.5,
                "no_such_key": 1,
                "pooling_type": 1,
                "residual_scale": 0.2,
                "rope.scaling.alpha": 2.0,
                "use_parallel_residual": True,
            }.items()
        ),
        ("llama", {"keys": {"attention.scale": 0.5}}, r"llama\.attention\.scale = 0\.5"),
        ("llama", {"keys": {"attention.sliding_window": 128}}, r"llama\.attention\.sliding_window = 128"),
        ("gemma2", {"keys": {"attention.sliding_window_pattern": 3}}, r"sliding_window_pattern = 3"),
        ("stablelm", {"keys": {"use_parallel_residual": True}}, r"use_parallel_residual = True; there is a tensor"),
        ("qwen3moe", {"keys": {"expert_gating_func": 2}}, r"qwen3moe\.expert_gating_func = 2"),
        ("qwen3moe", {"keys": {"expert_count": 10**9}}, r"qwen3moe\.expert_count = 1000000000"),
        ("llama", {"keys": {"general.type": "adapter"}}, r"general\.type = 'adapter'"),
        ("llama", {"keys": {"tokenizer.ggml.model": "rwkv"}}, r"tokenizer\.ggml\.model is 'rwkv'"),
        ("llama", {"keys": {"tokenizer.ggml.eot_token_id": "no"}}, r"tokenizer\.ggml\.eot_token_id = 'no'; a token's"),
        ("llama", {"keys": {"tokenizer.ggml.bos_token_id": 2**32 - 1, "tokenizer.ggml.add_bos_token": True}}, "begins"),
        ("llama", {"keys": {"tokenizer.ggml.tokens": ["a"] * 300}}, r"300 tokens, and token_embd\.weight has 260 rows"),
    ],
)
def test_what_cant_be_the_same_model_is_refused(tmp_path, cache, architecture, changes, said):
    path = write(tmp_path / "model.gguf", tiny_model(architecture), architecture, **changes)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(str(path))
    assert not list(cache.glob("checkpoints/*"))


def test_an_architecture_that_isnt_verified(tmp_path):
    path = write(tmp_path / "model.gguf", tiny_model(), keys={"general.architecture": "mamba"})
    with pytest.raises(CheckpointError, match=r"'mamba' aren't verified, only those of gemma2, .*starcoder2; convert"):
        converted(path)


@pytest.mark.parametrize("name", ["MODEL.GGUF", "model.Gguf", "model.bin", "model"])
def test_the_content_says_what_a_file_is(tmp_path, name):
    path = write(tmp_path / "model.gguf", tiny_model()).rename(tmp_path / name)
    assert is_gguf(str(path))
    assert load_checkpoint(str(path)).identity.num_layers == 2


@pytest.mark.parametrize("token", [2**32 - 1, 260])
def test_ids_of_no_token_count_as_none(tmp_path, token):
    names = ("bos", "eot", "unknown", "padding")
    keys = {f"tokenizer.ggml.{name}_token_id": token for name in names} | {"tokenizer.ggml.add_bos_token": False}
    folder = converted(write(tmp_path / "model.gguf", tiny_model(), keys=keys))
    remarks = remarks_of(folder)
    for name in names:
        assert [remark for remark in remarks if f"{name}_token_id = {token} isn't one of the 260 tokens" in remark]
    model = load_checkpoint(str(folder)).model
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (None, 2, None)
    assert model.generation_config.eos_token_id == 2


def test_generation_ends_at_every_end(tmp_path):
    keys = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 9}
    model = loaded(write(tmp_path / "model.gguf", tiny_model(), keys=keys))
    assert model.generation_config.eos_token_id == [2, 7, 9]
    assert model.config.eos_token_id == 2


def test_keys_that_somebody_may_miss_are_remarked(tmp_path):
    keys = {"general.sampling.temp": 0.6, "general.name": "tiny", "tokenizer.ggml.pre": "no_such_split"}
    folder = converted(write(tmp_path / "model.gguf", tiny_model(), keys=keys))
    sampling, split = remarks_of(folder)
    assert "general.sampling.temp" in sampling
    assert "'no_such_split'" in split


def test_a_file_without_a_tokenizer(tmp_path):
    checkpoint = load_checkpoint(str(write(tmp_path / "model.gguf", tiny_model(), tokenizer={})))
    assert checkpoint.tokenizer is None


@pytest.mark.parametrize("change", ["weight", "rotary", "setting", "missing"])
def test_the_witness_finds_what_differs(tmp_path, change):
    """Each is a fault that a loader had: a weight of its own, a key that it passed over, a parameter left random."""
    path = write(tmp_path / "model.gguf", tiny_model(), keys={"rope.scaling.factor": 2.0} if change == "rotary" else {})
    folder = converted(path)
    model = loaded(path)
    if change == "weight":
        model.model.layers[1].self_attn.k_proj.weight.data[[0, 1]] = model.model.layers[1].self_attn.k_proj.weight.data[
            [1, 0]
        ]
    elif change == "rotary":
        model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    elif change == "setting":
        model.config.rms_norm_eps = 1e-6
    else:
        model.lm_head = torch.nn.Identity()
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"the loaded model isn't what the file holds"):
        compare(path, folder)


def test_pieces_make_a_tokenizer(tmp_path):
    model = tiny_model(vocab_size=268)
    checkpoint = load_checkpoint(str(write(tmp_path / "model.gguf", model, tokenizer=pieces())))
    assert checkpoint.tokenizer("the a").input_ids == [1, 266, 267]
