"""`forward` for Hopper in an emulation of Gluon: the operator's cases, odd shapes, and kernels with defects."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import attention_cases
import gluon_emulator
import pytest
import torch
from attention_cases import CASES, GAMMAS, OF_PYTORCH, SINKS, Case, draw, draw_maps, is_decided, root_mean_square
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_interpreted_attention import compare, run

from act_export.ops.cuda import hopper
from act_export.ops.library import LoadedKernels

VARIABLE = "ACT_CUDA_FORWARD"
LONG = Case(  # more tiles than slots, twice over, and rows that see some of them whole
    batch=1, sequence=150, past=790, num_heads=2, kv_num_heads=1, calibrated_heads=(1,), threshold=0.005, gamma=(8.0,)
)
OWN_CASES = {
    "long": replace(LONG, batch=2),
    "long, no padding": replace(LONG, padding="none", head_size=128),
    "no tile needs a mask": replace(LONG, sequence=129, past=127, padding="none", gamma=(1.0,)),
    "long, holes": replace(LONG, padding="holes", sink_logits=SINKS[:2]),
    "long, right padding": replace(LONG, batch=2, padding="right", sequence=140, gamma=(1.0,)),
    "long, window": replace(LONG, sliding_window=300, head_size=128),
    "long, in place, gamma alone": replace(LONG, in_place=True, beta=(1.0,), padding="none"),
    "three blocks of rows": replace(LONG, sequence=300, past=0, calibrated_heads=(0, 1), gamma=GAMMAS[:2]),
}


def takes_hopper(case: Case) -> bool:
    sizes = {case.head_size, case.value_size}
    return case.sequence > 16 and not case.softcap and case.scale is None and sizes in ({64}, {128})


PROMPTS = {name: case for name, case in CASES.items() if takes_hopper(case)}


@pytest.fixture
def on_hopper(driver, monkeypatch):
    """The driver with a device on which prompts take the kernel for Hopper."""
    monkeypatch.setenv(VARIABLE, "hopper")
    monkeypatch.setattr(driver, "device", driver.add_device(9, 0))
    return driver


def check(driver, case: Case) -> None:
    with driver.recording() as launches:
        errors = compare(driver, case)
    assert [found.kernel for found in launches][1].startswith("hopper.")
    assert root_mean_square(errors.own) <= OF_PYTORCH * root_mean_square(errors.pytorch)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", PROMPTS)
def test_cases_of_the_operator(on_hopper, name, storage):
    check(on_hopper, replace(PROMPTS[name], storage=storage))


@pytest.mark.in_turn(2)
@pytest.mark.sampled(1)
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", OWN_CASES)
def test_more_tiles_than_slots(on_hopper, name, storage):
    check(on_hopper, replace(OWN_CASES[name], storage=storage))


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
@pytest.mark.sampled(1)
def test_padding_of_whole_tiles(on_hopper, monkeypatch, storage):
    """On the left, on the right, and among the real tokens."""
    case = replace(LONG, batch=2, num_heads=1, calibrated_heads=(0,), storage=storage)
    mask = torch.ones(2, case.past + case.sequence, dtype=torch.int64)
    mask[0, :300] = mask[1, -40:] = mask[1, 350:620] = 0
    monkeypatch.setattr(attention_cases, "draw_mask", lambda *_: mask)
    check(on_hopper, case)


@st.composite
def odd_cases(draw) -> Case:
    kv_num_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 1)]))
    num_heads = kv_num_heads * group
    return Case(
        batch=draw(st.integers(1, 2)),
        sequence=draw(st.sampled_from([17, 63, 65, 129])),
        past=draw(st.integers(0, 400)),
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        head_size=draw(st.sampled_from([64, 128])),
        storage=draw(st.sampled_from(["float16", "bfloat16"])),
        sliding_window=draw(st.sampled_from([-1, 1, 100, 200])),
        calibrated_heads=tuple(draw(st.lists(st.integers(0, num_heads - 1), unique=True))),
        beta=(draw(st.sampled_from([0.0, 0.4, 1.0, 1.7])),),
        gamma=(draw(st.sampled_from([1.0, 0.0625, 16.0])),),
        each_sequence=draw(st.booleans()),
        padding=draw(st.sampled_from(["none", "left", "right", "holes"])),
        in_place=draw(st.booleans()),
        sink_logits=tuple(draw(st.sampled_from([[], [-1.0, 0.5, 12.0][:num_heads]]))),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=odd_cases(), order=st.integers(0, 2**16))
def test_odd_shapes(on_hopper, case, order):
    """In whatever order the partitions run."""
    assume(is_decided(draw_maps(case, draw(case))))
    gluon_emulator.order.seed(order)
    compare(on_hopper, case)


# Changes of the kernel's source, and what an order of the partitions, or each, makes of it.
DEFECTS = {
    "none": ("", "", ""),
    "loads without waiting": ("    mbarrier.wait(empty, phase)\n", "", "may not have been|more arrive"),
    "the wrong phase": ("% 2 ^ 1", "% 2", "all partitions wait"),
    "no fence behind a store": (
        "        fence_async_shared()\n        mbarrier",
        "        mbarrier",
        "multiplies without a fence",
    ),
    "no fence behind the queries": (
        "other=0.0))\n    fence_async_shared()",
        "other=0.0))",
        "multiplies without a fence",
    ),
    "takes values that haven't arrived": (
        "    mbarrier.wait(full.index(values), (tile - 1) // STAGES % 2)\n",
        "",
        "may not have been written",
    ),
    "takes keys that haven't arrived": (
        "    mbarrier.wait(full.index(next % STAGES * 2), next // STAGES % 2, pred=next < tiles)\n",
        "",
        "may not have been written",
    ),
    "takes a product that runs": ("    x = warpgroup_mma_wait(1, deps=(x,))\n", "", "Product"),
    "gives keys back too early": (
        "    x = warpgroup_mma_wait(0, deps=(x,))\n    mbarrier.arrive(empty.index(0), count=1)\n",
        "    mbarrier.arrive(empty.index(0), count=1)\n    x = warpgroup_mma_wait(0, deps=(x,))\n",
        "overwrites what",
    ),
    "gives values back too early": (
        "    if not IS_MASKED:\n",
        "    mbarrier.arrive(empty.index(values), count=1)\n    values = keys\n    if not IS_MASKED:\n",
        "overwrites what|more arrive|all partitions wait",
    ),
    "nobody's turn": ("(tile + CONSUMER) % 2", "(tile + 1) % 2", "all partitions wait"),
    "too many arrive": (
        "init(empty.index(slot), count=CONSUMERS)",
        "init(empty.index(slot), count=1)",
        "partitions wait",
    ),
}


def changed(source: str, path: Path) -> types.ModuleType:
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", DEFECTS)
def test_wrong_synchronization_is_found(on_hopper, monkeypatch, tmp_path, name):
    old, new, message = DEFECTS[name]
    source = Path(hopper.__file__).read_text(encoding="utf-8")
    assert not old or source.count(old) == 1
    module = changed(source.replace(old, new) if old else source, tmp_path / "changed.py")
    monkeypatch.setitem(on_hopper.replaced, "hopper", module.forward)
    case = replace(LONG, storage="bfloat16", sequence=66, past=710, num_heads=1, calibrated_heads=())
    inputs, found = draw(case), []
    for seed in range(2):
        monkeypatch.setattr(gluon_emulator, "order", random.Random(seed))
        try:
            run(on_hopper, case, inputs)
        except RuntimeError as error:
            found.append(str(error.__cause__))
    assert bool(found) == bool(old)
    assert all(re.search(message, one) for one in found), found


def kernels_of(driver, case: Case) -> set[str]:
    with driver.recording(interpret=False) as launches:
        run(driver, case, draw(case))
    return {found.kernel.partition(".")[0] for found in launches}


@pytest.mark.parametrize(
    ("changes", "forward"),
    [
        ({}, "hopper"),
        ({"storage": "float32"}, "forward"),
        ({"head_size": 256}, "forward"),
        ({"head_size": 32}, "forward"),
        ({"softcap": 5.0}, "forward"),
    ],
)
def test_calls_that_take_it(on_hopper, changes, forward):
    case = replace(LONG, **{"storage": "bfloat16", **changes})
    assert kernels_of(on_hopper, case) & {"hopper", "forward"} == {forward}


@pytest.mark.parametrize(
    ("variable", "capability"), [("", (9, 0)), ("triton", (9, 0)), ("hopper", (8, 0)), ("hopper", (10, 0))]
)
def test_triton_is_taken_unless_it_is_asked_for_and_there(driver, monkeypatch, variable, capability):
    monkeypatch.setenv(VARIABLE, variable)
    monkeypatch.setattr(driver, "device", driver.add_device(*capability))
    assert "forward" in kernels_of(driver, replace(LONG, storage="bfloat16"))


# A prompt over a driver whose launches do nothing, in a process of its own; arguments: driver and harness.
ALONE = """
import ctypes, sys
from dataclasses import replace
from pathlib import Path
driver = ctypes.CDLL(sys.argv[1])
from attention_cases import PROMPT, draw
from harness_calls import Harness, PlacedCall
from test_interpreted_attention import OnHost
case = replace(PROMPT, storage="bfloat16")
harness = Harness(Path(sys.argv[2]))
harness.attention("bfloat16", PlacedCall(case, draw(case), OnHost).arguments)
print(*harness.loaded(), sep="; ")
"""


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("name", ["driver", "mapless_driver"])
def test_a_driver_without_maps_of_tensors(libraries, name):
    variables = {**os.environ, VARIABLE: "hopper", "FAKE_CUDA_DEVICE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ALONE, getattr(libraries, name), libraries.harness]
    ran = subprocess.run(command, env=variables, capture_output=True, text=True)
    expected = "hopper.bf16.64" if name == "driver" else "forward.bf16.64"
    assert expected in ran.stdout.strip().split("; "), ran.stderr


def test_which_kernel_was_taken_is_told():
    taken = LoadedKernels({"select": "sm_90", "hopper.bf16.64": "sm_90"}, "")
    assert taken.describe() == "2 as sm_90, prompts by the kernel for Hopper"
    assert LoadedKernels({"forward.bf16.64": "sm_90"}, "").describe() == "1 as sm_90"


def test_other_values_are_refused(driver, monkeypatch):
    monkeypatch.setenv(VARIABLE, "gluon")
    with pytest.raises(RuntimeError, match='ACT_CUDA_FORWARD is "gluon": set it to "triton" or "hopper", or unset it'):
        driver.find("select", driver.add_device(9, 0))


def test_an_image_that_the_driver_refuses(on_hopper):
    """Triton's kernel is taken, and the reason told."""
    on_hopper.library.FakeCudaRefuse(b"hopper.bf16.64")
    try:
        assert "forward" in kernels_of(on_hopper, replace(LONG, storage="bfloat16"))
        on_hopper.library.FakeCudaRefuse(b"")
        assert "forward" in kernels_of(on_hopper, replace(LONG, storage="bfloat16"))  # nor tried again
    finally:
        on_hopper.library.FakeCudaRefuse(b"")
