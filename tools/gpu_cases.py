"""What the operator is checked on: shapes, masks, caches and types that its kernels treat differently.

A case is a sequence of calls, each with the state that the call before left. The same cases run on the CPU, where the
kernels are checked by other tests too: that shows the cases to be right.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from attention_workloads import SINK_PLACES, Shape, draw_tokens, estimate_column_sums
from on_device import DTYPES, Array, storage

SHARED, COPIED, REBUFFERED = "shared", "copied", "rebuffered"
LAYOUTS = (SHARED, COPIED, REBUFFERED)
SPARE = 9  # positions that a preallocated cache has beyond what the calls need
SMALL_TOTAL = 200  # tokens: cases up to here are checked under tools that slow everything down


@dataclass(frozen=True)
class Case:
    """One model of one node, and what it is given.

    Attributes:
        name: Unique, without the type.
        calls: New tokens of each call.
        dtype: Of activations and cache.
        heads: Query heads.
        kv_heads: Key-value heads.
        head_size: Of both.
        calibrated_heads: None: `act.Attention`.
        beta: One, or one for each calibrated head.
        threshold: tau or alpha.
        threshold_mode: "absolute" or "relative".
        softcap: 0 for none.
        sliding_window: -1 for none.
        batch: Sequences.
        sink_places: Of the later sinks, in parts of the total.
        past: Tokens that are in the cache before the first call, with estimated column sums.
        padding: "none", "left", "right", "holes", or "ragged": a different one for each sequence.
        layout: "shared": past and present are one buffer, longer than needed; "copied": the past has its exact length
            and the present other memory; "rebuffered": past and present are two buffers, both longer than needed.
        garbage: Padding tokens and unwritten positions of the cache hold NaN.
        graph: The one call is the replay of a CUDA graph, and made again with other tokens in the same memory.
    """

    name: str
    calls: tuple[int, ...]
    dtype: str = "float32"
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    calibrated_heads: tuple[int, ...] = (0, 3)
    beta: tuple[float, ...] = (0.4,)
    threshold: float = 0.1
    threshold_mode: str = "absolute"
    softcap: float = 0.0
    sliding_window: int = -1
    batch: int = 2
    sink_places: tuple[float, ...] = SINK_PLACES
    past: int = 0
    padding: str = "none"
    layout: str = SHARED
    garbage: bool = False
    graph: bool = False

    @property
    def total(self) -> int:
        """Tokens after the last call."""
        return self.past + sum(self.calls)

    @property
    def capacity(self) -> int:
        """Positions of a preallocated cache."""
        return self.total + SPARE

    @property
    def small(self) -> bool:
        """Whether it is soon done."""
        return self.total <= SMALL_TOTAL

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype}"


@dataclass(frozen=True)
class Tokens:
    """What a case's calls consist of, in the case's type.

    Attributes:
        query: (batch, rows, heads, head_size) of the calls' tokens.
        key: (batch, total, kv_heads, head_size), those of the past too.
        value: As `key`.
        mask: (batch, total), int64.
        past_sums: Running column sums of the past, (batch, calibrated heads, past, 1).
    """

    query: Array
    key: Array
    value: Array
    mask: Array
    past_sums: Array


def all_cases() -> list[Case]:
    """Every case in every type."""
    return [replace(case, dtype=dtype) for dtype in DTYPES for case in _cases()]


def _cases() -> list[Case]:
    grouped: dict[str, Any] = {"heads": 8, "kv_heads": 2, "head_size": 128, "calibrated_heads": (1, 4, 5, 7)}
    cases = [Case(f"prompt and decode, head size {size}", (150, 1, 1), head_size=size) for size in (64, 96, 128, 256)]
    cases += [Case(f"padding {kind}", (131, 1, 20), padding=kind) for kind in ("left", "right", "holes", "ragged")]
    cases += [Case(f"cache {layout}", (70, 1, 3, 1), layout=layout, padding="left") for layout in LAYOUTS]
    cases += [
        Case("one token, nothing before", (1, 1, 1), threshold=0.3),
        Case("chunks", (70, 1, 33, 16, 1, 17), head_size=128),
        Case("sliding window", (130, 1, 1), sliding_window=48),
        Case("sliding window and holes", (90, 1, 30), sliding_window=17, padding="holes", threshold=0.2),
        Case("soft cap", (130, 1, 1), softcap=5.0, head_size=256, threshold=0.03),
        Case("soft cap, window, padding", (90, 1), softcap=8.0, sliding_window=40, padding="ragged"),
        Case("no group", (100, 1), heads=3, kv_heads=3, calibrated_heads=(2, 0)),
        Case("one key-value head", (100, 1, 2), heads=8, kv_heads=1, calibrated_heads=(7, 2, 3), head_size=256),
        Case("groups of 16", (90, 1), heads=32, kv_heads=2, calibrated_heads=tuple(range(0, 32, 4)), batch=1),
        Case("all heads", (140, 1, 1), **{**grouped, "calibrated_heads": tuple(range(8))}),
        Case("no head", (140, 1, 1), **{**grouped, "calibrated_heads": ()}, padding="ragged"),
        Case("no head, copied", (100, 1, 1), calibrated_heads=(), layout=COPIED),
        Case("beta of each head", (140, 1), **grouped, beta=(0.0, 2.0, 1.0, 1.3)),
        Case("many sinks", (150, 1, 1), sink_places=tuple(i / 60 for i in range(1, 50)), threshold=0.01),
        Case("relative threshold, padding", (120, 1), threshold=5.0, threshold_mode="relative", padding="ragged"),
        Case("garbage in padding and spare", (110, 1, 20), padding="ragged", garbage=True),
        Case("garbage, copied", (110, 1), padding="ragged", garbage=True, layout=REBUFFERED),
        Case("one prompt of 1500", (1500, 1), **grouped, batch=1),
        Case("prompt of 1100, padding", (1100, 1), **grouped, padding="left"),
        Case("decode after 9000", (1, 1), past=9000, heads=8, kv_heads=2, head_size=128, calibrated_heads=(0, 5)),
        Case("decode after 3000, batch of 8", (1, 4), past=3000, batch=8, padding="left"),
        Case("graph, decode", (1,), past=150, padding="left", graph=True),
        Case("graph, decode without calibrated heads", (1,), past=150, calibrated_heads=(), graph=True),
        Case("graph, prompt", (120,), head_size=128, padding="ragged", graph=True),
    ]
    return cases


def draw(case: Case, variant: int = 0) -> Tokens:
    """The data of a case, the same at each call; other tokens and padding for another variant."""
    rng = np.random.default_rng([zlib.crc32(case.name.encode()), variant])
    dtype = storage(case.dtype)
    shape = Shape(case.heads, case.kv_heads, case.head_size)
    sampled = np.unique(np.linspace(0, case.past - 1, 64).astype(int)) if case.past else np.zeros(0)
    queries, keys, values = draw_tokens(
        rng, shape, case.batch, case.total, len(sampled) + sum(case.calls), case.sink_places
    )
    mask = np.stack([_mask_row(_padding_of(case, b), case.total, rng) for b in range(case.batch)])
    sums = estimate_column_sums(queries[:, : len(sampled)], keys[:, : case.past], sampled)
    sums = sums[:, list(case.calibrated_heads)] * mask[:, None, : case.past, None]
    return Tokens(
        queries[:, len(sampled) :].astype(dtype),
        keys.astype(dtype),
        values.astype(dtype),
        mask,
        sums.astype(np.float32),
    )


def _padding_of(case: Case, sequence: int) -> str:
    return ("left", "none", "right", "holes")[sequence % 4] if case.padding == "ragged" else case.padding


def _mask_row(padding: str, total: int, rng: np.random.Generator) -> Array:
    row = np.ones(total, np.int64)
    count = int(rng.integers(total // 8, total // 3 + 1))
    if padding == "left":
        row[:count] = 0
    elif padding == "right":
        row[total - count :] = 0
    elif padding == "holes":
        row[rng.random(total) < 0.3] = 0
    return row
