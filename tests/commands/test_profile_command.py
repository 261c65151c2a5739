"""The profile and report commands as a user meets them: files, notes, bad input, exit codes, going on after an end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import Result
from planted import save_planted
from tiny import save_checkpoint
from typer.testing import CliRunner

from act_export.calibration.file import Calibration
from act_export.commands.main import app
from act_export.files import cache_folder
from act_export.profile import SinkProfile, run


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def act_export(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_three_files_and_the_findings(planted, here):
    model, rows = planted
    Path("some.txt").write_text("w5 w6 w7 " * 30)
    Path("prompts.jsonl").write_text('{"prompt": "w5 w17"}\n{"prompt": "w9 w17 w30"}\n')
    Calibration({0: (1,)}, beta=0.2).save("mine.json")
    result = act_export(
        "profile", model, "--data", rows, "--data", "prompts.jsonl", "--text", "some.txt", "--length", 20,
        "--prompts", 20, "--calibration", "mine.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == ["profile.safetensors", "profile.json", "profile.html"]
    assert re.search(r"Later sinks exist in \d of 8 heads", result.stderr)
    assert re.search(r"right answers likelier in \d", result.stderr)
    profile = SinkProfile.load("profile.safetensors")
    assert list(profile.sources) == [rows.name, "prompts.jsonl", "some.txt"]
    assert [source.prompts for source in profile.sources.values()] == [20, 2, 14]
    assert profile["some.txt"].longest == 20
    assert [source.effects is not None for source in profile.sources.values()] == [True, False, False]
    assert profile.calibration == Calibration.load("mine.json")
    assert str(model.parent) not in Path("profile.json").read_text()  # nothing of this machine
    assert names(cache_folder() / "profiles") == set()
    assert names(here) == {"some.txt", "prompts.jsonl", "mine.json", "profile.safetensors", "profile.json",
                           "profile.html"}  # fmt: skip


def test_prompts_of_a_task_are_those_that_a_search_ranks_with(planted, here, monkeypatch):
    """And never those that it reports on."""
    from act_export.profile.job import ProfileJob, load_prompts
    from act_export.tasks import Questions, read_examples, split_examples

    _, rows = planted
    splits = split_examples(read_examples(rows).examples, seed=3)
    (found,) = load_prompts(ProfileJob(Questions(data=(rows,), seed=3)))
    assert found.examples == splits.rank
    (found,) = load_prompts(ProfileJob(Questions(data=(rows,), seed=3), prompts=7))
    assert found.examples == splits.rank[:7]


def test_interrupted_the_same_command_goes_on(planted, here, monkeypatch):
    model, rows = planted
    arguments = ("profile", model, "--data", rows, "--batch-tokens", 30, "--no-report")
    compute, calls, whole = run.profile_batch, [], []
    with monkeypatch.context() as patch:
        patch.setattr(run, "profile_batch", lambda *given: whole.append(given) or compute(*given))
        assert act_export(*arguments, "--out", "whole.safetensors").exit_code == 0

    def stop(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compute(*given)

    with monkeypatch.context() as patch:
        patch.setattr(run, "profile_batch", stop)
        result = act_export(*arguments)
    assert result.exit_code == 2
    assert "the same command goes on" in " ".join(result.stderr.split())
    assert names(here) == {"whole.safetensors", "whole.json"}
    assert len(names(cache_folder() / "profiles")) == 1
    counted = []
    with monkeypatch.context() as patch:
        patch.setattr(run, "profile_batch", lambda *given: counted.append(given) or compute(*given))
        assert act_export(*arguments).exit_code == 0
    assert len(counted) == len(whole) - 3 + 1  # the example again: its scores aren't kept
    assert Path("profile.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()


def test_the_report_command(planted, here):
    model, rows = planted
    assert act_export("profile", model, "--data", rows, "--prompts", 8, "--no-report").exit_code == 0
    assert names(here) == {"profile.safetensors", "profile.json"}
    result = act_export("report", "profile.safetensors")
    assert (result.exit_code, result.stdout.strip()) == (0, "report.html"), result.output
    Calibration({1: (0,)}).save("mine.json")
    for form in ("svg", "png"):
        result = act_export("report", "profile.json", "mine.json", "--format", form, "--out", form)
        assert result.exit_code == 0, result.output
        written = [Path(line) for line in result.stdout.split()]
        assert {file.name for file in written} == names(here / form)
        assert len(written) >= 4
        assert all(file.suffix == f".{form}" for file in written)


def test_bad_input_is_named_before_any_work(planted, here):
    model, rows = planted
    (here / "folder.safetensors").mkdir()
    (here / "page.html").mkdir()
    Calibration({0: (1,)}).save("mine.json")
    (here / "list.jsonl").write_text("[]\n")
    (here / "empty.txt").write_text("")
    no_tokenizer = save_checkpoint(here / "bare", tokenizer=False)
    japanese = save_checkpoint(here / "japanese", architecture="gpt_neox_japanese")
    (here / "bare" / "empty.txt").write_text("")
    for arguments, message in (
        (
            (model, "--data", rows, "--out", "p.json"),
            "p.json isn't a file *.safetensors; pass e.g. --out p.safetensors",
        ),
        ((model, "--data", rows, "--out", "folder.safetensors"), "isn't a file *.safetensors"),
        ((model, "--data", rows, "--out", "."), "isn't a file *.safetensors; pass e.g. --out profile.safetensors"),
        ((model, "--data", rows, "--out", "/"), "isn't a file *.safetensors; pass e.g. --out profile.safetensors"),
        ((model, "--data", rows, "--out", "mine.safetensors"), "mine.json would be written beside mine.safetensors"),
        (
            (model, "--data", rows, "--out", "page.safetensors"),
            "page.html is a folder",
        ),
        ((model, "--text", "empty.txt", "--text", here / "bare" / "empty.txt"), "'empty.txt' names two sources"),
        ((model, "--data", rows, "--prompts", 0), "--prompts is 0; it must be at least 1"),
        ((model, "--data", rows, "--length", 0), "--length is 0"),
        ((model, "--data", rows, "--dtype", "float8"), "dtype is 'float8'"),
        ((model, "--data", rows, "--absolute-threshold", -1), "threshold is -1"),
        ((model, "--data", rows, "--batch-tokens", 0), "batch_tokens is 0"),
        ((model, "--data", rows, "--calibration", "nothing.json"), "there is no calibration file nothing.json"),
        ((model, "--task", "sst3"), "did you mean sst5 or sst2"),
        ((model, "--data", "nowhere.jsonl"), "can't read nowhere.jsonl"),
        ((model, "--data", "list.jsonl"), "list.jsonl, line 1"),
        ((model, "--text", "nowhere.txt"), "there is no text file nowhere.txt"),
        ((model, "--text", "empty.txt"), "empty.txt has no tokens"),
        ((model, "--text", rows, "--length", 10_000), "--length is 10000; the model takes"),
        ((no_tokenizer, "--data", rows), "has no tokenizer"),
        ((japanese, "--data", rows), "attention of gpt_neox_japanese"),
    ):
        result = act_export("profile", *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in " ".join(result.stderr.split()), (arguments, result.stderr)
    kept = {"folder.safetensors", "page.html", "mine.json", "list.jsonl", "empty.txt", "bare", "japanese"}
    assert names(here) == kept


def test_bad_input_of_a_report(planted, here):
    model, rows = planted
    assert act_export("profile", model, "--data", rows, "--prompts", 4, "--no-report").exit_code == 0
    Calibration({9: (0,)}).save("other.json")
    (here / "folder").mkdir()
    (here / "broken.json").write_text("{")
    for arguments, message in (
        (("nowhere.safetensors",), "can't read nowhere.json: No such file or directory; a profile has two files"),
        (("broken.json",), "broken.json isn't JSON"),
        ((".",), ". is a folder; pass a profile in it, e.g. profile.safetensors"),
        (("profile.json", "other.json"), "layer 9"),
        (("profile.json", "nothing"), "there is no calibration file nothing"),
        (("profile.json", "--format", "pdf"), "--format is 'pdf'; it must be html, png, svg"),
        (("profile.json", "--out", "folder"), "folder is a folder; pass a file, e.g. --out folder/report.html"),
        (("profile.json", "--format", "png", "--out", "other.json"), "other.json is a file"),
        (("profile.json", "--evaluation", "broken.json"), "broken.json"),
    ):
        result = act_export("report", *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in " ".join(result.stderr.split()), (arguments, result.stderr)
    assert json.loads(Path("profile.json").read_text())["format"] == "act-export sink profile"


def test_data_that_is_too_little_or_too_uneven_to_search_on_can_be_profiled(here):
    from act_export.profile.job import ProfileJob, load_prompts
    from act_export.tasks import Questions

    rows = [{"prompt": f"w{n}", "choices": [" w97", " w98"], "answer": int(n == 7)} for n in range(40)]
    for count in (1, 40):
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        (found,) = load_prompts(ProfileJob(Questions(data=(Path("rows.jsonl"),))))
        assert len(found.examples) == count
