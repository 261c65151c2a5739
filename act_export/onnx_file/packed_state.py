"""Where the sink state is in a file whose host knows no state but a cache; see the export option `--state-in-cache`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_export.errors import shown
from act_export.json_fields import Fields
from act_export.onnx_file.names import PAST, PRESENT

PROPERTY = "packed_sink_state"
"""Key of the file's metadata, without act-export's prefix."""

SCALE = 32.0
"""Sums are divided by it in a half type, so that those of 65,000 tokens and more fit into float16."""

_MOST = 100_000  # layers, and heads of a layer


@dataclass(frozen=True)
class PackedState:
    """Column sums in tensors of the shape of a cache, (batch, key-value heads, tokens, head size).

    For each token, the numbers of all tensors one after another are: the first part of the sum of each calibrated head,
    layer by layer; the second part of each, if there is one; the third; zeros.

    Attributes:
        inputs: Names of the tensors.
        heads: Calibrated heads of each calibrated layer, in the order of the layers.
        parts: Numbers that add up to a sum.
    """

    inputs: tuple[str, ...]
    heads: Mapping[int, int]
    parts: int

    @property
    def num_heads(self) -> int:
        """Calibrated heads of all layers."""
        return sum(self.heads.values())

    @property
    def outputs(self) -> tuple[str, ...]:
        """The graph's outputs that the next call gets as `inputs`."""
        return tuple(name.replace(PAST, PRESENT) for name in self.inputs)

    def to_fields(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"inputs": self.inputs, "heads": self.heads, "parts": self.parts}

    @classmethod
    def of(cls, fields: Fields) -> PackedState:
        """That of a file's record; errors as of `Fields`."""
        heads = fields.inner("heads")
        layers = {name: heads.whole(name, 1, _MOST) for name in heads.members}
        wrong = next((name for name in layers if not (name.isdecimal() and int(name) < _MOST)), None)
        if wrong is not None or not layers:
            raise heads.refused(f"has {shown(wrong)}, which is no layer" if layers else "has no layer")
        inputs = fields.texts("inputs")
        if not inputs:
            raise fields.refused("names no inputs")
        return cls(inputs, {int(name): count for name, count in layers.items()}, fields.whole("parts", 1, 3))

    def unpack(self, state: Mapping[str, NDArray[Any]]) -> dict[int, NDArray[np.float32]]:
        """Running column sums (batch, calibrated heads, tokens, 1), by layer."""
        rows = [np.moveaxis(state[name], 1, 2) for name in self.inputs]
        flat = [row.reshape(*row.shape[:2], row.shape[2] * row.shape[3]) for row in rows]
        numbers = np.concatenate(flat, -1).astype(np.float32)
        parts = [numbers[..., i * self.num_heads : (i + 1) * self.num_heads] for i in range(self.parts)]
        sums = np.sum(parts, 0) * np.float32(SCALE if self.parts > 1 else 1)
        columns = np.moveaxis(sums, -1, 1)[..., None]
        ends = np.cumsum(list(self.heads.values()))
        return dict(zip(self.heads, np.split(columns, ends[:-1], axis=1), strict=True))
