"""Running a case in an engine, PyTorch or a session, and keeping what is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from act_export.calibration import Calibration
from act_export.hooks import HookedModel, LayerState
from act_export.reference import later_sinks, sink_margins, visible_rows
from act_export.runtime.session import Session
from act_export.runtime.state import State
from act_export.verify.cases import Case


class Engine(Protocol):
    """Runs one call and returns logits and the running column sums by layer."""

    def __call__(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], *, first: bool
    ) -> tuple[NDArray[np.float32], dict[int, Tensor]]:
        """Logits (batch, sequence, vocabulary); sums (batch, calibrated heads, total, 1) by layer."""
        ...


@dataclass(frozen=True)
class Step:
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

    def of(self, row: int, mask: NDArray[np.bool_]) -> Step:
        """One sequence of a first call without its padding; `mask` (sequence) is true for what stays."""
        kept = torch.from_numpy(mask)
        return Step(
            logits=self.logits[row : row + 1, mask],
            sinks={layer: sinks[row : row + 1][..., kept] for layer, sinks in self.sinks.items()},
            margins={layer: margins[row : row + 1][..., kept] for layer, margins in self.margins.items()},
            real=self.real[row : row + 1, mask],
        )


@dataclass(frozen=True)
class SinkRule:
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

    def step(self, logits: NDArray[np.float32], sums: dict[int, Tensor], mask: NDArray[np.int64]) -> Step:
        """The results of a call, whose last positions are those of the logits."""
        return Step(logits, *self.judge(sums, mask), (mask != 0)[:, -logits.shape[1] :])


def pytorch_engine(hooked: HookedModel) -> Engine:
    """A model under a hook, on the device that it is on."""
    state: list[LayerState] | None = None
    device = hooked.model.device

    def run(
        input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], *, first: bool
    ) -> tuple[NDArray[np.float32], dict[int, Tensor]]:
        nonlocal state
        ids, mask = (torch.from_numpy(array).to(device) for array in (input_ids, attention_mask))
        with torch.no_grad():
            outputs = hooked(ids, mask, None if first else state)
        state = outputs.state
        sums = {layer: kept.sink_scores.cpu() for layer, kept in enumerate(state) if kept.sink_scores.shape[1]}
        return outputs.logits.float().cpu().numpy(), sums

    return run


def session_engine(session: Session, rule: SinkRule) -> Engine:
    """A session, with states by value."""
    state: State | None = None

    def run(
        input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], *, first: bool
    ) -> tuple[NDArray[np.float32], dict[int, Tensor]]:
        nonlocal state
        logits, state = session.run(input_ids, attention_mask, None if first else state)
        return logits.astype(np.float32), column_sums(session, state, attention_mask, rule)

    return run


def column_sums(session: Session, state: State, attention_mask: NDArray[np.int64], rule: SinkRule) -> dict[int, Tensor]:
    """The running column sums of a session's state, (batch, calibrated heads, total, 1), by layer."""
    packed = session.packed_sinks
    if packed is not None:
        return {layer: torch.from_numpy(np.ascontiguousarray(sums)) for layer, sums in packed.unpack(state).items()}
    real = torch.from_numpy(attention_mask != 0)
    sums = {}
    for layer, names in session.sink_state.items():
        parts = [torch.from_numpy(state[name].astype(np.float32)) for name in names]
        if len(parts) == 1:
            (sums[layer],) = parts
        else:  # means
            rows = visible_rows(real, rule.sliding_windows[layer])
            sums[layer] = sum(parts[1:], parts[0]).sum(-1, keepdim=True) * rows[:, None, :, None]
    return sums


def record(case: Case, engine: Engine, rule: SinkRule, *, follow: Sequence[Step] | None) -> list[Step]:
    """Runs a case; decode steps feed the greedy tokens of `follow`, or (None) the engine's own."""
    mask = case.attention_mask
    steps: list[Step] = []
    done = 0

    def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> None:
        steps.append(rule.step(*engine(ids, mask, first=not steps), mask))

    for ids in case.calls:
        done += ids.shape[1]
        run(ids, mask[:, :done])
    for _ in range(case.decode_steps):
        leader = steps if follow is None else follow
        ids = leader[len(steps) - 1].logits[:, -1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], 1)
        run(ids, mask)
    return steps
