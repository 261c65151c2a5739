"""Verification: passes what is right, and catches what is wrong."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CALIBRATION, tiny_checkpoint

from act_export.calibration.file import Calibration
from act_export.calibration.strengths import KNOBS
from act_export.errors import ActExportError
from act_export.export import build_model
from act_export.runtime import RunOutputs, Session
from act_export.runtime.cache import Cache
from act_export.runtime.node_placement import NodePlacement
from act_export.verify.parity.cases import parity_cases
from act_export.verify.parity.half_model import half_model
from act_export.verify.parity.job import describe_failures, verify_file
from act_export.verify.parity.metrics import GATES, Gate, Metrics, compare_logits
from act_export.verify.parity.parity_report import ParityReport
from act_export.verify.parity.sessions import verify_sessions


def verify(checkpoint, calibration, path, **options):
    return verify_sessions(checkpoint, calibration, {"native": lambda: Session.open(path)}, **options)


def changed_copy(source, folder, change):
    """The exported model with something in its graph changed."""
    shutil.copytree(source.parent, folder, dirs_exist_ok=True)
    model = onnx.load(folder / source.name, load_external_data=False)
    change(model.graph)
    onnx.save(model, folder / source.name)
    return folder / source.name


def set_attribute(graph, name, value):
    """Of a calibrated node, or of the default calibration a knob of all heads."""
    if name in KNOBS:
        tensor = next(each for each in graph.initializer if each.name == "calibration")
        strengths = onnx.numpy_helper.to_array(tensor).copy()
        strengths[..., KNOBS.index(name)] = value
        return tensor.CopyFrom(onnx.numpy_helper.from_array(strengths, "calibration"))
    node = next(node for node in graph.node if node.op_type == "CalibratedAttention")
    attribute = next(a for a in node.attribute if a.name == name)
    attribute.CopyFrom(onnx.helper.make_attribute(name, value))


def test_a_right_export_passes(tiny, tiny_file):
    report = verify(tiny, CALIBRATION, tiny_file)
    assert (report.passed, report.hook_passed) == (True, True)
    names = [result.case for result in report.engines[0].results]
    assert names == [
        "prompt of 1",
        "prompt of 2",
        "prompt of 17",
        "prompt of 64",
        "prompt of 193",
        "ragged batch of 4",
        "prompts in 3 chunks",
        "32 decode steps",
        "plain, ragged batch of 4",
        "mixed calibrated, plain, 4 decode steps",
        "ragged batch of 4: each row as if alone",
        "prompts in 3 chunks: as generation runs them",
    ]
    assert next(r for r in report.engines[0].results if "decode" in r.case).greedy_identical is True
    assert all(result.flips == 0 for result in report.engines[0].results)


@pytest.mark.parametrize(
    ("name", "value"),
    [("beta", 0.9), ("gamma", 2.0), ("threshold", 0.5), ("scale", 0.3), ("calibrated_heads", [2])],
)
def test_a_wrong_attribute_is_caught(tiny, tiny_file, tmp_path, name, value):
    path = changed_copy(tiny_file, tmp_path, lambda graph: set_attribute(graph, name, value))
    assert not verify(tiny, CALIBRATION, path).passed


def test_another_models_weights_are_caught(tiny_file):
    assert not verify(tiny_checkpoint(seed=1), CALIBRATION, tiny_file).passed


class Spoiled:
    """A session of which a subclass spoils what `run` gives."""

    session: Session

    def allocate(self, batch, capacity):
        return self.session.allocate(batch, capacity)

    @property
    def sink_state(self):
        return self.session.sink_state

    @property
    def packed_sinks(self):
        return self.session.packed_sinks

    @property
    def token_input(self):
        return self.session.token_input

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.session.close()


class Nudged(Spoiled):
    """A session whose column sums are off by a rounding error: what half precision does, on purpose."""

    def __init__(self, session, factor):
        self.session, self.factor = session, factor

    def run(self, *arguments, **named):
        logits, state = self.session.run(*arguments, **named)
        nudged = {k: v * np.float32(self.factor) if "sink" in k else v for k, v in state.items()}
        return RunOutputs(logits, nudged)


def test_a_flipped_sink_is_counted_and_kept_apart(tiny, tiny_file, tmp_path):
    case = next(case for case in parity_cases(tiny.model, None) if case.name == "prompt of 17")
    with Session.open(tiny_file) as session:
        sums = session.run(case.calls[0], case.attention_mask).state["past_sink_scores.0"][0, 0, :, 0]
    score = float(np.sort((sums / np.arange(17, 0, -1))[1:])[-3])
    calibration = Calibration(CALIBRATION.heads, CALIBRATION.beta, score * (1 + 1e-4))  # a hair above that score
    path = tmp_path / "model.onnx"
    build_model(tiny, calibration, path)
    exact = verify(tiny, calibration, path).engines[0]
    assert exact.passed
    assert exact.flipped == 0
    report = verify_sessions(
        tiny, calibration, {"nudged": lambda: Nudged(Session.open(path), 1 + 2e-4)}, precision="float16"
    )
    result = next(r for r in report.engines[0].results if r.case == "prompt of 17")
    assert result.flips >= 1
    assert (result.sequences, result.flipped_sequences) == (1, 1)
    assert result.metrics.positions == 0
    assert result.flipped_metrics.positions == 17
    assert result.passed
    assert 0 < report.engines[0].flipped < 1


def test_wrong_sinks_are_no_rounding(tiny, tiny_file):
    report = verify_sessions(
        tiny, CALIBRATION, {"nudged": lambda: Nudged(Session.open(tiny_file), 1.5)}, precision="bfloat16"
    )
    failed = [result for result in report.engines[0].results if not result.passed]
    assert failed
    assert max(result.score_difference for result in failed) > 0.1
    assert not report.passed


def test_too_many_flips_fail(tiny, tiny_file, monkeypatch):
    loose = dataclasses.replace(GATES["float32"], score_rounding=1e9)
    monkeypatch.setitem(GATES, "float32", loose)
    report = verify_sessions(tiny, CALIBRATION, {"nudged": lambda: Nudged(Session.open(tiny_file), 1.5)})
    assert report.engines[0].flipped > loose.flipped_sequences
    assert sum(result.wrong_sinks for result in report.engines[0].results) == 0
    assert not report.passed


class Forgetful(Spoiled):
    """A session that drops its sink state where a chunk continues a prompt."""

    def __init__(self, session):
        self.session = session

    def run(self, ids, mask, state=None, *others, **named):
        if state is not None and ids.shape[1] > 1:
            state = {name: np.zeros_like(value) if "sink" in name else value for name, value in state.items()}
        return self.session.run(ids, mask, state, *others, **named)


def test_lost_sink_state_is_caught(tiny, tiny_file):
    report = verify_sessions(tiny, CALIBRATION, {"forgetful": lambda: Forgetful(Session.open(tiny_file))})
    chunks = next(r for r in report.engines[0].results if "chunks" in r.case)
    assert chunks.wrong_sinks > 0
    assert not chunks.passed
    assert not report.passed


def test_a_cache_that_loses_its_sums_is_caught(tiny, tiny_file, monkeypatch):
    def forgetful(cache, *arguments):
        for name, buffer in cache._buffers.items():
            if "sink" in name:
                buffer.owner[...] = 0
        return run(cache, *arguments)

    run = Cache._run
    monkeypatch.setattr(Cache, "_run", forgetful)
    report = verify(tiny, CALIBRATION, tiny_file)
    failed = [result.case for result in report.engines[0].results if not result.passed]
    assert failed == ["prompts in 3 chunks: as generation runs them"]
    assert not report.passed


def test_metrics_by_hand():
    reference = np.array([[1.0, 2.0, 4.0], [0.0, 5.0, 1.0]], np.float32)
    logits = reference + np.array([[0.5, 0.0, 0.0], [0.0, -4.5, 0.0]], np.float32)
    metrics = compare_logits(logits, reference)
    assert metrics.positions == 2
    assert metrics.max_difference == pytest.approx(4.5)
    assert metrics.mean_difference == pytest.approx(5.0 / 6)
    assert metrics.near_ties == 2  # both margins, 2 and 4, are below ten times 0.83
    assert compare_logits(reference[:, ::-1], reference).top10_agreement == 1.0


def test_a_changed_argmax_is_seen_where_the_difference_is_allowed():
    """One position of many is wrong by less than the limit on differences, and no near tie."""
    reference = np.random.default_rng(0).standard_normal((50, 40)).astype(np.float32)
    reference[7, :2] = 5.0, 5.5
    logits = reference.copy()
    logits[7, 0] += 0.9
    metrics = compare_logits(logits, reference)
    assert metrics.argmax_agreement < 1
    assert not metrics.passes(Gate(1.0, 1.0, 0.0, 0.0))
    assert metrics.passes(Gate(1.0, 0.9, 0.0, 0.0))


@given(st.integers(0, 1000), st.floats(0, 1e-4))
def test_small_noise_passes(seed, size):
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal((70, 30)).astype(np.float32)
    noise = (size * rng.uniform(-1, 1, reference.shape)).astype(np.float32)
    assert compare_logits(reference + noise, reference).passes(GATES["float32"])


def test_nan_fails_every_gate():
    reference = np.zeros((3, 5), np.float32)
    logits = reference.copy()
    logits[1, 2] = np.nan
    assert not compare_logits(logits, reference).passes(Gate(1e9, 0.0, 0.0, 1.0))


@pytest.fixture(scope="module")
def half_file(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("half") / "model.onnx"
    build_model(tiny, CALIBRATION, path, dtype="float16")
    return path


def test_a_half_export_is_held_against_pytorch_in_its_type(tiny, half_file):
    report = verify(tiny, CALIBRATION, half_file, precision="float16")
    assert report.passed
    assert report.pytorch is not None
    assert report.pytorch.engine == "PyTorch in float16"
    assert [r.case for r in report.pytorch.results] == [r.case for r in report.engines[0].results][:-2]
    assert report.pytorch.max_difference > 1e-3  # what float32 allows
    ratio = report.error_ratio(report.engines[0])
    assert ratio is not None
    assert 0.1 < ratio < 2


@pytest.mark.parametrize(
    ("name", "value"), [("beta", 0.9), ("gamma", 2.0), ("threshold", 0.5), ("scale", 0.3), ("calibrated_heads", [2])]
)
def test_a_wrong_attribute_is_caught_in_half(tiny, half_file, tmp_path, name, value):
    path = changed_copy(half_file, tmp_path, lambda graph: set_attribute(graph, name, value))
    assert not verify(tiny, CALIBRATION, path, precision="float16").passed


class Noisy(Spoiled):
    """A session whose logits are off by normal noise."""

    def __init__(self, session, size):
        self.session, self.size = session, size

    def run(self, *arguments, **named):
        logits, state = self.session.run(*arguments, **named)
        noise = np.random.default_rng(0).standard_normal(logits.shape).astype(np.float32)
        return RunOutputs(logits + self.size * noise, state)


def test_more_than_twice_the_error_of_pytorch_is_too_much(tiny, half_file):
    exact = verify(tiny, CALIBRATION, half_file, precision="float16")
    assert exact.pytorch is not None
    error = exact.pytorch.of_all_cases.mean_difference
    report = verify_sessions(
        tiny, CALIBRATION, {"noisy": lambda: Noisy(Session.open(half_file), 4 * error)}, precision="float16"
    )
    assert not report.passed
    engine = report.engines[0]
    assert 2 < report.error_ratio(engine) < 6
    assert sum(result.wrong_sinks for result in engine.results) == 0


def test_sink_state_lost_in_half_is_no_rounding(tiny, half_file):
    report = verify_sessions(
        tiny, CALIBRATION, {"forgetful": lambda: Forgetful(Session.open(half_file))}, precision="float16"
    )
    assert not report.passed
    chunks = next(r for r in report.engines[0].results if "chunks" in r.case)
    assert not chunks.passed
    assert chunks.score_difference > 0.05


def test_a_model_that_overflows_in_pytorch_too(tmp_path):
    checkpoint = tiny_checkpoint("mistral")
    checkpoint.model.lm_head.weight.mul_(2e4)
    build_model(checkpoint, CALIBRATION, tmp_path / "m.onnx", dtype="float16")
    with pytest.raises(ActExportError, match="logits aren't finite in PyTorch either; export it with --dtype bfloat16"):
        verify(checkpoint, CALIBRATION, tmp_path / "m.onnx", precision="float16")


def test_a_half_model_is_a_copy_with_rounded_parameters(tiny):
    half = half_model(tiny.model, "bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in tiny.model.parameters()} == {torch.float32}
    assert half.lm_head.weight is half.model.embed_tokens.weight
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    for name, parameter in tiny.model.named_parameters():
        assert torch.equal(half.get_parameter(name), parameter.to(torch.bfloat16))


def test_a_stand_in_that_cant_be_written(tiny, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    build_model(tiny, CALIBRATION, tmp_path / "m.onnx", dtype="bfloat16")
    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(ActExportError, match="none can be written: Permission denied; copy the model"):
        verify_file(tmp_path / "m.onnx", tiny, CALIBRATION)


def test_limits_by_pytorch():
    def metrics(largest, mean):
        return Metrics(9, largest, mean, 1.0, 1.0, 0)

    gate = GATES["float16"].relative_to([metrics(0.5, 0.01), metrics(0.25, 0.02)], score_difference=0.1)
    assert (gate.max_difference, gate.mean_difference, gate.score_rounding) == (2.0, 0.04, 0.2)
    assert metrics(2.0, 0.04).passes(gate)
    assert not metrics(2.1, 0.01).passes(gate)
    assert not metrics(1.0, 0.05).passes(gate)
    assert GATES["float32"].relative_to([metrics(0.5, 0.01)]) == GATES["float32"]


def test_attention_that_fell_back_to_the_cpu_fails():
    nodes = {"CUDAExecutionProvider": {"MatMul": 7}, "CPUExecutionProvider": {"CalibratedAttention": 1}}
    placed = NodePlacement("cuda:0", {"attention_1": "CPUExecutionProvider"}, nodes, copies=4)
    metrics = Metrics(10, 0.0, 0.0, 1.0, 1.0, 0)
    report = ParityReport("float32", metrics, True, (), placement=placed)
    assert not report.passed
    assert "not all attention runs on cuda:0: attention nodes: 1 of 1 on CPU" in describe_failures(report)
    assert dataclasses.replace(
        report, placement=dataclasses.replace(placed, attention={"attention_1": "CUDAExecutionProvider"})
    ).passed


ODD = (np.inf, -np.inf, np.nan)


@pytest.mark.parametrize("odd", ODD)
def test_equal_infinities_agree(odd):
    """A token that a bias rules out is one in both; what differs beside it counts."""
    reference = np.random.default_rng(0).standard_normal((9, 20)).astype(np.float32)
    reference[2:4, 5] = odd
    assert compare_logits(reference.copy(), reference) == compare_logits(reference, reference)
    assert compare_logits(reference.copy(), reference).passes(Gate(0, 1.0, 0, 0, mean_difference=0))
    ours = reference.copy()
    ours[0, 0] += 0.5
    assert compare_logits(ours, reference).max_difference == 0.5


@pytest.mark.parametrize("ours", [0.0, *ODD])
@pytest.mark.parametrize("theirs", [0.0, *ODD])
def test_other_infinities_differ(ours, theirs):
    logits = [np.zeros((3, 4), np.float32) for _ in range(2)]
    logits[0][1, 2], logits[1][1, 2] = ours, theirs
    same = ours == theirs or np.isnan([ours, theirs]).all()
    assert compare_logits(*logits).max_difference == (0.0 if same else np.inf)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_export_with_a_token_that_is_ruled_out(tmp_path, dtype):
    checkpoint = tiny_checkpoint("phi")
    checkpoint.model.lm_head.bias.data[[5, 77]] = -torch.inf
    build_model(checkpoint, CALIBRATION, tmp_path / "a.onnx", dtype=dtype)
    report = verify(checkpoint, CALIBRATION, tmp_path / "a.onnx", precision=dtype)
    assert report.passed
    assert report.hook.max_difference < 1e-3
    checkpoint.model.lm_head.bias.data[77] = 0
    assert not verify(checkpoint, CALIBRATION, tmp_path / "a.onnx", precision=dtype).passed


def test_a_model_that_computes_nothing(tiny_file):
    checkpoint = tiny_checkpoint()
    checkpoint.model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ActExportError, match="computes NaN in PyTorch"):
        verify(checkpoint, CALIBRATION, tiny_file)
