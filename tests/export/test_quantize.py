"""Weights in blocks of int4 and int8: the blocks, the graph, and what ONNX Runtime makes of it."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CALIBRATION, tiny_checkpoint

from act_export.calibration.strengths import CalibratedHeads
from act_export.errors import ActExportError
from act_export.export import build_model
from act_export.export.job import export_model
from act_export.export.quantize import quantize_weight
from act_export.export.slim import slim
from act_export.export.trace import trace
from act_export.onnx_file.inspect import inspect_file
from act_export.onnx_file.precision import Quantization, quantization_of
from act_export.verify.parity.dequantized import dequantized
from act_export.verify.parity.job import verify_file
from act_export.verify.parity.quantized_file import quantized_weights

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


@pytest.fixture(scope="module")
def checkpoint():
    return tiny_checkpoint(**WIDE)


@pytest.fixture(scope="module")
def files(checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """int4 and int8 at accuracy level 1, and int4 at the default level; traced once."""
    folder = tmp_path_factory.mktemp("quantized")
    wanted = {"int4": ("int4", 1), "int8": ("int8", 1), "default": ("int4", None)}
    slimmed = ir.to_proto(slim(trace(checkpoint.model, CalibratedHeads.of([CALIBRATION])), weight_prefix="model."))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("act_export.export.build.trace", lambda *_, **__: None)
        patch.setattr("act_export.export.build.slim", lambda *_, **__: ir.from_proto(slimmed))
        for name, (dtype, level) in wanted.items():
            build_model(checkpoint, CALIBRATION, folder / f"{name}.onnx", dtype=dtype, accuracy_level=level)
    return {name: folder / f"{name}.onnx" for name in wanted}


@settings(max_examples=30, deadline=None)
@given(
    outputs=st.integers(1, 9),
    inputs=st.integers(1, 100),
    bits=st.sampled_from([4, 8]),
    block_size=st.sampled_from([16, 32, 64]),
    seed=st.integers(0, 100),
)
def test_every_value_is_the_nearest_of_its_block(outputs: int, inputs: int, bits: int, block_size: int, seed: int):
    weight = np.random.default_rng(seed).normal(size=(outputs, inputs)).astype(np.float32)
    blocks = quantize_weight(weight, Quantization(bits, block_size))
    count = -(-inputs // block_size)
    assert blocks.packed.shape == (outputs, count, block_size * bits // 8)
    assert blocks.scales.shape == (outputs, count)
    values = blocks.packed.reshape(outputs, -1).astype(np.int32)
    if bits == 4:
        values = np.stack([values & 15, values >> 4], -1).reshape(outputs, -1)
    steps = np.abs(blocks.scales).repeat(block_size, 1)[:, :inputs]
    rounded = (values[:, :inputs] - 2 ** (bits - 1)) * blocks.scales.repeat(block_size, 1)[:, :inputs]
    # Half a step, but a whole one at the end of the range that a symmetric block has one value fewer on.
    assert (np.abs(rounded - weight) <= 1.001 * steps).all()
    inner = np.abs(weight) < (2 ** (bits - 1) - 1.5) * steps
    assert (np.abs(rounded - weight)[inner] <= 0.501 * steps[inner]).all()


def test_a_weight_of_many_outputs_is_quantized_as_in_one_piece():
    weight = np.random.default_rng(0).normal(size=(4096 + 3, 32)).astype(np.float32)
    whole, tail = quantize_weight(weight, Quantization(4)), quantize_weight(weight[4096:], Quantization(4))
    assert (whole.packed[4096:] == tail.packed).all()
    assert (whole.scales[4096:] == tail.scales).all()


def test_the_quantizer_leaves_the_logging_of_the_process_alone():
    quantize_weight(np.ones((1, 32), np.float32), Quantization(4))
    assert not any(type(handler) is logging.NullHandler for handler in logging.getLogger().handlers)
    assert logging.getLogger().level == logging.WARNING


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int4", 5), "accuracy level is 5"),
        (("int8", 1, 48), "block size is 48"),
        (("float32", 4), "float32 has no accuracy level"),
        (("bfloat16", None, 32), "bfloat16 has no block size"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, message: str):
    with pytest.raises(ActExportError, match=message):
        quantization_of(*arguments)


def test_float_types_have_no_quantization():
    assert quantization_of("float16") is None
    assert quantization_of("int8") == Quantization(8, 32, 4)


def test_without_onnx_runtime_the_error_says_what_to_install(checkpoint, tmp_path: Path, monkeypatch):
    def absent() -> None:
        raise ActExportError("ONNX Runtime isn't installed: pip install 'act-export[cpu]'")

    monkeypatch.setattr("act_export.export.build.import_onnxruntime", absent)
    with pytest.raises(ActExportError, match="pip install"):
        build_model(checkpoint, None, tmp_path / "m.onnx", dtype="int4")
    assert not list(tmp_path.iterdir())


def test_products_and_the_table_of_tokens_are_quantized(files):
    graph = onnx.load(files["int4"], load_external_data=False).graph
    counts = Counter(node.op_type for node in graph.node)
    assert counts["MatMulNBits"] == 2 * 5 + 1  # packed query, key and value; output; gate, up, down; and the logits
    assert counts["GatherBlockQuantized"] == 1
    assert not {"MatMul", "Gather", "Transpose"} & counts.keys()
    assert all(node.name for node in graph.node)
    left = [
        tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2
    ]
    assert all(tensor.name.endswith("_scales") for tensor in left)


def test_a_tied_table_is_stored_once_in_8_bits(files):
    weights = quantized_weights(files["int4"])
    logits, lookup = weights[-1], next(weight for weight in weights if weight.operator == "GatherBlockQuantized")
    assert {weight.bits for weight in weights if weight not in (logits, lookup)} == {4}
    assert (logits.bits, lookup.bits) == (8, 8)
    assert logits.packed.name == lookup.packed.name
    assert np.array_equal(logits.dequantize(), lookup.dequantize())


def test_the_file_says_how_it_is_quantized(files):
    found = inspect_file(files["default"])
    assert (found.precision, found.accuracy_level, found.block_size) == ("int4", 4, 32)
    assert inspect_file(files["int8"]).accuracy_level == 1


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_the_file_is_pytorch_with_its_weights(files, checkpoint, name: str):
    report = verify_file(files[name], checkpoint, CALIBRATION)
    assert report.precision == name
    assert report.passed
    assert all(engine.max_difference < 1e-3 for engine in report.engines)


def test_int8_activations_are_held_against_pytorch_that_rounds_them(files, checkpoint):
    report = verify_file(files["default"], checkpoint, CALIBRATION)
    assert report.precision == "int4 with int8 activations"
    assert report.pytorch is not None
    assert report.pytorch.engine == "PyTorch with int8 activations"
    assert report.passed
    assert all(engine.max_difference > 1e-3 for engine in report.engines)  # they are rounded, in ONNX Runtime too


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("opt", "qwen2", "phi3", "gemma2")]


@pytest.mark.parametrize("architecture", ["gpt2", *OTHERS])
def test_biases_and_layouts_of_other_architectures(tmp_path: Path, architecture: str):
    changes = {"gpt2": {"n_embd": 64}, "opt": {"word_embed_proj_dim": 64, **WIDE}}.get(architecture, WIDE)
    checkpoint = tiny_checkpoint(architecture, **changes)
    build_model(checkpoint, CALIBRATION, tmp_path / "m.onnx", dtype="int8", accuracy_level=1)
    assert not {"MatMul", "Gemm"} & {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    report = verify_file(tmp_path / "m.onnx", checkpoint, CALIBRATION)
    assert report.passed
    found = dequantized(tmp_path / "m.onnx", checkpoint).checkpoint.model
    for (name, before), after in zip(checkpoint.model.named_parameters(), found.parameters(), strict=True):
        assert (name.endswith("weight") and before.dim() == 2) or before is after


@pytest.mark.slow
def test_a_table_of_broken_blocks_stays_float32(tmp_path: Path):
    checkpoint = tiny_checkpoint(hidden_size=40, head_dim=8, intermediate_size=48)
    build_model(checkpoint, CALIBRATION, tmp_path / "m.onnx", dtype="int8", accuracy_level=1)
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node)
    assert (counts["Gather"], counts["GatherBlockQuantized"]) == (1, 0)
    assert verify_file(tmp_path / "m.onnx", checkpoint, CALIBRATION).passed


@pytest.mark.slow
def test_an_untied_table_has_weights_of_its_own(tmp_path: Path):
    checkpoint = tiny_checkpoint(tie_word_embeddings=False, **WIDE)
    build_model(checkpoint, None, tmp_path / "m.onnx", dtype="int4", block_size=16, accuracy_level=1)
    weights = quantized_weights(tmp_path / "m.onnx")
    lookup = next(weight for weight in weights if weight.operator == "GatherBlockQuantized")
    assert lookup.packed.name != weights[-1].packed.name
    assert (lookup.bits, weights[-1].bits, lookup.block_size) == (8, 8, 16)
    assert verify_file(tmp_path / "m.onnx", checkpoint, None).passed


@pytest.mark.slow
def test_the_whole_job(checkpoint, tmp_path: Path):
    written = export_model(checkpoint, CALIBRATION, tmp_path / "m.onnx", dtype="int8", accuracy_level=1)
    assert written.parity is not None
    assert written.parity.precision == "int8"
    with pytest.raises(ActExportError, match="float32 has no accuracy level"):
        export_model(checkpoint, CALIBRATION, tmp_path / "n.onnx", accuracy_level=1)
    assert not (tmp_path / "n.onnx").exists()
