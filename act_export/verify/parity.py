"""Parity of an exported model with PyTorch running the reference."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from act_export.calibration import Calibration
from act_export.checkpoint import Checkpoint
from act_export.hooks import HookedModel, LayerState, ReferenceAttention, attention_hook, positions
from act_export.reference import later_sinks, sink_margins
from act_export.runtime.session import Session
from act_export.verify.cases import Case, parity_cases, ragged_batch
from act_export.verify.metrics import GATES, Metrics, compare_logits

Progress = Callable[[str], None]


@dataclass(frozen=True)
class CaseResult:
    """One case of one engine.

    Attributes:
        case: Its name.
        metrics: Over the sequences in which no sink flipped.
        flips: Number of (sequence, head, key) whose being a sink differs from the reference by rounding.
        wrong_sinks: Number of those that differ by more than rounding.
        sequences: Number of sequences.
        flipped_sequences: Number of those with a flip.
        flipped_metrics: Over the sequences with a flip; reported, not gated.
        greedy_identical: Whether the most likely token agreed at every decode step; None without decode steps, or where
            a sink flipped in every sequence.
        passed: Whether the gate holds for the sequences without a flip, and no sink is wrong.
    """

    case: str
    metrics: Metrics
    flips: int
    wrong_sinks: int
    sequences: int
    flipped_sequences: int
    flipped_metrics: Metrics
    greedy_identical: bool | None
    passed: bool


@dataclass(frozen=True)
class EngineReport:
    """All cases of one engine against PyTorch with the reference.

    Attributes:
        engine: How the file was run.
        results: One per case.
        passed: Whether every case passed, and sinks flipped in few enough sequences.
    """

    engine: str
    results: tuple[CaseResult, ...]
    passed: bool

    @property
    def flipped(self) -> float:
        """Fraction of sequences, over all cases, in which a sink flipped."""
        return sum(r.flipped_sequences for r in self.results) / sum(r.sequences for r in self.results)

    @property
    def max_difference(self) -> float:
        """Largest difference of a logit over all cases."""
        return max(result.metrics.max_difference for result in self.results)

    @property
    def greedy_identical(self) -> bool:
        """Whether decode steps were compared, and every token was the same."""
        compared = [result.greedy_identical for result in self.results if result.greedy_identical is not None]
        return bool(compared) and all(compared)


@dataclass(frozen=True)
class ParityReport:
    """The report of a verification.

    Attributes:
        precision: Which row of `GATES` was applied.
        hook: The reference hook without calibration against the model's own attention, padded batch.
        hook_passed: Whether that holds.
        engines: One report per way of running the file.
    """

    precision: str
    hook: Metrics
    hook_passed: bool
    engines: tuple[EngineReport, ...]

    @property
    def passed(self) -> bool:
        """Whether everything passed."""
        return self.hook_passed and all(engine.passed for engine in self.engines)


class Recording(Protocol):
    """An engine: runs one call and returns logits and the running column sums by layer."""

    def __call__(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], *, first: bool
    ) -> tuple[NDArray[np.float32], dict[int, Tensor]]:
        """Logits (batch, sequence, vocabulary); sums (batch, calibrated heads, total, 1) by layer."""
        ...


@dataclass(frozen=True)
class _Step:
    """One call's results.

    Attributes:
        logits: (batch, sequence, vocabulary).
        sinks: (batch, calibrated head, total), by layer.
        margins: How far each sink score lies above the threshold, shapes as `sinks`.
        real: (batch, sequence), false for padding.
    """

    logits: NDArray[np.float32]
    sinks: dict[int, Tensor]
    margins: dict[int, Tensor]
    real: NDArray[np.bool_]


@dataclass(frozen=True)
class _SinkRule:
    """What makes a column sum a sink, for each layer."""

    calibration: Calibration | None
    sliding_windows: dict[int, int]

    def judge(self, sums: dict[int, Tensor], mask: NDArray[np.int64]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Sinks and margins of running column sums (batch, calibrated head, total, 1), by layer."""
        real = torch.from_numpy(mask != 0)[:, None]
        sinks, margins = {}, {}
        for layer, column_sums in sums.items():
            part = self.calibration.layer(layer) if self.calibration is not None else None
            if part is None:
                continue
            sums_3d = column_sums.squeeze(-1)
            window = self.sliding_windows[layer]
            sinks[layer] = later_sinks(
                sums_3d,
                real,
                threshold=part.threshold,
                threshold_mode=part.threshold_mode,
                sliding_window=window,
            )
            margins[layer] = sink_margins(
                sums_3d,
                real,
                threshold=part.threshold,
                threshold_mode=part.threshold_mode,
                sliding_window=window,
            )
        return sinks, margins


def verify_sessions(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    openers: dict[str, Callable[[], Session]],
    *,
    precision: str = "float32",
    progress: Progress = lambda _: None,
) -> ParityReport:
    """Compares sessions over one exported file with PyTorch running the reference.

    Args:
        checkpoint: The model that was exported.
        calibration: The calibration that the file should have inside; None for a plain export.
        openers: Name -> opens a session; one is open at a time.
        precision: Row of `GATES`.
        progress: Called with what is being compared.
    """
    cases = parity_cases(checkpoint.model, checkpoint.tokenizer)
    progress("verifying, reference hook against the model's own attention")
    hook = _hook_against_own_attention(checkpoint, cases)
    expected: list[tuple[Case, list[_Step]]] = []
    attention = ReferenceAttention(calibration)
    rule = _SinkRule(calibration, attention.sliding_windows)
    with attention_hook(checkpoint.model, attention) as hooked:
        for case in cases:
            progress(f"verifying, PyTorch: {case.name}")
            expected.append((case, _run(case, _reference_engine(hooked), rule, follow=None)))
    engines = []
    for name, opener in openers.items():
        with opener() as session:
            results = []
            for case, reference in expected:
                progress(f"verifying, {name}: {case.name}")
                steps = _run(case, _session_engine(session), rule, follow=reference)
                results.append(_compare(case, steps, reference, precision))
            progress(f"verifying, {name}: batch against alone")
            results.append(_batch_against_alone(session, cases, precision))
            progress(f"verifying, {name}: as generation runs it")
            results.append(_generation_against_runs(session, cases, precision))
        engines.append(_engine_report(name, results, precision, [case.name for case in cases]))
    return ParityReport(precision, hook, hook.passes(GATES["float32"]), tuple(engines))


def _engine_report(name: str, results: Sequence[CaseResult], precision: str, cases: Collection[str]) -> EngineReport:
    judged = [result for result in results if result.case in cases]
    flipped = sum(result.flipped_sequences for result in judged)
    few_flips = flipped <= GATES[precision].flipped_sequences * sum(result.sequences for result in judged)
    return EngineReport(name, tuple(results), few_flips and all(result.passed for result in results))


def _reference_engine(hooked: HookedModel) -> Recording:
    state: list[LayerState] | None = None

    def run(
        input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], *, first: bool
    ) -> tuple[NDArray[np.float32], dict[int, Tensor]]:
        nonlocal state
        with torch.no_grad():
            outputs = hooked(torch.from_numpy(input_ids), torch.from_numpy(attention_mask), None if first else state)
        state = outputs.state
        sums = {layer: kept.sink_scores for layer, kept in enumerate(state) if kept.sink_scores.shape[1]}
        return outputs.logits.float().numpy(), sums

    return run


def _session_engine(session: Session) -> Recording:
    state = None

    def run(
        input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], *, first: bool
    ) -> tuple[NDArray[np.float32], dict[int, Tensor]]:
        nonlocal state
        logits, state = session.run(input_ids, attention_mask, None if first else state)
        prefix = "past_sink_scores."
        sums = {
            int(name.removeprefix(prefix)): torch.from_numpy(value)
            for name, value in state.items()
            if name.startswith(prefix)
        }
        return logits.astype(np.float32), sums

    return run


def _run(case: Case, engine: Recording, rule: _SinkRule, *, follow: Sequence[_Step] | None) -> list[_Step]:
    """Runs a case; decode steps feed the greedy tokens of `follow`, or (None) the engine's own."""
    mask = case.attention_mask
    steps: list[_Step] = []
    done = 0
    for ids in case.calls:
        done += ids.shape[1]
        steps.append(_step(engine, ids, mask[:, :done], rule, first=not steps))
    for _ in range(case.decode_steps):
        leader = steps if follow is None else follow
        ids = leader[len(steps) - 1].logits[:, -1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], 1)
        steps.append(_step(engine, ids, mask, rule, first=False))
    return steps


def _step(engine: Recording, ids: NDArray[np.int64], mask: NDArray[np.int64], rule: _SinkRule, *, first: bool) -> _Step:
    logits, sums = engine(ids, mask, first=first)
    return _Step(logits, *rule.judge(sums, mask), (mask != 0)[:, -ids.shape[1] :])


def _compare(case: Case, steps: Sequence[_Step], reference: Sequence[_Step], precision: str) -> CaseResult:
    gate = GATES[precision]
    flips = np.zeros((len(steps), len(case.attention_mask)), np.int64)
    wrong = 0
    for index, (ours, theirs) in enumerate(zip(steps, reference, strict=True)):
        for layer, sinks in theirs.sinks.items():
            differs = ours.sinks[layer] != sinks
            flips[index] += differs.sum((1, 2)).numpy()
            by_rounding = (ours.margins[layer].abs() <= gate.score_rounding) & (
                theirs.margins[layer].abs() <= gate.score_rounding
            )
            wrong += int((differs & ~by_rounding).sum())
    tainted = np.maximum.accumulate(flips > 0, axis=0)

    def metrics(of_tainted: bool) -> Metrics:
        pairs = [
            (ours.logits[picked], theirs.logits[picked])
            for ours, theirs, rows in zip(steps, reference, tainted, strict=True)
            for picked in [theirs.real & (rows == of_tainted)[:, None]]
        ]
        return compare_logits(*(np.concatenate(side) for side in zip(*pairs, strict=True)))

    clean = metrics(of_tainted=False)
    greedy = None
    if case.decode_steps and not tainted.all():
        greedy = all(
            (ours.logits[~rows, -1].argmax(-1) == theirs.logits[~rows, -1].argmax(-1)).all()
            for ours, theirs, rows in zip(steps, reference, tainted, strict=True)
        )
    exact_tokens = greedy is not False or gate.argmax_agreement < 1
    return CaseResult(
        case=case.name,
        metrics=clean,
        flips=int(flips.sum()) - wrong,
        wrong_sinks=wrong,
        sequences=tainted.shape[1],
        flipped_sequences=int(tainted[-1].sum()),
        flipped_metrics=metrics(of_tainted=True),
        greedy_identical=greedy,
        passed=clean.passes(gate) and exact_tokens and not wrong,
    )


def _batch_against_alone(session: Session, cases: Sequence[Case], precision: str) -> CaseResult:
    """Each row of the ragged batch equals the prompt run alone, both in this engine."""
    case = next(case for case in cases if case.name.startswith("ragged"))
    (ids,) = case.calls
    together = session.run(ids, case.attention_mask).logits
    pairs = []
    for row, mask in enumerate(case.attention_mask.astype(bool)):
        alone = session.run(ids[row : row + 1, mask], np.ones((1, mask.sum()), np.int64)).logits
        pairs.append((together[row, mask], alone[0]))
    return _within_engine(f"{case.name}: each row as if alone", pairs, len(ids), precision)


def _generation_against_runs(session: Session, cases: Sequence[Case], precision: str) -> CaseResult:
    """A cache that grows, with the last logits alone, equals runs by value with all logits, both in this engine."""
    case = next(case for case in cases if "chunks" in case.name)
    cache = session.allocate(len(case.attention_mask), capacity=case.calls[0].shape[1])
    state, pairs = None, []
    for ids in case.calls:
        start, end = cache.length, cache.length + ids.shape[1]
        last = cache.step(ids, case.attention_mask[:, start:end])
        logits, state = session.run(ids, case.attention_mask[:, :end], state)
        pairs.append((last[:, -1], logits[:, -1]))
    return _within_engine(f"{case.name}: as generation runs them", pairs, cache.batch, precision)


def _within_engine(
    name: str, pairs: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]], sequences: int, precision: str
) -> CaseResult:
    """Result of a comparison of pairs (positions, vocabulary), both sides by the same engine."""
    metrics = compare_logits(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
    empty = compare_logits(*(np.zeros((0, 1), np.float32),) * 2)
    return CaseResult(name, metrics, 0, 0, sequences, 0, empty, None, metrics.passes(GATES[precision]))


def _hook_against_own_attention(checkpoint: Checkpoint, cases: Sequence[Case]) -> Metrics:
    """The reference hook without calibration against the model as transformers runs it, on a padded batch."""
    longest = max((case.calls[0] for case in cases if len(case.calls[0]) == 1), key=lambda ids: ids.shape[1])[0]
    ids, mask = (torch.from_numpy(x) for x in ragged_batch([longest.tolist(), longest[len(longest) // 2 :].tolist()]))
    with torch.no_grad():
        own = checkpoint.model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
        with attention_hook(checkpoint.model, ReferenceAttention(None)) as hooked:
            ours = hooked(ids, mask).logits
    real = mask.bool()
    return compare_logits(ours[real].float().numpy(), own[real].float().numpy())
