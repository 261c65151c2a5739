"""The graft command as a user meets it: what it writes and says, exit codes, and one line for what is wrong."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import onnx
import pytest
from click.testing import Result
from foreign_models import CALIBRATION, DATA, Decoder, hashes
from typer.testing import CliRunner

from act_export.calibration.file import Calibration, ModelIdentity
from act_export.calibration.recipes import named_recipe
from act_export.commands.main import app
from act_export.graft import check
from act_export.graft.rewriters import group_query_attention
from act_export.runtime import Session


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["graft", *map(str, arguments)])


def refused(*arguments: object, code: int = 2) -> str:
    """The message, on one line."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    return lines[0].removeprefix("error: ")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return Decoder(layers=3).save(tmp_path / "in.onnx")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Decoder(layers=3).save_folder(tmp_path / "in")


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    CALIBRATION.save(tmp_path / "calibration.json")
    return tmp_path / "calibration.json"


def test_files_that_are_needed_are_told(calibration: Path, tmp_path: Path) -> None:
    source, out = Decoder(layers=3).save(tmp_path / "in.onnx", external=True), tmp_path / "out.onnx"
    result = run(source, "--calibration", calibration, "--out", out)
    assert f"MB  {tmp_path / DATA}" in result.stderr
    assert f"out.onnx needs {DATA} beside it; --copy-weights" in result.stderr
    assert re.search(rf"needs +│ {DATA}, 0\.", CliRunner().invoke(app, ["inspect", str(out)]).stdout)
    (tmp_path / DATA).rename(tmp_path / "gone")
    assert f"{DATA}, which isn't there" in CliRunner().invoke(app, ["inspect", str(out)]).stdout
    (tmp_path / "gone").rename(tmp_path / DATA)
    result = run(source, "--calibration", calibration, "--out", out, "--copy-weights")
    assert f"MB  {out}.data" in result.stderr
    assert "beside it" not in result.stderr


def test_a_file(file: Path, calibration: Path, tmp_path: Path) -> None:
    result = run(file, "--calibration", calibration, "--out", tmp_path / "out.onnx")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'out.onnx'}\n"
    assert "replaced in 2 of 3 layers: 2 GroupQueryAttention" in result.stderr
    assert "each of them with beta = 1 within" in result.stderr
    assert "sink state: in inputs of its own" in result.stderr
    with Session.open(tmp_path / "out.onnx") as session:
        assert session.calibration == CALIBRATION


def test_a_folder_and_back(folder: Path, calibration: Path, tmp_path: Path) -> None:
    result = run(folder, "--calibration", calibration, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'out' / 'model.onnx'}\n"
    assert "sink state: in further layers of the cache" in result.stderr
    assert (tmp_path / "out" / "libact_ops.so").is_file()
    result = run(tmp_path / "out", "--remove", "--out", tmp_path / "back")
    assert result.exit_code == 0, result.output
    assert "taken out of 2 layers; the graph is what it was before" in result.stderr
    assert result.stdout == f"{tmp_path / 'back' / 'model.onnx'}\n"
    assert hashes(tmp_path / "back") == hashes(folder)


def test_portable(folder: Path, calibration: Path, tmp_path: Path) -> None:
    assert run(folder, "--calibration", calibration, "--out", tmp_path / "out", "--portable").exit_code == 0
    assert not (tmp_path / "out" / "libact_ops.so").exists()
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert "custom_ops_library" not in config["model"]["decoder"]["session_options"]


def test_other_values(file: Path, calibration: Path, tmp_path: Path) -> None:
    values = "--beta", 0.7, "--threshold", 3, "--threshold-mode", "relative"
    assert run(file, "--calibration", calibration, "--out", tmp_path / "out.onnx", *values).exit_code == 0
    with Session.open(tmp_path / "out.onnx") as session:
        found = session.calibration
    assert found == Calibration(CALIBRATION.heads, beta=0.7, threshold=3.0, threshold_mode="relative")
    message = refused(file, "--calibration", calibration, "--out", tmp_path / "more.onnx", "--beta", 2.5)
    assert message.startswith("beta is 2.5; it must lie in [0, 2]")


def test_a_shipped_recipe(tmp_path: Path) -> None:
    """By its name, for a model of the shape that it is for; and not for another."""
    recipe = named_recipe("smollm2-135m")
    assert recipe is not None
    known = recipe.calibration.model
    assert known is not None
    shape = Decoder(layers=known.num_layers, heads=known.num_heads, kv_heads=3)
    folder = shape.save_folder(tmp_path / "in")
    result = run(folder, "--calibration", "smollm2-135m", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert f"of {known.num_layers} layers" in result.stderr
    with Session.open(tmp_path / "out") as session:
        assert session.calibration == recipe.calibration
        assert session.record.model == ModelIdentity("llama", known.num_layers, known.num_heads)
    small = Decoder().save(tmp_path / "small.onnx")
    message = refused(small, "--calibration", "smollm2-135m", "--out", tmp_path / "out.onnx")
    assert "number of layers is 30 in the calibration, 2 in the model" in message


def test_what_is_missing(file: Path, calibration: Path, tmp_path: Path) -> None:
    assert refused(file, "--calibration", calibration).startswith(f"--out is missing: act-export graft {file} --calib")
    assert refused(file, "--out", tmp_path / "out.onnx").startswith("--calibration is missing: act-export graft")
    message = refused(file, "--calibration", "no-such-recipe", "--out", tmp_path / "out.onnx")
    assert "no-such-recipe" in message
    message = refused(tmp_path / "gone.onnx", "--calibration", calibration, "--out", tmp_path / "out.onnx")
    assert message == f"there is no model {tmp_path / 'gone.onnx'}: name an ONNX file, or a folder that has model.onnx"


@pytest.mark.parametrize(
    ("option", "value"), [("--calibration", "any"), ("--beta", 0.4), ("--threshold", 0.1), ("--threshold-mode", "any")]
)
def test_remove_takes_no_calibration(option: str, value: object, file: Path, tmp_path: Path) -> None:
    message = refused(file, "--remove", option, value, "--out", tmp_path / "out.onnx")
    assert message == f"--remove takes the calibration out; leave out {option}"


def test_remove_of_what_has_no_graft(file: Path, tmp_path: Path) -> None:
    assert "wasn't grafted, so there is nothing to remove" in refused(file, "--remove", "--out", tmp_path / "out.onnx")


@pytest.mark.parametrize("kind", ["text", "cut", "weights", "state", "mask"])
def test_bad_models(kind: str, calibration: Path, tmp_path: Path) -> None:
    path = Decoder().save(tmp_path / "in.onnx", external=kind == "weights")
    if kind == "text":
        path.write_text("ONNX")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "weights":
        (tmp_path / DATA).unlink()
    else:
        model = onnx.load(path)
        for node in model.graph.node:
            if kind == "state" and node.op_type == "GroupQueryAttention":
                node.op_type, node.domain = "Unknown", "com.microsoft"
            if kind == "mask":
                node.input[:] = ["other" if name == "attention_mask" else name for name in node.input]
        if kind == "mask":
            model.graph.input[1].name = "other"
        onnx.save(model, path)
    before = hashes(tmp_path)
    message = refused(path, "--calibration", calibration, "--out", tmp_path / "out.onnx")
    reasons = {
        "text": "as an ONNX file",
        "cut": "as an ONNX file",
        "weights": "which isn't there; put it beside the model",
        "state": "the model has no attention with a cache that act-export knows",
        "mask": "the model has no input attention_mask",
    }
    assert reasons[kind] in message
    assert hashes(tmp_path) == before


def test_an_attention_that_isnt_what_it_seems(
    file: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, and no file; unless nobody compares."""
    read = group_query_attention.attribute
    monkeypatch.setattr(
        group_query_attention,
        "attribute",
        lambda node, name, default=None: 0.3 if name == "scale" else read(node, name, default),
    )
    before = hashes(tmp_path)
    message = refused(file, "--calibration", calibration, "--out", tmp_path / "out.onnx", code=1)
    assert (
        "layer 0: the operator differs from GroupQueryAttention '/model/layers.0.attn/GroupQueryAttention'" in message
    )
    assert "nothing was written" in message
    assert hashes(tmp_path) == before
    result = run(file, "--calibration", calibration, "--out", tmp_path / "out.onnx", "--no-check")
    assert result.exit_code == 0, result.output
    assert "within" not in result.stderr


def test_a_defect_is_told_as_one(
    file: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("by accident")

    monkeypatch.setattr(import_module("act_export.graft.job"), "apply", fails)
    result = run(file, "--calibration", calibration, "--out", tmp_path / "out.onnx")
    assert result.exit_code == 3
    assert "this is a defect of act-export" in result.stderr
    assert not (tmp_path / "out.onnx").exists()


def test_notes_are_told(calibration: Path, tmp_path: Path) -> None:
    folder = Decoder(windows=(-1, 5)).save_folder(tmp_path / "in")
    result = run(folder, "--calibration", calibration, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "sliding window of layer 1 counts padding too" in " ".join(result.stderr.split())


def test_help() -> None:
    text = " ".join(run("--help").stdout.split())
    assert "Calibrates a model that was exported before" in text
    for option in ("--out", "--calibration", "--beta", "--portable", "--no-check", "--remove"):
        assert option in text


def test_tolerances_are_of_types_that_a_cpu_runs() -> None:
    assert set(check.TOLERANCE) == {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}


def test_without_the_native_library(folder: Path, calibration: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("act_export.ops.library.NAMES", ("missing.so",))
    message = refused(folder, "--calibration", calibration, "--out", tmp_path / "out")
    assert "libact_ops is not in" in message
    assert message.endswith("Or pass --portable, which needs none")
    assert not (tmp_path / "out").exists()
    result = run(folder, "--calibration", calibration, "--portable", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert not list((tmp_path / "out").glob("libact_ops*"))
