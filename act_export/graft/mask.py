"""Logits of an attention as a graph computes them, against what the operator does to them.

Between the product of query and key and the softmax, exporters put scale, cap and mask in many ways. This runs that
part of the graph on numbers of its own and reads the scale, the cap and the window off the results, then compares
with causal attention over real tokens, whichever side the padding is on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from act_export.graft.graph import UnsupportedPatternError
from act_export.graft.probe import Call, Part

_LOWEST_VISIBLE = -500.0  # exp of anything below is 0, next to logits as small as those here
_SMALL = {np.dtype(np.float32): 2.0**-10, np.dtype(np.float16): 2.0**-6}  # hardly capped, and not yet rounded
_LARGE = 2.0**13
_LENGTHS = (1 << 16, 1 << 10, 1 << 6)  # of the row that shows the window; older exports have a table of 1024 x 1024
_LARGEST_SQUARE = 512  # window of which a whole prompt is compared, which takes memory for every pair of tokens
_TOLERANCE = {np.dtype(np.float32): 1e-4, np.dtype(np.float16): 1e-2}


@dataclass(frozen=True)
class LogitTerms:
    """What becomes of the logits.

    Attributes:
        scale: They are multiplied by it.
        softcap: Then capped at it by tanh; 0 for none.
        sliding_window: Number of keys that a row sees, itself included; -1 for all.
        takes_chunks: Whether several tokens can follow others in the cache.
    """

    scale: float
    softcap: float
    sliding_window: int
    takes_chunks: bool


class Logits(Protocol):
    """How an attention treats its logits."""

    @property
    def heads(self) -> int:
        """Query heads."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the logits."""

    def run(self, logits: NDArray[Any], call: Call) -> NDArray[np.float64]:
        """What the softmax gets for logits (batch, heads, sequence, total) in a call, of the same shape.

        Raises:
            UnsupportedPatternError: If it can't be computed.
        """


@dataclass(frozen=True)
class LogitPart:
    """The part of a graph between the product of query and key and the softmax.

    Attributes:
        part: It.
        logits: Name of the product, (batch, heads, sequence, total).
        heads: Query heads.
        dtype: Of the product.
        shapes: Other values whose shape it may ask for: (batch, heads, sequence or total, size) and which of the two.
    """

    part: Part
    logits: str
    heads: int
    dtype: np.dtype[Any]
    shapes: Mapping[str, tuple[int, str, int]]

    def run(self, logits: NDArray[Any], call: Call) -> NDArray[np.float64]:
        """What the softmax gets for a call, float64, of the shape of `logits`."""
        given: dict[str, NDArray[Any]] = {self.logits: np.asarray(logits, self.dtype)}
        lengths = {"sequence": call.sequence, "past": call.past, "total": call.mask.shape[1]}
        for name, (heads, length, size) in self.shapes.items():
            given[name] = np.full((call.batch, heads, lengths[length], size), np.nan, self.dtype)
        found = self.part.run(given, call)
        try:
            return np.broadcast_to(found.astype(np.float64), logits.shape)
        except ValueError:
            raise UnsupportedPatternError(
                f"logits of shape {logits.shape} become {found.shape} on their way to the softmax"
            ) from None


def read_logits(logits: Logits) -> LogitTerms:
    """Scale, cap and window of an attention.

    Raises:
        UnsupportedPatternError: If it isn't causal attention over the tokens that `attention_mask` calls real, or does
            something else to its logits.
    """
    scale, softcap = _scale_and_softcap(logits)
    terms = LogitTerms(scale, softcap, _window(logits), _takes_chunks(logits))
    for call in _calls(terms.sliding_window):
        if terms.takes_chunks or not call.is_chunk:
            _compare(logits, terms, call)
    return terms


def visible(call: Call, sliding_window: int) -> NDArray[np.bool_]:
    """Which keys the operator's rows see, (batch, sequence, total)."""
    columns = np.arange(call.mask.shape[1])
    rows = np.arange(call.past, call.mask.shape[1])[:, None]
    seen = columns <= rows
    if sliding_window >= 0:
        seen = seen & (columns > rows - sliding_window)
    seen_and_real: NDArray[np.bool_] = seen & (call.mask != 0)[:, None, :]
    return seen_and_real


def _ones(past: int, sequence: int) -> Call:
    return Call(np.ones((1, past + sequence), np.int64), sequence)


def _calls(window: int) -> Iterator[Call]:
    """Padding on either side, in prompts, chunks and single tokens; then the edge of the window."""
    yield Call(np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]), 5)
    yield Call(np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]), 5)
    yield Call(np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]), 1)
    yield Call(np.array([[1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1]]), 2)
    if window >= 0:
        yield _ones(max(window - 2, 0), 5)
        yield Call(np.array([[0, 0, *[1] * (window + 3)]]), 3)
        if window <= _LARGEST_SQUARE:
            yield Call(np.array([[0, 0, *[1] * (window + 3)]]), window + 5)


def _scale_and_softcap(logits: Logits) -> tuple[float, float]:
    def first_key(logit: float) -> float:
        return float(logits.run(np.full((1, logits.heads, 2, 2), logit), _ones(0, 2))[0, 0, 0, 0])

    small = _SMALL[logits.dtype]
    scale = first_key(small) / small
    if not np.isfinite(scale) or scale <= 0:
        raise UnsupportedPatternError(f"a logit of {small} becomes {scale * small} before the softmax")
    capped = first_key(_LARGE / scale)
    return scale, 0.0 if capped > _LARGE / 2 else capped


def _window(logits: Logits) -> int:
    """Keys that the last of many rows sees."""
    for length in _LENGTHS:
        call = _ones(length - 1, 1)
        try:
            row = logits.run(np.zeros((1, logits.heads if length < _LENGTHS[0] else 1, 1, length)), call)[0, 0, 0]
        except UnsupportedPatternError:
            continue
        seen = int(np.count_nonzero(row > _LOWEST_VISIBLE))
        return -1 if seen == length else seen
    raise UnsupportedPatternError(f"a row of {_LENGTHS[-1]} keys can't be masked")


def _takes_chunks(logits: Logits) -> bool:
    """Some exporters' masks have no shape for chunks; their models can't run these at all."""
    try:
        logits.run(np.zeros((1, logits.heads, 2, 5)), _ones(3, 2))
    except UnsupportedPatternError:
        return False
    return True


def _compare(logits: Logits, terms: LogitTerms, call: Call) -> None:
    random = np.random.default_rng(0)
    given = np.asarray(random.standard_normal((call.batch, logits.heads, call.sequence, call.mask.shape[1])))
    given = given.astype(logits.dtype).astype(np.float64)
    found = logits.run(given, call)
    wanted = given * terms.scale
    if terms.softcap:
        wanted = terms.softcap * np.tanh(wanted / terms.softcap)
    real = call.mask[:, -call.sequence :] != 0
    seen = visible(call, terms.sliding_window)[:, None] & np.ones_like(found, bool)
    rows = np.broadcast_to(real[:, None, :, None], found.shape)
    if not np.array_equal((found > _LOWEST_VISIBLE)[rows], seen[rows]):
        raise UnsupportedPatternError(
            f"its mask isn't that of causal attention over real tokens"
            f"{f' in a window of {terms.sliding_window}' if terms.sliding_window >= 0 else ''}: for the mask "
            f"{call.mask.tolist()} and {call.sequence} new tokens other keys are seen"
        )
    difference = np.abs(found - wanted)[rows & seen].max()
    if not difference <= _TOLERANCE[logits.dtype] * max(1.0, terms.scale):
        raise UnsupportedPatternError(
            f"its logits differ by {difference:.1e} from those with a scale of {terms.scale:.6g}"
            f"{f' and a cap of {terms.softcap:.6g}' if terms.softcap else ''}: something else is done to them"
        )
