"""The launches and kernels of one call, in Triton's interpreter, against the reference and the plain CPU kernel."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from attention_cases import (
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
from attention_workloads import SINK_PLACES, Shape, draw_tokens
from close import assert_close, assert_within
from harness_calls import ELEMENT_TYPES, PlacedCall
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from act_export.calibration.reference import later_sinks
from act_export.ops.cuda import kernels
from act_export.ops.cuda.specs import rows_and_columns
from act_export.ops.schema import NO_SINK_LOGIT


class OnHost:
    """A tensor in aligned memory of the host, which is the stand-in's device memory."""

    def __init__(self, tensor: Tensor) -> None:
        flat = torch.empty(tensor.numel() + 256, dtype=tensor.dtype)
        skip = (-flat.data_ptr() % 256) // tensor.element_size()
        self._placed = flat[skip : skip + tensor.numel()].view(tensor.shape)
        self._placed.copy_(tensor)
        self.address = self._placed.data_ptr()

    def read(self) -> Tensor:
        return self._placed


def run(driver, case: Case, inputs: Inputs, *, plain: bool = False) -> Result:
    """One call through the C++ launches, or of the plain kernel of the CPU."""
    call = PlacedCall(case, inputs, OnHost)
    if plain:
        driver.call("ActPlainAttention", ELEMENT_TYPES[case.storage], ctypes.byref(call.arguments))
    else:
        driver.attention(case.storage, call.arguments)
    return call.result()


def compare(driver, case: Case) -> Errors:
    inputs = draw(case)
    maps = draw_maps(case, inputs)
    found = run(driver, case, inputs)
    errors = judge(case, inputs, found, maps)
    if case.storage == "float32":
        plain = run(driver, case, inputs, plain=True)
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


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", BRANCHES)
def test_float32(driver, name):
    compare(driver, CASES[name])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", [name for name in CASES if name not in BRANCHES])
def test_more_in_float32(driver, name):
    compare(driver, CASES[name])


@pytest.mark.sampled(3)
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


MOST_COMPUTED_AGAIN = 0.02  # of the blocks of rows


@pytest.mark.parametrize("strength", [1.0, 3.0])
def test_blocks_are_computed_again_only_where_digits_would_be_lost(driver, monkeypatch, strength):
    """None of the benchmark's data; all that see little but later sinks."""
    length, size, counts, rest = 512, 64, [], kernels._rest

    def counted(*arguments):
        counts.append(1)
        return rest(*arguments)

    monkeypatch.setattr(kernels, "_rest", counted)
    query, key, value = draw_tokens(np.random.default_rng(0), Shape(1, 1, size), 1, length, length)
    key[:, [int(place * length) for place in SINK_PLACES]] *= strength
    case = Case(1, length, 0, 1, 1, size, storage="bfloat16", calibrated_heads=(0,), threshold=0.1, padding="none")
    inputs = draw(case)
    tensors = zip(("query", "key", "value"), (query, key, value), strict=True)
    new = {name: torch.from_numpy(x).reshape(1, length, size).bfloat16() for name, x in tensors}
    inputs = replace(inputs, **new)
    maps = draw_maps(case, inputs)
    blocks = maps.rests[0, 0].split(rows_and_columns("correct", "bf16", size)[0])
    expected = sum((block < kernels.LEAST_REST_HALF.value).any().item() for block in blocks)
    judge(case, inputs, run(driver, case, inputs), maps)
    assert len(counts) == expected
    assert (expected <= MOST_COMPUTED_AGAIN * len(blocks)) == (strength == 1.0)


@pytest.mark.real
def test_few_blocks_of_a_real_model_are_computed_again(smollm2):
    """Of every head with later sinks in a text of 384 tokens: by far most keep a thousandth of their mass outside."""
    text = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    ids = torch.tensor([smollm2.tokenizer(text).input_ids[:384]])
    before = smollm2.model.config._attn_implementation
    smollm2.model.set_attn_implementation("eager")
    with torch.inference_mode():
        maps = torch.cat(smollm2.model(ids, output_attentions=True).attentions)
    smollm2.model.set_attn_implementation(before)
    sinks = later_sinks(maps.sum(-2), torch.ones(ids.shape[1], dtype=torch.bool), threshold=0.1)
    rests = maps.masked_fill(sinks[..., None, :], 0).sum(-1)[sinks.any(-1)]
    blocks = (rests < kernels.LEAST_REST_HALF.value).unflatten(-1, (-1, 64)).any(-1)
    assert len(rests) > 10
    assert blocks.float().mean() <= MOST_COMPUTED_AGAIN


def test_number_of_launches(driver):
    """Calibration costs a decode step none."""
    counts = {}
    for name in ("decode", "decode, no calibrated head", "prompt", "no calibrated head"):
        with driver.recording(interpret=False) as launches:
            run(driver, CASES[name], draw(CASES[name]))
            counts[name] = len(launches)
    assert counts == {"decode": 3, "decode, no calibrated head": 3, "prompt": 5, "no calibrated head": 2}


def test_head_size_that_is_too_large(driver):
    case = replace(PROMPT, head_size=264)
    with pytest.raises(RuntimeError, match=r"head sizes up to 256; this model's is 264: run the portable functions"):
        run(driver, case, draw(case))
