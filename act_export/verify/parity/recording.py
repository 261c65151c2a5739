"""Running a case in an engine, PyTorch or a session, and keeping what is compared.

The logits of a thousand positions and a vocabulary of 262,144 take a gigabyte. Large ones wait for their comparison in
a temporary file; the system keeps of it in memory what there is room for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from act_export.attention.call import LayerState
from act_export.attention.hook import HookedModel
from act_export.attention.reference_attention import ReferenceAttention
from act_export.calibration.reference import later_sinks, sink_margins, visible_rows
from act_export.onnx_file.state import State
from act_export.runtime.request import DEFAULT, Choices
from act_export.runtime.session import Session
from act_export.verify.parity.cases import Case

_SHELVED_BYTES = 1 << 26


class Engine(Protocol):
    """Runs one call and returns logits and the running column sums by layer."""

    def __call__(
        self,
        tokens: NDArray[Any],
        attention_mask: NDArray[np.int64],
        *,
        first: bool,
        position_ids: NDArray[np.int64] | None = None,
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


class SinkRule:
    """What makes a column sum a sink, for each layer."""

    def __init__(self, attention: ReferenceAttention) -> None:
        """Takes the reference, whose heads, strengths and windows are those of now, and of later."""
        self._attention = attention

    @property
    def sliding_windows(self) -> dict[int, int]:
        """By layer, as the model asked for them."""
        return self._attention.sliding_windows

    def judge(self, sums: dict[int, Tensor], mask: NDArray[np.int64]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Sinks and margins of running column sums (batch, calibrated head, total, 1), by layer."""
        real = torch.from_numpy(mask != 0)[:, None]
        sinks, margins = {}, {}
        for layer, column_sums in sums.items():
            heads, strengths = self._attention.heads, self._attention.strengths
            sums_3d = column_sums.squeeze(-1)
            threshold, mode = strengths[:, heads.part(layer), 2:], heads.threshold_mode
            window = self.sliding_windows[layer]
            sinks[layer] = later_sinks(sums_3d, real, threshold=threshold, threshold_mode=mode, sliding_window=window)
            margins[layer] = sink_margins(
                sums_3d, real, threshold=threshold, threshold_mode=mode, sliding_window=window
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
        tokens: NDArray[Any],
        attention_mask: NDArray[np.int64],
        *,
        first: bool,
        position_ids: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], dict[int, Tensor]]:
        nonlocal state
        new, mask = (torch.from_numpy(array).to(device) for array in (tokens, attention_mask))
        places = torch.from_numpy(position_ids).to(device) if position_ids is not None else None
        ids, embeds = (None, new.to(hooked.model.dtype)) if new.is_floating_point() else (new, None)
        with torch.no_grad():
            outputs = hooked(ids, mask, None if first else state, inputs_embeds=embeds, position_ids=places)
        state = outputs.state
        sums = {layer: kept.sink_scores.cpu() for layer, kept in enumerate(state) if kept.sink_scores.shape[1]}
        return outputs.logits.float().cpu().numpy(), sums

    return run


def session_engine(session: Session, rule: SinkRule, calibration: Choices = DEFAULT) -> Engine:
    """A session, with states by value."""
    state: State | None = None

    def run(
        tokens: NDArray[Any],
        attention_mask: NDArray[np.int64],
        *,
        first: bool,
        position_ids: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], dict[int, Tensor]]:
        nonlocal state
        past = None if first else state
        logits, state = session.run(tokens, attention_mask, past, position_ids, calibration=calibration)
        return logits.astype(np.float32, copy=False), column_sums(session, state, attention_mask, rule)

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
    """Runs a case; decode steps feed the greedy tokens of `follow`, or (None) the engine's own.

    Without `follow` the steps are to be kept: large logits are in a file.
    """
    mask = case.attention_mask
    steps: list[Step] = []
    done = 0

    def run(tokens: NDArray[Any], mask: NDArray[np.int64]) -> None:
        end = mask.shape[1]
        positions = case.positions(end - tokens.shape[1], end)
        logits, sums = engine(tokens, mask, first=not steps, position_ids=positions)
        steps.append(rule.step(_shelved(logits) if follow is None else logits, sums, mask))

    for ids in case.calls:
        done += ids.shape[1]
        run(ids, mask[:, :done])
    for _ in range(case.decode_steps):
        leader = steps if follow is None else follow
        ids = leader[len(steps) - 1].logits[:, -1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], 1)
        run(ids, mask)
    return steps


def _shelved(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same logits, in a file without a name if they are large and there is room for one."""
    if logits.nbytes < _SHELVED_BYTES:
        return logits
    try:
        with tempfile.TemporaryFile() as file:
            logits.tofile(file)
            file.flush()
            return np.memmap(file, logits.dtype, "r", shape=logits.shape)
    except OSError:
        return logits
