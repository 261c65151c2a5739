"""Calls of the attention operator, what each has to give, and how far a kernel's answer may be from it.

For every way to run it: the CUDA kernels in Triton's interpreter, and ONNX Runtime on a CPU or a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from close import assert_close, assert_within, smallest_number, spacing, unit_roundoff
from torch import Tensor

from act_export.calibration.reference import SMALLEST_REST, calibrate_with_state, sink_margins
from act_export.calibration.reference_operator import attention_probabilities, calibrated_attention
from act_export.ops.schema import NO_SINK_LOGIT

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FLOAT32_ERROR = 1e-5  # of numbers up to 1
# Of half types: the kernels round plain probabilities, PyTorch calibrated ones, and a row's sum has no rounding.
HALF_FACTOR = 2
OF_PYTORCH = 1.1  # root mean square of the errors in half types, by PyTorch's; measured: 0.65 to 1.07
CACHE_ROOM = 7  # positions of a preallocated cache beyond this call


@dataclass(frozen=True)
class Case:
    """One call of the operator.

    `sharpness` scales the logits; `padding` is none, left, right or holes. `beta` and `gamma` are those of all
    calibrated heads, or of each; with `each_sequence` those of a sequence's heads begin one further on than those of
    the sequence before it, and its threshold is higher by half.
    """

    batch: int = 2
    sequence: int = 5
    past: int = 0
    num_heads: int = 4
    kv_num_heads: int = 2
    head_size: int = 64
    value_head_size: int | None = None
    storage: str = "float32"
    scale: float | None = None
    softcap: float = 0.0
    sliding_window: int = -1
    calibrated_heads: tuple[int, ...] = (0, 3)
    beta: tuple[float, ...] = (0.4,)
    gamma: tuple[float, ...] = (1.0,)
    threshold: float = 0.05
    threshold_mode: str = "absolute"
    each_sequence: bool = False
    padding: str = "left"
    sharpness: float = 1.0
    in_place: bool = False
    sink_logits: tuple[float, ...] = ()
    seed: int = 0

    @property
    def value_size(self) -> int:
        return self.value_head_size or self.head_size

    @property
    def attributes(self) -> dict:
        names = ("num_heads", "kv_num_heads", "softcap", "sliding_window", "calibrated_heads", "threshold_mode")
        names += ("sink_logits",)
        scale = self.head_size**-0.5 if self.scale is None else self.scale
        return {"scale": scale, **{name: getattr(self, name) for name in names}}

    @property
    def calibration(self) -> Tensor:
        """Beta, gamma and threshold, (1 or batch, calibrated heads, 3)."""
        strengths = torch.empty(len(self.calibrated_heads), 3)
        for column, values in enumerate((self.beta, self.gamma, (self.threshold,))):
            strengths[:, column] = torch.tensor(values)
        rows = [strengths.roll(-b, 0) for b in range(self.batch if self.each_sequence else 1)]
        return torch.stack([row * torch.tensor([1, 1, 1 + 0.5 * b]) for b, row in enumerate(rows)])


@dataclass
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    past_key: Tensor
    past_value: Tensor
    past_sink_scores: Tensor
    attention_mask: Tensor
    calibration: Tensor


def draw_mask(case: Case, generator: torch.Generator) -> Tensor:
    total = case.past + case.sequence
    mask = torch.ones(case.batch, total, dtype=torch.int64)
    for b in range(case.batch):
        padding = min(3 * b, total - 1)
        if padding and case.padding == "left":
            mask[b, :padding] = 0
        elif padding and case.padding == "right":
            mask[b, -padding:] = 0
    if case.padding == "holes":
        mask = (torch.rand(case.batch, total, generator=generator) < 0.7).long()
    return mask


def draw(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)
    dtype = TYPES[case.storage]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mask = draw_mask(case, generator)
    kv, past = case.kv_num_heads, case.past
    sums = torch.rand(case.batch, len(case.calibrated_heads), past, 1, generator=generator)

    key = normal(case.batch, case.sequence, kv * case.head_size)
    value = normal(case.batch, case.sequence, kv * case.value_size)
    past_key = normal(case.batch, kv, past, case.head_size)
    past_value = normal(case.batch, kv, past, case.value_size)
    query = normal(case.batch, case.sequence, case.num_heads * case.head_size) * case.sharpness
    # Nothing may be read of padding, but queries by their own rows.
    padding = mask == 0
    query[padding[:, past:]] = torch.nan
    key[padding[:, past:]] = torch.nan
    value[padding[:, past:]] = torch.nan
    past_key.transpose(1, 2)[padding[:, :past]] = torch.nan
    past_value.transpose(1, 2)[padding[:, :past]] = torch.nan
    return Inputs(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        past_key.to(dtype),
        past_value.to(dtype),
        (sums * mask[:, None, :past, None]).float(),
        mask,
        case.calibration,
    )


def expect(case: Case, inputs: Inputs, dtype: torch.dtype):
    """The reference, with padding's NaN out of the way."""
    tensors = [
        torch.nan_to_num(tensor).to(dtype)
        for tensor in (inputs.query, inputs.key, inputs.value, inputs.past_key, inputs.past_value)
    ]
    state = (inputs.past_sink_scores, inputs.attention_mask, inputs.calibration)
    return calibrated_attention(*tensors, *state, **case.attributes)


@dataclass
class Maps:
    """Attention maps in float64, (batch, num_heads, sequence, total), and what decides about later sinks.

    Attributes:
        plain: A.
        calibrated: A'.
        margin: The least distance of a sink score from the threshold, by the larger of the two, where a beta isn't 1.
        rests: (batch, calibrated heads, sequence): n, each row's mass outside the later sinks; as `margin`.
    """

    plain: Tensor
    calibrated: Tensor
    margin: float
    rests: Tensor


def draw_maps(case: Case, inputs: Inputs) -> Maps:
    real = inputs.attention_mask != 0
    group = case.num_heads // case.kv_num_heads
    query = torch.nan_to_num(inputs.query).double().view(case.batch, case.sequence, case.num_heads, case.head_size)
    heads = list(case.calibrated_heads)
    beta, gamma, threshold = inputs.calibration.double().expand(case.batch, -1, -1).unbind(-1)
    every_gamma = torch.ones(case.batch, case.num_heads, dtype=torch.float64)
    every_gamma[:, heads] = gamma
    plain = attention_probabilities(
        query.transpose(1, 2),
        all_keys(inputs.past_key, inputs.key).repeat_interleave(group, 1).double(),
        real,
        scale=case.attributes["scale"],
        softcap=case.softcap,
        sliding_window=case.sliding_window,
        sink_logits=case.sink_logits,
        gamma=every_gamma,
    )
    if not heads:
        return Maps(plain, plain, np.inf, plain[:, :0, :, 0])
    rule = {
        "threshold": threshold[..., None],
        "threshold_mode": case.threshold_mode,
        "sliding_window": case.sliding_window,
    }
    found = calibrate_with_state(
        plain[:, heads],
        beta=beta[..., None, None],
        real=real[:, None],
        past_column_sums=inputs.past_sink_scores[..., 0].double(),
        **rule,
    )
    calibrated = plain.clone()
    calibrated[:, heads] = found.probabilities
    margins = sink_margins(found.column_sums, real[:, None], **rule)
    scores = sink_margins(found.column_sums, real[:, None], **{**rule, "threshold": 0.0})
    distances = margins.abs() / torch.maximum(scores, scores - margins)  # NaN where nothing is seen and tau is 0
    is_plain = (beta == 1)[..., None]
    rests = plain[:, heads].masked_fill(found.sinks[:, :, None], 0).sum(-1).masked_fill(is_plain, torch.inf)
    margin = torch.nan_to_num(distances, nan=torch.inf).masked_fill(is_plain, torch.inf).amin().item()
    return Maps(plain, calibrated, margin, rests)


def all_keys(past: Tensor, new: Tensor) -> Tensor:
    """(batch, kv_num_heads, total, head size), with padding's NaN out of the way."""
    own = new.view(*new.shape[:2], past.shape[1], past.shape[3]).transpose(1, 2)
    return torch.nan_to_num(torch.cat([past, own], 2))


def outputs_of(maps: Tensor, value: Tensor) -> Tensor:
    """(batch, sequence, num_heads * value size) of maps (batch, num_heads, sequence, total)."""
    value = value.repeat_interleave(maps.shape[1] // value.shape[1], 1)
    return (maps @ value.double()).transpose(1, 2).flatten(2)


def is_decided(maps: Maps) -> bool:
    """Whether rounding decides neither what is a later sink nor which rows have no rest."""
    return maps.margin > 1e-5 and not ((maps.rests / SMALLEST_REST - 1).abs() < 1e-4).any()


def eager_output(case: Case, inputs: Inputs, maps: Maps) -> Tensor:
    """What PyTorch gives in the storage type: A', rounded to it and multiplied by the values, and the product rounded.

    Not by PyTorch's own product, whose rounding is the processor's.
    """
    dtype = TYPES[case.storage]
    value = all_keys(inputs.past_value, inputs.value)
    return outputs_of(maps.calibrated.float().to(dtype).double(), value).to(dtype)


def allowed_error(case: Case, inputs: Inputs, maps: Maps) -> Tensor:
    """The largest error that each output may have, (batch, sequence, num_heads * value size)."""
    value = all_keys(inputs.past_value, inputs.value)
    # The sum of each output's terms, without their signs: errors are relative to it.
    terms = torch.maximum(outputs_of(maps.plain, value.abs()), outputs_of(maps.calibrated, value.abs()))
    allowed = FLOAT32_ERROR * terms.clamp(min=1)
    if case.storage == "float32":
        return allowed
    dtype = TYPES[case.storage]
    # Probabilities are rounded to the type, those next to 0 to its smallest number, and at last the output is.
    tiny = value.shape[2] * smallest_number(dtype) / 2 * value.abs().amax().double()
    allowed += HALF_FACTOR * (unit_roundoff(dtype) * terms + tiny)
    return allowed + spacing(outputs_of(maps.calibrated, value).abs() + allowed, dtype) / 2


def root_mean_square(errors: Tensor) -> float:
    return errors.square().mean().sqrt().item()


@dataclass
class Result:
    output: Tensor
    present_key: Tensor
    present_value: Tensor
    present_sink_scores: Tensor


@dataclass
class Errors:
    """Of the outputs of real tokens: the kernels', and those of PyTorch in the storage type."""

    own: Tensor
    pytorch: Tensor


def judge(case: Case, inputs: Inputs, found: Result, maps: Maps | None = None) -> Errors:
    """Asserts that a call's outputs are right, the cache to the last bit."""
    maps = maps or draw_maps(case, inputs)
    assert is_decided(maps), "rounding decides what is a sink; take another seed"
    exact = expect(case, inputs, torch.float64)
    real = inputs.attention_mask[:, case.past :] != 0
    cached = inputs.attention_mask != 0
    assert torch.isfinite(found.output[real]).all()
    for name in ("present_key", "present_value"):
        assert torch.equal(
            getattr(found, name).transpose(1, 2)[cached].double(), getattr(exact, name).transpose(1, 2)[cached]
        )
    if case.calibrated_heads:
        assert_close(found.present_sink_scores, exact.present_sink_scores, FLOAT32_ERROR, what="column sums")
    allowed = allowed_error(case, inputs, maps)
    assert_within(found.output[real], exact.output[real], allowed[real], what="output")
    outputs = (found.output, eager_output(case, inputs, maps))
    return Errors(*((output.double() - exact.output)[real] for output in outputs))


SINKS = (1.5, NO_SINK_LOGIT, -2.0, 4.0)
GAMMAS = (4.0, 0.125)
PROMPT = Case(sequence=200, threshold=0.01)
DECODE = Case(sequence=1, past=150)
SHORT, SHORT_DECODE = replace(PROMPT, sequence=70), replace(DECODE, past=70)
BEHIND = replace(SHORT, past=40)  # the least of which every kernel has tiles that are seen whole

CASES = {
    "prompt": PROMPT,
    "no calibrated head": replace(PROMPT, calibrated_heads=()),
    "every head, beta each": replace(
        PROMPT,
        calibrated_heads=(3, 1, 0, 2),
        beta=(0.0, 1.0, 1.5, 2.0),
        gamma=(1.0, 16.0, 0.25, 1.0),
        each_sequence=True,
    ),
    "strengths of 1": replace(PROMPT, beta=(1.0,), past=40),
    "gamma alone": replace(PROMPT, beta=(1.0,), gamma=GAMMAS, past=40),
    "right padding": replace(PROMPT, padding="right", gamma=GAMMAS),
    "holes": replace(PROMPT, padding="holes", gamma=GAMMAS),
    "several tokens behind a cache": BEHIND,
    "relative threshold": replace(SHORT, threshold=2.0, threshold_mode="relative", each_sequence=True),
    "window": replace(PROMPT, sliding_window=37, past=30, threshold=0.05, gamma=GAMMAS),
    "window shorter than a block": replace(PROMPT, sliding_window=3, threshold=0.05, gamma=GAMMAS),
    "soft cap": replace(BEHIND, softcap=5.0, sharpness=3.0, gamma=GAMMAS),
    "negative scale": replace(BEHIND, scale=-0.2, gamma=GAMMAS),
    "scale 0": replace(BEHIND, scale=0.0, threshold=0.012, gamma=GAMMAS),
    "head size 40": replace(BEHIND, head_size=40, seed=1),
    "head size 5": replace(SHORT, head_size=5),
    "head size 128": replace(PROMPT, head_size=128, batch=1),
    "head size 192, value 128": replace(PROMPT, head_size=192, value_head_size=128, batch=1, sequence=40),
    "one head": replace(PROMPT, num_heads=1, kv_num_heads=1, calibrated_heads=(0,)),
    "little rest": replace(PROMPT, threshold=0.0005, sharpness=4.0),
    "no rest": replace(SHORT, threshold=0.0, sharpness=4.0, beta=(0.0,), gamma=GAMMAS),
    "clamped": replace(BEHIND, threshold=0.002, sharpness=3.0, beta=(2.0,)),
    "in place": replace(SHORT, past=9, in_place=True, beta=(0.4, 1.0), each_sequence=True),
    "sinks": replace(SHORT, sink_logits=SINKS, threshold=0.01, padding="holes", gamma=GAMMAS),
    "sinks, no calibrated head": replace(SHORT, sink_logits=SINKS, calibrated_heads=(), padding="right"),
    "sinks, soft cap, window": replace(
        SHORT, sink_logits=SINKS, softcap=2.0, sliding_window=37, threshold=0.01, gamma=GAMMAS
    ),
    "sinks, little rest": replace(SHORT, sink_logits=SINKS, threshold=0.0005, sharpness=4.0, beta=(1.6, 0.0)),
    "sinks that draw everything": replace(SHORT, sink_logits=(14.0,) * 4, threshold=0.0, beta=(0.0,)),
    "two blocks of the mask": Case(
        sequence=17, past=4100, threshold=0.01, batch=1, num_heads=1, kv_num_heads=1, calibrated_heads=(0,)
    ),
    "decode": DECODE,
    "decode, strengths of 1": replace(DECODE, beta=(1.0,)),
    "decode, gamma alone": replace(DECODE, beta=(1.0,), gamma=GAMMAS),
    "decode, no calibrated head": replace(DECODE, calibrated_heads=()),
    "decode, first token": Case(sequence=1),
    "decode, several tokens": replace(DECODE, sequence=5),
    "decode, more heads of a group": replace(
        DECODE, sequence=3, num_heads=8, kv_num_heads=1, beta=(0.4, 1.0), gamma=GAMMAS, each_sequence=True
    ),
    "decode, holes": replace(DECODE, padding="holes", gamma=GAMMAS),
    "decode, right padding": replace(DECODE, padding="right", sequence=3, gamma=GAMMAS),
    "decode, window": replace(DECODE, sliding_window=37, gamma=GAMMAS),
    "decode, soft cap": replace(DECODE, softcap=5.0, sharpness=3.0, head_size=24, gamma=GAMMAS),
    "decode, relative threshold": replace(DECODE, threshold=3.0, threshold_mode="relative"),
    "decode, little rest": replace(DECODE, threshold=0.001, sharpness=4.0),
    "decode, no rest": replace(DECODE, threshold=0.0, sharpness=4.0, beta=(0.0,), gamma=(4.0, 16.0)),
    "decode, in place": replace(DECODE, in_place=True),
    "decode, in place, window": replace(
        DECODE, in_place=True, sliding_window=37, beta=(0.4, 1.0), gamma=GAMMAS, each_sequence=True
    ),
    "decode, long cache": Case(
        sequence=1, past=1100, batch=1, num_heads=2, kv_num_heads=1, calibrated_heads=(1,), gamma=(8.0,)
    ),
    "decode, sinks": replace(SHORT_DECODE, sequence=3, sink_logits=SINKS, threshold=0.01, padding="holes"),
    "decode, sinks, no calibrated head": replace(SHORT_DECODE, sink_logits=SINKS, calibrated_heads=()),
    "decode, sinks, soft cap, window": replace(
        SHORT_DECODE, sink_logits=SINKS, softcap=2.0, sliding_window=71, gamma=GAMMAS
    ),
    "decode, sinks, little rest": replace(
        SHORT_DECODE, sink_logits=SINKS, threshold=0.001, sharpness=4.0, beta=(1.6, 0.0)
    ),
    "decode, sinks that draw everything": replace(SHORT_DECODE, sink_logits=(14.0,) * 4, threshold=0.0, beta=(0.0,)),
    "decode, value size of its own": replace(DECODE, head_size=48, value_head_size=32),
}  # fmt: skip


# Where rounding to the storage type matters; the rest of the arithmetic is the same for all.
HALF_CASES = (
    "prompt",
    "every head, beta each",
    "gamma alone",
    "several tokens behind a cache",
    "window",
    "head size 40",
    "little rest",
    "no rest",
    "in place",
    "sinks",
    "decode",
    "decode, gamma alone",
    "decode, sinks",
    "decode, more heads of a group",
    "decode, little rest",
    "decode, no rest",
)
