"""Rotary positions as a GGUF file describes them: what transformers is told, and the frequencies that must come of it.

llama.cpp rotates pair i of a head by position * f[i], f[i] = base^(-2i/d) / factor[i], and scales the angles as
`rope.scaling.*` says: https://github.com/ggml-org/ggml/blob/master/src/ggml-cpu/ops.cpp (rope_yarn). The frequencies
here are computed by these formulas, in float64, with nothing of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from act_export.checkpoint.gguf.keys import Keys
from act_export.errors import CheckpointError

SHARED_FACTORS, LONG_FACTORS, SHORT_FACTORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
_CLOSE = 1e-5  # relative: the file's factors are float32


@dataclass(frozen=True)
class Rotary:
    """Of one kind of layer.

    Attributes:
        kind: As transformers calls it: default, linear, yarn, llama3 or longrope.
        base: Of the frequencies.
        size: Numbers of a head that are rotated, d.
        share: Of the head's numbers that these are.
        factor: That positions are divided by, where the kind has one.
        original: Context that the model had before.
        attention_factor: That cosines and sines are multiplied by.
        beta_fast: Rotations above which yarn leaves a frequency.
        beta_slow: Rotations below which yarn divides it by the whole factor.
        short: Divisors of the frequencies, [size / 2], up to the original context.
        long: Divisors beyond it.
        low: llama3's low_freq_factor.
        high: llama3's high_freq_factor.
        partial: Whether such models can rotate a share of a head alone.
    """

    kind: str
    base: float
    size: int
    share: float = 1.0
    factor: float = 1.0
    original: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    low: float = 1.0
    high: float = 4.0
    partial: bool = False

    def parameters(self) -> dict[str, Any]:
        """`rope_parameters` of a transformers configuration."""
        found: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.base}
        if self.partial:
            found["partial_rotary_factor"] = self.share
        if self.kind in ("linear", "yarn", "llama3"):
            found["factor"] = self.factor
        if self.kind in ("yarn", "llama3", "longrope"):
            found["original_max_position_embeddings"] = self.original
        if self.kind in ("yarn", "longrope"):
            found["attention_factor"] = self.attention_factor
        if self.kind == "yarn":
            found |= {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow}
        if self.kind == "llama3":
            found |= {"low_freq_factor": self.low, "high_freq_factor": self.high}
        if self.kind == "longrope":
            found |= {"short_factor": list(self.short), "long_factor": list(self.long)}
        return found

    def frequencies(self, *, beyond: bool = False) -> np.ndarray:
        """Angle per position of each pair, [size / 2].

        Args:
            beyond: For contexts longer than the original one, where these differ.
        """
        plain = self.base ** (-np.arange(0, self.size, 2, dtype=np.float64) / self.size)
        divisors = self.long if beyond else self.short
        if divisors:
            return np.asarray(plain / np.asarray(divisors, np.float64))
        if self.kind == "yarn":
            return self._yarn(plain)
        return np.asarray(plain / self.factor)

    def _yarn(self, plain: np.ndarray) -> np.ndarray:
        def pair_of(rotations: float) -> float:
            return self.size * math.log(self.original / (rotations * 2 * math.pi)) / (2 * math.log(self.base))

        first = max(0, math.floor(pair_of(self.beta_fast)))
        last = min(self.size - 1, math.ceil(pair_of(self.beta_slow)))
        ramp = np.clip((np.arange(self.size // 2) - first) / max(0.001, last - first), 0, 1)
        return np.asarray(plain * (1 - ramp) + plain / self.factor * ramp)


def read_rotary(
    keys: Keys, *, size: int, head_size: int, context: int, factors: bool = False, partial: bool = False
) -> Rotary:
    """What the keys `rope.*` and the tensors of factors say together.

    Args:
        keys: The file's.
        size: Numbers of a head that are rotated.
        head_size: Of the keys.
        context: Tokens that the model was made for.
        factors: Whether the architecture has tensors of factors; with False they are left to be refused.
        partial: Whether such models can rotate a share of a head alone.

    Raises:
        CheckpointError: If they can't be applied exactly, with the key.
    """
    if size % 2 or not 0 < size <= head_size:
        raise keys.refused(keys.full("rope.dimension_count"), size, f"an even number up to {head_size} is needed")
    plain = Rotary("default", keys.number("rope.freq_base", 10000.0), size, size / head_size, partial=partial)
    kind, factor = _scaling(keys)
    attention_factor = keys.number("rope.scaling.attn_factor", 1.0)
    original = keys.count("rope.scaling.original_context_length", context)
    divisors = {name: _divisors(keys, name, size) for name in _TENSORS} if factors else {}
    shared, long, short = (divisors.get(name, ()) for name in _TENSORS)
    if bool(long) != bool(short):
        raise CheckpointError(
            f"can't load {keys.gguf.path}: it has one of {LONG_FACTORS} and {SHORT_FACTORS}, which belong together"
        )
    if kind == "longrope" and not long:
        raise keys.refused(
            keys.full("rope.scaling.type"), kind, f"it needs the tensors {LONG_FACTORS} and {SHORT_FACTORS}"
        )
    if (shared or long) and (factor != 1.0 or kind == "yarn"):
        raise keys.refused(
            keys.full("rope.scaling.factor"), factor, "scaling of that kind beside tensors of factors isn't verified"
        )
    if long:
        if shared:
            raise CheckpointError(f"can't load {keys.gguf.path}: it has {SHARED_FACTORS} beside {LONG_FACTORS}")
        return replace(
            plain, kind="longrope", original=original, attention_factor=attention_factor, short=short, long=long
        )
    if kind == "yarn":
        return _yarn(keys, plain, factor, original, attention_factor)
    if attention_factor != 1.0:
        raise keys.refused(
            keys.full("rope.scaling.attn_factor"), attention_factor, "it is applied with yarn and longrope alone"
        )
    if shared and any(each != 1.0 for each in shared):
        by_formula = _llama3(plain, shared, context)
        return by_formula or replace(plain, kind="longrope", original=context, short=shared, long=shared)
    return plain if factor == 1.0 else replace(plain, kind="linear", factor=factor)


_TENSORS = (SHARED_FACTORS, LONG_FACTORS, SHORT_FACTORS)


def _scaling(keys: Keys) -> tuple[str, float]:
    """Kind and factor; llama.cpp takes a factor without a kind for linear scaling."""
    kind = keys.take("rope.scaling.type")
    if kind not in (None, "none", "linear", "yarn", "longrope"):
        raise keys.refused(
            keys.full("rope.scaling.type"),
            kind,
            "none, linear, yarn and longrope are known; convert the original checkpoint to safetensors and pass that",
        )
    old = keys.number("rope.scale_linear", 1.0)
    factor = keys.number("rope.scaling.factor", 0.0, positive=False) or old
    if factor < 0:
        raise keys.refused(keys.full("rope.scaling.factor"), factor, "a number above 0 is needed")
    if kind == "none":
        return "none", 1.0
    return kind or "linear", factor


def _yarn(keys: Keys, plain: Rotary, factor: float, original: int, attention_factor: float) -> Rotary:
    why = "yarn of that kind isn't verified"
    if attention_factor != 1.0:
        raise keys.refused(keys.full("rope.scaling.attn_factor"), attention_factor, why)
    keys.must_be("rope.scaling.yarn_attn_factor", 1.0, why)
    keys.must_be("rope.scaling.yarn_log_multiplier", 0.0, why)
    if keys.take("rope.scaling.yarn_ext_factor") not in (None, 1.0, -1.0):
        raise keys.refused(keys.full("rope.scaling.yarn_ext_factor"), keys.take("rope.scaling.yarn_ext_factor"), why)
    if factor < 1.0:
        raise keys.refused(keys.full("rope.scaling.factor"), factor, why)
    return replace(
        plain,
        kind="yarn",
        factor=factor,
        original=original,
        attention_factor=1.0 + 0.1 * math.log(factor),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
    )


def _divisors(keys: Keys, name: str, size: int) -> tuple[float, ...]:
    tensor = keys.gguf.tensors.get(name)
    if tensor is None:
        return ()
    if tensor.shape != (size // 2,):
        raise CheckpointError(
            f"can't load {keys.gguf.path}: tensor {name} has shape {tensor.shape}, not [{size // 2}], one number for "
            f"each pair that is rotated"
        )
    values = tensor.values()
    if not np.isfinite(values).all() or (values <= 0).any():
        raise CheckpointError(f"can't load {keys.gguf.path}: tensor {name} has numbers that aren't above 0")
    return tuple(values.tolist())


def _llama3(plain: Rotary, divisors: tuple[float, ...], context: int) -> Rotary | None:
    """The settings of Llama 3 that these divisors come from; None if there are none among the usual ones."""
    found = np.asarray(divisors)
    for factor, low, high, original in _usual(float(found.max()), context):
        if np.allclose(llama3_divisors(plain, factor, low, high, original), found, rtol=_CLOSE, atol=0):
            known = replace(plain, kind="llama3", factor=factor, original=original, low=low, high=high)
            return replace(known, short=divisors, long=divisors)
    return None


def _usual(factor: float, context: int) -> Iterator[tuple[float, float, float, int]]:
    for original in dict.fromkeys((8192, *(1 << n for n in range(4, 21)), context)):
        yield factor, 1.0, 4.0, original


def llama3_divisors(plain: Rotary, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """What Llama 3 divides each frequency by, [size / 2]: 1 for short waves, `factor` for long ones."""
    wave = 2 * math.pi / plain.frequencies()
    smooth = (original / wave - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wave < original / high, 1.0, np.where(wave > original / low, factor, between))
