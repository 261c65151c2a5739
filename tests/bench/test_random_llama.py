"""A checkpoint of random weights: transformers loads it, it has sinks, and it is written in bounded pieces."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import random_llama
import torch
from random_llama import CONTEXT, Shape, weights, write_checkpoint
from safetensors.torch import load_file

from act_export.attention.hook import attention_hook
from act_export.attention.reference_attention import ReferenceAttention
from act_export.calibration.file import Calibration
from act_export.checkpoint.load import load_checkpoint

pytestmark = pytest.mark.in_turn(3)

TOOL = Path(__file__).parents[2] / "tools" / "bench" / "random_llama.py"
SMALL = Shape(layers=3, heads=4, kv_heads=2, hidden=128, intermediate=160, vocabulary=400, sink_every=100)


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """Runs the program here: its exit code and what it says on standard error."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        try:
            code = random_llama.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, capsys.readouterr().err

    return run


def test_default_shape_is_llama_2_7b():
    assert (Shape().layers, Shape().heads, Shape().kv_heads, Shape().head_size) == (32, 32, 32, 128)
    assert (Shape().hidden, Shape().intermediate, Shape().vocabulary) == (4096, 11008, 32000)


def test_transformers_loads_it(tmp_path):
    size = write_checkpoint(tmp_path, SMALL)
    checkpoint = load_checkpoint(str(tmp_path))
    config = checkpoint.model.config
    assert type(checkpoint.model).__name__ == "LlamaForCausalLM"
    assert checkpoint.tokenizer is None
    assert config.max_position_embeddings == CONTEXT
    assert config.num_key_value_heads == 2
    parameters = dict(checkpoint.model.named_parameters())
    assert size == 2 * sum(parameter.numel() for parameter in parameters.values())
    for name, tensor in weights(SMALL, seed=0):
        torch.testing.assert_close(parameters.pop(name), tensor.float(), rtol=0, atol=0)
    assert not parameters


def test_shards_are_bounded(tmp_path):
    write_checkpoint(tmp_path, SMALL, shard_bytes=60_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 5
    assert {path.name for path in files} == set(index["weight_map"].values())
    largest = max(tensor.nbytes for _, tensor in weights(SMALL, seed=0))
    for path in files:
        tensors = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in tensors)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= max(60_000, largest)
    assert load_checkpoint(str(tmp_path)).model.config.num_hidden_layers == 3


def test_sink_tokens_are_later_sinks_in_every_head(tmp_path, monkeypatch):
    import act_export.calibration.reference as reference

    write_checkpoint(tmp_path, Shape(layers=4, heads=4, kv_heads=4, hidden=512, intermediate=512, vocabulary=3000))
    model = load_checkpoint(str(tmp_path)).model
    tokens = torch.randint(1, 500, (1, 300), generator=torch.Generator().manual_seed(0))
    tokens[0, [40, 150]] = torch.tensor([512, 1024])
    found = []
    later_sinks = reference.later_sinks

    def spy(*arguments, **options):
        found.append(later_sinks(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(reference, "later_sinks", spy)
    calibration = Calibration(dict.fromkeys(range(4), (0, 1, 2, 3)), beta=0.4, threshold=0.1)
    with torch.no_grad(), attention_hook(model, ReferenceAttention(calibration)) as hooked:
        hooked(tokens, torch.ones_like(tokens))
    assert len(found) == 4
    for sinks in found:
        assert [row.nonzero().flatten().tolist() for row in sinks.flatten(0, -2)] == [[40, 150]] * 4


def test_same_seed_same_weights():
    one, two, other = (next(iter(weights(SMALL, seed)))[1] for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_command_line(run_tool, tmp_path):
    folder = tmp_path / "checkpoint"
    options = ("--layers", 1, "--heads", 2, "--kv-heads", 1, "--hidden", 32, "--intermediate", 16, "--vocabulary", 64)
    code, errors = run_tool("--out", folder, *options)
    assert code == 0, errors
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"] == 64
    assert os.access(TOOL, os.X_OK)
    code, errors = run_tool("--out", folder, *options)
    assert code == 2
    assert "isn't an empty folder" in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--hidden", "100", "--heads", "3"), "--hidden 100 isn't --heads 3 times an even head size"),
        (("--hidden", "64", "--heads", "32"), "even head size of 4 or more"),
        (("--kv-heads", "5"), "--kv-heads 5 doesn't divide --heads 32"),
        (("--layers", "0"), "0 is not a positive number"),
    ],
)
def test_refuses(run_tool, tmp_path, options, message):
    code, errors = run_tool("--out", tmp_path / "checkpoint", *options)
    assert code == 2
    assert message in errors
    assert not (tmp_path / "checkpoint").exists()
