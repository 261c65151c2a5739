"""Mixtures of experts: what stands in for transformers' computation, the graph of it, and what can't be exported."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CALIBRATION, tiny_checkpoint, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from act_export.calibration.strengths import CalibratedHeads
from act_export.checkpoint.identity import identify
from act_export.checkpoint.load import Checkpoint
from act_export.errors import ActExportError
from act_export.export import build_model
from act_export.export.experts import check_experts, exportable_experts, sorted_experts, translation_table
from act_export.export.passes.unroll_experts import UnrollExpertsPass
from act_export.export.slim import slim
from act_export.export.trace import trace
from act_export.runtime import Session
from act_export.verify.parity.dequantized import dequantized
from act_export.verify.parity.job import describe_failures, verify_file
from act_export.verify.parity.sessions import verify_sessions

EXPERTS, HIDDEN = 4, 8
ARCHITECTURES = [  # mixtral comes with its types
    "qwen2_moe",
    pytest.param("qwen3_moe", marks=pytest.mark.slow),
    pytest.param("olmoe", marks=pytest.mark.slow),
]
_CONFIG = {
    "hidden_size": HIDDEN,
    "moe_hidden_size": HIDDEN,
    "moe_latent_size": None,
    "intermediate_size": 6,
    "moe_intermediate_size": 6,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "post_norm_eps": 1e-5,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 0.5,
    "_experts_implementation": "eager",
    "_experts_implementation_internal": "eager",
}
# Gated; with biases, transposed, interleaved and clamped; without a gate; with a norm after each expert.
KINDS = {
    "mixtral": MixtralExperts,
    "gpt_oss": GptOssExperts,
    "nemotron_h": NemotronHExperts,
    "muse_spark": MuseSparkExperts,
}
ROUTINGS = st.lists(st.permutations(range(EXPERTS)), min_size=1, max_size=9)


def experts_module(kind: str) -> torch.nn.Module:
    """A random experts module of an architecture, by itself."""
    torch.manual_seed(0)
    module = KINDS[kind](SimpleNamespace(**_CONFIG)).requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_()
    return module


def inputs(routing: list[list[int]], chosen: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations, experts and weights of tokens whose experts are the first `chosen` of each permutation."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(routing), HIDDEN, generator=generator)
    return hidden, torch.tensor(routing)[:, :chosen], torch.rand(len(routing), chosen, generator=generator)


class _Routed(torch.nn.Module):
    def __init__(self, experts: torch.nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return sorted_experts(self.experts, hidden, index, weights)


def exported(kind: str) -> onnx.ModelProto:
    """The graph of an experts module that two experts are chosen of, before experts are unrolled."""
    tokens = torch.export.Dim("tokens")
    program = torch.onnx.export(
        _Routed(experts_module(kind)).eval(),
        inputs([[0, 1, 2, 3]] * 3, 2),
        dynamo=True,
        opset_version=23,
        custom_translation_table=translation_table(),
        dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens}),
        verbose=False,
    )
    return ir.to_proto(program.model)


@pytest.fixture(scope="module")
def rolled() -> dict[str, onnx.ModelProto]:
    return {kind: exported(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def graphs(rolled: dict[str, onnx.ModelProto]) -> dict[str, bytes]:
    """With experts unrolled."""
    models = {kind: UnrollExpertsPass()(ir.from_proto(proto)).model for kind, proto in rolled.items()}
    return {kind: ir.to_proto(model).SerializeToString() for kind, model in models.items()}


def run(graph: bytes, *given: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph)
    feeds = {value.name: array.numpy() for value, array in zip(session.get_inputs(), given, strict=True)}
    (result,) = session.run(None, feeds)
    return result


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(routing=ROUTINGS, chosen=st.integers(1, EXPERTS), seed=st.integers(0, 99))
def test_sorted_by_expert_equals_transformers(kind: str, routing: list[list[int]], chosen: int, seed: int):
    module = experts_module(kind)
    given_inputs = inputs(routing, chosen, seed)
    torch.testing.assert_close(sorted_experts(module, *given_inputs), module(*given_inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(routing=ROUTINGS, seed=st.integers(0, 99))
def test_the_graph_equals_transformers(graphs: dict[str, bytes], kind: str, routing: list[list[int]], seed: int):
    given_inputs = inputs(routing, 2, seed)
    expected = experts_module(kind)(*given_inputs).numpy()
    np.testing.assert_allclose(run(graphs[kind], *given_inputs), expected, atol=1e-4, rtol=1e-4)


def test_weights_of_experts_that_nobody_chose_are_not_read(graphs: dict[str, bytes]):
    model = onnx.load_from_string(graphs["mixtral"])
    for tensor in model.graph.initializer:
        if ".3." in tensor.name:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(tensor.dims, np.nan, np.float32), tensor.name))
    result = run(model.SerializeToString(), *inputs([[0, 1, 2, 3], [2, 3, 0, 1], [1, 2, 0, 3]], 2))
    assert np.isfinite(result).all(1).tolist() == [True, False, True]


def test_the_graph_has_a_product_for_each_expert(graphs: dict[str, bytes]):
    model = onnx.load_from_string(graphs["gpt_oss"])
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert Counter(node.op_type for node in model.graph.node)["MatMul"] == 2 * EXPERTS
    matrices = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer if "weight" in tensor.name}
    assert matrices == {
        **{f"experts.{expert}.gate_up_proj.weight": [HIDDEN, 12] for expert in range(EXPERTS)},
        **{f"experts.{expert}.down_proj.weight": [6, HIDDEN] for expert in range(EXPERTS)},
    }
    assert all(len(tensor.dims) < 3 for tensor in model.graph.initializer)


def test_weights_are_cut_when_they_are_written_and_read_once(rolled: dict[str, onnx.ModelProto]):
    model = ir.from_proto(rolled["mixtral"])
    reads = []
    for value in model.graph.initializers.values():
        if value.const_value is not None and len(value.const_value.shape) == 3:
            value.const_value = _counted(value.const_value, reads)
    UnrollExpertsPass()(model)
    assert not reads
    ir.to_proto(model)
    assert sorted(reads) == ["experts.down_proj", "experts.gate_up_proj"]


def _counted(tensor: ir.TensorProtocol, reads: list[str]) -> ir.LazyTensor:
    def values() -> ir.TensorProtocol:
        reads.append(str(tensor.name))
        return ir.Tensor(tensor.numpy(), dtype=tensor.dtype)

    return ir.LazyTensor(values, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)


def test_weights_that_the_graph_computes_are_refused(rolled: dict[str, onnx.ModelProto]):
    model = ir.from_proto(rolled["mixtral"])
    weights = next(node for node in model.graph if node.op_type == "ExpertMatMul").inputs[2]
    users = list(weights.uses())
    negated = ir.node("Neg", [weights])
    negated.outputs[0].type, negated.outputs[0].shape = weights.type, weights.shape
    model.graph.insert_before(model.graph[0], negated)
    for node, index in users:
        node.replace_input_with(index, negated.outputs[0])
    with pytest.raises(ActExportError, match="are computed"):
        UnrollExpertsPass()(model)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures_end_to_end(architecture: str, tmp_path: Path):
    checkpoint = tiny_checkpoint(architecture)
    path = tmp_path / "model.onnx"
    build_model(checkpoint, CALIBRATION, path)
    assert_agrees(path, checkpoint)


def assert_agrees(path: Path, checkpoint: Checkpoint):
    report = verify_sessions(
        checkpoint,
        CALIBRATION,
        {"native": lambda: Session.open(path), "portable": lambda: Session.open(path, native=False)},
    )
    assert report.passed, describe_failures(report)
    assert max(engine.max_difference for engine in report.engines) < 5e-4
    assert {node.domain for node in onnx.load(path, load_external_data=False).graph.node} == {"", "act"}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """With experts that are much alike: which of them a rounding chooses is chance, and then changes little."""
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        for stack in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            stack.copy_(stack[:1] + 0.1 * (stack - stack[:1]))
    return Checkpoint("tiny mixtral", model, None, identify(model))


@pytest.fixture(scope="module")
def slimmed(checkpoint) -> onnx.ModelProto:
    return ir.to_proto(slim(trace(checkpoint.model, CalibratedHeads.of([CALIBRATION])), weight_prefix="model."))


@pytest.fixture
def typed(request, checkpoint, slimmed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A type, and the model exported in it; traced once."""
    monkeypatch.setattr("act_export.export.build.trace", lambda *_, **__: None)
    monkeypatch.setattr("act_export.export.build.slim", lambda *_, **__: ir.from_proto(slimmed))
    path = tmp_path / "model.onnx"
    build_model(checkpoint, CALIBRATION, path, dtype=request.param)
    return request.param, path


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("typed", ["float32"], indirect=True)
def test_mixtral_end_to_end(typed, checkpoint):
    assert_agrees(typed[1], checkpoint)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("typed", ["float16", "bfloat16", "int8", "int4"], indirect=True)
def test_smaller_types_pass_and_choose_experts_in_float32(typed, checkpoint):
    dtype, path = typed
    model = ir.load(path)
    routers = [
        node for node in model.graph if any(".mlp.gate.weight" in str(value.name) for value in node.inputs if value)
    ]
    chosen = [node for node in model.graph if node.op_type == "TopK" and node.inputs[0].dtype == ir.DataType.FLOAT]
    assert len(routers) == len(chosen) == 2
    assert all(value.dtype == ir.DataType.FLOAT for node in routers for value in (*node.inputs, *node.outputs))
    weights = Counter(
        node.op_type for node in model.graph if any(".experts." in str(value.name) for value in node.inputs if value)
    )
    assert weights == {"MatMulNBits" if dtype.startswith("int") else "MatMul": 2 * 2 * EXPERTS}
    report = verify_file(path, checkpoint, CALIBRATION)
    assert report.passed, describe_failures(report)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("typed", ["int8", "int4"], indirect=True)
def test_dequantized_experts_are_those_of_the_file(typed, checkpoint):
    dtype, path = typed
    own = checkpoint.model.model.layers[1].mlp.experts
    before = own.down_proj.clone()
    copy = dequantized(path, checkpoint).checkpoint.model.model.layers[1].mlp.experts
    assert torch.equal(own.down_proj, before)
    for name in ("gate_up_proj", "down_proj"):
        weights = getattr(own, name).flatten(1)
        error = (getattr(copy, name).flatten(1) - weights).norm(dim=1) / weights.norm(dim=1)
        assert (error > 1e-4).all(), "every expert has rounded weights"
        assert (error < (0.15 if dtype == "int4" else 0.01)).all()


def test_experts_are_routed_within_the_block_only():
    model = tiny_model("mixtral")
    before = model.config._experts_implementation
    config = model.model.layers[0].mlp.experts.config
    with exportable_experts(model):
        assert config._experts_implementation == "act_export"
    assert config._experts_implementation == before != "act_export"
    model.model.layers[0].mlp.experts.register_forward_pre_hook(_fails)
    with pytest.raises(RuntimeError, match="stop"), exportable_experts(model):
        model(torch.tensor([[3]]))
    assert config._experts_implementation == before


def _fails(*_: object) -> None:
    raise RuntimeError("stop")


def test_experts_that_do_not_pass_through_the_interface_are_refused(tmp_path: Path):
    checkpoint = tiny_checkpoint("qwen3_moe")
    layer = checkpoint.model.model.layers[1].mlp
    layer.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(4))
    with pytest.raises(ActExportError, match=r"layers\.1\.mlp\.experts \(ModuleList\).*experts interface"):
        build_model(checkpoint, None, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_stacked_experts_of_another_kind_are_refused():
    config = AutoConfig.for_model("jetmoe", hidden_size=32, num_hidden_layers=1, num_key_value_heads=2, vocab_size=99)
    with pytest.raises(ActExportError, match="JetMoeParallelExperts"):
        check_experts(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("architecture", ["llama", "qwen2_moe"])
def test_other_modules_are_no_reason_to_refuse(architecture: str):
    check_experts(tiny_model(architecture))  # shared experts are ordinary layers


def test_experts_of_several_processes_are_refused():
    model = tiny_model("mixtral")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(ActExportError, match="spread over several processes"):
        check_experts(model)
