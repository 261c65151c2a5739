"""Every kind of export and graft calls the dimensions of its inputs and outputs alike."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest
from tiny import CALIBRATION, tiny_checkpoint

from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.file import Calibration
from act_export.export import build_model
from act_export.graft.job import graft
from act_export.onnx_file.pack_sink_state import pack_sink_state

EVERY = {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}
CHOSEN = {
    "plain": (None, "float32"),
    "plain int4": (None, "int4"),
    "plain float16": (None, "float16"),
    "no head found": (Calibration({}), "float32"),
    "calibrated int4": (CALIBRATION, "int4"),
    "switchable": (CalibrationSet.of(None, every=EVERY), "float32"),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_exports(tiny, tmp_path, name):
    calibrations, dtype = CHOSEN[name]
    build_model(tiny, calibrations, tmp_path / "m.onnx", dtype=dtype)
    assert_named_alike(tmp_path / "m.onnx")


@pytest.mark.in_turn(3)
def test_an_export_of_another_architecture(tmp_path):
    build_model(tiny_checkpoint("gemma3_text"), None, tmp_path / "m.onnx")
    assert_named_alike(tmp_path / "m.onnx")


@pytest.mark.parametrize("switchable", [False, True])
def test_grafts(tiny_plain_file, tmp_path, switchable):
    graft(tiny_plain_file, CALIBRATION, tmp_path / "m.onnx", switchable=switchable, check=False)
    assert_named_alike(tmp_path / "m.onnx")


def test_state_in_the_cache(tiny_file, tmp_path):
    model = onnx.load(tiny_file, load_external_data=False)
    pack_sink_state(model)
    assert_named_alike(model)


def assert_named_alike(model: onnx.ModelProto | Path) -> None:
    """Against names that are written down here again."""
    graph = (onnx.load(model, load_external_data=False) if isinstance(model, Path) else model).graph
    found = {info.name: [dim.dim_param for dim in info.type.tensor_type.shape.dim] for info in graph.input}
    found |= {info.name: [dim.dim_param for dim in info.type.tensor_type.shape.dim] for info in graph.output}
    tokens = ["batch_size", "sequence_length"]
    fixed = {
        "input_ids": tokens,
        "inputs_embeds": [*tokens, ""],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "logits": ["batch_size", "logits_length", ""],
        "logits_to_keep": [],
        "calibration": ["calibrations", "", ""],
    }
    assert {"attention_mask", "logits", "past_key_values.0.key", "present.1.value"} <= set(found)
    for name, dims in found.items():
        if name == "position_ids":
            assert dims in (tokens, ["", *tokens])
        elif re.fullmatch(r"past_(key_values\.\d+\.(key|value)|sink_scores\.\d+)", name):
            assert dims == ["batch_size", "", "past_sequence_length", ""], name
        elif re.fullmatch(r"present(\.\d+\.(key|value)|_sink_scores\.\d+)", name):
            assert dims == ["batch_size", "", "total_sequence_length", ""], name
        else:
            assert dims == fixed[name], name
    inside = {dim.dim_param for info in graph.value_info for dim in info.type.tensor_type.shape.dim}
    assert not [name for name in inside if re.search(r"\bs\d+\b", name)]
