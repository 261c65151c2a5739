"""What can be refused without torch, transformers or ONNX Runtime is refused before these are imported: it is slow."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from act_export.commands.main import app

_RUN = """
import json, sys
from typer.testing import CliRunner
from act_export.commands.main import app

slow, known = {"torch", "transformers", "onnxruntime", "onnx_ir", "altair"}, set()
for arguments in json.load(sys.stdin):
    ended = CliRunner().invoke(app, arguments)
    loaded = (slow & set(sys.modules)) - known
    known |= loaded
    print(json.dumps([ended.exit_code, ended.output, sorted(loaded)]))
"""
MODEL = "there is no model"
REFUSED = [
    ("export nomodel --out o.onnx", MODEL),
    ("export {folder} --out o.onnx --dtype float3", "dtype is 'float3'"),
    ("export {folder} --out o.onnx --task notask", "there is no task"),
    ("export {folder} --out o.onnx --calibration norecipe", "no shipped recipe"),
    ("export {folder} --out o.onnx --beta 7", "beta is 7"),
    ("export {folder}", "where to?"),
    ("try nomodel --task sst2", MODEL),
    ("try {folder} --task notask", "there is no task"),
    ("search nomodel --task sst2", MODEL),
    ("search {folder} --task notask", "there is no task"),
    ("search {folder} --ranking noranking", "there is no ranking"),
    ("search {folder} --method nomethod", "there is no method"),
    ("search {folder} --weights none.onnx", MODEL),
    ("search {folder} --device gpu", "device is 'gpu'"),
    ("search {folder} --dtype float3", "dtype is 'float3'"),
    ("graft none.onnx --calibration smollm2-135m --out o.onnx", MODEL),
    ("graft none.onnx --remove --out o.onnx", MODEL),
    ("graft {file} --calibration norecipe --out o.onnx", "no shipped recipe"),
    ("adapter none.onnx --calibration smollm2-135m --out o.onnx_adapter", MODEL),
    ("adapter {file} --calibration smollm2-135m --out o.onnx", "its name must end in"),
    ("profile nomodel", MODEL),
    ("profile {folder} --task notask", "there is no task"),
    ("profile {folder} --calibration norecipe", "no shipped recipe"),
    ("profile {folder} --out o.bin", "isn't a file *.safetensors"),
    ("report none.safetensors", "a profile has two files"),
    ("report none.safetensors --format bmp", "--format is 'bmp'"),
    ("verify none.onnx --against {folder}", MODEL),
    ("verify {file} --against nomodel", MODEL),
    ("generate none.onnx x", MODEL),
    ("generate none.onnx x --temperature=-1", "temperature"),
    ("eval none.onnx --task sst2", MODEL),
    ("eval {file} --task notask", "there is no task"),
    ("eval {file} --split nosplit", "there is no split"),
    ("eval {file} --calibration nocalibration", "has no calibration"),
    ("eval none.onnx --chat-file {questions}", MODEL),
    ("eval {file} --chat-file none.jsonl", "can't read none.jsonl"),
    ("eval {file} --task sst2 --tokenizer nomodel", MODEL),
    ("generate {file} x --tokenizer nomodel", MODEL),
    ("bench none.onnx", MODEL),
    ("bench {file} --pytorch nomodel", MODEL),
    ("bench {file} --rounds 0", "rounds"),
    ("inspect none.onnx", MODEL),
    ("triton none.onnx --out repository", MODEL),
    ("fetch-data notask", "there is no task"),
]
NOTHING_TO_REFUSE = {"library", "lm-eval"}  # without arguments; with those of lm-evaluation-harness


@pytest.fixture(scope="module")
def ended(checkpoint_folder, tiny_file, tmp_path_factory) -> dict[str, tuple[int, str, list[str]]]:
    """By command line, its exit code, what it said, and what was imported by then for the first time."""
    questions = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    questions.write_text('{"question_id": 1, "category": "x", "turns": ["a"]}\n')
    places = {"folder": checkpoint_folder, "file": tiny_file, "questions": questions}
    lines = [[part.format(**places) for part in line.split()] for line, _ in REFUSED]
    run = subprocess.run(
        [sys.executable, "-c", _RUN], input=json.dumps(lines), check=True, capture_output=True, text=True
    )
    found = map(json.loads, run.stdout.splitlines())
    return {line: tuple(each) for (line, _), each in zip(REFUSED, found, strict=True)}


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_refused_before_anything_slow_is_imported(ended, line, message):
    code, said, loaded = ended[line]
    assert (code, loaded) == (2, []), said
    assert message in " ".join(said.split())


def test_every_command_is_here():
    named = {command.name for command in app.registered_commands}
    assert named - NOTHING_TO_REFUSE == {line.split()[0] for line, _ in REFUSED}
