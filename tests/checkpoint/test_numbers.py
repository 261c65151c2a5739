"""Weights that are no numbers are named before anything is exported; a bias may rule a token out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from act_export.checkpoint.load import load_checkpoint
from act_export.checkpoint.numbers import check_fits, check_numbers, is_finite
from act_export.errors import CheckpointError

NORM, UP, BIAS = "model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.bias"


def spoiled(folder, name, number, architecture="llama", dtype=None):
    """A checkpoint with one number of one tensor replaced."""
    tiny_model(architecture).save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name].clone() if dtype is None else tensors[name].to(dtype)
    tensors[name].view(-1)[-1] = number
    save_file(tensors, file, {"format": "pt"})
    return str(folder)


def read_all(folder, stream, **options):
    loaded = load_checkpoint(folder, stream=stream, **options)
    if loaded.streamed is not None:
        for name in loaded.streamed.origins:
            loaded.streamed.read(name)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("name", "number"), [(NORM, math.nan), (UP, math.nan), (UP, math.inf), (UP, -math.inf), (NORM, -math.inf)]
)
def test_a_weight_that_is_no_number(tmp_path, name, number, stream):
    word = "NaN" if math.isnan(number) else "infinity"
    with pytest.raises(CheckpointError, match=rf"{name} .*model\.safetensors.* has {word} in 1 of its \d+ numbers"):
        read_all(spoiled(tmp_path, name, number), stream)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_joined_weight_that_is_no_number(tmp_path, stream):
    tiny_model("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[next(name for name in tensors if "experts.3" in name)].view(-1)[0] = math.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.\w+ .* has NaN in 1 of its"):
        read_all(str(tmp_path), stream)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_bias_that_rules_a_token_out(tmp_path, stream):
    read_all(spoiled(tmp_path / "a", BIAS, -math.inf, "phi"), stream)
    with pytest.raises(CheckpointError, match=r"lm_head\.bias .* has infinity in 1 of its 259 numbers"):
        read_all(spoiled(tmp_path / "b", BIAS, math.inf, "phi"), stream)


@pytest.mark.parametrize(
    ("number", "stored", "dtype", "said"),
    [
        (1e6, torch.float32, "float16", r"1e\+06; float16 goes up to 65504.*--dtype bfloat16 or float32"),
        (3.4e38, torch.float32, "bfloat16", r"3\.4e\+38; bfloat16 goes up to 3\.3"),
        (1e300, torch.float64, "float32", r"1e\+300; float32 goes up to 3\.4"),
    ],
)
def test_a_number_that_a_type_has_no_room_for(tmp_path, number, stored, dtype, said):
    folder = spoiled(tmp_path, NORM, number, dtype=stored)
    with pytest.raises(CheckpointError, match=rf"{NORM} .* has the number {said}"):
        load_checkpoint(folder, dtype=dtype)


def test_a_number_that_is_streamed_and_has_no_room(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{NORM} .* has the number 1e\+300; float32"):
        load_checkpoint(spoiled(tmp_path, NORM, 1e300, dtype=torch.float64), stream=True)


@given(
    st.lists(st.sampled_from([0.0, 1.5, -3e38, 3e38]), max_size=12),
    st.none() | st.tuples(st.integers(0, 11), st.sampled_from([math.nan, math.inf, -math.inf])),
    st.integers(1, 5),
)
def test_numbers_are_looked_at_in_pieces(values, spoil, piece):
    if spoil is not None and spoil[0] < len(values):
        values[spoil[0]] = spoil[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("act_export.checkpoint.numbers._PIECE", piece)
        assert is_finite(torch.tensor(values)) == all(math.isfinite(value) for value in values)


def test_what_is_finite_passes():
    large = torch.full((8, 8), 3e38)  # whose sum isn't
    check_numbers("w", large, "of a")
    check_numbers("w", torch.arange(3), "of a")
    check_numbers("sinks", torch.tensor([-math.inf, 0.0]), "of a")
    check_fits("w", large, large, "of a")
    check_fits("w", torch.tensor([math.inf]), torch.tensor([math.inf]), "of a")
