"""The command line as a user meets it: the whole job, every kind of bad input, exit codes, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from command_runs import run
from tiny import save_checkpoint

from act_export.calibration.file import Calibration, ModelIdentity, Provenance
from act_export.checkpoint.load import load_checkpoint
from act_export.runtime import Session

HEADS_OF_EXPORTED = {0: (1,), 1: (0, 3)}  # torch traces a model once for each choice of heads


@pytest.fixture
def own_cache(monkeypatch, tmp_path_factory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Enough rows to search with; the answer is in the prompt."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as file:
        for i in range(160):
            answer = i % 2
            prompt = f"Row {i}: {'good' if answer else 'bad'}. It is"
            file.write(json.dumps({"prompt": prompt, "choices": [" n", " y"], "answer": answer}) + "\n")
    return path


def test_a_folder_is_ready_to_be_copied(exported, tmp_path):
    names = {path.name for path in exported.iterdir()}
    assert {
        "model.onnx",
        "model.onnx.data",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "calibration.json",
        "libact_ops.so",
    } <= names
    assert Calibration.load(exported / "calibration.json").threshold == 0.06
    moved = tmp_path / "elsewhere"
    shutil.copytree(exported, moved)
    result = run("generate", moved, "One light", "--max-new-tokens", 5)
    assert result.exit_code == 0, result.output


def test_generate_native_and_portable_alike(exported):
    native = run("generate", exported, "One light, two ships", "--max-new-tokens", 12)
    portable = run("generate", exported, "One light, two ships", "--max-new-tokens", 12, "--portable")
    assert native.exit_code == portable.exit_code == 0, native.output
    assert native.stdout == portable.stdout


def test_inspect(exported):
    shown = json.loads(run("inspect", exported, "--json").stdout)
    assert (shown["architecture"], shown["num_layers"], shown["num_heads"]) == ("llama", 2, 4)
    assert shown["operators"] == {"act.CalibratedAttention": 2}
    assert shown["weights_bytes"] > 0
    assert shown["calibration"]["heads"] == {"0": [1], "1": [0, 3]}
    assert "3 heads in 2 layers" in run("inspect", exported).stdout


def test_verify(exported, checkpoint_folder):
    result = run("verify", exported, "--against", checkpoint_folder, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [engine["engine"] for engine in report["engines"]] == ["native library", "portable functions"]
    assert all(engine["passed"] for engine in report["engines"])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_export_in_a_half_type(checkpoint_folder, heads_file, tmp_path, dtype):
    out = tmp_path / "half.onnx"
    result = run(checkpoint_folder, "--out", out, "--calibration", heads_file, "--threshold", "0.06", "--dtype", dtype)
    assert result.exit_code == 0, result.output
    assert f"times the mean error of PyTorch in {dtype}" in result.output
    assert ("attention ran in bfloat16" in result.output) == (dtype == "bfloat16")
    assert json.loads(run("inspect", out, "--json").stdout)["precision"] == dtype
    assert dtype in run("inspect", out).stdout
    verified = run("verify", out, "--against", checkpoint_folder, "--device", "cpu")
    assert verified.exit_code == 0, verified.output
    assert f"PyTorch in {dtype}" in verified.output


def test_verify_against_another_model(exported, tmp_path):
    other = save_checkpoint(tmp_path / "other", seed=5)
    result = run("verify", exported, "--against", other)
    assert result.exit_code == 2
    assert "exported from another model" in result.output


@pytest.mark.usefixtures("own_cache")
def test_search_then_export_then_eval(checkpoint_folder, rows, tmp_path):
    calibration = tmp_path / "found.json"
    result = run("search", checkpoint_folder, "--data", rows, "--out", calibration)
    assert result.exit_code == 0, result.output
    found = Calibration.load(calibration)
    assert found.provenance is not None
    assert found.provenance.samples["report"] == 83
    for name, options in (("calibrated", ["--calibration", calibration]), ("plain", ["--plain"])):
        result = run(checkpoint_folder, "--out", tmp_path / f"{name}.onnx", "--no-verify", *options)
        assert result.exit_code == 0, result.output
    result = run(
        "eval",
        tmp_path / "calibrated.onnx",
        "--against",
        tmp_path / "plain.onnx",
        "--data",
        rows,
        "--tokenizer",
        checkpoint_folder,
        "--json",
    )
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    # ONNX Runtime measures what PyTorch measured in the search.
    (shown,) = shown["tasks"]
    assert len(shown["plain"]["answers"]) == 83
    assert shown["comparison"]["accuracy"]["gain"] == pytest.approx(
        found.provenance.calibrated_accuracy - found.provenance.plain_accuracy, abs=0.01
    )


def test_bench(exported, tiny_plain_file, tmp_path):
    shutil.copytree(tiny_plain_file.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.onnx").rename(tmp_path / "plain.onnx")
    result = run(
        *("bench", exported, "--against", tmp_path / "plain.onnx"),
        *("--prompt-tokens", 30, "--new-tokens", 4, "--rounds", 2, "--threads", 1, "--json", tmp_path / "bench.json"),
    )
    assert result.exit_code == 0, result.output
    for words in (
        "30 prompt tokens, 4 new tokens",
        "out: native library",
        "plain.onnx",
        "ratio",
        "versions",
    ):
        assert words in result.stdout
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [one["contender"]["name"] for one in found["contenders"]] == ["out", "plain.onnx"]
    assert [ratios["against"] for ratios in found["ratios"]] == ["plain.onnx"]


def test_an_interrupted_bench_ends_its_process(exported, tmp_path):
    command = [sys.executable, "-m", "act_export", "bench", exported, "--json", tmp_path / "bench.json"]
    process = subprocess.Popen(
        [*command, "--rounds", "10000", "--prompt-tokens", "30"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job inherits it ignored
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("bench: round 1"):
            break
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "interrupted; no partial output was left" in errors
    assert not Path(f"/proc/{child}").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("own_cache")
def test_data_given_to_the_whole_job(checkpoint_folder, rows, tmp_path):
    result = run(checkpoint_folder, "--out", tmp_path / "m.onnx", "--data", rows, "--no-verify")
    assert result.exit_code == 0, result.output
    with Session.open(tmp_path / "m.onnx") as session:
        assert session.calibration is not None
        assert session.calibration.provenance is not None
        assert session.calibration.provenance.tasks == ("rows.jsonl",)


@pytest.mark.in_turn(2)
def test_overrides_reach_the_file(checkpoint_folder, heads_file, tmp_path):
    out = tmp_path / "m.onnx"
    result = run(
        checkpoint_folder,
        "--out",
        out,
        "--calibration",
        heads_file,
        "--beta",
        "0.2",
        "--threshold-mode",
        "relative",
        "--no-verify",
    )
    assert result.exit_code == 0, result.output
    with Session.open(out) as session:
        calibration = session.calibration
    assert calibration is not None
    assert (calibration.beta, calibration.threshold_mode, calibration.threshold) == (0.2, "relative", 5.0)


def test_a_shipped_recipe_is_used_by_itself_and_by_name(checkpoint_folder, tmp_path, monkeypatch):
    identity = load_checkpoint(str(checkpoint_folder)).identity
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for name, beta, tasks in (("tiny", 0.4, ("sst2", "boolq")), ("tiny-boolq", 1.7, ("boolq",))):
        recipe = Calibration(HEADS_OF_EXPORTED, beta=beta, model=identity, provenance=Provenance("gates", tasks))
        recipe.save(recipes / f"{name}.json")
    monkeypatch.setattr("act_export.calibration.recipes.recipes_folder", lambda: recipes)
    for options, used, others, beta in (
        ([], "tiny (sst2, boolq)", "tiny-boolq", 0.4),
        (["--calibration", "tiny-boolq"], "tiny-boolq (boolq)", "tiny", 1.7),
    ):
        result = run(checkpoint_folder, "--out", tmp_path / "m.onnx", "--no-verify", *options)
        assert result.exit_code == 0, result.output
        line = f"using the shipped recipe {used}; others for this model: {others}: --calibration {others}"
        assert line in result.output
        with Session.open(tmp_path / "m.onnx") as session:
            assert session.calibration is not None
            assert (session.calibration.heads, session.calibration.beta) == (HEADS_OF_EXPORTED, beta)


def test_published_heads_without_a_fingerprint(checkpoint_folder, tmp_path):
    """A file whose model is known by name only: exported, shown and verified as any other."""
    published = Calibration(
        {0: (1,), 1: (0, 3)},
        model=ModelIdentity("llama", 2, 4, name="owner/model"),
        provenance=Provenance("published", ("sst2",), source={"paper": "a paper"}),
    )
    published.save(tmp_path / "published.json")
    out = tmp_path / "m.onnx"
    result = run(checkpoint_folder, "--out", out, "--calibration", tmp_path / "published.json", "--no-verify")
    assert result.exit_code == 0, result.output
    shown = run("inspect", out)
    assert shown.exit_code == 0, shown.output
    assert "published for sst2" in shown.stdout
    assert json.loads(run("inspect", out, "--json").stdout)["calibration"]["model"] == asdict(published.model)
    verified = run("verify", out, "--against", checkpoint_folder)
    assert verified.exit_code == 0, verified.output
