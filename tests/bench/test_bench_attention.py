"""The attention benchmark measures what it says, and stops where contenders disagree. No times are judged."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import attention_on_gpu as on_gpu
import bench_attention
import numpy as np
import pytest
from attention_workloads import Shape, Workload, make_data
from close import assert_close

from act_export.ops.library import library_path
from act_export.runtime.device import Device

pytestmark = pytest.mark.in_turn(3)

TOOLS = Path(__file__).parents[2] / "tools" / "bench" / "attention"
CONTENDERS = ["calibrated", "gamma", "idle", "plain", "gqa", "attention23"]


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TOOLS / "bench_attention.py", "--threads", 1, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


@pytest.mark.in_turn(2)
def test_times_and_roofline(tmp_path):
    path = tmp_path / "bench.json"
    result = run_tool("--lengths", 16, "--shapes", "4x2x8", "--rounds", 1, "--batch", 2, "--roofline", "--json", path)
    assert result.returncode == 0, result.stderr
    report = json.loads(path.read_text(encoding="utf-8"))
    assert [workload["work"] for workload in report["workloads"]] == ["prompt", "decode"]
    for workload in report["workloads"]:
        assert (workload["shape"], workload["length"]) == ("4x2x8", 16)
        assert list(workload["ms"]) == list(workload["roof"]["reached"]) == CONTENDERS
        assert list(workload["ratios"]) == CONTENDERS[1:]
        ratio = workload["ms"]["calibrated"] / workload["ms"]["gqa"]
        assert workload["ratios"]["gqa"]["of_medians"] == pytest.approx(ratio)
        of_plain = [f"plain - {name}" for name in ("idle", "gqa", "attention23")]
        of_reference = [f"{name} - reference of {name}" for name in ("calibrated", "gamma")]
        assert list(workload["differences"]) == of_plain + of_reference
        assert workload["differences"]["plain - idle"] == 0
        assert workload["later_sinks_per_head"]["least"] > 0
        summary = report["summary"][workload["work"]]["gqa"]
        assert summary["worst"] == pytest.approx(summary["geometric_mean"])
        assert summary["worst_at"] == "4x2x8 16"
    prompt, decode = report["workloads"]
    assert prompt["flops"] == 2 * 4 * 4 * 8 * (16 * 17 // 2)
    assert decode["flops"] == 2 * 4 * 4 * 8 * 17
    assert decode["cache_bytes"] == 2 * 2 * 2 * 17 * 8 * 4
    assert report["machine"]["threads"] == report["roofline"]["threads"] == 1
    assert report["versions"]["onnxruntime"]
    assert "calibrated / gqa" in result.stdout
    assert "load: " in result.stdout


def test_memory(tmp_path):
    path = tmp_path / "memory.json"
    result = run_tool("--memory", "--lengths", 300, "--shapes", "4x2x8", "--work", "prompt", "--json", path)
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(path.read_text(encoding="utf-8"))["memory"]
    assert list(found["extra_bytes"]) == ["calibrated", "gqa"]
    # query, output; key, value and their copies; sums; mask; strengths
    assert found["arrays_bytes"]["calibrated"] == 300 * (2 * 4 * 8 * 4 + 4 * 2 * 8 * 4 + 4 * 4 + 8) + 4 * 3 * 4


def test_half_precision_against_one_contender():
    result = run_tool(
        *("--dtype", "float16", "--against", "gqa", "--lengths", 9, "--shapes", "2x1x16", "--rounds", 1),
        *("--work", "decode"),
    )
    assert result.returncode == 0, result.stderr
    assert "attention23" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "9x3"), "'9x3' is no shape"),
        (("--shapes", "9x4x64"), "key-value heads must divide heads"),
        (("--lengths", "0"), "0 is not a positive number"),
        (("--against", "calibrated"), "invalid choice"),
    ],
)
def test_refuses(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_attention.py", *arguments])
    with pytest.raises(SystemExit) as end:
        bench_attention.main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("changed", CONTENDERS)
def test_disagreement(changed):
    from attention_contenders import DisagreementError, check_agreement, reference_output

    workload = Workload(Shape(4, 2, 8), "decode", 16)
    data = make_data(workload)
    outputs = {name: np.zeros((1, 1, 32), np.float32) for name in CONTENDERS}
    outputs |= {name: reference_output(workload, data, name) for name in ("calibrated", "gamma")}
    assert max(check_agreement(workload, data, outputs).values()) == 0
    for wrong in (1e-3, math.nan):
        outputs[changed] = outputs[changed] + np.float32(wrong)
        with pytest.raises(DisagreementError, match=rf"4x2x8 decode 16: .*{changed}.* differ by"):
            check_agreement(workload, data, outputs)


def test_disagreement_fails_the_run(monkeypatch, capsys):
    from attention_contenders import DisagreementError

    def disagree(*_: object) -> None:
        raise DisagreementError("outputs of plain and gqa differ")

    monkeypatch.setattr(sys, "argv", ["bench_attention.py"])
    monkeypatch.setattr(bench_attention, "share_threads", lambda threads: None)
    monkeypatch.setattr(bench_attention, "bench", disagree)
    assert bench_attention.main() == 1
    assert "error: outputs of plain and gqa differ" in capsys.readouterr().err


def test_estimated_column_sums_are_exact_where_every_row_is_sampled():
    from attention_workloads import estimate_column_sums

    rng = np.random.default_rng(0)
    queries = rng.standard_normal((1, 6, 2, 8), np.float32)
    keys = rng.standard_normal((1, 6, 1, 8), np.float32)
    sums = estimate_column_sums(queries, keys, np.arange(6))
    for head in range(2):
        weights = np.tril(np.exp(queries[0, :, head] @ keys[0, :, 0].T / math.sqrt(8)))
        weights /= weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(sums[0, head, :, 0], weights.sum(0), rtol=1e-5)


@pytest.mark.parametrize(
    "script",
    ["bench_attention.py", "../random_llama.py", "roofline.py"],
)
def test_scripts_can_be_run(script):
    assert os.access(TOOLS / script, os.X_OK)
    assert (TOOLS / script).read_text(encoding="utf-8").startswith("#!/usr/bin/env python3\n")


# ---------------------------------------------------------------------------------------------------------------------
# What runs on a GPU, on the CPU: float16, where GroupQueryAttention has a kernel for both.


def gpu_workload(work="decode", dtype="float16", length=40, batch=2):
    return Workload(Shape(8, 2, 64), work, length, batch, dtype)


@pytest.mark.parametrize("work", ["prompt", "decode"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_contenders_of_a_gpu_agree(work, dtype):
    workload = gpu_workload(work, dtype)
    found = on_gpu.bench_on_gpu(workload, library_path(), Device(), 1, cuda_graph=False)
    others = ["plain"] if dtype == "float32" else ["plain", "gqa"]
    assert list(found["ms"]) == ["calibrated", "quarter", *others]
    assert list(found["ratios"]) == [f"{one} / {other}" for one in ("calibrated", "quarter") for other in others]
    assert found["ratios"]["quarter / plain"] == pytest.approx(found["ms"]["quarter"] / found["ms"]["plain"])
    assert found["nodes"] == (1 if work == "prompt" else on_gpu.MOST_NODES)
    assert found["later_sinks_per_head"] == 3
    assert len(found["differences"]) == 1 + len(others)
    assert (found["batch"], found["length"], found["work"]) == (2, 40, work)


def test_contenders_of_a_gpu_give_what_the_reference_gives():
    from attention_contenders import reference_output

    workload = gpu_workload("decode", "float32", batch=1)
    inputs = on_gpu.Inputs(workload, Device())
    contender = on_gpu.GpuContender("calibrated", inputs, library_path(), Device(), cuda_graph=False)
    contender.run()
    contender.synchronize()
    assert_close(contender.output.read(), reference_output(workload, make_data(workload)), 1e-5)
    once = contender.sink_scores()
    contender.run()
    assert not np.array_equal(contender.sink_scores(), once)
    contender.restore()
    contender.run()
    np.testing.assert_array_equal(contender.sink_scores(), once)


@pytest.mark.parametrize(
    ("changed", "head", "pair"),
    [
        ("quarter", 0, "quarter and calibrated"),
        ("quarter", 1, "quarter and plain"),
        ("calibrated", 4, "quarter and calibrated"),
        ("gqa", 7, "plain and gqa"),
    ],
)
def test_disagreement_on_a_gpu(changed, head, pair):
    from attention_contenders import DisagreementError

    workload = gpu_workload()
    outputs = {name: np.zeros((2, 1, 512), np.float16) for name in on_gpu.CONTENDERS}
    assert max(on_gpu.check_outputs(workload, outputs).values()) == 0
    outputs[changed][0, 0, 64 * head] = 1
    with pytest.raises(DisagreementError, match=pair):
        on_gpu.check_outputs(workload, outputs)


def test_caches_exceed_what_a_gpu_keeps():
    small = gpu_workload("decode", length=4096, batch=1)
    assert small.cache_bytes * on_gpu.count_nodes(small) < on_gpu.LEAST_CACHE_BYTES  # at the most so many nodes
    middle = Workload(Shape(32, 8, 128), "decode", 4096, 1, "bfloat16")
    nodes = on_gpu.count_nodes(middle)
    assert middle.cache_bytes * (nodes - 1) < on_gpu.LEAST_CACHE_BYTES <= middle.cache_bytes * nodes
    assert on_gpu.count_nodes(Workload(Shape(32, 8, 128), "decode", 4096, 32, "bfloat16")) == 1


def test_time_of_a_turn():
    class Slow:
        name, nodes, log = "slow", 4, ""

        def __getattr__(self, what):
            return lambda: setattr(self, "log", self.log + what[0] + what[1])

    contender = Slow()
    turn = on_gpu.time_turn(contender, 3, iter((10.0, 11.5, 12.4)).__next__)
    assert contender.log == "re" + "rusy" + "rururu" + "sy"
    assert turn["seconds"] == pytest.approx(2.4 / 3 / 4)
    assert turn["launching_share"] == pytest.approx(1.5 / 2.4)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("/x.cc:360 AllocateRawInternal Failed to allocate memory for requested buffer of size 9\nmore", "of size 9"),
        ("CUDA failure 2: out of memory ; GPU=0", "out of memory ; GPU=0"),
        ("Available memory of 7 is smaller than requested bytes of 8", "of 7 is smaller than requested bytes of 8"),
    ],
)
def test_what_does_not_fit_is_skipped(monkeypatch, capsys, message, reason):
    def fail(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr(on_gpu, "_bench", fail)
    found = on_gpu.bench_on_gpu(gpu_workload(), library_path(), Device(), 1, cuda_graph=False)
    assert found["skipped"].endswith(reason)
    assert "8x2x64 decode 40, batch 2: skipped" in capsys.readouterr().err
    monkeypatch.setattr(on_gpu, "OUT_OF_MEMORY", re.compile("nothing of the kind"))
    with pytest.raises(RuntimeError):
        on_gpu.bench_on_gpu(gpu_workload(), library_path(), Device(), 1, cuda_graph=False)


@pytest.mark.parametrize("failing", ["gqa", "plain"])
def test_others_are_measured_where_a_foreign_operator_fails(monkeypatch, failing):
    run = on_gpu.GpuContender.run

    def fail(contender):
        if contender.name == failing:
            raise RuntimeError("no such kernel\nat all")
        run(contender)

    monkeypatch.setattr(on_gpu.GpuContender, "run", fail)
    if failing == "plain":
        with pytest.raises(RuntimeError, match="no such kernel"):
            on_gpu.bench_on_gpu(gpu_workload(), library_path(), Device(), 1, cuda_graph=False)
        return
    found = on_gpu.bench_on_gpu(gpu_workload(), library_path(), Device(), 1, cuda_graph=False)
    assert list(found["ms"]) == ["calibrated", "quarter", "plain"]
    assert list(found["ratios"]) == ["calibrated / plain", "quarter / plain"]
    assert found["failures"] == {"gqa": "no such kernel"}


def test_report_of_a_gpu():
    from attention_gpu_report import report_on_gpu

    result = {
        "shape": "8x2x64",
        "work": "decode",
        "length": 40,
        "batch": 2,
        "nodes": 4,
        "failures": {"gqa": "no such kernel"},
        "later_sinks_per_head": 3.0,
        "differences": {"plain - gqa": 0.001},
        "flops": 10**9,
        "cache_bytes": 10**6,
        "ms": {"calibrated": 0.002, "plain": 0.001},
        "launching_share": {"calibrated": 0.5, "plain": 0.95},
        "ratios": {"calibrated / plain": 2.0},
    }
    skipped = {"shape": "8x2x64", "work": "decode", "length": 90, "batch": 2, "skipped": "too large"}
    report = {"dtype": "bfloat16", "cuda_graph": False, "machine": {"GPU": "X"}, "workloads": [result, skipped]}
    text = report_on_gpu(report)
    assert "| 8x2x64 | 2 | 40 | 3.0 | 4 | 2.00 | 0.002 | 0.001* | 500 | 1e+03 |" in text
    assert "decode, 8x2x64, batch 2, 90 tokens: skipped, too large" in text
    assert "plain - gqa 1.0e-03 (allowed 0.05)" in text
    assert "decode, 8x2x64, batch 2, 40 tokens: gqa fails: no such kernel" in text
    other = {**result, "length": 60, "ms": {**result["ms"], "gqa": 0.004}, "failures": {}}
    other |= {"launching_share": {**result["launching_share"], "gqa": 0.1}, "ratios": {**result["ratios"], "x": 0.5}}
    both = report_on_gpu(report | {"workloads": [result, other]})
    assert "| 40 | 3.0 | 4 | 2.00 | - | 0.002 | 0.001* | - | 500 | 1e+03 | - |" in both
    assert "| 60 | 3.0 | 4 | 2.00 | 0.50 | 0.002 | 0.001* | 0.004 | 500 | 1e+03 | 250 |" in both
    assert "0.001* " not in report_on_gpu(report | {"cuda_graph": True})
    summary = on_gpu.summarize([result, {**result, "ratios": {"calibrated / plain": 0.5}}, skipped])
    assert summary == {"decode": {"calibrated / plain": {"geometric_mean": pytest.approx(1), "worst": 2.0}}}


def test_without_a_gpu_the_benchmark_says_so(without_gpu):
    result = run_tool("--device", "cuda")
    assert result.returncode == 2
    assert "no NVIDIA driver" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "bfloat16"), "add --device cuda"),
        (("--batch", "1", "2"), "--batch takes one number on the CPU"),
        (("--cuda-graph",), "--cuda-graph can't be used with --device cpu"),
        (("--device", "cuda", "--memory"), "--memory can't be used with --device cuda:0"),
        (("--device", "cuda", "--against", "gqa"), "--against can't be used with --device cuda:0"),
        (("--device", "gpu"), "device is 'gpu'"),
    ],
)
def test_refuses_what_a_device_has_not(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_attention.py", *arguments])
    with pytest.raises(SystemExit) as end:
        bench_attention.main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err
