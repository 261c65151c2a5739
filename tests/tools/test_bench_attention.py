"""The attention benchmark measures what it says, and stops where contenders disagree. No times are judged."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).parent.parent.parent / "tools"
CONTENDERS = ["calibrated", "plain", "gqa", "attention23"]


@pytest.fixture(autouse=True)
def import_from_tools(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TOOLS / "bench_attention.py", "--threads", 1, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


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
        assert list(workload["differences"]) == ["plain - gqa", "plain - attention23", "calibrated - reference"]
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
    # query, output; key, value and their copies; sums; mask
    assert found["arrays_bytes"]["calibrated"] == 300 * (2 * 4 * 8 * 4 + 4 * 2 * 8 * 4 + 4 * 4 + 8)


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
def test_refuses(arguments, message):
    result = run_tool(*arguments)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize("changed", CONTENDERS)
def test_disagreement(changed):
    from attention_contenders import DisagreementError, check_agreement, reference_output
    from attention_workloads import Shape, Workload, make_data

    workload = Workload(Shape(4, 2, 8), "decode", 16)
    data = make_data(workload)
    outputs = {name: np.zeros((1, 1, 32), np.float32) for name in CONTENDERS}
    outputs["calibrated"] = reference_output(workload, data)
    assert max(check_agreement(workload, data, outputs).values()) == 0
    for wrong in (1e-3, math.nan):
        outputs[changed] = outputs[changed] + np.float32(wrong)
        with pytest.raises(DisagreementError, match=rf"4x2x8 decode 16: .*{changed}.* differ by"):
            check_agreement(workload, data, outputs)


def test_disagreement_fails_the_run(monkeypatch, capsys):
    import bench_attention
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


@pytest.mark.parametrize("script", ["bench_attention.py", "roofline.py"])
def test_scripts_can_be_run(script):
    assert os.access(TOOLS / script, os.X_OK)
    assert (TOOLS / script).read_text(encoding="utf-8").startswith("#!/usr/bin/env python3\n")
