"""What the masks of an attention operator mean: which keys a row sees.

A mask is a value that the graph computes, of a type and shape that the operator allows. Its nodes are run on calls of
all kinds, and what they say is compared with causal attention over real tokens; see `act_export.graft.mask`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_export.graft.graph import Graph, UnsupportedPatternError
from act_export.graft.mask import LogitTerms, read_logits
from act_export.graft.probe import Call, Part

_RANK = 4


@dataclass(frozen=True)
class OperatorMask:
    """What keeps rows of an attention operator from seeing keys.

    Attributes:
        added: Name of a mask that broadcasts to (batch, heads, sequence, total), added to the logits, or true where a
            key is seen; empty for none.
        keys: Name of a mask (batch, total) or (batch, sequence, total) of integers, 0 for keys that aren't seen; empty
            for none.
        causal: Rows don't see later keys.
        own_cache: The operator has the cache, so it knows how many keys come before its rows; it takes the first row
            for the first token otherwise.
        lowest: What the operator adds to logits of keys that aren't seen.
    """

    added: str = ""
    keys: str = ""
    causal: bool = False
    own_cache: bool = True
    lowest: float = -np.inf


class MaskReader:
    """Reads the masks of a graph's attention operators, each once: decoders share one between layers."""

    def __init__(self, graph: Graph) -> None:
        """Reads nothing yet."""
        self._graph = graph
        self._terms: dict[OperatorMask, LogitTerms | UnsupportedPatternError] = {}
        self._parts: dict[str, Part] = {}

    def read(self, mask: OperatorMask) -> LogitTerms:
        """The sliding window of a mask, and whether it can mask chunks.

        Raises:
            UnsupportedPatternError: If it isn't causal attention over the tokens that `attention_mask` calls real; it
                names the mask.
        """
        if mask not in self._terms:
            self._terms[mask] = self._read(mask)
        found = self._terms[mask]
        if isinstance(found, UnsupportedPatternError):
            raise found
        return found

    def embeddings(self, mask: OperatorMask) -> Mapping[str, int]:
        """Width of token embeddings whose shape the mask depends on, by name."""
        return {name: width for given in self._names(mask) for name, width in self._part(given).embeddings.items()}

    def _read(self, mask: OperatorMask) -> LogitTerms | UnsupportedPatternError:
        names = self._names(mask)
        if not names:
            what = "takes padding for tokens" if mask.causal else "sees later tokens"
            return UnsupportedPatternError(f"it has no mask, so it {what}; export the model with its attention mask")
        try:
            return read_logits(_MaskedLogits(mask, {name: self._part(name) for name in names}))
        except UnsupportedPatternError as error:
            return UnsupportedPatternError(f"{error} (read from {' and '.join(names)})")

    def _names(self, mask: OperatorMask) -> Sequence[str]:
        return [name for name in (mask.added, mask.keys) if name]

    def _part(self, name: str) -> Part:
        if name not in self._parts:
            self._parts[name] = Part(self._graph, name, ())
        return self._parts[name]


@dataclass(frozen=True)
class _MaskedLogits:
    """Logits of one head under a mask; see `act_export.graft.mask.Logits`."""

    mask: OperatorMask
    parts: Mapping[str, Part]

    @property
    def heads(self) -> int:
        return 1

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def run(self, logits: NDArray[Any], call: Call) -> NDArray[np.float64]:
        masked = logits.astype(np.float64)
        if self.mask.added:
            masked = masked + _one_head(_as_bias(self._compute(self.mask.added, call)), call)
        if self.mask.keys:
            masked = masked + _one_head(_of_keys(self._compute(self.mask.keys, call), self.mask.lowest), call)
        if self.mask.causal:
            first = call.past if self.mask.own_cache else 0
            later = np.arange(call.mask.shape[1]) > first + np.arange(call.sequence)[:, None]
            masked = masked + np.where(later, self.mask.lowest, 0.0)
        return masked

    def _compute(self, name: str, call: Call) -> NDArray[Any]:
        return self.parts[name].run({}, call)


def _as_bias(found: NDArray[Any]) -> NDArray[np.float64]:
    if found.dtype == np.bool_:
        return np.where(found, 0.0, -np.inf)
    if not np.issubdtype(found.dtype, np.floating):
        raise UnsupportedPatternError(f"a mask of type {found.dtype} can't be added to logits")
    return found.astype(np.float64)


def _of_keys(found: NDArray[Any], lowest: float) -> NDArray[np.float64]:
    axes = {2: (1, 2), 3: (1,)}
    if found.ndim not in axes:
        raise UnsupportedPatternError(
            f"its key padding mask has shape {found.shape}; (batch, tokens) or (batch, new tokens, tokens) is known"
        )
    return np.expand_dims(np.where(found > 0, 0.0, lowest), axes[found.ndim])


def _one_head(bias: NDArray[np.float64], call: Call) -> NDArray[np.float64]:
    """(batch, 1, sequence, total), if all heads agree."""
    heads = bias.shape[-3] if bias.ndim >= _RANK - 1 else 1
    try:
        whole = np.broadcast_to(bias, (call.batch, heads, call.sequence, call.mask.shape[1]))
    except ValueError:
        raise UnsupportedPatternError(
            f"a mask of shape {bias.shape} doesn't fit {call.sequence} new of {call.mask.shape[1]} tokens"
        ) from None
    if heads > 1 and not np.array_equal(whole, np.broadcast_to(whole[:, :1], whole.shape), equal_nan=True):
        raise UnsupportedPatternError("its mask differs between heads, as a bias of positions does")
    return whole[:, :1]
