"""The command that generates: wrong options end with exit code 2 and a remedy, and settings beside the file count."""

from __future__ import annotations

import json
import shutil

import onnx
import pytest
from tiny import tiny_tokenizer
from typer.testing import CliRunner

from act_export.commands.main import app


@pytest.fixture(scope="module")
def folder(tiny_plain_file, tmp_path_factory):
    place = tmp_path_factory.mktemp("exported")
    for file in tiny_plain_file.parent.iterdir():
        shutil.copy(file, place)
    tiny_tokenizer().save_pretrained(place)
    return place


def run(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--seed", -1), "seed is -1"),
        (("--temperature", "nan"), "temperature is nan"),
        (("--temperature", "inf"), "temperature is inf"),
        (("--temperature", -1), "temperature is -1"),
        (("--top-p", 0), "top_p is 0"),
        (("--top-p", "nan"), "top_p is nan"),
        (("--top-p", 2), "top_p is 2"),
        (("--top-k", -1), "top_k is -1"),
        (("--max-new-tokens", 300), "300 new tokens don't fit"),
        (("--chat",), "no chat template"),
        (("--sample", "--temperature", 0), "temperature is 0"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_wrong_options(folder, options, said):
    result = run(folder, "One", *options)
    assert result.exit_code == 2, result.output
    assert said in result.output


@pytest.mark.parametrize(("prompt", "said"), [("", "the prompt is empty"), ("a\udc80", "the prompt isn't text")])
def test_wrong_prompts(folder, prompt, said):
    result = run(folder, prompt)
    assert result.exit_code == 2
    assert said in result.output


def test_a_tokenizer_that_cant_be_had(tiny_plain_file, tmp_path):
    model = onnx.load(tiny_plain_file)
    next(entry for entry in model.metadata_props if entry.key == "act_export.source").value = "smollm2-1.7b"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("act_export.runtime.text.BUILT_IN", {"smollm2-1.7b"})
        result = run(tmp_path / "m.onnx", "One")
    assert result.exit_code == 2
    assert "no tokenizer beside" in result.output
    assert "of smollm2-1.7b, which the file was made from, can't be had" in result.output
    assert "--tokenizer MODEL" in result.output


def test_settings_beside_the_file(folder):
    plain = run(folder, "One", "--max-new-tokens", 8)
    assert plain.exit_code == 0
    assert "F" in plain.stdout
    settings, config = folder / "generation_config.json", folder / "config.json"
    config.write_text("{}")  # as in a folder that was exported: there what is beside the file counts
    settings.write_text(json.dumps({"suppress_tokens": tiny_tokenizer()("F").input_ids, "num_beams": 3}))
    try:
        without = run(folder, "One", "--max-new-tokens", 8)
        assert "num_beams 3, which isn't done here" in without.output
        assert "F" not in without.stdout
        assert run(folder, "One", "--max-new-tokens", 8, "--ignore-generation-config").stdout == plain.stdout
        settings.write_text('{"repetition_penalty": "high"}')
        refused = run(folder, "One")
        assert refused.exit_code == 2
        assert "--ignore-generation-config" in refused.output
    finally:
        settings.unlink()
        config.unlink()


def test_drawing(folder):
    first, second = (run(folder, "One", "--sample", "--temperature", 2, "--seed", seed) for seed in (1, 2))
    assert first.exit_code == second.exit_code == 0
    assert first.stdout != second.stdout
    assert "top_k: no effect" in run(folder, "One", "--top-k", 3).output
