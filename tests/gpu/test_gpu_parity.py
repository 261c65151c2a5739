"""The operator in ONNX Runtime against the reference, in every type, on the CPU and on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import (
    CASES,
    DECODE,
    GAMMAS,
    HALF_CASES,
    OF_PYTORCH,
    PROMPT,
    TYPES,
    Case,
    draw,
    draw_maps,
    is_decided,
    judge,
    root_mean_square,
)
from bound_operator import LAYOUTS, BoundOperator

# What would take minutes in Triton's interpreter.
LARGE = {
    "head size 256": replace(PROMPT, head_size=256),
    "decode, head size 256": replace(DECODE, head_size=256),
    "groups of 16": replace(PROMPT, batch=1, num_heads=32, calibrated_heads=tuple(range(0, 32, 4))),
    "prompt of 1500": replace(
        PROMPT,
        batch=1,
        sequence=1500,
        head_size=128,
        num_heads=2,
        kv_num_heads=1,
        calibrated_heads=(1,),
        threshold=0.002,
    ),
    "decode after 9000": Case(batch=1, sequence=1, past=9000, head_size=128),
    "decode after 3000, batch of 8": Case(sequence=4, past=3000, batch=8),
}
IN_PLACE = {
    "decode": replace(DECODE, in_place=True),
    "decode, no calibrated head": replace(DECODE, in_place=True, calibrated_heads=()),
    "prompt": replace(PROMPT, in_place=True, head_size=128, threshold=0.015),
}
SHORT = ("prompt", "head size 128", "sinks", "decode", "decode, sinks", "decode, in place")


def check(case, device, layout=None):
    inputs = draw(case)
    return judge(case, inputs, BoundOperator(case, inputs, device, layout).run())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("storage", TYPES)
def test_parity(device, storage, name):
    errors = check(replace(CASES[name], storage=storage), device)
    if storage != "float32" and name in HALF_CASES:
        assert root_mean_square(errors.own) <= OF_PYTORCH * root_mean_square(errors.pytorch)


@pytest.mark.parametrize("storage", TYPES)
def test_short_calls(device, storage):
    """For tools that slow everything down."""
    for name in SHORT:
        check(replace(CASES[name], storage=storage), device)


@pytest.mark.parametrize("name", LARGE)
def test_parity_of_large_calls(device, name):
    for storage in TYPES if device.is_cuda else ["float32"]:
        check(replace(LARGE[name], storage=storage), device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", IN_PLACE)
def test_layouts_of_the_cache(device, name, layout):
    check(replace(IN_PLACE[name], past=40), device, layout)


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("storage", TYPES)
def test_a_replayed_graph(device, storage, name):
    """Captured with other tokens and strengths; the run that captures it adds to the state more than once."""
    case = replace(IN_PLACE[name], storage=storage, each_sequence=True)
    operator = BoundOperator(case, draw(replace(case, beta=(1.0,))), device, graph=device.is_cuda)
    operator.run()
    others = {"beta": (1.0, 0.2), "gamma": GAMMAS} if case.calibrated_heads else {}
    for replayed in (case, replace(case, seed=1, **others)):
        inputs = draw(replayed)
        operator.write(inputs)
        judge(replayed, inputs, operator.run())


@pytest.mark.parametrize("name", ["prompt", "holes", "no calibrated head", "decode, holes"])
def test_padding_gives_finite_numbers(device, name):
    case = CASES[name]
    inputs = draw(case)
    inputs.query.nan_to_num_()
    assert BoundOperator(case, inputs, device).run().output.isfinite().all()


@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_calibrated_calls_have_later_sinks(name):
    case = (CASES | LARGE)[name]
    maps = draw_maps(case, draw(case))
    assert is_decided(maps)
    unchanged = set(case.beta) == {1.0} or not case.calibrated_heads or case.past + case.sequence == 1
    assert torch.equal(maps.plain, maps.calibrated) == unchanged
