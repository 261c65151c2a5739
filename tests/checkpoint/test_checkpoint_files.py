"""What is said of a checkpoint's files before a weight is read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import transformers
from tiny import save_checkpoint

from act_export.checkpoint.folder import code_files, weight_files
from act_export.checkpoint.load import load_checkpoint
from act_export.errors import CheckpointError

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4}
BITSANDBYTES = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture
def folder(checkpoint_folder, tmp_path) -> Path:
    """A checkpoint to spoil."""
    shutil.copytree(checkpoint_folder, tmp_path, dirs_exist_ok=True)
    return tmp_path


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def message_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(str(folder))
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "isn't JSON"),
        (b"{nonsense", "isn't JSON: .* get the file anew"),
        (b"\xff\xfe\x00", "isn't JSON"),
        (b"[1]", "no JSON object but a list"),
        (b"{}", "has no model_type"),
        (b'{"model_type": 3}', "has no model_type"),
    ],
)
def test_a_configuration_that_is_none(folder, content, said):
    (folder / "config.json").write_bytes(content)
    assert re.search(rf"config\.json of .*{said}", message_of(folder))


def test_an_unknown_model_type(folder):
    change_config(folder, model_type="no_such_model")
    assert f"'no_such_model', which transformers {transformers.__version__} doesn't know" in message_of(folder)


def test_weights_without_a_configuration(folder):
    (folder / "config.json").unlink()
    assert "has weights (model.safetensors) but no config.json" in message_of(folder)


def test_an_exported_model_in_place_of_a_checkpoint(tmp_path):
    (tmp_path / "model.onnx").touch()
    assert "model.onnx is exported already: act-export graft" in message_of(tmp_path)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model-q4.gguf", "pass one .gguf file by its path"),
        ("model.onnx", "act-export graft calibrates it"),
        ("weights.pt", "load it in PyTorch and save it with save_pretrained"),
        ("consolidated.00.pth", "load it in PyTorch"),
        ("tf_model.h5", "with an older transformers"),
        ("consolidated.safetensors", "rename it"),
        ("weights.bin", "rename it"),
    ],
)
def test_weights_in_another_format(folder, file, said):
    (folder / "model.safetensors").rename(folder / file)
    message = message_of(folder)
    assert "no weights (model.safetensors or pytorch_model.bin" in message
    assert f"{file}: " in message
    assert said in message


def test_weights_of_pickle_alone_are_read(folder):
    import torch
    from safetensors.torch import load_file

    expected = load_checkpoint(str(folder)).identity
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert load_checkpoint(str(folder)).identity == expected


def test_safetensors_are_preferred(tmp_path):
    assert weight_files(["pytorch_model.bin", "model.safetensors"], tmp_path, "x") == ("model.safetensors",)
    index = {"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = weight_files(["pytorch_model.bin", "model.safetensors.index.json"], tmp_path, "x")
    assert found == ("model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "nonsense"])
def test_an_index_of_nothing(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json of" in message_of(folder)


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "LlamaForSequenceClassification", "BertForPreTraining"])
def test_a_model_of_another_task(folder, architecture):
    change_config(folder, architectures=[architecture])
    assert f"is a {architecture}, which is no causal language model" in message_of(folder)


def test_a_model_without_a_causal_form(folder):
    change_config(folder, model_type="distilbert", architectures=None)
    assert "a distilbert model, which transformers doesn't know as a causal language model" in message_of(folder)


@pytest.mark.parametrize("whole", [True, False], ids=["with a model", "alone"])
def test_an_adapter(folder, whole):
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "owner/base"})
    )
    if not whole:
        (folder / "config.json").unlink()
    message = message_of(folder)
    assert "is an adapter (LORA, adapter_config.json) for owner/base; merge it" in message
    assert "merge_and_unload" in message


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        (GPTQ, "quantized (gptq, 4 bits)"),
        (AWQ, "quantized (awq, 4 bits)"),
        (BITSANDBYTES, "quantized (bitsandbytes, 4 bits)"),
        ({"load_in_8bit": True}, "quantized (bitsandbytes, 8 bits)"),
        ({"quant_method": "compressed-tensors"}, "quantized (compressed-tensors)"),
    ],
)
def test_quantized_weights(folder, quantization, said):
    change_config(folder, quantization_config=quantization)
    message = message_of(folder)
    assert said in message
    assert "pass the model that it was made from" in message


@pytest.mark.parametrize(("method", "settings"), [("mxfp4", "Mxfp4Config"), ("fp8", "FineGrainedFP8Config")])
def test_quantized_weights_that_transformers_can_dequantize(folder, method, settings):
    change_config(folder, quantization_config={"quant_method": method})
    assert f"quantization_config={settings}(dequantize=True)" in message_of(folder)
    assert hasattr(transformers, settings)


def test_no_quantization_after_all(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    assert load_checkpoint(str(folder)).identity.num_layers == 2


@pytest.mark.parametrize(
    ("auto_map", "classes", "files"),
    [
        ({"AutoConfig": "configuration_a.A", "AutoModelForCausalLM": "modeling_a.B"}, None, 2),
        ({"AutoConfig": "modeling_a.A", "AutoModelForCausalLM": "modeling_a.B"}, None, 1),
        ({"AutoModel": "modeling_a.A"}, None, 0),
        ({"AutoTokenizer": ["tokenization_a.A", None]}, ["AutoTokenizer"], 1),
        (["tokenization_a.A", None], ["AutoTokenizer"], 1),
        (None, None, 0),
    ],
)
def test_files_of_code(auto_map, classes, files):
    found = code_files({"auto_map": auto_map}, *([classes] if classes else []))
    assert len(found) == files
    assert all(file.endswith("_a.py") for file in found)


def test_code_of_another_repository():
    assert code_files({"auto_map": {"AutoConfig": "other/repo--part.configuration_a.A"}}) == (
        "part/configuration_a.py of other/repo",
    )


def test_a_checkpoint_as_it_should_be(tmp_path):
    assert load_checkpoint(str(save_checkpoint(tmp_path))).revision == ""
