"""The launches and kernels of one call, in Triton's interpreter, against the reference and the plain CPU kernel."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
import torch
from attention_cases import (
    CACHE_ROOM,
    CASES,
    FLOAT32_ERROR,
    HALF_CASES,
    OF_PYTORCH,
    PROMPT,
    SHORT,
    TYPES,
    Case,
    Errors,
    Inputs,
    Result,
    allowed_error,
    draw,
    draw_maps,
    expect,
    is_decided,
    judge,
    root_mean_square,
)
from close import assert_close, assert_within
from fake_driver import AttentionCall, address
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from act_export.ops.schema import NO_SINK_LOGIT


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
    query, key, value, mask, calibration = (
        buffers.place(x) for x in (inputs.query, inputs.key, inputs.value, inputs.attention_mask, inputs.calibration)
    )
    output = buffers.place(query.new_full((case.batch, case.sequence, case.num_heads * case.value_size), torch.nan))
    heads = np.array(case.calibrated_heads, np.int32)
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
        calibration=calibration.data_ptr(),
        output=output.data_ptr(),
        present_key=present[0].data_ptr(),
        present_value=present[1].data_ptr(),
        present_sink_scores=present[2].data_ptr(),
        scale=attributes["scale"],
        softcap=case.softcap,
        sliding_window=case.sliding_window,
        calibrations=len(calibration),
        calibrated_count=len(heads),
        calibrated_heads=address(heads),
        sink_logits=address(sinks),
        relative_threshold=case.threshold_mode == "relative",
    )
    types = {"float32": 1, "float16": 10, "bfloat16": 16}
    driver.call(function, *([0] if function == "ActCudaAttention" else []), types[case.storage], ctypes.byref(call))
    assert all(x[:, :, total:].isnan().all() for x in present), "written to beyond the call's tokens"
    return Result(output, *(x[:, :, :total] for x in present))


def compare(driver, case: Case) -> Errors:
    inputs = draw(case)
    maps = draw_maps(case, inputs)
    found = run(driver, case, inputs)
    errors = judge(case, inputs, found, maps)
    if case.storage == "float32":
        plain = run(driver, case, inputs, "ActPlainAttention")
        real = inputs.attention_mask[:, case.past :] != 0
        allowed = allowed_error(case, inputs, maps)
        assert_within(found.output[real], plain.output[real], allowed[real], what="output of the plain kernel")
    return errors


# Of every sort of call that the kernels have a branch for, the one that takes most of them: more of these are drawn.
BRANCHES = (
    "every head, beta each",
    "relative threshold",
    "window shorter than a block",
    "soft cap",
    "negative scale",
    "head size 40",
    "head size 5",
    "head size 192, value 128",
    "no rest",
    "clamped",
    "in place",
    "sinks, no calibrated head",
    "sinks, soft cap, window",
    "two blocks of the mask",
    "decode, first token",
    "decode, more heads of a group",
    "decode, no rest",
    "decode, in place, window",
    "decode, long cache",
    "decode, sinks, no calibrated head",
    "decode, sinks, soft cap, window",
)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", BRANCHES)
def test_float32(driver, name):
    compare(driver, CASES[name])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", [name for name in CASES if name not in BRANCHES])
def test_more_in_float32(driver, name):
    compare(driver, CASES[name])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", HALF_CASES)
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_half_types(driver, name, storage):
    errors = compare(driver, replace(CASES[name], storage=storage))
    assert root_mean_square(errors.own) <= OF_PYTORCH * root_mean_square(errors.pytorch)


@st.composite
def odd_cases(draw) -> Case:
    kv_num_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    num_heads = kv_num_heads * group
    return Case(
        batch=draw(st.integers(1, 3)),
        sequence=draw(st.integers(1, 70)),
        past=draw(st.integers(0, 70)),
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        head_size=draw(st.sampled_from([1, 8, 31, 64, 65])),
        storage=draw(st.sampled_from(list(TYPES))),
        sliding_window=draw(st.sampled_from([-1, 1, 20])),
        calibrated_heads=tuple(draw(st.lists(st.integers(0, num_heads - 1), unique=True))),
        beta=(draw(st.sampled_from([0.0, 0.4, 1.0, 1.7])),),
        gamma=(draw(st.sampled_from([1.0, 0.0625, 16.0])),),
        each_sequence=draw(st.booleans()),
        padding=draw(st.sampled_from(["none", "left", "right", "holes"])),
        in_place=draw(st.booleans()),
        sink_logits=tuple(draw(st.sampled_from([[], [-1.0, 0.5, 3.0, 12.0, NO_SINK_LOGIT, 0.0][:num_heads]]))),
        seed=draw(st.integers(0, 2**16)),
    )


# Two rows, each of which has one key beside later sinks that lose all: PyTorch's A' is exactly 1 there.
ONE_KEY = Case(
    batch=1,
    sequence=47,
    past=3,
    num_heads=2,
    head_size=31,
    storage="float16",
    sliding_window=20,
    calibrated_heads=(1, 0),
    beta=(0.0,),
    padding="holes",
)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(case=replace(ONE_KEY, seed=41597))
@example(case=replace(ONE_KEY, seed=11618))
@given(case=odd_cases())
def test_odd_shapes(driver, case):
    assume(is_decided(draw_maps(case, draw(case))))
    compare(driver, case)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_errors_of_half_types_beside_pytorchs(driver, storage):
    """Over many calls no strength of the sinks costs more digits than rounding the map does, nor do learned sinks."""
    random = np.random.default_rng(0)
    for beta in (0.0, 0.4, 1.0, 1.7):
        for sink_logits in ((), (-1.0, 0.5)):
            found = []
            while len(found) < 25:
                case = replace(
                    ONE_KEY,
                    storage=storage,
                    beta=(beta,),
                    gamma=(float(random.choice([1.0, 0.125, 8.0])),),
                    sink_logits=sink_logits,
                    sliding_window=int(random.choice([-1, 20])),
                    padding=str(random.choice(["none", "left", "holes"])),
                    seed=int(random.integers(2**16)),
                )
                if is_decided(draw_maps(case, draw(case))):
                    found.append(compare(driver, case))
            own = root_mean_square(torch.cat([errors.own for errors in found]))
            pytorch = root_mean_square(torch.cat([errors.pytorch for errors in found]))
            assert own <= OF_PYTORCH * pytorch, f"beta {beta}, sinks {sink_logits}: {own:.2e}, PyTorch's {pytorch:.2e}"


@pytest.mark.parametrize("sliding_window", [-1, 1])
def test_no_new_token(driver, sliding_window):
    case = Case(sequence=0, past=64, padding="none", sliding_window=sliding_window)
    inputs = draw(case)
    found = run(driver, case, inputs)
    assert torch.equal(found.present_key, inputs.past_key)
    assert torch.equal(found.present_value, inputs.past_value)
    assert torch.equal(found.present_sink_scores, inputs.past_sink_scores)


@pytest.mark.parametrize("sequence", [1, 17])
def test_strengths_out_of_range(driver, sequence):
    """The nearest in range stands for them, and those of a plain head for NaN: the host can't refuse them."""
    nan, inf = torch.nan, torch.inf
    given = [
        (5.0, 100.0, -1.0),
        (-1.0, 1e-9, 0.02),
        (0.4, -inf, -inf),
        (nan, nan, nan),
        (inf, nan, 0.1),
        (0.4, inf, inf),
    ]
    taken = [
        (2.0, 16.0, 0.0),
        (0.0, 0.0625, 0.02),
        (0.4, 0.0625, 0.0),
        (1.0, 1.0, 0.0),
        (2.0, 1.0, 0.1),
        (0.4, 16.0, inf),
    ]
    case = Case(sequence=sequence, past=20, num_heads=6, calibrated_heads=tuple(range(6)), batch=1)
    inputs = draw(case)
    found, expected = (
        run(driver, case, replace(inputs, calibration=torch.tensor([strengths]))) for strengths in (given, taken)
    )
    assert torch.equal(found.output, expected.output)
    assert torch.equal(found.present_sink_scores, expected.present_sink_scores)


def test_infinite_queries_of_padding(driver):
    case = replace(SHORT, padding="holes")
    inputs = draw(case)
    inputs.query[torch.isnan(inputs.query)] = torch.inf
    exact = expect(case, replace(inputs, query=torch.nan_to_num(inputs.query, posinf=0.0)), torch.float64)
    found = run(driver, case, inputs)
    assert_close(found.present_sink_scores, exact.present_sink_scores, FLOAT32_ERROR)


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
