"""The state of an exported model: its cache and the running column sums, by the names of the graph's inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from act_export.onnx_file.names import PAST, PAST_SINKS, PRESENT, PRESENT_SINKS

State = dict[str, NDArray[Any]]
"""Arrays by input name; batch is axis 0, tokens are axis 2."""

_PREFIXES = {PAST: PRESENT, PAST_SINKS: PRESENT_SINKS}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
"""numpy has no type of its own for it, and ONNX Runtime takes no array of this one: bind its memory instead."""

DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": BFLOAT16,
}
_ONNX_BFLOAT16 = 16
_MOST = 2**31


def bound_type(dtype: np.dtype[Any]) -> Any:
    """How ONNX Runtime's bindings want a type: numpy's, or ONNX's number where numpy has none."""
    return _ONNX_BFLOAT16 if dtype == BFLOAT16 else dtype


@dataclass(frozen=True)
class StateInput:
    """One part of the state.

    Attributes:
        name: Of the graph's input.
        present: Name of the graph's output that is the next call's input.
        heads: Key-value heads, or calibrated heads.
        size: Head size; 1 for column sums.
        dtype: Of the array.
    """

    name: str
    present: str
    heads: int
    size: int
    dtype: np.dtype[Any]

    def shape(self, batch: int, tokens: int) -> tuple[int, int, int, int]:
        """(batch, heads, tokens, size)."""
        return batch, self.heads, tokens, self.size

    def zeros(self, batch: int, tokens: int) -> NDArray[Any]:
        """An array (batch, heads, tokens, size)."""
        return np.zeros(self.shape(batch, tokens), self.dtype)


def state_inputs(inner: Any, look_up: Callable[[str], StateInput]) -> tuple[StateInput, ...]:
    """The state inputs of an `onnxruntime.InferenceSession`, in the graph's order.

    Args:
        inner: The session.
        look_up: Tells of an input whose shape doesn't say heads or size, by name.
    """
    found = []
    for given in inner.get_inputs():
        for prefix, present in _PREFIXES.items():
            if given.name.startswith(prefix):
                name = present + given.name.removeprefix(prefix)
                _, heads, _, size = given.shape if len(given.shape) == 4 else (None,) * 4
                if _in_range(heads) and _in_range(size) and given.type in DTYPES:
                    found.append(StateInput(given.name, name, heads, size, DTYPES[given.type]))
                else:
                    found.append(look_up(given.name))
    return tuple(found)


def _in_range(size: Any) -> TypeGuard[int]:
    return isinstance(size, int) and 0 < size < _MOST


def select(state: State, rows: Sequence[int]) -> State:
    """The state of some sequences of a batch, in the order given; a row may be repeated."""
    return {name: value[list(rows)] for name, value in state.items()}
