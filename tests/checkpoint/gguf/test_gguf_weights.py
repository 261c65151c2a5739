"""Weights of GGUF files are converted, read and compared in pieces, and are what they are as a whole."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import WIDE, as_kind, logits_of, random_blocks, tiny_model, write
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, modeling_gguf_pytorch_utils

from act_export.checkpoint.gguf import convert, header, weights
from act_export.checkpoint.gguf.convert import converted
from act_export.checkpoint.gguf.header import StoredTensor, read_header
from act_export.checkpoint.gguf.names import Target
from act_export.checkpoint.gguf.plan import Pair
from act_export.checkpoint.gguf.weights import pieces_of
from act_export.checkpoint.load import load_checkpoint

PIECE_BYTES = 40_000


@given(
    st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(1, 40), min_size=1, max_size=3)), max_size=20),
    st.integers(1, 4000),
)
def test_pieces_are_full_and_whole(tensors, most_bytes):
    pairs = [
        Pair(StoredTensor(f"t{at}", tuple(shape), None, Path(), 0, 0), Target(f"p{number}"))
        for at, (number, shape) in enumerate(tensors)
    ]
    pieces = list(pieces_of(pairs, most_bytes))
    sizes = [sum(4 * prod(pair.tensor.shape) for pair in piece) for piece in pieces]
    parameters = [{pair.target.parameter for pair in piece} for piece in pieces]
    assert sorted(pair.tensor.name for piece in pieces for pair in piece) == sorted(pair.tensor.name for pair in pairs)
    assert sum(map(len, parameters)) == len(set().union(*parameters))
    assert all(size <= most_bytes or len(own) == 1 for size, own in zip(sizes, parameters, strict=True))
    for piece, size, following in zip(pieces[1:], sizes, pieces[1:], strict=False):
        first = [pair for pair in piece if pair.target.parameter == following[0].target.parameter]
        assert size + sum(4 * prod(pair.tensor.shape) for pair in first) > most_bytes


@pytest.mark.sampled(2)
@pytest.mark.parametrize("architecture", ["llama", "qwen2moe", "gemma3", "gpt2"])
def test_a_model_that_is_converted_in_pieces(tmp_path, monkeypatch, capfd, architecture):
    """transformers' loader never gives more than a piece, or a parameter, and the model is the one that was written."""
    monkeypatch.setattr(convert, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(weights, "PIECE_BYTES", PIECE_BYTES)
    load, given_bytes = modeling_gguf_pytorch_utils.load_gguf_checkpoint, []

    def recorded(*arguments, **options):
        found = load(*arguments, **options)
        if options.get("return_tensors"):
            sizes = [tensor.nbytes for tensor in found["tensors"].values()]
            given_bytes.append((sum(sizes), max(sizes)))
        return found

    monkeypatch.setattr(modeling_gguf_pytorch_utils, "load_gguf_checkpoint", recorded)
    make_table, tables = gguf.get_tensor_name_map, []
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *of: tables.append(of) or make_table(*of))
    model = tiny_model(architecture)
    folder = converted(write(tmp_path / "model.gguf", model, architecture))
    assert len(given_bytes) > 2
    assert len(tables) == len(given_bytes)
    assert all(total <= max(PIECE_BYTES, largest) for total, largest in given_bytes)
    assert len(list(folder.glob("model-*.safetensors"))) == len(given_bytes)
    assert not (folder / "model.safetensors").exists()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(total for total, _ in given_bytes)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits_of(load_checkpoint(str(folder)).model), logits_of(loaded))
    assert "onverting" not in capfd.readouterr().err


def test_what_a_folder_says_is_what_transformers_would_have_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "cache_folder", lambda: tmp_path / "cache")
    folder = converted(write(tmp_path / "model.gguf", tiny_model("qwen2"), "qwen2"))
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    for file in ("config.json", "generation_config.json"):
        assert json.loads((folder / file).read_text()) == json.loads((tmp_path / "saved" / file).read_text())


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q6_K"])
@pytest.mark.parametrize("at_once", [1, 700, 1 << 22])
def test_tensors_are_dequantised_in_pieces(tmp_path, monkeypatch, kind, at_once):
    monkeypatch.setattr(header, "_AT_ONCE", at_once)
    chosen = gguf.GGMLQuantizationType[kind]
    quantise = as_kind(chosen) if kind == "F16" else random_blocks(chosen)
    path = write(tmp_path / "model.gguf", tiny_model("llama", **WIDE), quantise=quantise)
    found = read_header(path).tensors
    for tensor in gguf.GGUFReader(path).tensors:
        whole = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(found[tensor.name].values(), whole.reshape(found[tensor.name].shape))
