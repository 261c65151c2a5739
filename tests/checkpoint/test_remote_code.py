"""Code that comes with a checkpoint: run only where it is asked for, and checked like any model then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import save_checkpoint, tiny_model, tiny_tokenizer

from act_export.attention.hook import attention_hook, check_supported
from act_export.attention.reference_attention import ReferenceAttention
from act_export.checkpoint.load import load_checkpoint
from act_export.checkpoint.tokenizer import load_tokenizer_of
from act_export.errors import CheckpointError

MARKER = "ACT_EXPORT_TEST_MARKER"
MODELING = f"""
import os
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path(os.environ["{MARKER}"]).touch()


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZATION = f"""
import os
from pathlib import Path

from transformers import PreTrainedTokenizerFast

Path(os.environ["{MARKER}"]).touch()


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(scope="module", autouse=True)
def modules_folder(tmp_path_factory):
    """Where transformers copies code to; not the user's."""
    patch = pytest.MonkeyPatch()
    patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    yield
    patch.undo()


@pytest.fixture
def marker(monkeypatch, tmp_path) -> Path:
    """The file that a checkpoint's code makes."""
    path = tmp_path / "marker"
    monkeypatch.setenv(MARKER, str(path))
    return path


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_own_model(folder: Path, model_type: str = "own_llama") -> Path:
    """A checkpoint whose model is its own."""
    save_checkpoint(folder)
    (folder / "modeling_own.py").write_text(f"# {folder}{MODELING}")  # no module that a process has already
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change(folder / "config.json", model_type=model_type, auto_map=auto_map, architectures=["OwnForCausalLM"])
    return folder


def with_own_tokenizer(folder: Path) -> Path:
    """A checkpoint whose tokenizer is its own; the model is one that transformers has."""
    save_checkpoint(folder)
    (folder / "tokenization_own.py").write_text(f"# {folder}{TOKENIZATION}")
    auto_map = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)
    return folder


def test_a_model_with_code_is_refused(tmp_path, marker):
    folder = with_own_model(tmp_path / "own")
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(str(folder))
    assert f"{folder} needs code of its own, which isn't run unless asked for: modeling_own.py" in str(raised.value)
    assert "--trust-remote-code" in str(raised.value)
    assert not marker.exists()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_a_model_with_code_runs_where_it_is_asked_for(tmp_path, marker, dtype, tolerance):
    loaded = load_checkpoint(str(with_own_model(tmp_path / "own")), dtype=dtype, trust_remote_code=True)
    assert marker.exists()
    assert type(loaded.model).__name__ == "OwnForCausalLM"
    assert (loaded.identity.architecture, loaded.identity.num_layers, loaded.identity.num_heads) == ("own_llama", 2, 4)
    check_supported(loaded.model)
    ids = torch.arange(3, 13)[None]
    with attention_hook(loaded.model, ReferenceAttention(None)) as hooked:
        logits = hooked(ids, torch.ones_like(ids)).logits
    expected = tiny_model()(ids).logits
    torch.testing.assert_close(logits.float(), expected, atol=tolerance * float(expected.abs().max()), rtol=tolerance)


def test_trust_does_not_last(tmp_path, marker):
    folder = with_own_model(tmp_path / "own")
    load_checkpoint(str(folder), trust_remote_code=True)
    marker.unlink()
    with pytest.raises(CheckpointError, match="needs code of its own"):
        load_checkpoint(str(folder))
    assert not marker.exists()


def test_code_that_transformers_does_not_need_is_not_run(tmp_path, marker):
    loaded = load_checkpoint(str(with_own_model(tmp_path / "own", model_type="llama")))
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert not marker.exists()


def test_code_that_is_missing(tmp_path, marker):
    folder = with_own_model(tmp_path / "own")
    (folder / "modeling_own.py").unlink()
    with pytest.raises(CheckpointError, match=r"can't load .*modeling_own\.py"):
        load_checkpoint(str(folder), trust_remote_code=True)


@pytest.mark.parametrize("load", [load_checkpoint, load_tokenizer_of])
def test_a_tokenizer_with_code(tmp_path, marker, load):
    folder = with_own_tokenizer(tmp_path / "own")
    with pytest.raises(CheckpointError) as raised:
        load(str(folder))
    assert "needs code of its own, which isn't run unless asked for: tokenization_own.py" in str(raised.value)
    assert "auto_map in tokenizer_config.json" in str(raised.value)
    assert not marker.exists()
    loaded = load(str(folder), trust_remote_code=True)
    tokenizer = loaded.tokenizer if load is load_checkpoint else loaded
    assert marker.exists()
    assert tokenizer("ab").input_ids == tiny_tokenizer()("ab").input_ids
    assert tokenizer.padding_side == "left"
