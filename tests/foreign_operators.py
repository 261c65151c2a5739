"""Small decoders with an operator of attention, calls of them, and what the reference says that they compute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
import torch
from hypothesis import strategies as st
from operator_writer import VOCABULARY, Array, Operator

from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.file import Calibration
from act_export.calibration.reference import sink_margins
from act_export.calibration.reference_operator import calibrated_attention
from act_export.graft.graph import Graph
from act_export.graft.rewrite import apply, find_sites, rewrite
from act_export.graft.sink_state import StateLayout
from act_export.ops.library import library_path

CALIBRATION = Calibration({0: (0, 1)}, beta={0: (0.2, 1.6)}, threshold=0.15)
NOTHING = Calibration({0: (0, 1)}, beta=1.0, threshold=0.15)


def calibrated(model: onnx.ModelProto, calibration: Calibration) -> onnx.ModelProto:
    """The model, rewritten."""
    after = onnx.ModelProto.FromString(model.SerializeToString())
    graph = Graph(after.graph, after.opset_import)
    apply(after, graph, rewrite(after, graph, find_sites(graph), CalibrationSet.of(calibration), StateLayout.SCORES))
    onnx.checker.check_model(after)
    return after


def run(model: onnx.ModelProto, ids: Array, mask: Array, calls: Sequence[int], native: bool = True) -> list[Array]:
    """Outputs of each call, (batch, tokens of the call, width), in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    if native:
        options.register_custom_ops_library(str(library_path()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    sizes = {given.name: given.shape for given in session.get_inputs() if given.name.startswith("past")}
    known = {"batch": len(ids), "batch_size": len(ids), "size": Operator.size}
    state = {
        name: np.zeros([known.get(dim, 0) if isinstance(dim, str) else dim for dim in shape], np.float32)
        for name, shape in sizes.items()
    }
    found, start = [], 0
    for count in calls:
        tokens = {"input_ids": ids[:, start : start + count], "attention_mask": mask[:, : start + count]}
        start += count
        made = dict(zip(outputs, session.run(None, {**tokens, **state}), strict=True))
        found.append(made["logits"])
        state = {name: made[name.replace("past_key_values", "present").replace("past_", "present_")] for name in state}
    return found


def reference(
    operator: Operator, ids: Array, mask: Array, calls: Sequence[int], calibration: Calibration
) -> tuple[Array, float]:
    """Layer 0 by the reference, and the least distance of a sink score from the threshold."""
    layer = calibration.layer(0)
    assert layer is not None
    key = value = torch.zeros(len(ids), operator.kv_heads, 0, operator.size)
    sums, outputs, margin, start = torch.zeros(len(ids), len(layer.heads), 0, 1), [], np.inf, 0
    for count in calls:
        real = torch.from_numpy(mask[:, : start + count])
        found = calibrated_attention(
            *(torch.from_numpy(each) for each in operator.projected(0, ids[:, start : start + count])),
            key,
            value,
            sums,
            real,
            torch.tensor([layer.strengths]),
            num_heads=operator.heads,
            kv_num_heads=operator.kv_heads,
            scale=operator.scale or operator.size**-0.5,
            softcap=operator.softcap,
            sliding_window=operator.window,
            calibrated_heads=layer.heads,
            threshold_mode=layer.threshold_mode,
            sink_logits=dict(operator.attributes).get("sink_logits"),
        )
        start += count
        outputs.append(found.output)
        key, value, sums = found.present_key, found.present_value, found.present_sink_scores
        margins = sink_margins(
            sums.squeeze(-1), real[:, None] != 0, threshold=layer.threshold, threshold_mode=layer.threshold_mode,
            sliding_window=operator.window,
        )  # fmt: skip
        margin = min(margin, float(margins.abs().min()))
    return torch.cat(outputs, 1).numpy(), margin


def batch(calls: Sequence[int], left: int = 2, right: int = 2, seed: int = 0) -> tuple[Array, Array]:
    """Tokens and mask of a whole sequence, one that is padded before, and one that is padded behind its prompt."""
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (3, sum(calls)))
    mask = np.ones_like(ids)
    mask[1, : min(left, calls[0] - 1)] = 0
    mask[2, max(1, calls[0] - right) : calls[0]] = 0
    return ids, mask


def assert_nothing_changes(operator: Operator, calls: Sequence[int], **padding: int) -> None:
    """With beta = 1 the rewritten model computes what the model did, for real rows."""
    ids, mask = batch(calls, **padding)
    before = np.concatenate(run(operator.model, ids, mask, calls), 1)
    after = np.concatenate(run(calibrated(operator.model, NOTHING), ids, mask, calls), 1)
    np.testing.assert_allclose(after[mask != 0], before[mask != 0], atol=3e-5, rtol=3e-5)


def assert_calibrates(operator: Operator, calls: Sequence[int]) -> None:
    """With a calibration the rewritten model computes what the reference does, natively and portably."""
    for seed in range(20):
        ids, mask = batch(calls, seed=seed)
        wanted, margin = reference(operator, ids, mask, calls, CALIBRATION)
        if margin > 1e-5:  # otherwise rounding decides what is a sink
            break
    before = np.concatenate(run(operator.model, ids, mask, calls), 1)[..., : operator.hidden]
    assert np.abs(wanted - before)[mask != 0].max() > 1e-2, "the calibration does nothing"
    model = calibrated(operator.model, CALIBRATION)
    for native in (True, False):
        found = np.concatenate(run(model, ids, mask, calls, native), 1)[..., : operator.hidden]
        np.testing.assert_allclose(found[mask != 0], wanted[mask != 0], atol=3e-5, rtol=3e-5)


SIZES = st.fixed_dictionaries(
    {
        "heads": st.integers(1, 3).map(lambda group: 2 * group),
        "size": st.sampled_from([1, 4, 8, 20]),
        "window": st.sampled_from([-1, 1, 3, 9]),
        "scale": st.sampled_from([0.0, 0.25, 1.5]),
    }
)
PADDING = st.fixed_dictionaries({"left": st.integers(0, 6), "right": st.integers(0, 6), "seed": st.integers(0, 99)})
CALLS = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(lambda more: [7, *more])
