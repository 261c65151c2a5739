"""What commands refuse, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_runs import run
from tiny import save_checkpoint

from act_export.commands.export import grown


@pytest.mark.in_turn(2)
def test_a_checkpoint_without_a_tokenizer(tmp_path):
    folder = save_checkpoint(tmp_path / "bare", tokenizer=False)
    result = run(folder, "--out", tmp_path / "m.onnx", "--plain")
    assert result.exit_code == 0, result.output
    assert "greedy tokens identical" in result.output
    result = run(folder, "--out", tmp_path / "n.onnx")
    assert result.exit_code == 2
    assert "has no tokenizer" in result.output


def test_library_and_version():
    result = run("library")
    assert Path(result.stdout.strip()).is_file()
    assert run("--version").stdout.strip()
    assert "search" in run("--help").output


def bad_inputs(folder: Path, heads: Path, tmp: Path) -> dict[str, tuple[list[object], str]]:
    def with_file(name: str, text: str) -> Path:
        (tmp / name).write_text(text)
        return tmp / name

    good_row = '{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n'
    out = ["--out", tmp / "out.onnx"]
    return {
        "missing folder": ([tmp / "none", *out, "--plain"], "there is no model"),
        "mistyped command": (["serach", folder, *out], "did you mean search?"),
        "no out": ([folder, "--plain"], "where to?"),
        "no such name": (["smollm3", *out, "--plain"], "there is no model smollm3"),
        "layer out of range": (
            [folder, *out, "--calibration", with_file("l.json", '{"7": [0]}')],
            "layer 7 is out of range; the model has layers 0 to 1",
        ),
        "head out of range": (
            [folder, *out, "--calibration", with_file("h.json", '{"1": [4]}')],
            "head 4 of layer 1 is out of range; the model has heads 0 to 3",
        ),
        "another model": (
            [
                folder,
                *out,
                "--calibration",
                with_file(
                    "m.json",
                    '{"heads": {}, "model": {"architecture": "opt", "layers": 2, "heads": 4, "fingerprint": "x"}}',
                ),
            ],
            "belongs to another model: architecture is opt",
        ),
        "calibration that is not JSON": ([folder, *out, "--calibration", with_file("x.json", "{")], "isn't JSON"),
        "missing calibration": ([folder, *out, "--calibration", tmp / "no.json"], "can't read the calibration"),
        "unknown recipe": ([folder, *out, "--calibration", "smollm2-135"], "did you mean smollm2-135m"),
        "recipe of another model": (
            [folder, *out, "--calibration", "llama-2-7b-chat-classification"],
            "belongs to another model: number of layers is 32 in the calibration, 2 in the model",
        ),
        "beta too large": ([folder, *out, "--calibration", heads, "--beta", 2.5], "beta is 2.5; it must lie in [0, 2]"),
        "beta negative": ([folder, *out, "--calibration", heads, "--beta=-0.1"], "beta is -0.1"),
        "negative threshold": ([folder, *out, "--calibration", heads, "--threshold=-1"], "threshold is -1.0"),
        "unknown mode": (
            [folder, *out, "--calibration", heads, "--threshold-mode", "both"],
            "threshold_mode is 'both'",
        ),
        "out in what is no folder": ([folder, "--out", heads / "m.onnx", "--plain"], "heads.json is no folder"),
        "out can't be written": ([folder, "--out", "/proc/m.onnx", "--plain"], "can't write to /proc"),
        "options that exclude each other": ([folder, *out, "--plain", "--task", "sst2"], "exclude each other"),
        "plain with beta": ([folder, *out, "--plain", "--beta", 0.2], "--plain has no calibration to change"),
        "unknown task": ([folder, *out, "--task", "sst3"], "sst2"),
        "missing data": ([folder, *out, "--data", tmp / "no.jsonl"], "no.jsonl"),
        "empty data": ([folder, *out, "--data", with_file("e.jsonl", "")], "e.jsonl"),
        "a bad line": ([folder, *out, "--data", with_file("b.jsonl", good_row + "{\n")], "line 2"),
        "a row without an answer": (
            [folder, *out, "--data", with_file("a.jsonl", good_row + '{"prompt": "a", "choices": ["b"]}\n')],
            "line 2",
        ),
        "too few rows": ([folder, *out, "--data", with_file("f.jsonl", good_row)], "1 different prompts"),
        "generate without a file": (["generate", tmp / "no.onnx", "a"], "there is no model"),
        "inspect something else": (["inspect", with_file("t.onnx", "text")], "t.onnx"),
        "out is a checkpoint": ([folder, "--out", folder, "--plain"], "holds other files, e.g. "),
        "bench without a file": (["bench", tmp / "no.onnx"], "there is no model"),
        "bench of something else": (["bench", with_file("u.onnx", "text")], "can't read"),
        "bench with a negative number": (
            ["bench", folder, "--prompt-tokens=-5"],
            "prompt tokens is -5; give 1 or more",
        ),
        "bench into a folder": (["bench", folder, "--json", tmp], "is a folder, which isn't replaced"),
        "bench into what is no folder": (["bench", folder, "--json", heads / "b.json"], "heads.json is no folder"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "missing folder",
        "mistyped command",
        "no out",
        "no such name",
        "layer out of range",
        "head out of range",
        "another model",
        "calibration that is not JSON",
        "missing calibration",
        "unknown recipe",
        "recipe of another model",
        "beta too large",
        "beta negative",
        "negative threshold",
        "unknown mode",
        "out in what is no folder",
        "out can't be written",
        "options that exclude each other",
        "plain with beta",
        "unknown task",
        "missing data",
        "empty data",
        "a bad line",
        "a row without an answer",
        "too few rows",
        "generate without a file",
        "inspect something else",
        "out is a checkpoint",
        "bench without a file",
        "bench of something else",
        "bench with a negative number",
        "bench into a folder",
        "bench into what is no folder",
    ],
)
def test_bad_input(name, checkpoint_folder, heads_file, tmp_path):
    arguments, message = bad_inputs(checkpoint_folder, heads_file, tmp_path)[name]
    before = set(tmp_path.iterdir())
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "error:" in result.output
    assert message in result.output
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int2"], "dtype is 'int2'; an export must be one of float32, float16, bfloat16, int8, int4"),
        (["--device", "tpu"], "device is 'tpu'; pass cpu, cuda or cuda:N"),
    ],
)
def test_bad_precision_or_device(checkpoint_folder, tmp_path, options, message):
    result = run(checkpoint_folder, "--out", tmp_path / "m.onnx", "--plain", *options)
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_cant_be_used_is_told_before_any_work(checkpoint_folder, exported, tmp_path, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr("act_export.commands.loading.AskedModel.load", None)
    model = checkpoint_folder
    for command in ((model, "--out", tmp_path / "m.onnx"), ("verify", exported, "--against", model)):
        result = run(*command, "--device", "cuda")
        assert result.exit_code == 2
        assert "built without CUDA" in result.output


def early_refusals(exported: Path, heads: Path, tmp: Path) -> list[tuple[list[object], str]]:
    (tmp / "bad.jsonl").write_text('{"prompt": "a", "choices": ["b"]}\n')
    bad = [(["--task", "sst3"], "did you mean sst5 or sst2"), (["--data", tmp / "bad.jsonl"], "line 1")]
    out = ["--out", tmp / "m.onnx"]
    calibrated = [*out, "--calibration", heads]
    return [
        *((["MODEL", *out, *given], said) for given, said in bad),
        *((["search", "MODEL", *given], said) for given, said in bad),
        *((["profile", "MODEL", *given], said) for given, said in bad),
        *((["eval", exported, *given], said) for given, said in bad),
        (["MODEL", *calibrated, "--default", "other"], "the default calibration is 'other'"),
        (["MODEL", *calibrated, "--beta", 3], "beta is 3.0"),
        (["MODEL", "--out", heads / "m.onnx"], "is no folder"),
        (["search", "MODEL", "--data", heads, "--heads", "x"], "--heads is 'x'"),
        (["search", "MODEL", "--out", tmp], "is a folder"),
        (["search", "MODEL", "--weights", exported], "has no quantized weights"),
        (["search", "MODEL", "--weights", tmp / "none.onnx"], "there is no model"),
        (["search", "MODEL", "--device", "tpu"], "device is 'tpu'"),
        (["profile", "MODEL", "--out", tmp / "p.json"], "isn't a file *.safetensors"),
        (["profile", "MODEL", "--calibration", "smollm2-135"], "did you mean"),
        (["verify", tmp / "none.onnx", "--against", "MODEL"], "there is no model"),
        (["verify", exported, "--against", "MODEL", "--device", "tpu"], "device is 'tpu'"),
        (["bench", exported, "--pytorch", "MODEL", "--rounds", 0], "rounds is 0"),
        (["eval", exported, "--task", "sst2", "--split", "some"], "split"),
        (["generate", exported, "a", "--top-p", 7], "top_p is 7"),
        (["generate", exported, "a", "--tokenizer", tmp / "none"], "there is no model"),
    ]


def test_what_can_be_refused_before_a_model_is_loaded_is(
    checkpoint_folder, exported, heads_file, tmp_path, monkeypatch
):
    """Neither a checkpoint is loaded, nor a file opened in ONNX Runtime."""

    def loaded(*_, **__):
        raise AssertionError("loaded")

    for place in ("load_checkpoint", "load_fetched"):
        monkeypatch.setattr(f"act_export.checkpoint.load.{place}", loaded)
    monkeypatch.setattr("act_export.runtime.Session.open", loaded)
    others = []
    for arguments, message in early_refusals(exported, heads_file, tmp_path):
        result = run(*(checkpoint_folder if each == "MODEL" else each for each in arguments))
        if result.exit_code != 2 or message not in result.output:
            others.append((arguments, message, result.output))
    assert not others


def test_architecture_without_the_hook(tmp_path):
    folder = save_checkpoint(tmp_path / "japanese", architecture="gpt_neox_japanese")
    result = run(folder, "--out", tmp_path / "m.onnx", "--plain")
    assert result.exit_code == 2
    assert "attention of gpt_neox_japanese" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"japanese"}


def test_a_failed_gate_is_exit_code_1_and_leaves_nothing(checkpoint_folder, heads_file, tmp_path, monkeypatch):
    from act_export.verify.parity import metrics

    out = tmp_path / "results"
    out.mkdir()
    (out / "m.onnx").write_text("an older export")
    monkeypatch.setitem(metrics.GATES, "float32", metrics.Gate(1e-12, 1.0, 0.0, 0.0))
    result = run(checkpoint_folder, "--out", out / "m.onnx", "--calibration", heads_file)
    assert result.exit_code == 1
    assert "disagrees with PyTorch" in result.output
    assert "largest difference" in result.output
    assert [path.name for path in out.iterdir()] == ["m.onnx"]
    assert (out / "m.onnx").read_text() == "an older export"


def test_a_full_disk(checkpoint_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 0})())
    result = run(checkpoint_folder, "--out", tmp_path / "m.onnx", "--plain")
    assert result.exit_code == 2
    assert "MB free; the export needs" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("installed", ["none", "both"])
def test_onnxruntime_packages(checkpoint_folder, tmp_path, monkeypatch, installed):
    import importlib
    from importlib import metadata

    real_import, real_distribution = importlib.import_module, metadata.distribution
    if installed == "both":
        file = metadata.PathDistribution(tmp_path / "onnxruntime.dist-info")
        monkeypatch.setattr(
            metadata, "distribution", lambda name: file if "onnxruntime" in name else real_distribution(name)
        )
        message = "both installed"
    else:

        def distribution(name):
            if name.startswith("onnxruntime"):
                raise metadata.PackageNotFoundError(name)
            return real_distribution(name)

        def import_module(name, *arguments):
            if name == "onnxruntime":
                raise ImportError("No module named 'onnxruntime'")
            return real_import(name, *arguments)

        monkeypatch.setattr(metadata, "distribution", distribution)
        monkeypatch.setattr(importlib, "import_module", import_module)
        message = "isn't installed"
    result = run(checkpoint_folder, "--out", tmp_path / "m.onnx", "--plain")
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.sampled(1)
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing(checkpoint_folder, tmp_path, sent):
    command = [sys.executable, "-m", "act_export", str(checkpoint_folder), "--out", str(tmp_path / "m.onnx"), "--plain"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job inherits it ignored
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.iterdir()):  # the staging folder appears when the export begins
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (2 if sent == signal.SIGINT else 143)
    assert sent != signal.SIGINT or "interrupted; no partial output was left" in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dtype", "stored", "said"),
    [("float32", 10_000, True), ("float16", 10_000, True), ("int4", 10_000, False), ("float32", 10_000_000, False)],
)
def test_a_gguf_file_that_grows_is_told(tiny, tmp_path, monkeypatch, dtype, stored, said):
    file = tmp_path / "m.gguf"
    file.write_bytes(bytes(stored))
    monkeypatch.setattr("act_export.checkpoint.gguf.shards.read_gguf", lambda path: (None, [path]))
    line = grown(str(file), tiny, dtype)
    assert (f"in {dtype} the export has about 0 MB; --dtype int4" in line) == said
    assert bool(line) == said
    assert not grown("tiny", tiny, dtype)
