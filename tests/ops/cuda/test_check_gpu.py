"""tools/check_gpu without a GPU: what it packs, its time limits, its steps over the stand-in driver, its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import harness_steps
import pack
import plan
import pytest
import report
from attention_cases import CASES
from fake_driver import Libraries, catalogue
from gpu_memory import Gpu
from plan import FAILED, OK, SKIPPED, TIMED_OUT, Step

from act_export.ops.cuda.catalogue import write_catalogue

CHECK = Path(__file__).parents[3] / "tools" / "check_gpu"
WRITE = "import plan; plan.write_result({'found': 1})"


def step(name, code, limit_s=60, **options):
    return Step(name, ("-c", code), limit_s, **options)


def test_the_plan_fits():
    assert sum(one.limit_s for one in plan.STEPS) < plan.LIMIT_S
    assert len({one.name for one in plan.STEPS}) == len(plan.STEPS)
    programs = [one.command[0] for one in plan.STEPS if one.command[0] != "-m"]
    assert all((plan.ROOT / program).is_file() for program in programs)


def test_what_fails_or_hangs_costs_itself_alone(tmp_path):
    """Its child ends too, and what it had found is kept."""
    hangs = f"{WRITE}; import subprocess; subprocess.run(['sleep', '600'])"
    steps = [
        step("right", WRITE),
        step("hangs", hangs, 3),
        step("fails", "raise OSError('a reason')"),
        step("last", ""),
    ]
    lines: list[str] = []
    begin = time.monotonic()
    plan.run(tmp_path, steps, say=lines.append)
    assert time.monotonic() - begin < 60
    found = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert [one["status"] for one in found] == [OK, TIMED_OUT, FAILED, OK]
    assert [one["result"] for one in found[:3]] == [{"found": 1}, {"found": 1}, None]
    assert "a reason" in found[2]["output"]
    assert lines[1] == "hangs: timed out, 3 of 3 s"


def test_nothing_is_run_after_what_stops_it_or_without_time(tmp_path):
    stops = step("images", "raise SystemExit(1)", stops=True)
    assert [one.status for one in plan.run(tmp_path, [stops, step("next", "")])] == [FAILED, SKIPPED]
    hangs = step("hangs", "import time; time.sleep(600)")
    found = plan.run(tmp_path, [hangs, step("next", "")], limit_s=2)
    assert [one.status for one in found] == [TIMED_OUT, SKIPPED]
    assert found[1].output == "no time is left"


def test_steps_over_the_stand_in(driver):
    """Parity as on a GPU, and a call that is wrong is told with its type."""
    gpu, saved = Gpu(), []
    try:
        found = harness_steps.parity(gpu, driver, {"decode": replace(CASES["decode"], past=20)}, saved.append)
        assert set(found["calls"]) == {f"decode, {storage}" for storage in ("float32", "float16", "bfloat16")}
        assert found["wrong"] == {}
        assert len(saved) == 6
        with driver.recording(interpret=False):
            found = harness_steps.parity(gpu, driver, {"decode": CASES["decode"]}, saved.append)
        assert set(found["wrong"]) == {f"decode, {storage}" for storage in ("float32", "float16", "bfloat16")}
    finally:
        gpu.close()


def test_the_kernel_for_hopper_has_to_be_taken(driver, monkeypatch):
    gpu, cases = (
        Gpu(),
        {"decode": CASES["decode"], "prompt": replace(CASES["no calibrated head"], batch=1, sequence=70)},
    )
    loaded = ["hopper.bf16.64"]
    monkeypatch.setenv("ACT_CUDA_FORWARD", "hopper")
    monkeypatch.setattr(driver, "device", driver.add_device(9, 0))
    monkeypatch.setattr(driver, "loaded", lambda: loaded)  # the driver of the tests has others of before
    try:
        with driver.recording() as launches:
            found = harness_steps.hopper(gpu, driver, cases, lambda _: None)
        assert [one.kernel for one in launches if "forward" in one.kernel or "hopper" in one.kernel] == [
            "hopper.bf16.64",
            "hopper.fp16.64",
        ]
        assert list(found["calls"]) == ["prompt, bfloat16", "prompt, float16"]
        assert found["wrong"] == {}
        loaded[:] = ["forward.bf16.64"]
        found = harness_steps.hopper(gpu, driver, {}, lambda _: None)
        assert found["wrong"]["kernels"].startswith("forward.bf16.64 were taken.")
    finally:
        gpu.close()


@pytest.fixture(scope="module")
def packed(libraries: Libraries, tmp_path_factory) -> Path:
    """A folder that was packed from a wheel with a small provider and libraries with placeholders for kernels."""
    tmp_path = tmp_path_factory.mktemp("packed")
    wheel = tmp_path / "onnxruntime_gpu.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (f"onnxruntime/capi/{pack.PROVIDER}", "onnxruntime/__init__.py", "onnxruntime/tools/x.py"):
            archive.writestr(name, "content")
    made = {"libact_ops.so": libraries.act_ops, "libcuda_harness.so": libraries.harness}
    made["kernels.bin"] = tmp_path / "kernels.bin"
    write_catalogue(made["kernels.bin"], [image for image in catalogue() if not image.name.startswith("test.")])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pack, "build", lambda *_: made)
        patched.setattr(pack, "prune_provider", lambda path: path.write_text("pruned"))
        table = pack.pack(wheel, None, 1, tmp_path / "packed")
    assert [line.split()[1] for line in table.splitlines()[2:]] == ["repository", pack.LIBRARIES, pack.SITE, "all"]
    return tmp_path / "packed"


def test_what_was_packed_is_unpacked(packed, tmp_path):
    variables = pack.unpack(packed, tmp_path / "site")
    package = Path(variables["PYTHONPATH"], "onnxruntime")
    assert (package / "capi" / pack.PROVIDER).read_text() == "pruned"
    assert not (package / "tools").exists()
    assert Path(variables["CHECK_GPU_HARNESS"]).stat().st_size > 10_000


def test_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "build", lambda *_: dict.fromkeys(pack.NAMES, CHECK))
    with pytest.raises(pack.PackError, match="is no wheel"):
        pack.pack(CHECK, None, 1, tmp_path / "packed")
    monkeypatch.setattr(pack, "unpack_wheel", lambda *_: tmp_path / "packed")
    monkeypatch.setattr(pack, "MOST_BYTES", 1 << 20)
    with pytest.raises(pack.PackError, match=r"all \| \d+\.\d \|\nThat is more than 1 MiB"):
        pack.pack(CHECK, None, 1, tmp_path / "packed")


@pytest.mark.in_turn(2)
def test_a_run_from_end_to_end(packed, libraries, tmp_path):
    """Of the steps that the stand-in has what they need for; its launches do nothing."""
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text('#!/bin/sh\necho "========= $2: ERROR SUMMARY: 7 errors"\nexit 99\n', encoding="utf-8")
    sanitizer.chmod(0o755)
    environment = {**os.environ, "FAKE_CUDA_DEVICE": "1", "LD_LIBRARY_PATH": str(libraries.driver.parent)}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    command = [sys.executable, CHECK, "run", tmp_path / "out", "--folder", packed, "--steps", "images", "memcheck"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| images | ok |" in text
    assert "| sm_90 |" in text
    assert "Fell back to PTX" not in text
    assert "| memcheck | failed |" in text
    assert "| summary | memcheck: ERROR SUMMARY: 7 errors |" in text
    shown = subprocess.run([sys.executable, CHECK, "report", tmp_path / "out" / "results.json"], capture_output=True)
    assert shown.stdout.decode() == text


def test_the_report_has_every_table():
    times = {"seconds": {"plain": 1e-3, "quarter": 2e-3, "cuDNN": 1.6e-3}, "kernels, us": {"quarter": {"forward": 9.0}}}
    ratios = {"workloads": [{"work": "decode", "batch": 1, "length": 4096, "ratios": {"quarter / gqa": 1.125}}]}
    results = {
        "machine": {"gpu": "a card", "copy, GB/s": 4321.0},
        "images": {"targets": {"forward": "ptx"}, "refused": "why", "fell back to PTX": ["forward"]},
        "parity": {"calls": {"decode, float16": [1.0, 2.0]}, "wrong": {"holes, float16": "output: 1 of 2"}},
        "times": {"prompt 2048": times},
        "times, hopper": {"prompt 4096": times},
        "operator": ratios,
    }
    steps = [
        {"name": name, "status": OK, "limit_s": 9, "seconds": 1.0, "output": "", "result": result}
        for name, result in results.items()
    ]
    text = report.report({"limit_s": 9, "steps": steps})
    for expected in (
        "| copy, GB/s | 4321 |",
        "Fell back to PTX: forward (why).",
        "| float16 | 1 | 1 | 0.50 |",
        "- holes, float16: output: 1 of 2",
        "| prompt 2048 | 1 | 2 | 1.6 | 2.00 | 1.25 | - |",
        "| prompt 2048 | quarter | forward | 9.0 |",
        "## Times, hopper",
        "| prompt 4096 | 1 | 2 | 1.6 | 2.00 | 1.25 | - |",
        "| decode, batch 1, 4096 | quarter / gqa | 1.12 |",
    ):
        assert expected in text
