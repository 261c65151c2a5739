"""What README and pages show works: Python and C++ run, the calibration file loads, tables are complete."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer.main
from tiny import CALIBRATION

import act_export
from act_export.calibration.file import Calibration
from act_export.checkpoint.load import load_checkpoint
from act_export.commands.main import app
from act_export.export import build_model
from act_export.ops.library import library_path
from act_export.runtime import Session, generate

ROOT = Path(__file__).parent.parent.parent
DOCS = Path(act_export.__file__).parent / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILE, COMMANDS, RUNNING = (
    (DOCS / f"{name}.md").read_text(encoding="utf-8") for name in ("file", "commands", "running")
)
INCLUDES = "onnxruntime_cxx_api.h"


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def exported(checkpoint_folder, tmp_path_factory) -> Path:
    """A folder with the file that the README's programs open, its tokenizer and the native library."""
    folder = tmp_path_factory.mktemp("readme")
    checkpoint = load_checkpoint(str(checkpoint_folder))
    build_model(checkpoint, CALIBRATION, folder / "calibrated.onnx")
    checkpoint.tokenizer.save_pretrained(folder)
    shutil.copy(library_path(), folder / "libact_ops.so")
    return folder


def test_python_runs(exported, monkeypatch, capsys):
    monkeypatch.chdir(exported)

    def run_python(program: str) -> str:
        exec(program, {})
        return capsys.readouterr().out

    (alone,) = blocks("python", README)
    generation, steps, loop = blocks("python", RUNNING)
    first = int(run_python(alone))
    tokens = ast.literal_eval(run_python(loop))
    assert (tokens[:5], len(tokens)) == ([28, 216, 34, 32, first], 12)
    with Session.open(exported / "calibrated.onnx", native=False) as session:
        assert generate(session, [tokens[:4]], max_new_tokens=8) == [tokens[4:]]
    printed = run_python(generation)
    assert "The capital of France is" in printed
    assert "1, 2, 3," in printed
    length, size = map(int, run_python(steps).split())
    assert length > 8
    assert size > 0


def test_cpp_runs(exported, tmp_path):
    """Needs ONNX Runtime's headers where the compiler looks (CPATH), which its Python package doesn't have."""
    compiler = _compiler("c++", "g++", "clang++")
    if subprocess.run([compiler, "-E", "-x", "c++", "-"], input=f"#include <{INCLUDES}>", **_quiet()).returncode != 0:
        pytest.skip(f"{INCLUDES} isn't where the compiler looks; CPATH can name its folder")
    import onnxruntime

    capi = Path(onnxruntime.__file__).parent / "capi"
    libraries = sorted(capi.glob("libonnxruntime.so.*"))
    if not libraries:
        pytest.skip(f"there is no libonnxruntime.so in {capi}")
    (tmp_path / "libonnxruntime.so.1").symlink_to(libraries[-1])  # its name among libraries
    (tmp_path / "example.cc").write_text(blocks("cpp", RUNNING)[0], encoding="utf-8")
    command = [compiler, "-std=c++17", "example.cc", "-o", "example", libraries[-1]]
    compiled = subprocess.run(list(map(str, command)), cwd=tmp_path, **_quiet())
    assert compiled.returncode == 0, compiled.stderr
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    result = subprocess.run([tmp_path / "example"], cwd=exported, env=environment, **_quiet())
    assert result.returncode == 0, result.stderr
    with Session.open(exported / "calibrated.onnx") as session:
        assert result.stdout.split()[:3] == ["input_ids", "attention_mask", "position_ids"]
        assert set(result.stdout.split()[3:]) == set(session.empty_state(1))


def test_c_program_finds_the_entry_point(tmp_path):
    """A host without Python and without ONNX Runtime can load the library."""
    (tmp_path / "host.c").write_text(
        "#include <dlfcn.h>\n"
        "#include <stdio.h>\n"
        "int main(int count, char **arguments) {\n"
        "  void *library = count == 2 ? dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL) : NULL;\n"
        '  if (!library || !dlsym(library, "RegisterCustomOps")) return puts(dlerror()), 1;\n'
        "  return dlclose(library);\n"
        "}\n",
        encoding="utf-8",
    )
    compiled = subprocess.run(
        [_compiler("cc", "gcc", "clang"), "host.c", "-o", "host", "-ldl"], cwd=tmp_path, **_quiet()
    )
    assert compiled.returncode == 0, compiled.stderr
    result = subprocess.run([tmp_path / "host", library_path()], env={}, **_quiet())
    assert result.returncode == 0, result.stdout


def test_calibration_file_loads():
    calibration = Calibration.from_json(blocks("json", FILE)[0])
    assert calibration.heads == {5: (0, 3), 8: (1,)}
    assert (calibration.beta, calibration.threshold, calibration.threshold_mode) == (0.4, 0.1, "absolute")
    assert calibration.model is not None
    assert calibration.model.num_layers == 30
    shortest = re.search(r"The shortest form is heads by layer, `(.*?)`", FILE)
    assert shortest is not None
    assert Calibration.from_json(shortest[1]).heads == calibration.heads


def test_row_of_data_is_read(tmp_path):
    from act_export.tasks import Example, read_examples

    row = re.search(r"A row of `--data` is `(.*?)`", COMMANDS)
    assert row is not None
    (tmp_path / "rows.jsonl").write_text(row[1] + "\n", encoding="utf-8")
    assert read_examples(tmp_path / "rows.jsonl").examples == (Example("2 + 2 =", (" 4", " 5"), 0),)


def test_every_command_is_in_the_table():
    named = set(re.findall(r"^\| `act-export ([a-z-]+)", COMMANDS, re.MULTILINE))
    assert named == set(_commands()) - {"export"}


def test_every_option_of_the_export_is_in_the_table():
    table = COMMANDS.split("| option of the export | meaning |")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line]
    named = {option for cell in cells for option in re.findall(r"`(--[a-z-]+)`", cell)}
    options = {name for option in _commands()["export"].params for name in (*option.opts, *option.secondary_opts)}
    assert named == {name for name in options if name.startswith("--")} - {"--help"}


@pytest.mark.parametrize("script", ["tools/demo", "tools/test"])
def test_scripts_that_it_names_can_be_run(script):
    assert script in README
    assert os.access(ROOT / script, os.X_OK)


def _commands():
    return typer.main.get_command(app).commands


def _compiler(*names: str) -> str:
    for name in names:
        if shutil.which(name):
            return name
    pytest.skip(f"there is no compiler ({', '.join(names)})")


def _quiet() -> dict:
    return {"capture_output": True, "text": True}
