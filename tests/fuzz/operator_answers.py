"""What the operators have to answer to a case, from act_export.calibration.reference, and how far an answer may be from
it.

Bounds follow from the numbers of the case: what float32 may do to the logits of a row, times its values, plus half the
spacing of the storage type. Rows whose numbers leave float32 on the way, and heads whose later sinks hang on rounding,
are not compared; what the reference can't tell has to be finite at least where the reference is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import torch
from operator_cases import STORAGE, Array, Case, output_shapes

from act_export.calibration.reference import SMALLEST_REST, sink_margins
from act_export.calibration.reference_operator import AttentionOutputs, attention_probabilities, calibrated_attention
from act_export.ops import schema

_EPSILON = 1.2e-7  # of float32
_IN_REACH = 1e37  # what float32 still multiplies and adds without overflow
_LARGEST_ERROR = 0.05  # of a probability: rows with more of it are not compared


@dataclass(frozen=True)
class Verdict:
    """How an answer compares.

    Attributes:
        problems: What is wrong with it; empty where nothing is.
        rows: Rows of heads that were compared.
        left_out: Rows of heads that weren't.
    """

    problems: tuple[str, ...]
    rows: int = 0
    left_out: int = 0


def compare(case: Case, outputs: dict[str, Array]) -> Verdict:
    """The outputs of a case that has an answer, with what they should be."""
    problems = []
    for name, shape in output_shapes(case).items():
        if outputs[name].shape != shape:
            return Verdict((f"{name} has shape {outputs[name].shape}, not {shape}",))
        if name in ("present_key", "present_value") and not _same(outputs[name], _extended(case, name)):
            problems.append(f"{name} isn't the past with the new tokens")
    batch, sequence, _ = case.inputs["query"].shape
    if batch == 0:
        return Verdict(tuple(problems))
    if sequence == 0:
        sums = case.inputs.get("past_sink_scores")
        if sums is not None and not _same(outputs["present_sink_scores"], sums):
            problems.append("present_sink_scores isn't past_sink_scores, though nothing is new")
        return Verdict(tuple(problems))
    with np.errstate(all="ignore"):
        verdict = _Truth(case).compare(outputs)
    return replace(verdict, problems=(*problems, *verdict.problems))


def _same(a: Array, b: Array) -> bool:
    """Equal to the last bit, but for numbers that are none."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    return bool(np.array_equal(wide_a, wide_b, equal_nan=True))


def _extended(case: Case, name: str) -> Array:
    past, new = (case.inputs[name.replace("present", "past")], case.inputs[name.removeprefix("present_")])
    batch, heads, room, size = past.shape
    sequence, total = new.shape[1], case.inputs["attention_mask"].shape[1]
    present = np.zeros((batch, heads, max(room, total), size), past.dtype)
    present[:, :, :room] = past
    present[:, :, total - sequence : total] = new.reshape(batch, sequence, heads, size).swapaxes(1, 2)
    return present


def _tensor(array: Array, kind: type = np.float64) -> torch.Tensor:
    return torch.from_numpy(array.astype(kind))


class _Truth:
    """The answer in float64, and what float32 may make of it."""

    def __init__(self, case: Case):
        self.case = case
        attributes = dict(case.attributes)
        for name in ("scale", "softcap"):
            attributes[name] = float(np.float32(attributes[name]))
        if "sink_logits" in attributes:
            attributes["sink_logits"] = [float(number) for number in np.asarray(attributes["sink_logits"], np.float32)]
        if attributes["sliding_window"] > case.inputs["attention_mask"].shape[1]:
            attributes["sliding_window"] = -1
        self.attributes = attributes
        self.calibrated = attributes.get("calibrated_heads", [])
        self.group = attributes["num_heads"] // attributes["kv_num_heads"]
        inputs = case.inputs
        self.sequence, self.total = inputs["query"].shape[1], inputs["attention_mask"].shape[1]
        self.past = self.total - self.sequence
        self.mask = torch.from_numpy(inputs["attention_mask"])
        self.real = self.mask != 0
        # The reference multiplies what no row sees by 0, which makes something of what isn't a number.
        self.keys, self.values = (
            np.where((inputs["attention_mask"] != 0)[:, None, :, None], _extended(case, name)[:, :, : self.total], 0)
            for name in ("present_key", "present_value")
        )
        self.keys64, self.values64 = _tensor(self.keys), _tensor(self.values)
        batch = self.real.shape[0]
        self.calibration = _tensor(inputs.get("calibration", np.empty((1, 0, 3)))).expand(batch, -1, -1)
        gamma = torch.ones(batch, attributes["num_heads"], dtype=torch.float64)
        gamma[:, self.calibrated] = self.calibration[..., 1]
        self.answer = self._reference()
        self.probabilities = attention_probabilities(
            self._heads(inputs["query"]),
            self.keys64.repeat_interleave(self.group, 1),
            self.real,
            scale=attributes["scale"],
            softcap=attributes["softcap"],
            sliding_window=attributes["sliding_window"],
            sink_logits=attributes.get("sink_logits"),
            gamma=gamma,
        )

    def _heads(self, query: Array) -> torch.Tensor:
        batch, sequence, _ = query.shape
        return _tensor(query).view(batch, sequence, self.attributes["num_heads"], -1).transpose(1, 2)

    def _reference(self) -> AttentionOutputs:
        batch, sequence = self.real.shape[0], self.sequence

        def new(kept: torch.Tensor) -> torch.Tensor:
            return kept[:, :, self.past :].transpose(1, 2).reshape(batch, sequence, -1)

        sums = self.case.inputs.get("past_sink_scores", np.zeros((batch, 0, self.past, 1)))
        return calibrated_attention(
            _tensor(self.case.inputs["query"]),
            new(self.keys64),
            new(self.values64),
            self.keys64[:, :, : self.past],
            self.values64[:, :, : self.past],
            _tensor(sums[:, :, : self.past]),
            self.mask,
            self.calibration,
            **self.attributes,
        )

    def compare(self, outputs: dict[str, Array]) -> Verdict:
        error, in_reach = self._logit_errors()
        skipped = ~in_reach | self._undecided(error)
        batch, heads = self.real.shape[0], self.attributes["num_heads"]
        shape = (batch, self.sequence, heads, -1)
        expected = self.answer.output.view(shape).transpose(1, 2).numpy()
        actual = outputs["output"].astype(np.float64).reshape(shape).swapaxes(1, 2)
        problems = []

        largest = np.abs(self.values64.repeat_interleave(self.group, 1).numpy()).max((2, 3))[:, :, None, None]
        finite = np.isfinite(expected).all(-1) & in_reach.numpy() & (largest[..., 0] < 1e38)
        lost = finite & ~np.isfinite(actual).all(-1)
        if lost.any():
            problems.append(f"output is no number in {int(lost.sum())} rows of heads where the reference has numbers")
        compared = finite & ~lost & ~skipped.numpy()
        spacing, tiny = _spacing(self.case.storage)
        bounds = (8 * error.numpy()[..., None] + 2e-5) * largest + spacing * np.abs(expected) + tiny
        excess = np.where(compared[..., None], np.abs(actual - expected) / np.maximum(bounds, 1e-300), 0)
        if excess.max(initial=0) > 1:
            at = tuple(int(i) for i in np.unravel_index(np.argmax(excess), excess.shape))
            problems.append(
                f"output is {actual[at]:.9g} at (batch, head, row, column) {at}, not {expected[at]:.9g}; allowed: "
                f"{bounds[at]:.3g}"
            )
        if self.calibrated:
            problems += self._compare_sums(outputs["present_sink_scores"], error, in_reach)
        return Verdict(tuple(problems), int(compared.sum()), int(compared.size - compared.sum()))

    def _compare_sums(self, actual: Array, error: torch.Tensor, in_reach: torch.Tensor) -> list[str]:
        past = self.case.inputs["past_sink_scores"]
        problems = []
        if not _same(actual[:, :, self.total :], past[:, :, self.total :]):
            problems.append("present_sink_scores beyond the tokens isn't what the past has there")
        counted = self.real[:, None, self.past :].numpy()  # padding adds nothing
        fine = (in_reach[:, self.calibrated].numpy() | ~counted).all(-1)[..., None]
        found, expected = actual[:, :, : self.total, 0].astype(np.float64), self.answer.present_sink_scores[..., 0]
        wanted = expected.numpy().astype(np.float64)
        of_rows = torch.where(torch.from_numpy(counted), error[:, self.calibrated], 0).sum(-1).numpy()[..., None]
        bounds = 8 * of_rows + 1e-5 * (1 + np.abs(wanted)) + 1e-5
        wrong = fine & np.isfinite(wanted) & (np.abs(wanted) < 1e38) & ~(np.abs(found - wanted) <= bounds)
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            problems.append(f"present_sink_scores is {found[at]:.9g} at {at}, not {wanted[at]:.9g}")
        return problems

    def _logit_errors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """By head and row: how much float32 may change a logit, and whether nothing overflows on the way."""
        a = self.attributes
        queries, keys = self._heads(self.case.inputs["query"]).abs(), self.keys64.repeat_interleave(self.group, 1).abs()
        magnitudes = (queries @ keys.transpose(2, 3)).masked_fill(~self._visible()[:, None], 0).amax(-1)
        scaled = magnitudes * abs(a["scale"])
        error = scaled * _EPSILON * (4 + queries.shape[-1] ** 0.5)
        # Logits that are no ordinary numbers, in a unit of float32's smallest.
        error = error + abs(a["scale"]) * 1e-37 * queries.amax(-1).clamp(min=1)
        largest = torch.maximum(torch.maximum(magnitudes, scaled), queries.amax(-1) * max(1.0, abs(a["scale"])))
        if a["softcap"] > 0:
            error = torch.minimum(error, torch.full_like(error, 2 * a["softcap"]))
            error = error + 2e-6 * torch.minimum(scaled, torch.full_like(scaled, a["softcap"]))
            error = error + scaled * min(1.0, 1e-38 * a["softcap"])
            largest = torch.maximum(largest, queries.amax(-1) * min(abs(a["scale"]) / a["softcap"], 1e30))
        sinks = torch.tensor(a.get("sink_logits", [0.0]), dtype=torch.float64)
        sinks = torch.where(sinks <= schema.NO_SINK_LOGIT, 0.0, sinks).abs()[None, :, None]
        error = error + _EPSILON * sinks.clamp(max=1e30)
        in_reach = torch.isfinite(largest) & (largest < _IN_REACH) & (error < _LARGEST_ERROR)
        return error, in_reach

    def _visible(self) -> torch.Tensor:
        columns = torch.arange(self.total)
        rows = columns[self.past :, None]
        visible = columns <= rows
        if self.attributes["sliding_window"] > 0:
            visible = visible & (columns > rows - self.attributes["sliding_window"])
        return visible & self.real[:, None, :]

    def _undecided(self, error: torch.Tensor) -> torch.Tensor:
        """By head and row: whether rounding may rightly decide otherwise on a later sink, or on a row's rest."""
        undecided = torch.zeros_like(error, dtype=torch.bool)
        if not self.calibrated:
            return undecided
        heads = self.calibrated
        sums = self.answer.present_sink_scores[..., 0].double()
        beta, _, threshold = self.calibration[..., None].unbind(2)
        margins = sink_margins(
            sums,
            self.real[:, None],
            threshold=threshold,
            threshold_mode=self.attributes["threshold_mode"],
            sliding_window=self.attributes["sliding_window"],
        )
        probabilities = self.probabilities[:, heads]
        slack = 1e-5 + 8 * error[:, heads].nan_to_num(nan=1).amax(-1, keepdim=True) + 1e-6 * sums.abs()
        close = (margins.abs() < slack) & (probabilities.nan_to_num(nan=1).amax(-2) > 1e-7)
        sinks = (margins > 0)[:, :, None]
        rest = probabilities.masked_fill(sinks, 0).sum(-1)
        on_edge = (rest > SMALLEST_REST / 30) & (rest < SMALLEST_REST * 30)
        undecided[:, heads] = (beta != 1) & (close.any(-1, keepdim=True) | on_edge)
        return undecided


def _spacing(storage: str) -> tuple[float, float]:
    """Relative, and absolute near 0: what rounding to a storage type may change."""
    information = ml_dtypes.finfo(STORAGE[storage][1])
    return float(information.eps), max(float(information.smallest_subnormal), 1e-37)
