"""A calibration that isn't for the model is refused by every command that takes one, before any weight is loaded."""

from __future__ import annotations

import pytest
from command_runs import run

_MODEL = '{{"architecture": {}, "layers": {}, "heads": {}, "fingerprint": null}}'
_OF_ANOTHER = '{{"heads": {{"1": [0]}}, "model": ' + _MODEL + "}}"
MISFITS = {
    "a layer that isn't there": ('{"7": [0]}', "layer 7 is out of range; the model has layers 0 to 1"),
    "a head that isn't there": ('{"1": [4]}', "head 4 of layer 1 is out of range; the model has heads 0 to 3"),
    "another family": (_OF_ANOTHER.format('"opt"', 2, 4), "architecture is opt in the calibration, llama in the model"),
    "other layers": (_OF_ANOTHER.format('"llama"', 3, 4), "number of layers is 3 in the calibration, 2 in the model"),
    "other heads": (_OF_ANOTHER.format('"llama"', 2, 9), "number of heads is 9 in the calibration, 4 in the model"),
}
COMMANDS = [
    "export {folder} --out {tmp}/new.onnx",
    "export {folder} --out {tmp}/new.onnx --calibration {good}",
    "profile {folder} --data {rows} --out {tmp}/new.safetensors",
    "graft {plain} --out {tmp}/new.onnx",
    "adapter {file} --out {tmp}/new.onnx_adapter",
    "eval {file} --data {rows} --tokenizer {folder}",
    "eval {file} --chat-file {questions} --tokenizer {folder}",
    "generate {file} a --tokenizer {folder}",
    "bench {file}",
]


@pytest.fixture
def nothing_loads(monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr("act_export.checkpoint.load._load", loaded)
    monkeypatch.setattr("onnxruntime.InferenceSession", loaded)
    monkeypatch.setattr("act_export.verify.bench.job._run_child", loaded)


@pytest.mark.sampled(20)
@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("command", COMMANDS)
def test_refused_before_weights_are_loaded(
    command, misfit, checkpoint_folder, tiny_file, tiny_plain_file, heads_file, tmp_path
):
    text, message = MISFITS[misfit]
    places = {"folder": checkpoint_folder, "file": tiny_file, "plain": tiny_plain_file, "tmp": tmp_path}
    for name, content in {
        "rows": "".join(f'{{"prompt": "a {n}", "choices": ["b", "c"], "answer": 0}}\n' for n in range(8)),
        "questions": '{"question_id": 1, "category": "x", "turns": ["a"]}\n',
    }.items():
        places[name] = tmp_path / f"{name}.jsonl"
        places[name].write_text(content)
    other = tmp_path / "other.json"
    other.write_text(text)
    before = set(tmp_path.iterdir())
    result = run(*(part.format(**places, good=heads_file) for part in command.split()), "--calibration", other)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert set(tmp_path.iterdir()) == before
