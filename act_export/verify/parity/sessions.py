"""Parity of an exported model with PyTorch running the reference."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from act_export.attention.call import positions
from act_export.attention.hook import attention_hook, contiguous_rows
from act_export.attention.reference_attention import ReferenceAttention
from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.file import Calibration
from act_export.checkpoint.load import Checkpoint
from act_export.errors import ActExportError
from act_export.progress import Notice
from act_export.runtime.session import Session
from act_export.verify.parity.cases import Case, calibration_cases, parity_cases, ragged_batch
from act_export.verify.parity.compare_runs import compare_runs
from act_export.verify.parity.embedded_case import embedded_case, look_up_tokens
from act_export.verify.parity.half_model import half_model, placed
from act_export.verify.parity.metrics import GATES, Gate, Metrics, compare_parts
from act_export.verify.parity.parity_report import CaseResult, EngineReport, ParityReport
from act_export.verify.parity.recording import SinkRule, Step, column_sums, pytorch_engine, record, session_engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HOOK_POSITIONS = 256


def verify_sessions(
    checkpoint: Checkpoint,
    calibrations: CalibrationSet | Calibration | None,
    openers: dict[str, Callable[[], Session]],
    *,
    precision: str = "float32",
    rounding: Callable[[PreTrainedModel], PreTrainedModel] | None = None,
    pads_left: bool = True,
    takes_embeddings: bool = False,
    device: str = "cpu",
    progress: Notice = lambda _: None,
) -> ParityReport:
    """Compares sessions over one exported file with PyTorch running the reference in float32.

    Where activations are rounded their errors are held against those of PyTorch that rounds them too.

    Args:
        checkpoint: The model that was exported, in float32; of a quantized file with its dequantized weights.
        calibrations: That the file should have; None for a plain export.
        openers: Name -> opens a session; one is open at a time.
        precision: Row of `GATES`: the type that the file stores.
        rounding: Makes of the model one that rounds activations as the file does; None for one in the file's half type.
        pads_left: Whether all layers leave out padding before a sequence, see `Session.pads_left`; otherwise only
            sequences without any are run.
        takes_embeddings: Whether the file takes embeddings instead of token ids; those of tokens are looked up in
            `embedding.onnx` beside it, without one in the model.
        device: Where PyTorch runs if it can: "cpu" (wherever the model is), "cuda" or "cuda:N".
        progress: Called with what is being compared.

    Raises:
        ActExportError: If PyTorch gets NaN, or logits in that type that are infinite where they shouldn't be.
    """
    model = checkpoint.model
    if not isinstance(calibrations, CalibrationSet):
        calibrations = CalibrationSet.of(calibrations)
    cases = parity_cases(model, checkpoint.tokenizer)
    if len(calibrations.heads):
        cases += calibration_cases(cases, calibrations.names, calibrations.default)
    if takes_embeddings:
        cases.append(embedded_case(model))
    if not pads_left:
        cases = [case.without_padding() for case in cases]
    attention = _Calibrated(calibrations)
    rule = SinkRule(attention)
    with placed(model, device):
        progress("verifying, reference hook against the model's own attention")
        hook = _hook_against_own_attention(checkpoint, cases)
        expected: list[list[Step]] = []
        with attention_hook(model, attention) as hooked:
            for case in cases:
                progress(f"verifying, PyTorch: {case.name}")
                attention.follow(case)
                expected.append(record(case, pytorch_engine(hooked), rule, follow=None))
                _check_numbers(expected[-1], checkpoint, case)
        half = None
        if GATES[precision].error_ratio is not None:
            rounded = half_model(model, precision) if rounding is None else rounding(model)
            half = _rounding_pytorch(rounded, attention, rule, cases, expected, precision, progress)
            _check_finite(half, checkpoint, precision)
    gates = _Gates(GATES[precision], half)
    engines = []
    for name, opener in openers.items():
        with opener() as session:
            look_up_tokens(session, model)
            results = []
            for case, reference in zip(cases, expected, strict=True):
                progress(f"verifying, {name}: {case.name}")
                attention.follow(case)
                steps = record(case, session_engine(session, rule, case.choice), rule, follow=reference)
                results.append(compare_runs(case.name, [(steps, reference)], gates.of(case.name), case.decode_steps))
            attention.follow(cases[0])
            if pads_left:
                progress(f"verifying, {name}: batch against alone")
                results.append(_batch_against_alone(session, cases, rule, gates))
            progress(f"verifying, {name}: as generation runs it")
            results.append(_generation_against_runs(session, cases, rule, gates))
        engines.append(_engine_report(name, results, gates.of_all.flipped_sequences, [case.name for case in cases]))
    return ParityReport(precision, hook, hook.passes(GATES["float32"]), tuple(engines), half)


class _Calibrated(ReferenceAttention):
    """The reference, calibrated as a case says."""

    def __init__(self, calibrations: CalibrationSet) -> None:
        super().__init__(None)
        self.heads = calibrations.heads
        self._calibrations = calibrations

    def follow(self, case: Case) -> None:
        """Takes the calibrations of a case."""
        names = case.calibrations or (self._calibrations.default,)
        self.calibrate(*(self._calibrations[name] for name in names))


class _Gates:
    """The gate of each case: in a half type by what PyTorch does in that case, or in all cases if that is more."""

    def __init__(self, gate: Gate, half: EngineReport | None) -> None:
        self._own: dict[str, Metrics] = {}
        self._all: list[Metrics] = []
        self._gate, self._scores, self._flipped = gate, 0.0, 0.0
        if half is not None:
            self._own = {result.case: result.metrics for result in half.results}
            self._all = [half.of_all_cases]
            self._scores = max(result.score_difference for result in half.results)
            self._flipped = half.flipped

    def of(self, case: str) -> Gate:
        own = [self._own[case]] if case in self._own else []
        return self._gate.relative_to(
            [*own, *self._all], score_difference=self._scores, flipped_sequences=self._flipped
        )

    @property
    def of_all(self) -> Gate:
        return self.of("")


def _rounding_pytorch(
    model: PreTrainedModel,
    attention: _Calibrated,
    rule: SinkRule,
    cases: Sequence[Case],
    expected: Sequence[Sequence[Step]],
    precision: str,
    progress: Notice,
) -> EngineReport:
    """What PyTorch that rounds as the file does makes of the cases, against float32."""
    engine = f"PyTorch {precision.partition(' ')[2] or f'in {precision}'}"  # "int4 with int8 activations": with those
    results = []
    with attention_hook(model, attention) as hooked:
        for case, reference in zip(cases, expected, strict=True):
            progress(f"verifying, {engine}: {case.name}")
            attention.follow(case)
            steps = record(case, pytorch_engine(hooked), rule, follow=reference)
            result = compare_runs(case.name, [(steps, reference)], GATES[precision], case.decode_steps)
            results.append(replace(result, passed=True))  # it sets the limits
    return EngineReport(engine, tuple(results), passed=True)


def _check_numbers(steps: Sequence[Step], checkpoint: Checkpoint, case: Case) -> None:
    """Raises ActExportError if PyTorch gets NaN: what computes nothing can't be compared."""
    for step in steps:
        for row, real in enumerate(step.real):
            if np.isnan(step.logits[row][real]).any():
                raise ActExportError(
                    f"{checkpoint.name} computes NaN in PyTorch in float32 ({case.name}), so there is nothing to "
                    f"export: some of its weights are too large, or its configuration isn't the one it was trained with"
                )


def _check_finite(report: EngineReport, checkpoint: Checkpoint, precision: str) -> None:
    """Raises ActExportError if PyTorch in a half type gets infinite logits where they are finite in float32."""
    largest = [max(each.metrics.max_difference, each.flipped_metrics.max_difference) for each in report.results]
    if not np.isfinite(largest).all():
        raise ActExportError(
            f"{checkpoint.name} can't run in {precision}: its logits aren't finite in PyTorch either; export it with "
            f"{'--dtype bfloat16 or ' if precision == 'float16' else ''}--dtype float32"
        )


def _engine_report(
    name: str, results: Sequence[CaseResult], flipped_sequences: float, cases: Collection[str]
) -> EngineReport:
    judged = [result for result in results if result.case in cases]
    flipped = sum(result.flipped_sequences for result in judged)
    few_flips = flipped <= flipped_sequences * sum(result.sequences for result in judged)
    return EngineReport(name, tuple(results), few_flips and all(result.passed for result in results))


def _batch_against_alone(session: Session, cases: Sequence[Case], rule: SinkRule, gates: _Gates) -> CaseResult:
    """Each row of the ragged batch equals the prompt run alone, both in this engine."""
    case = next(case for case in cases if case.name.startswith("ragged"))
    (ids,) = case.calls
    engine = session_engine(session, rule)
    together = rule.step(*engine(ids, case.attention_mask, first=True), case.attention_mask)
    runs = []
    for row, mask in enumerate(case.attention_mask.astype(bool)):
        whole = np.ones((1, mask.sum()), np.int64)
        alone = rule.step(*engine(ids[row : row + 1, mask], whole, first=True), whole)
        runs.append(([together.of(row, mask)], [alone]))
    return compare_runs(f"{case.name}: each row as if alone", runs, gates.of_all)


def _generation_against_runs(session: Session, cases: Sequence[Case], rule: SinkRule, gates: _Gates) -> CaseResult:
    """A cache that grows, with the last logits alone, equals runs by value with all logits, both in this engine."""
    case = next(case for case in cases if "chunks" in case.name)
    cache = session.allocate(len(case.attention_mask), capacity=case.calls[0].shape[1])
    engine = session_engine(session, rule)
    ours: list[Step] = []
    theirs: list[Step] = []
    for ids in case.calls:
        start, end = cache.length, cache.length + ids.shape[1]
        mask = case.attention_mask[:, :end]
        last = cache.step(ids, case.attention_mask[:, start:end])
        ours.append(rule.step(last.astype(np.float32), column_sums(session, cache.state(), mask, rule), mask))
        logits, sums = engine(ids, mask, first=not theirs)
        theirs.append(rule.step(logits[:, -1:], sums, mask))
    return compare_runs(f"{case.name}: as generation runs them", [(ours, theirs)], gates.of_all)


def _hook_against_own_attention(checkpoint: Checkpoint, cases: Sequence[Case]) -> Metrics:
    """The reference hook without calibration against the model as transformers runs it, on a padded batch.

    Of long prompts the last positions are compared, which see least of the padding and most of what came before.
    """
    longest = max((case.calls[0] for case in cases if len(case.calls[0]) == 1), key=lambda ids: ids.shape[1])[0]
    batch = ragged_batch([longest.tolist(), longest[len(longest) // 2 :].tolist()])
    ids, mask = (torch.from_numpy(array).to(checkpoint.model.device) for array in batch)
    with torch.no_grad(), attention_hook(checkpoint.model, ReferenceAttention(None)) as hooked:
        kept = min(_HOOK_POSITIONS, ids.shape[1]) * hooked.fewest_logits
        ours = hooked(ids, mask, logits_to_keep=kept).logits
    last = {"logits_to_keep": kept} if kept else {}
    with torch.no_grad(), contiguous_rows(checkpoint.model):
        own = checkpoint.model(
            input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False, **last
        ).logits
    real = mask.bool()[:, -ours.shape[1] :]
    ours, own = ours.float(), own.float()
    return compare_parts(
        (ours[row][real[row]].cpu().numpy(), own[row][real[row]].cpu().numpy()) for row in range(len(ids))
    )
