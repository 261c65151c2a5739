"""The launches and kernels of one call, in Triton's interpreter, against the reference and the plain CPU kernel."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from fake_driver import AttentionCall, address
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from act_export.ops.schema import NO_SINK_LOGIT
from act_export.reference import attention_probabilities, calibrate_with_state, calibrated_attention

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FLOAT32_ERROR = 1e-5
CACHE_ROOM = 7  # positions of a preallocated cache beyond this call


@dataclass(frozen=True)
class Case:
    """One call of the operator. `sharpness` scales the logits; `padding` is none, left, right or holes."""

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
    threshold: float = 0.05
    threshold_mode: str = "absolute"
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
        names = ("num_heads", "kv_num_heads", "softcap", "sliding_window", "calibrated_heads", "beta", "threshold")
        names += ("threshold_mode", "sink_logits")
        scale = self.head_size**-0.5 if self.scale is None else self.scale
        return {"scale": scale, **{name: getattr(self, name) for name in names}}


@dataclass
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    past_key: Tensor
    past_value: Tensor
    past_sink_scores: Tensor
    attention_mask: Tensor


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
    )


def expect(case: Case, inputs: Inputs, dtype: torch.dtype):
    """The reference, with padding's NaN out of the way."""
    tensors = [
        torch.nan_to_num(tensor).to(dtype)
        for tensor in (inputs.query, inputs.key, inputs.value, inputs.past_key, inputs.past_value)
    ]
    return calibrated_attention(*tensors, inputs.past_sink_scores, inputs.attention_mask, **case.attributes)


def eager_output(case: Case, inputs: Inputs) -> Tensor:
    """What PyTorch gives in the storage type: A' in float32, then rounded and multiplied by the values in that type."""
    outputs = expect(case, inputs, TYPES[case.storage])
    group = case.num_heads // case.kv_num_heads
    real = inputs.attention_mask != 0
    query = torch.nan_to_num(inputs.query).view(case.batch, case.sequence, case.num_heads, -1).transpose(1, 2)
    key, value = (x.repeat_interleave(group, 1) for x in (outputs.present_key, outputs.present_value))
    attributes = case.attributes
    probabilities = attention_probabilities(
        query,
        key,
        real,
        scale=attributes["scale"],
        softcap=case.softcap,
        sliding_window=case.sliding_window,
        sink_logits=case.sink_logits,
    )
    heads = list(case.calibrated_heads)
    if heads:
        probabilities[:, heads] = calibrate_with_state(
            probabilities[:, heads],
            beta=torch.tensor(case.beta).view(-1, 1, 1),
            threshold=case.threshold,
            threshold_mode=case.threshold_mode,
            real=real[:, None],
            past_column_sums=inputs.past_sink_scores[..., 0],
            sliding_window=case.sliding_window,
        ).probabilities
    return (probabilities.to(value.dtype) @ value).transpose(1, 2).flatten(2)


class Buffers:
    """Aligned memory that tensors are copied into, and read back from."""

    def __init__(self) -> None:
        self._memory: list[Tensor] = []

    def place(self, tensor: Tensor) -> Tensor:
        flat = torch.empty(tensor.numel() + 256, dtype=tensor.dtype)
        skip = (-flat.data_ptr() % 256) // tensor.element_size()
        placed = flat[skip : skip + tensor.numel()].view(tensor.shape)
        placed.copy_(tensor)
        self._memory.append(flat)
        return placed


@dataclass
class Result:
    output: Tensor
    present_key: Tensor
    present_value: Tensor
    present_sink_scores: Tensor


def run(driver, case: Case, inputs: Inputs, function: str = "ActCudaAttention") -> Result:
    """One call through the C++ launches; outputs begin as NaN."""
    buffers = Buffers()
    total = case.past + case.sequence
    room = CACHE_ROOM if case.in_place else 0
    past = [inputs.past_key, inputs.past_value, inputs.past_sink_scores]
    if case.in_place:
        past = [
            torch.cat([x, x.new_full((*x.shape[:2], total + room - case.past, x.shape[3]), torch.nan)], 2) for x in past
        ]
    past = [buffers.place(x) for x in past]
    present = past
    if not case.in_place:
        present = [buffers.place(x.new_full((*x.shape[:2], total, x.shape[3]), torch.nan)) for x in past]
    query, key, value, mask = (
        buffers.place(x) for x in (inputs.query, inputs.key, inputs.value, inputs.attention_mask)
    )
    output = buffers.place(query.new_full((case.batch, case.sequence, case.num_heads * case.value_size), torch.nan))
    heads = np.array(case.calibrated_heads, np.int32)
    beta = np.array(case.beta * (len(heads) if len(case.beta) == 1 else 1), np.float32)
    sinks = np.array(case.sink_logits, np.float32) if case.sink_logits else None
    attributes = case.attributes
    call = AttentionCall(
        batch=case.batch,
        sequence=case.sequence,
        total=total,
        past_capacity=past[0].shape[2],
        present_capacity=present[0].shape[2],
        num_heads=case.num_heads,
        kv_num_heads=case.kv_num_heads,
        head_size=case.head_size,
        value_head_size=case.value_size,
        query=query.data_ptr(),
        key=key.data_ptr(),
        value=value.data_ptr(),
        past_key=past[0].data_ptr(),
        past_value=past[1].data_ptr(),
        past_sink_scores=past[2].data_ptr(),
        attention_mask=mask.data_ptr(),
        output=output.data_ptr(),
        present_key=present[0].data_ptr(),
        present_value=present[1].data_ptr(),
        present_sink_scores=present[2].data_ptr(),
        scale=attributes["scale"],
        softcap=case.softcap,
        sliding_window=case.sliding_window,
        calibrated_count=len(heads),
        calibrated_heads=address(heads),
        beta=address(beta),
        sink_logits=address(sinks),
        threshold=case.threshold,
        relative_threshold=case.threshold_mode == "relative",
    )
    types = {"float32": 1, "float16": 10, "bfloat16": 16}
    driver.call(function, *([0] if function == "ActCudaAttention" else []), types[case.storage], ctypes.byref(call))
    return Result(output, *(x[:, :, :total] for x in present))


def compare(driver, case: Case) -> None:
    inputs = draw(case)
    found, exact = run(driver, case, inputs), expect(case, inputs, torch.float64)
    real = inputs.attention_mask[:, case.past :] != 0
    cached = inputs.attention_mask != 0
    assert torch.isfinite(found.output[real]).all()
    for name in ("present_key", "present_value"):
        assert torch.equal(
            getattr(found, name).transpose(1, 2)[cached].double(), getattr(exact, name).transpose(1, 2)[cached]
        )
    if case.calibrated_heads:
        torch.testing.assert_close(
            found.present_sink_scores.double(), exact.present_sink_scores.double(), rtol=0, atol=FLOAT32_ERROR
        )
    error = (found.output.double() - exact.output)[real].abs().max().item() if real.any() else 0.0
    if case.storage == "float32":
        assert error <= FLOAT32_ERROR
        plain = run(driver, case, inputs, "ActPlainAttention")
        torch.testing.assert_close(found.output[real], plain.output[real], rtol=0, atol=FLOAT32_ERROR)
    else:
        pytorch = (eager_output(case, inputs).double() - exact.output)[real].abs().max().item() if real.any() else 0.0
        assert error <= 2 * pytorch, f"error {error:.2e}, PyTorch's {pytorch:.2e}"


SINKS = (1.5, NO_SINK_LOGIT, -2.0, 4.0)
PROMPT = Case(sequence=200)
DECODE = Case(sequence=1, past=150)
SHORT, SHORT_DECODE = replace(PROMPT, sequence=70), replace(DECODE, past=70)

CASES = {
    "prompt": PROMPT,
    "no calibrated head": replace(PROMPT, calibrated_heads=()),
    "every head, beta each": replace(PROMPT, calibrated_heads=(3, 1, 0, 2), beta=(0.0, 0.4, 1.5, 2.0)),
    "right padding": replace(PROMPT, padding="right"),
    "holes": replace(PROMPT, padding="holes"),
    "several tokens behind a cache": replace(PROMPT, sequence=70, past=40),
    "relative threshold": replace(PROMPT, threshold=3.0, threshold_mode="relative"),
    "window": replace(PROMPT, sliding_window=37, past=30),
    "window shorter than a block": replace(PROMPT, sliding_window=3),
    "soft cap": replace(PROMPT, softcap=5.0, sharpness=3.0),
    "negative scale": replace(PROMPT, scale=-0.2),
    "scale 0": replace(PROMPT, scale=0.0),
    "head size 40": replace(PROMPT, head_size=40),
    "head size 5": replace(PROMPT, head_size=5),
    "head size 128": replace(PROMPT, head_size=128, batch=1),
    "head size 192, value 128": replace(PROMPT, head_size=192, value_head_size=128, batch=1, sequence=40),
    "one head": replace(PROMPT, num_heads=1, kv_num_heads=1, calibrated_heads=(0,)),
    "little rest": replace(PROMPT, threshold=0.0005, sharpness=4.0),
    "no rest": replace(PROMPT, threshold=0.0, sharpness=4.0, beta=(0.0,)),
    "clamped": replace(PROMPT, threshold=0.002, sharpness=3.0, beta=(2.0,)),
    "in place": replace(PROMPT, past=9, in_place=True),
    "sinks": replace(SHORT, sink_logits=SINKS, threshold=0.01, padding="holes"),
    "sinks, no calibrated head": replace(SHORT, sink_logits=SINKS, calibrated_heads=(), padding="right"),
    "sinks, soft cap, window": replace(SHORT, sink_logits=SINKS, softcap=2.0, sliding_window=37, threshold=0.01),
    "sinks, little rest": replace(SHORT, sink_logits=SINKS, threshold=0.0005, sharpness=4.0, beta=(1.6, 0.0)),
    "sinks that draw everything": replace(SHORT, sink_logits=(14.0,) * 4, threshold=0.0, beta=(0.0,)),
    "two blocks of the mask": Case(
        sequence=17, past=4100, batch=1, num_heads=1, kv_num_heads=1, calibrated_heads=(0,)
    ),
    "decode": DECODE,
    "decode, no calibrated head": replace(DECODE, calibrated_heads=()),
    "decode, first token": Case(sequence=1),
    "decode, several tokens": replace(DECODE, sequence=5),
    "decode, more heads of a group": replace(DECODE, sequence=3, num_heads=8, kv_num_heads=1),
    "decode, holes": replace(DECODE, padding="holes"),
    "decode, right padding": replace(DECODE, padding="right", sequence=3),
    "decode, window": replace(DECODE, sliding_window=37),
    "decode, soft cap": replace(DECODE, softcap=5.0, sharpness=3.0, head_size=24),
    "decode, relative threshold": replace(DECODE, threshold=3.0, threshold_mode="relative"),
    "decode, little rest": replace(DECODE, threshold=0.001, sharpness=4.0),
    "decode, no rest": replace(DECODE, threshold=0.0, sharpness=4.0, beta=(0.0,)),
    "decode, in place": replace(DECODE, in_place=True),
    "decode, in place, window": replace(DECODE, in_place=True, sliding_window=37),
    "decode, long cache": Case(sequence=1, past=4200, batch=1, num_heads=2, kv_num_heads=1, calibrated_heads=(1,)),
    "decode, sinks": replace(SHORT_DECODE, sequence=3, sink_logits=SINKS, threshold=0.01, padding="holes"),
    "decode, sinks, no calibrated head": replace(SHORT_DECODE, sink_logits=SINKS, calibrated_heads=()),
    "decode, sinks, soft cap, window": replace(SHORT_DECODE, sink_logits=SINKS, softcap=2.0, sliding_window=5),
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
    "several tokens behind a cache",
    "window",
    "head size 40",
    "little rest",
    "no rest",
    "in place",
    "sinks",
    "decode",
    "decode, sinks",
    "decode, more heads of a group",
    "decode, little rest",
    "decode, no rest",
)


@pytest.mark.parametrize("name", CASES)
def test_float32(driver, name):
    compare(driver, CASES[name])


@pytest.mark.parametrize("name", HALF_CASES)
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_half_types(driver, name, storage):
    compare(driver, replace(CASES[name], storage=storage))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_odd_shapes(driver, data):
    kv_num_heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    num_heads = kv_num_heads * group
    head_size = data.draw(st.sampled_from([1, 8, 31, 64, 65]))
    case = Case(
        batch=data.draw(st.integers(1, 3)),
        sequence=data.draw(st.integers(1, 70)),
        past=data.draw(st.integers(0, 70)),
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        head_size=head_size,
        storage=data.draw(st.sampled_from(list(TYPES))),
        sliding_window=data.draw(st.sampled_from([-1, 1, 20])),
        calibrated_heads=tuple(data.draw(st.lists(st.integers(0, num_heads - 1), unique=True))),
        beta=(data.draw(st.sampled_from([0.0, 0.4, 1.0, 1.7])),),
        padding=data.draw(st.sampled_from(["none", "left", "right", "holes"])),
        in_place=data.draw(st.booleans()),
        sink_logits=tuple(data.draw(st.sampled_from([[], [-1.0, 0.5, 3.0, 12.0, NO_SINK_LOGIT, 0.0][:num_heads]]))),
        seed=data.draw(st.integers(0, 2**16)),
    )
    compare(driver, case)


@pytest.mark.parametrize("sliding_window", [-1, 1])
def test_no_new_token(driver, sliding_window):
    case = Case(sequence=0, past=64, padding="none", sliding_window=sliding_window)
    inputs = draw(case)
    found = run(driver, case, inputs)
    assert torch.equal(found.present_key, inputs.past_key)
    assert torch.equal(found.present_value, inputs.past_value)
    assert torch.equal(found.present_sink_scores, inputs.past_sink_scores)


def test_infinite_queries_of_padding(driver):
    case = replace(PROMPT, padding="holes")
    inputs = draw(case)
    inputs.query[torch.isnan(inputs.query)] = torch.inf
    exact = expect(case, replace(inputs, query=torch.nan_to_num(inputs.query, posinf=0.0)), torch.float64)
    found = run(driver, case, inputs)
    torch.testing.assert_close(
        found.present_sink_scores.double(), exact.present_sink_scores.double(), rtol=0, atol=FLOAT32_ERROR
    )


def test_number_of_launches(driver):
    """Calibration costs a decode step one launch."""
    counts = {}
    for name in ("decode", "decode, no calibrated head", "prompt", "no calibrated head"):
        with driver.recording(interpret=False) as launches:
            run(driver, CASES[name], draw(CASES[name]))
            counts[name] = len(launches)
    assert counts == {"decode": 4, "decode, no calibrated head": 3, "prompt": 5, "no calibrated head": 2}


def test_head_size_that_is_too_large(driver):
    case = replace(PROMPT, head_size=264)
    with pytest.raises(RuntimeError, match=r"head sizes up to 256; this model's is 264: run the portable functions"):
        run(driver, case, draw(case))
