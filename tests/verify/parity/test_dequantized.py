"""Which weights of a quantized file are which layer's, and PyTorch that rounds activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tiny import CALIBRATION, save_checkpoint, tiny_checkpoint
from typer.testing import CliRunner

from act_export.calibration.file import Calibration
from act_export.commands.main import app
from act_export.errors import ActExportError
from act_export.export import build_model
from act_export.export.quantize import quantize_weight
from act_export.onnx_file.precision import Quantization
from act_export.verify.parity.dequantized import dequantized
from act_export.verify.parity.int8_activations import int8_activations_model, round_to_int8
from act_export.verify.parity.quantized_file import quantized_weights

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


@pytest.fixture(scope="module")
def checkpoint():
    return tiny_checkpoint(**WIDE)


def write(path: Path, weights: dict[str, np.ndarray], *, bits: int = 4) -> Path:
    """A file with a MatMulNBits for each weight (outputs, inputs), named as another exporter may."""
    nodes, tensors = [], []
    for name, weight in weights.items():
        blocks = quantize_weight(weight, Quantization(bits, 32))
        parts = {f"{name}.q": blocks.packed, f"{name}.s": blocks.scales}
        tensors += [numpy_helper.from_array(array, key) for key, array in parts.items()]
        shape = {"K": weight.shape[1], "N": weight.shape[0], "bits": bits, "block_size": 32}
        given = ["x", *parts]
        nodes.append(helper.make_node("MatMulNBits", given, [f"{name}.y"], name=name, domain="com.microsoft", **shape))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    outputs = [helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None) for name in weights]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def weights_of(checkpoint) -> dict[str, np.ndarray]:
    return {
        name: module.weight.detach().numpy()
        for name, module in checkpoint.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def test_packed_projections_under_other_names_are_found(checkpoint, tmp_path: Path):
    weights = weights_of(checkpoint)
    attention = "model.layers.1.self_attn"
    packed = np.concatenate([weights[f"{attention}.{part}_proj"] for part in "qkv"])
    path = write(tmp_path / "m.onnx", {"anything": packed, "other": weights["model.layers.0.mlp.up_proj"]})
    model = dequantized(path, checkpoint).checkpoint.model
    changed = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        if not np.array_equal(module.weight.numpy(), weights[name])
    }
    assert changed == {f"{attention}.{part}_proj" for part in "qkv"} | {"model.layers.0.mlp.up_proj"}
    whole = quantized_weights(path)[0].dequantize()
    heads = weights[f"{attention}.q_proj"].shape[0]
    assert np.array_equal(model.get_submodule(f"{attention}.q_proj").weight.numpy(), whole[:heads])


def test_rows_in_another_order_are_found(checkpoint, tmp_path: Path):
    weights = weights_of(checkpoint)
    name = "model.layers.1.mlp.gate_proj"
    order = np.random.default_rng(0).permutation(len(weights[name]))
    packed = np.concatenate([weights["model.layers.0.mlp.gate_proj"], weights[name][order]])
    path = write(tmp_path / "m.onnx", {"anything": packed})
    model = dequantized(path, checkpoint).checkpoint.model
    whole = quantized_weights(path)[0].dequantize()
    np.testing.assert_array_equal(model.get_submodule(name).weight.numpy()[order], whole[len(order) :])


def test_some_rows_twice_are_no_other_order(checkpoint, tmp_path: Path):
    weight = weights_of(checkpoint)["model.layers.1.mlp.gate_proj"]
    rows = np.r_[np.arange(1, len(weight)), 1]
    with pytest.raises(ActExportError, match="is no weight of"):
        dequantized(write(tmp_path / "m.onnx", {"anything": weight[rows]}), checkpoint)


def test_shares_of_a_packed_layer_are_found(checkpoint, tmp_path: Path):
    packed = tiny_checkpoint("phi3", **WIDE)
    weights = weights_of(packed)
    name = "model.layers.0.mlp.gate_up_proj"
    gate, up = np.split(weights[name], 2)
    path = write(tmp_path / "m.onnx", {"up": up, "gate": gate})
    found = dequantized(path, packed).checkpoint.model.get_submodule(name).weight.numpy()
    expected = [weight.dequantize() for weight in quantized_weights(path)]
    assert np.array_equal(found, np.concatenate(expected[::-1]))


def test_a_tied_matrix_that_only_the_logits_use_is_untied(checkpoint, tmp_path: Path):
    path = write(tmp_path / "m.onnx", {"head": weights_of(checkpoint)["lm_head"]})
    model = dequantized(path, checkpoint).checkpoint.model
    assert model.model.embed_tokens.weight is checkpoint.model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_the_checkpoint_stays_as_it_was(checkpoint, tmp_path: Path):
    before = {name: tensor.clone() for name, tensor in checkpoint.model.state_dict().items()}
    path = write(tmp_path / "m.onnx", weights_of(checkpoint))
    found = dequantized(path, checkpoint).checkpoint
    assert all(torch.equal(tensor, before[name]) for name, tensor in checkpoint.model.state_dict().items())
    assert found.identity == checkpoint.identity
    assert found.weights == "int4 of m.onnx"
    assert found.model.model.norm.weight is checkpoint.model.model.norm.weight


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_zero_points(tmp_path: Path, dtype):
    weight = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    path = write(tmp_path / "m.onnx", {"w": weight}, bits=8)
    model = onnx.load(path)
    packed, scales = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    zero_points = np.arange(10).reshape(5, 2) + 100
    model.graph.initializer.append(numpy_helper.from_array(zero_points.astype(dtype), "z"))
    model.graph.node[0].input.append("z")
    onnx.save(model, path)
    values = packed.reshape(5, 64).astype(np.float32) - zero_points.repeat(32, 1)
    assert np.allclose(quantized_weights(path)[0].dequantize(), values * scales.repeat(32, 1), atol=1e-6)


def test_zero_points_of_4_bits_are_packed_two_in_a_byte(tmp_path: Path):
    weight = np.random.default_rng(0).normal(size=(3, 96)).astype(np.float32)
    path = write(tmp_path / "m.onnx", {"w": weight})
    expected = quantized_weights(path)[0].dequantize()
    model = onnx.load(path)
    zero_points = numpy_helper.from_array(
        np.array([[0x88, 0x08]] * 3, np.uint8), "z"
    )  # 3 blocks: the last half is empty
    model.graph.initializer.append(zero_points)
    model.graph.node[0].input.append("z")
    onnx.save(model, path)
    assert np.array_equal(quantized_weights(path)[0].dequantize(), expected)
    assert np.abs(expected - weight).max() < np.abs(weight).max() / 7


def test_a_weight_of_another_model_is_an_error_that_names_it(checkpoint, tmp_path: Path):
    other = tiny_checkpoint(seed=1, **WIDE)
    path = write(tmp_path / "m.onnx", {"good": weights_of(checkpoint)["lm_head"], "bad": weights_of(other)["lm_head"]})
    with pytest.raises(ActExportError, match=r"bad, 259 x 64, is no weight of tiny llama from row 0 on"):
        dequantized(path, checkpoint)


def test_weights_too_alike_to_be_told_apart_are_an_error(tmp_path: Path):
    checkpoint = tiny_checkpoint(**WIDE)
    first, second = (checkpoint.model.model.layers[layer].mlp.up_proj for layer in (0, 1))
    second.weight.data.copy_(first.weight * 1.05)
    path = write(tmp_path / "m.onnx", {"up": first.weight.numpy()})
    with pytest.raises(ActExportError, match=r"up may be the weight of .*layers\.0.* or of .*layers\.1"):
        dequantized(path, checkpoint)
    second.weight.data.copy_(first.weight)  # equal ones: no matter which
    dequantized(path, checkpoint)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [({"weight_prepacked": 1}, "one kind of GPU"), ({"bits": 2}, "2 bits")],
)
def test_what_cannot_be_read_is_an_error(checkpoint, tmp_path: Path, attributes, message: str):
    path = write(tmp_path / "m.onnx", {"w": weights_of(checkpoint)["lm_head"]})
    model = onnx.load(path)
    node = model.graph.node[0]
    kept = [attribute for attribute in node.attribute if attribute.name not in attributes]
    del node.attribute[:]
    node.attribute.extend([*kept, *(helper.make_attribute(key, value) for key, value in attributes.items())])
    onnx.save(model, path)
    with pytest.raises(ActExportError, match=f"w can't be compared.*{message}"):
        dequantized(path, checkpoint)


def test_a_file_without_quantized_weights_is_an_error(checkpoint, tmp_path: Path):
    write(tmp_path / "m.onnx", {})
    with pytest.raises(ActExportError, match="no quantized weights"):
        dequantized(tmp_path / "m.onnx", checkpoint)


@settings(max_examples=30, deadline=None)
@given(inputs=st.integers(1, 80), block_size=st.sampled_from([16, 32]), seed=st.integers(0, 50))
def test_activations_are_rounded_to_127_steps_in_blocks(inputs: int, block_size: int, seed: int):
    x = torch.randn(2, 3, inputs, generator=torch.Generator().manual_seed(seed))
    rounded = round_to_int8(x, block_size)
    for start in range(0, inputs, block_size):
        block, result = x[..., start : start + block_size], rounded[..., start : start + block_size]
        step = block.abs().amax(-1, keepdim=True) / 127
        assert ((result - block).abs() <= step * 0.5001).all()
        assert torch.allclose(result / step, (result / step).round(), atol=1e-3)
    assert torch.equal(round_to_int8(torch.zeros(1, 5), block_size), torch.zeros(1, 5))


def test_only_the_named_layers_round_their_inputs(checkpoint):
    ids = torch.arange(8)[None]
    with torch.no_grad():
        exact = checkpoint.model(ids).logits
        rounded = int8_activations_model(checkpoint.model, {"lm_head": 32})(ids).logits
        hidden = checkpoint.model.model(ids).last_hidden_state
        expected = round_to_int8(hidden, 32) @ checkpoint.model.lm_head.weight.T
        assert torch.equal(checkpoint.model(ids).logits, exact)
    assert torch.allclose(rounded, expected, atol=1e-5)
    assert not torch.allclose(rounded, exact, atol=1e-5)


@pytest.mark.slow
def test_a_search_on_a_files_weights_says_so(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_checkpoint(tmp_path / "model", **WIDE)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i}+1=", "choices": ["a", "b"], "answer": {i % 2}}}\n' for i in range(30)))
    from act_export.checkpoint.load import load_checkpoint

    loaded = load_checkpoint(str(folder))
    build_model(loaded, CALIBRATION, tmp_path / "m.onnx", dtype="int4")
    command = ["search", folder, "--data", rows, "--rank", 10, "--choose", 10, "--report", 10, "--random-draws", 0]
    command += ["--heads", 1, "--weights", tmp_path / "m.onnx", "--out", tmp_path / "found.json"]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0, result.output
    found = Calibration.load(tmp_path / "found.json")
    assert found.model == loaded.identity
    assert found.provenance is not None
    assert found.provenance.notes["weights"] == "int4 of m.onnx"
