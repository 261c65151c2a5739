"""The whole job: what is written, what is kept, and what is refused before any answer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
from bare import installed_with, run_bare
from chats import QUESTIONS, write_questions

from act_export.calibration.file import Calibration
from act_export.errors import ActExportError
from act_export.journal import Journal
from act_export.runtime import Session
from act_export.runtime.adapter import write_adapters
from act_export.verify.evaluate.chat import job
from act_export.verify.evaluate.chat.conversation import Chats
from act_export.verify.evaluate.chat.job import ChatRequest, evaluate_chats


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "act-export" / "chats"


@pytest.fixture
def request_(chat_file, tokenizer_folder, questions_file, tmp_path):
    return ChatRequest(
        chat_file, questions_file, out=tmp_path / "out", max_new_tokens=5, tokenizer=str(tokenizer_folder)
    )


@pytest.fixture
def answered(monkeypatch):
    """What was answered: calibration and questions, group by group."""
    calls = []
    answers = Chats.answers

    def recorded(self, questions, calibration, *more):
        calls.append((calibration, [question.id for question in questions]))
        return answers(self, questions, calibration, *more)

    monkeypatch.setattr(Chats, "answers", recorded)
    return calls


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_answers_are_written_as_fastchat_has_them(request_):
    report = evaluate_chats(request_)
    assert [path.name for path in report.files] == ["plain.jsonl", "weak.jsonl", "side_by_side.html"]
    for name in ("plain", "weak"):
        lines = (request_.out / f"{name}.jsonl").read_text().splitlines()
        for line, question, answer in zip(lines, QUESTIONS, report.answers[name], strict=True):
            found = json.loads(line)
            assert list(found) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
            assert (found["question_id"], found["model_id"]) == (question["question_id"], name)
            assert found["choices"] == [{"index": 0, "turns": [turn.text for turn in answer.turns]}]
            assert len(answer.turns) == len(question["turns"])
            assert type(found["tstamp"]) is float
            assert len(found["answer_id"]) == 22
    ids = {json.loads(line)["answer_id"] for path in report.files[:2] for line in path.read_text().splitlines()}
    assert len(ids) == 6
    (comparison,) = report.comparisons
    assert (comparison.calibration, comparison.answers) == ("weak", 6)


def test_the_same_command_gives_the_same_files_and_answers_nothing_twice(request_, answered):
    first = evaluate_chats(request_)
    before = contents(request_.out)
    shutil.rmtree(request_.out)
    number = len(answered)
    steps = []
    again = evaluate_chats(request_, progress=lambda step, done: steps.append((step, done)))
    assert contents(request_.out) == before
    assert (again.answers, len(answered)) == (first.answers, number)
    assert steps[-1] == ("weak", 1)


def test_another_calibration_finds_the_plain_answers(request_, answered):
    evaluate_chats(request_)
    report = evaluate_chats(replace(request_, calibrations=("weak", "strong")))
    assert [calibration for calibration, _ in answered] == [None, "weak", "strong"]
    assert sorted(path.name for path in request_.out.iterdir()) == [
        "plain.jsonl",
        "side_by_side.html",
        "side_by_side_strong.html",
        "side_by_side_weak.html",
        "strong.jsonl",
        "weak.jsonl",
    ]
    assert [each.calibration for each in report.comparisons] == ["weak", "strong"]


@pytest.mark.parametrize("change", [{"max_new_tokens": 4}, {"portable": True}])
def test_other_settings_are_answered_anew(request_, answered, change):
    evaluate_chats(request_)
    evaluate_chats(replace(request_, **change))
    assert len(answered) == 4


def test_other_questions_and_another_template_are_answered_anew(request_, answered, tmp_path):
    evaluate_chats(request_)
    write_questions(request_.questions, [{**QUESTIONS[0], "turns": ["Hi, who is it?", "How?"]}])
    evaluate_chats(request_)
    folder = shutil.copytree(request_.tokenizer, tmp_path / "other")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<a>", "<b>"))
    evaluate_chats(replace(request_, tokenizer=str(folder)))
    assert len(answered) == 6


@pytest.mark.parametrize("batch_tokens", [1, 80])
def test_interrupted_it_goes_on_and_gives_what_one_run_gives(request_, cache, answered, monkeypatch, batch_tokens):
    """Stopped within each group in turn; a line that was cut off counts as not written."""
    request_ = replace(request_, batch_tokens=batch_tokens, calibrations=("strong",))
    whole = evaluate_chats(request_)
    groups = len(answered)
    assert groups > 2
    shutil.rmtree(cache)
    before = {name: [answer.turns for answer in answers] for name, answers in whole.answers.items()}

    class StopError(Exception):
        pass

    for number in range(groups):
        answered.clear()
        record = Journal.record

        def stop(self, key, value, number=number, record=record):
            if len(self.values) == number:
                raise StopError
            record(self, key, value)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "record", stop)
            for _ in range(2):  # the second time nothing is new but what was stopped
                with pytest.raises(StopError):
                    evaluate_chats(request_)
        (units,) = cache.glob("*/units-0.jsonl")
        with units.open("ab") as file:
            file.write(b'{"unit": "plain 12", "val')
    answered.clear()
    report = evaluate_chats(request_)
    assert len(answered) == 1
    assert {name: [answer.turns for answer in answers] for name, answers in report.answers.items()} == before
    assert report.comparisons == whole.comparisons


def test_groups_hold_what_memory_has_room_for(request_, answered):
    write_questions(request_.questions, [{"question_id": each, "turns": ["a" * (each + 1)]} for each in range(20)])
    evaluate_chats(request_)
    sizes = [len(ids) for _, ids in answered]
    assert sizes == [8, 8, 4] * 2
    answered.clear()
    evaluate_chats(replace(request_, batch_tokens=60, out=None))
    longest = [7 + max(ids) + 5 for _, ids in answered]
    assert [len(ids) for _, ids in answered] != sizes
    assert all(len(ids) == 1 or len(ids) * needed <= 60 for (_, ids), needed in zip(answered, longest, strict=True))
    assert [each for calibration, ids in answered for each in ids if calibration is None] == list(range(20))


def test_a_limit_takes_the_first_and_progress_only_grows(request_, tmp_path):
    shares = []
    report = evaluate_chats(replace(request_, limit=2, out=None), progress=lambda _, done: shares.append(done))
    assert [question.id for question in report.questions] == [81, 7]
    assert all(first <= second for first, second in pairwise(shares))
    assert (shares[-1], report.files) == (1, ())
    assert not (tmp_path / "out").exists()


def test_where_nothing_can_be_kept_it_does_without(request_, cache, answered):
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")
    evaluate_chats(request_)
    evaluate_chats(request_)
    assert len(answered) == 4


def test_calibrations_by_file_and_by_adapter(request_, chat_file, cache, tmp_path):
    with Session.open(chat_file) as session:
        write_adapters(tmp_path, {f"act_export.{key}": value for key, value in session.properties.items()})
    Calibration({0: (1,)}, beta=0.1, threshold=0.01).save(tmp_path / "mine.json")
    adapter = (tmp_path / "adapters" / "weak.onnx_adapter").rename(tmp_path / "other.onnx_adapter")
    report = evaluate_chats(replace(request_, calibrations=("strong", str(tmp_path / "mine.json"), str(adapter))))
    assert list(report.answers) == ["plain", "strong", "mine", "other"]
    shutil.rmtree(cache)
    by_name = evaluate_chats(replace(request_, calibrations=("weak",)))
    assert [each.turns for each in report.answers["other"]] == [each.turns for each in by_name.answers["weak"]]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("weaker",), "has no calibration 'weaker'; there are weak, strong, plain"),
        (("plain",), "'plain' leaves the heads of .* as they are, and the plain model answers anyway"),
        (("weak", "weak"), "two models would be called 'weak'"),
        (("{}/weak.json", "weak"), "two models would be called 'weak'"),
        (("{}/plain.json",), "two models would be called 'plain'"),
        (("{}/none.json",), "none.json"),
    ],
)
def test_calibrations_that_are_refused(request_, answered, tmp_path, asked, message):
    for name in ("weak", "plain"):
        Calibration({0: (1,)}, beta=0.1).save(tmp_path / f"{name}.json")
    with pytest.raises(ActExportError, match=message):
        evaluate_chats(replace(request_, calibrations=tuple(each.format(tmp_path) for each in asked)))
    assert answered == []


def test_a_plain_file_has_nothing_to_compare(request_, tiny_plain_file):
    with pytest.raises(
        ActExportError, match=r"no head of .* can be calibrated, so there is nothing to compare; export"
    ):
        evaluate_chats(replace(request_, file=tiny_plain_file))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max new tokens is 0; give 1 or more"),
        ({"limit": 0}, "limit is 0"),
        ({"batch_tokens": -1}, "batch tokens is -1"),
        ({"seed": -1}, "the seed is -1"),
        ({"device": "gpu"}, "device is 'gpu'"),
    ],
)
def test_values_out_of_range(request_, change, message):
    with pytest.raises(ActExportError, match=message):
        replace(request_, **change)


def test_places_that_cannot_be_written_to_are_refused_first(request_, answered, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ActExportError, match="is no folder; pass another folder with --chat-out"):
        evaluate_chats(replace(request_, out=tmp_path / "file" / "out"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weak.jsonl").symlink_to("../file")
    with pytest.raises(ActExportError, match=r"weak\.jsonl is a link to \.\./file, which would be replaced"):
        evaluate_chats(request_)
    assert answered == []


def test_a_question_that_is_too_long_is_refused_first(request_, answered):
    write_questions(request_.questions, [*QUESTIONS, {"question_id": "long", "turns": ["a" * 260]}])
    with pytest.raises(ActExportError, match="question 'long': the prompt has 266 tokens"):
        evaluate_chats(request_)
    assert answered == []
    assert job.NEW_TOKENS == 1024
    with pytest.raises(ActExportError, match=r"question 81 is too long: .* give --max-new-tokens \d+ or less"):
        evaluate_chats(replace(request_, max_new_tokens=job.NEW_TOKENS))


def test_torch_and_onnx_are_not_needed(request_):
    """A tokenizer is transformers'; the models run in ONNX Runtime."""
    packages = installed_with("cpu", "export") - {"torch", "onnx", "onnxscript", "onnx_ir", "optimum", "accelerate"}
    program = """
from pathlib import Path
from act_export.verify.evaluate.chat.job import ChatRequest, evaluate_chats
report = evaluate_chats(ChatRequest(Path(sys.argv[1]), Path(sys.argv[2]), max_new_tokens=5, tokenizer=sys.argv[3]))
print([len(answer.turns) for answer in report.answers["weak"]])
"""
    arguments = [str(each) for each in (request_.file, request_.questions, request_.tokenizer)]
    ran = run_bare(program, packages, *arguments)
    assert ran.stdout.splitlines()[-1:] == ["[2, 1, 3]"], ran.stderr
