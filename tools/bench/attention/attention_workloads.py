"""What bench_attention.py gives its contenders to do: shapes, lengths, and data that holds later sinks."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from on_device import Array, storage

SAMPLED_ROWS = 256  # rows that the column sums of a past are estimated from
SINK_PLACES = (1 / 16, 1 / 4, 1 / 2)  # later sinks, in parts of the length
SINK_SHARE = 0.3  # a sink's weight in parts of all ordinary tokens' together: it draws 14% of the last row


class Shape(NamedTuple):
    num_heads: int
    kv_num_heads: int
    head_size: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """A shape from heads x key-value heads x head size, as 9x3x64."""
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
        if match is None:
            raise ValueError(f"{text!r} is no shape; give heads, key-value heads and head size, as 9x3x64")
        shape = cls(*map(int, match.groups()))
        if min(shape) == 0 or shape.num_heads % shape.kv_num_heads or shape.head_size % 8:
            raise ValueError(
                f"{text}: key-value heads must divide heads, and the head size must be a multiple of 8 "
                "(GroupQueryAttention refuses others)"
            )
        return shape

    def __str__(self) -> str:
        return "x".join(map(str, self))


@dataclass(frozen=True)
class Workload:
    """One call: a prompt of `length` tokens, or one token with `length` tokens in the cache."""

    shape: Shape
    work: str
    length: int
    batch: int = 1
    dtype: str = "float32"

    @property
    def sequence(self) -> int:
        return self.length if self.work == "prompt" else 1

    @property
    def past(self) -> int:
        return 0 if self.work == "prompt" else self.length

    @property
    def total(self) -> int:
        return self.past + self.sequence

    @property
    def capacity(self) -> int:
        """Positions in the preallocated cache; a prompt writes one of exactly its own length."""
        return self.total if self.work == "prompt" else (self.total // 256 + 1) * 256

    @property
    def flops(self) -> int:
        """Of the two products, visible columns only."""
        visible = sum(range(self.past + 1, self.total + 1))
        return 4 * self.batch * self.shape.num_heads * self.shape.head_size * visible

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values that the call attends to."""
        size = storage(self.dtype).itemsize
        return 2 * self.batch * self.shape.kv_num_heads * self.total * self.shape.head_size * size

    @property
    def least_bytes(self) -> int:
        """Read and written at least: query, output, new keys and values and their copy in the cache, and the past."""
        heads = 2 * self.shape.num_heads + 4 * self.shape.kv_num_heads
        past = 2 * self.shape.kv_num_heads * self.past
        size = storage(self.dtype).itemsize
        return self.batch * (self.sequence * heads + past) * self.shape.head_size * size

    def __str__(self) -> str:
        return f"{self.shape} {self.work} {self.length}"


class Data(NamedTuple):
    """Shapes as in the operator's table; the past arrays are exactly `past` long."""

    query: Array
    key: Array
    value: Array
    past_key: Array
    past_value: Array
    past_sink_scores: Array


def make_data(workload: Workload, seed: int = 0) -> Data:
    """Normal queries, keys and values, but for a few sinks: keys along a direction that all queries lean to.

    The attention is neither uniform nor one-hot, and there are later sinks to calibrate. The running column sums of a
    past are estimated from up to `SAMPLED_ROWS` of its rows.
    """
    shape, batch, total = workload.shape, workload.batch, workload.total
    sampled = np.unique(np.linspace(0, workload.past - 1, SAMPLED_ROWS).astype(int)) if workload.past else np.zeros(0)
    rng = np.random.default_rng(seed)
    queries, keys, values = draw_tokens(rng, shape, batch, total, len(sampled) + workload.sequence)

    def cached(tokens: Array) -> Array:
        return np.ascontiguousarray(tokens[:, : workload.past].swapaxes(1, 2), storage(workload.dtype))

    def new(tokens: Array) -> Array:
        newest = np.ascontiguousarray(tokens[:, -workload.sequence :], storage(workload.dtype))
        return newest.reshape(batch, workload.sequence, -1)

    return Data(
        new(queries),
        new(keys),
        new(values),
        cached(keys),
        cached(values),
        estimate_column_sums(queries[:, : len(sampled)], keys[:, : workload.past], sampled),
    )


def draw_tokens(
    rng: np.random.Generator,
    shape: Shape,
    batch: int,
    total: int,
    rows: int,
    sink_places: Sequence[float] = SINK_PLACES,
) -> tuple[Array, Array, Array]:
    """Queries (batch, rows, heads, size), and keys and values (batch, total, kv_heads, size), with sinks at places."""
    heads, kv_heads, size = shape

    def normal(*dimensions: int) -> Array:
        return rng.standard_normal(dimensions, dtype=np.float32)

    direction = normal(kv_heads, size)
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    # With logits of variance 1 the ordinary tokens weigh e ** 0.5 each.
    sink_logit = math.log(max(SINK_SHARE * total * math.exp(0.5), 1.0))
    lean = math.sqrt(sink_logit * math.sqrt(size)) * direction

    keys = normal(batch, total, kv_heads, size)
    keys -= np.sum(keys * direction, -1, keepdims=True) * direction
    for place in {0, *(int(part * total) for part in sink_places)}:
        keys[:, place] = lean
    values = normal(batch, total, kv_heads, size)
    queries = normal(batch, rows, heads, size)
    queries += np.repeat(lean, heads // kv_heads, 0)
    return queries, keys, values


def estimate_column_sums(queries: Array, keys: Array, rows: Array) -> Array:
    """Running column sums of a past (batch, heads, past, 1), from queries (batch, rows, heads, size) of some rows."""
    batch, past, kv_heads, size = keys.shape
    heads = queries.shape[2]
    columns = np.arange(past)
    visible = columns <= rows[:, None]
    rows_seeing = np.maximum(visible.sum(0), 1)
    sums = np.zeros((batch, heads, past, 1), np.float32)
    for b in range(batch if past else 0):
        for head in range(heads):
            logits = queries[b, :, head] @ keys[b, :, head * kv_heads // heads].T / math.sqrt(size)
            weights = np.exp(np.where(visible, logits, -np.inf))
            weights /= weights.sum(-1, keepdims=True)
            sums[b, head, :, 0] = weights.sum(0) / rows_seeing * (past - columns)
    return sums
