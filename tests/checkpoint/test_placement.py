"""Checkpoints in other precisions and on named devices: the same identity, the same answers to rounding."""

from __future__ import annotations

import pytest
import torch
from tiny import CALIBRATION, save_checkpoint, tiny_model
from tiny_models import VARIANTS
from tiny_vision import tiny_whole
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, modeling_utils

from act_export.attention.fast_attention import FastAttention
from act_export.attention.hook import attention_hook
from act_export.attention.reference_attention import ReferenceAttention
from act_export.checkpoint.identity import identify
from act_export.checkpoint.load import load_checkpoint
from act_export.checkpoint.placement import DTYPES, Placement
from act_export.errors import ActExportError, CheckpointError
from act_export.search.gates import gate_gradients
from act_export.tasks import EncodedExample
from act_export.tasks.language_model import TorchLanguageModel
from act_export.tasks.scoring import score_choices

LAYERS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
MAPS = ["auto", "cpu", {"": "cpu"}, dict.fromkeys(LAYERS, "cpu")]
EXAMPLES = [
    EncodedExample(tuple(range(3, 30)), ((40, 41), (50,)), 0, "the first"),
    EncodedExample((7, 8, 9, 9, 9, 10), ((40,), (60, 61, 62)), 1, "the second"),
]
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """The same checkpoint, stored in each precision; some weights are too small for float16."""
    base = tmp_path_factory.mktemp("stored")
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data *= 1e-8
    model.to(torch.bfloat16).save_pretrained(base / "bfloat16")
    model.to(torch.float32).save_pretrained(base / "float32")
    save_checkpoint(base / "float16", tokenizer=False)
    tiny_model().half().save_pretrained(base / "float16")
    return {name: str(base / name) for name in STORED}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_precisions_and_identities(folders, stored, dtype):
    checkpoint = load_checkpoint(folders[stored], dtype=dtype)
    expected = STORED[stored if dtype == "auto" else dtype]
    assert {parameter.dtype for parameter in checkpoint.model.parameters()} == {expected}
    assert checkpoint.model.dtype == expected
    assert checkpoint.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert checkpoint.identity == load_checkpoint(folders[stored]).identity


def test_copies_in_float32_and_bfloat16_are_one_model(folders):
    assert load_checkpoint(folders["float32"]).identity == load_checkpoint(folders["bfloat16"]).identity
    float16 = load_checkpoint(folders["float32"], dtype="float16")
    assert identify(float16.model) != float16.identity, "the weights that float16 loses must be in the sample"


def scores_and_gradients(model) -> tuple[torch.Tensor, torch.Tensor]:
    with attention_hook(model, FastAttention(CALIBRATION)) as hooked:
        scores = score_choices(TorchLanguageModel(hooked), EXAMPLES)
    gradients = gate_gradients(model, EXAMPLES, num_layers=2, num_heads=4, beta=0.4, threshold=0.06)
    return torch.tensor([score for row in scores for score in row]), gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_half_precision_searches(checkpoint_folder, dtype, tolerance):
    expected_scores, expected_gradients = scores_and_gradients(load_checkpoint(str(checkpoint_folder)).model)
    scores, gradients = scores_and_gradients(load_checkpoint(str(checkpoint_folder), dtype=dtype).model)
    assert expected_gradients.abs().max() > 0
    assert torch.allclose(scores, expected_scores, rtol=tolerance, atol=tolerance)
    error = (gradients - expected_gradients).abs().max() / expected_gradients.abs().max()
    assert error < 2 * tolerance


@pytest.mark.parametrize("device_map", MAPS, ids=["auto", "cpu", "one", "layers"])
def test_device_maps_over_the_cpu(checkpoint_folder, device_map):
    mapped = load_checkpoint(str(checkpoint_folder), device_map=device_map)
    plain = load_checkpoint(str(checkpoint_folder))
    assert mapped.identity == plain.identity
    for got, expected in zip(scores_and_gradients(mapped.model), scores_and_gradients(plain.model), strict=True):
        assert torch.allclose(got, expected, atol=1e-5)


def test_a_device(checkpoint_folder):
    checkpoint = load_checkpoint(str(checkpoint_folder), device="cpu", dtype="bfloat16")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad(), attention_hook(checkpoint.model, ReferenceAttention(CALIBRATION)) as hooked:
        outputs = hooked(ids, torch.ones_like(ids))
        more = hooked(ids[:, :1], torch.ones(1, 5, dtype=torch.long), outputs.state)
    assert more.logits.isfinite().all()
    assert outputs.state[0].sink_scores.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("options", [{"device": "cuda"}, {"device_map": "auto"}, {"device_map": {"": 0}}])
def test_a_gpu(checkpoint_folder, options):
    on_gpu = load_checkpoint(str(checkpoint_folder), **options)
    plain = load_checkpoint(str(checkpoint_folder))
    assert on_gpu.model.device.type == "cuda"
    assert on_gpu.identity == plain.identity
    for got, expected in zip(scores_and_gradients(on_gpu.model), scores_and_gradients(plain.model), strict=True):
        assert torch.allclose(got, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, r"dtype is 'int8'; it must be one of float32, bfloat16, float16, auto"),
        ({"dtype": ""}, "dtype is ''"),
        ({"device": "gpu"}, "device is 'gpu'; pass e"),
        ({"device": "meta"}, "holds no weights"),
        ({"device": "cuda:99"}, r"device is cuda:99, but PyTorch .* sees \d+ CUDA GPUs"),
        ({"device": "cpu", "device_map": "auto"}, "device is cpu and device_map is 'auto'; pass one of them"),
        ({"device_map": "autox"}, "'autox'.*balanced"),
        ({"device_map": {"": 99}}, "device is cuda:99"),
        ({"device_map": "cuda:99"}, "device is cuda:99"),
    ],
)
def test_bad_placements_are_refused_before_anything_is_read(options, message):
    with pytest.raises(ActExportError, match=message):
        load_checkpoint("/nowhere/at/all", **options)


def test_cuda_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ActExportError, match=r"device is cuda, but PyTorch .* sees 0 CUDA GPUs"):
        Placement(device="cuda")


def test_an_incomplete_device_map(checkpoint_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    device_map = {**dict.fromkeys(LAYERS, "cpu"), "model.layers.0": "disk"}
    with pytest.raises((ActExportError, CheckpointError), match=r"disk|offload"):
        load_checkpoint(str(checkpoint_folder), device_map=device_map)


def test_weights_that_are_nowhere():
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(ActExportError, match=r"leaves 2 of its weights .*e\.g\. weight; take a smaller dtype"):
        Placement(device_map="auto").check_complete(model, "a model")


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("stored", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("architecture", sorted({variant.architecture for variant in VARIANTS}))
def test_files_of_another_type_are_loaded_without_mapping_them(tmp_path, monkeypatch, architecture, stored, dtype):
    """The model is the one that transformers loads from the folder by itself."""
    model = tiny_model(architecture)
    model.generation_config.max_length = 77
    model.to(STORED[stored]).save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=STORED[dtype])
    monkeypatch.setattr(modeling_utils, "safe_open", pytest.fail)
    found = load_checkpoint(str(tmp_path), dtype=dtype).model
    assert found.name_or_path == expected.name_or_path == str(tmp_path)
    assert found.generation_config == expected.generation_config
    assert found.generation_config.max_length == 77
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_a_text_tower_of_another_type(tmp_path, family):
    tiny_whole(family).to(torch.bfloat16).save_pretrained(tmp_path)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    found = load_checkpoint(str(tmp_path)).model
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, whole(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("source", ["smollm2-135m", "model.gguf"])
def test_a_gguf_file_has_no_device_map(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"device_map is 'auto', but .* is a GGUF file"):
        load_checkpoint(source, device_map="auto")
