from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation import evaluate
from rich.console import Console
from tiny import tiny_checkpoint, tiny_tokenizer

from act_export.commands.evaluate_table import print_evaluation_report, report_json
from act_export.errors import ActExportError
from act_export.export import build_model
from act_export.runtime import Session, generate
from act_export.tasks import Questions, TaskError, prompt_digest, read_examples, split_examples
from act_export.tasks.language_model import SessionLanguageModel
from act_export.tasks.measures import measure
from act_export.tasks.metrics import token_f1
from act_export.tasks.statistics import mean_interval
from act_export.verify.evaluate.answers import AnswerEvaluation, Evaluation, compare, shares
from act_export.verify.evaluate.job import evaluate_files
from act_export.verify.evaluate.request import EvaluationRequest
from act_export.verify.evaluate.results import EvaluationReport, TaskResult, average_over

TOKENIZER = tiny_tokenizer()


def write_rows(path: Path, rows: list[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def choosing(folder) -> Path:
    rows = [
        {"prompt": f"Row {i}: {'good' if i % 2 else 'bad'}. It is", "choices": [" no", " yes"], "answer": i % 2}
        for i in range(48)
    ]
    return write_rows(folder / "choosing.jsonl", [{**row, "content_free": "Row: N/A. It is"} for row in rows])


@pytest.fixture(scope="module")
def without_control(folder) -> Path:
    rows = [{"prompt": f"{i} and {i}?", "choices": [" a", " bb", " ccc"], "answer": i % 3} for i in range(30)]
    return write_rows(folder / "three.jsonl", rows)


@pytest.fixture(scope="module")
def writing(folder) -> Path:
    rows = [{"prompt": f"Question {i}?", "answers": [f"é {i}", "a b"]} for i in range(30)]
    return write_rows(folder / "writing.jsonl", rows)


@pytest.fixture(scope="module")
def files(tiny_file, tiny_plain_file, checkpoint_folder) -> dict[str, Any]:
    return {"file": tiny_file, "against": tiny_plain_file, "tokenizer": str(checkpoint_folder)}


@pytest.fixture(scope="module")
def report(files, choosing, without_control, writing) -> EvaluationReport:
    return evaluate_files(EvaluationRequest(**files, questions=Questions(data=(choosing, without_control, writing))))


def test_tasks_come_in_the_order_of_the_request_each_on_its_report_split(
    report, choosing, without_control, writing
) -> None:
    assert [result.name for result in report.tasks] == ["choosing.jsonl", "three.jsonl", "writing.jsonl"]
    for result, path in zip(report.tasks, (choosing, without_control, writing), strict=True):
        splits = split_examples(read_examples(path).examples)
        assert result.questions == tuple(prompt_digest(example.question) for example in splits.report)


@pytest.mark.parametrize("native", [True, False], ids=["native", "portable"])
def test_choices_are_those_of_each_file_alone(report, files, choosing, native) -> None:
    examples = split_examples(read_examples(choosing).examples).report
    for name, found in (("file", report.tasks[0].calibrated), ("against", report.tasks[0].plain)):
        with Session.open(files[name], native=native) as session:
            alone = evaluate(SessionLanguageModel(session), TOKENIZER, examples)
        assert found.predictions == alone.predictions
        for mine, theirs in zip(found.log_likelihoods, alone.log_likelihoods, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4, rel=1e-5)
    assert report.tasks[0].calibrated != report.tasks[0].plain


def test_the_control_takes_the_plain_models_prior_off(report, files, choosing) -> None:
    (example, *_) = read_examples(choosing).examples
    prompt = type(example)(example.content_free, example.choices, 0)
    with Session.open(files["against"]) as session:
        (prior,) = evaluate(SessionLanguageModel(session), TOKENIZER, [prompt]).log_likelihoods
    result = report.tasks[0]
    control = result.controls["label_prior"]
    for row, plain in zip(control.log_likelihoods, result.plain.log_likelihoods, strict=True):
        assert row == pytest.approx([score - off for score, off in zip(plain, prior, strict=True)], abs=1e-4, rel=1e-5)
    assert result.beyond_controls["label_prior"] == compare(control, result.calibrated)
    assert [list(one.controls) for one in report.tasks] == [["label_prior", "choice_bias"], ["choice_bias"], []]


def test_the_other_control_takes_off_what_the_plain_model_says_of_other_questions(report) -> None:
    for result in report.tasks[:2]:
        shares = [np.exp(row) / np.exp(row).sum() for row in result.plain.log_likelihoods]
        said = []
        for index, row in enumerate(shares):
            others = np.log(shares[:index] + shares[index + 1 :]).mean(0)
            said.append(int((np.log(row) - others).argmax()))
        assert result.controls["choice_bias"].predictions == tuple(said)
        assert result.controls["choice_bias"].answers == result.plain.answers


def test_the_best_control_may_be_the_plain_model() -> None:
    right, half, wrong = (Evaluation(((0.0, 0.0),) * 2, said, (0, 0)) for said in ((0, 0), (1, 0), (1, 1)))
    for plain, control, best in ((wrong, half, "choice_bias"), (half, half, "plain"), (half, wrong, "plain")):
        result = TaskResult("a", ("q",) * 2, right, plain, {"label_prior": wrong, "choice_bias": control})
        assert result.best_control[0] == best
        assert result.beyond_best_control == compare(half, right)
    alone = TaskResult("a", ("q",) * 2, right, None, {"label_prior": half})
    assert (alone.best_control, alone.beyond_best_control, alone.beyond_controls) == (None, None, {})


def test_answers_are_generated_and_measured(report, files, writing) -> None:
    result = report.tasks[2]
    examples = split_examples(read_examples(writing).examples).report
    with Session.open(files["file"]) as session:
        prompts = [TOKENIZER(example.prompt).input_ids for example in examples]
        said = generate(session, prompts, max_new_tokens=50, stop_tokens={TOKENIZER.eos_token_id})
    texts = [TOKENIZER.decode(tokens, skip_special_tokens=True).split("\n")[0] for tokens in said]
    assert list(result.calibrated.texts) == texts
    assert result.calibrated.references == tuple(example.references for example in examples)
    assert list(result.calibrated.f1) == [token_f1(t, e.references) for t, e in zip(texts, examples, strict=True)]
    assert result.calibrated.main_metric == "f1"
    assert set(result.comparisons) == {"exact_match", "f1"}
    assert result.comparisons["f1"].p is None


def of(values: list[float]) -> AnswerEvaluation:
    nothing = ("",) * len(values)
    return AnswerEvaluation(
        nothing, (("a",),) * len(values), tuple(map(float, map(round, values))), tuple(values), "f1"
    )


def test_the_average_weighs_tasks_alike_and_pairs_their_questions() -> None:
    plain, calibrated = [0.5, 0.25, 0.0, 1.0], [0.75, 0.25, 0.5, 1.0]
    right, half, wrong = (Evaluation(((0.0, 0.0),) * 2, said, (0, 0)) for said in ((0, 0), (1, 0), (1, 1)))
    average = average_over(
        [
            TaskResult("a", ("q",) * 4, of(calibrated), of(plain)),
            TaskResult("b", ("q",) * 2, right, wrong, {"label_prior": half}),
        ]
    )
    assert (average.plain, average.calibrated) == ((0.4375 + 0) / 2, (0.625 + 1) / 2)
    assert average.gain == average.calibrated - average.plain
    assert average.gain_interval == mean_interval([[0.25, 0.0, 0.5, 0.0], [1.0, 1.0]])
    assert average.best_control == (0.4375 + 0.5) / 2
    assert average.beyond_best_control == pytest.approx(average.calibrated - average.best_control)
    assert average.beyond_best_control_interval == mean_interval([[0.25, 0.0, 0.5, 0.0], [1.0, 0.0]])
    alone = average_over([TaskResult("b", ("q",) * 2, right)])
    assert (alone.calibrated, alone.plain, alone.gain, alone.gain_interval) == (1.0, None, None, None)


def test_gains_of_f1_are_paired() -> None:
    comparison = compare(of([0.5, 0.25, 0.0]), of([0.75, 0.25, 0.5]))
    assert comparison.gain == pytest.approx(0.25)
    assert comparison.interval == mean_interval([[0.25, 0.0, 0.5]])
    assert (comparison.gained, comparison.lost, comparison.p) == (2, 0, None)


def test_json_has_every_question_and_is_read_again(report) -> None:
    document = json.loads(report_json(report))
    assert (document["format"], document["version"]) == ("act-export evaluation", 2)
    assert document["request"]["split"] == "report"
    assert [task["name"] for task in document["tasks"]] == [result.name for result in report.tasks]
    for task, result in zip(document["tasks"], report.tasks, strict=True):
        assert task["questions"] == list(result.questions)
        for name in ("calibrated", "plain"):
            for metric, values in getattr(result, name).metrics.items():
                mean = task[name]["metrics"][metric]["mean"]
                low, high = task[name]["metrics"][metric]["interval"]
                assert mean == pytest.approx(sum(values) / len(values))
                assert low <= mean <= high
        assert set(task["comparison"]) == set(result.comparisons)
    assert document["tasks"][0]["calibrated"]["answers"] == list(report.tasks[0].calibrated.answers)
    for task, result in zip(document["tasks"][:2], report.tasks, strict=False):
        assert task["controls"].keys() == result.controls.keys()
        for name, control in task["controls"].items():
            assert control["metrics"].keys() == {"accuracy"}
            assert control["predictions"] == list(result.controls[name].predictions)
            assert control["beyond"]["gain"] == result.beyond_controls[name].gain
        assert task["best_control"] in ("plain", *result.controls)
        assert task["beyond_best_control"]["gain"] == result.beyond_best_control.gain
        for side in ("plain", "calibrated"):
            measures = measure(getattr(result, side).log_likelihoods, getattr(result, side).answers, same_choices=True)
            assert task[side]["measures"] == asdict(measures)
    assert document["tasks"][2]["plain"]["measures"] is None
    assert (document["tasks"][2]["controls"], document["tasks"][2]["best_control"]) == ({}, "plain")
    assert document["average"]["gain"] == report.average.gain


def printed(report: EvaluationReport) -> str:
    text = io.StringIO()
    print_evaluation_report(report, Console(file=text, width=60))
    return text.getvalue()


def test_the_table_has_every_metric_and_the_average(report) -> None:
    text = printed(report)
    lines = [line.split() for line in text.splitlines()]
    for result in report.tasks:
        place = next(number for number, line in enumerate(lines) if line[:1] == [result.name])
        assert lines[place + 1][:2] == [str(len(result.questions)), "questions"]
    for words in ("exact match", "F1", "average", "prior off", "bias off", "McNemar's"):
        assert words in text
    first = report.tasks[0]
    controls = [control.accuracy for control in first.controls.values()]
    for share in (first.plain.accuracy, first.calibrated.accuracy, *controls, report.average.calibrated):
        assert f"{share:.1%}" in text
    assert f"choosing.jsonl {100 * first.beyond_best_control.gain:+.1f}" in text
    assert f"on average {100 * report.average.beyond_best_control:+.1f}" in text
    rows = {line[0]: line for line in lines if line and line[0] in ("plain", "calibrated") and line[1] != "calibrated"}
    for side, found in (("plain", report.tasks[1].plain), ("calibrated", report.tasks[1].calibrated)):
        measures = found.measures
        assert rows[side][1:6] == [
            f"{found.accuracy:.1%}",
            f"{measures.balanced_accuracy:.1%}",
            f"{measures.auroc:.3f}",
            f"{measures.negative_log_likelihood:.3f}",
            f"{measures.expected_calibration_error:.3f}",
        ]
    assert "…" not in text  # numbers are never cut


def test_a_file_alone(files, choosing) -> None:
    found = evaluate_files(
        EvaluationRequest(files["file"], tokenizer=files["tokenizer"], questions=Questions(data=(choosing,)))
    )
    two = evaluate_files(
        EvaluationRequest(
            files["file"], files["against"], tokenizer=files["tokenizer"], questions=Questions(data=(choosing,))
        )
    )
    assert found.tasks == two.tasks  # it is compared with itself, plain
    assert found.average == two.average
    plain = evaluate_files(
        EvaluationRequest(files["against"], tokenizer=files["tokenizer"], questions=Questions(data=(choosing,)))
    )
    assert set(plain.tasks[0].controls) == {"label_prior", "choice_bias"}  # the file is the plain model
    assert plain.tasks[0].best_control is None
    for words in ("prior off", "the file", "AUROC"):
        assert words in printed(plain)
    assert "calibrated gains" not in printed(plain)


def test_first_tokens_are_those_of_generation(files, folder) -> None:
    """With so many letters among the choices, some answers are valid."""
    letters = [chr(code) for code in range(33, 127) if chr(code) not in "#"]
    rows = [{"prompt": f"{i} and {i}?", "choices": [f"{x}." for x in letters], "answer": i % 93} for i in range(30)]
    path = write_rows(folder / "letters.jsonl", [{**row, "content_free": "N/A?"} for row in rows])
    asked = Questions(data=(path,), scoring="first-token")
    (result,) = evaluate_files(EvaluationRequest(**files, questions=asked, split="all")).tasks
    assert set(result.controls) == {"label_prior", "choice_bias"}
    assert all(None not in control.predictions for control in result.controls.values())
    prompts = [TOKENIZER(row["prompt"]).input_ids for row in rows]
    for name, found in (("file", result.calibrated), ("against", result.plain)):
        with Session.open(files[name]) as session:
            said = [tokens[0] for tokens in generate(session, prompts, max_new_tokens=1)]
        firsts = [TOKENIZER(letter).input_ids[0] for letter in letters]
        assert found.predictions == tuple(firsts.index(token) if token in firsts else None for token in said)
        assert 0 < found.predictions.count(None) < 30
        mean, _ = shares(found)["valid_accuracy"]
        assert mean == sum(found.correct) / (30 - found.predictions.count(None))


@pytest.mark.parametrize("split", ["report", "all"])
def test_a_limit_draws_the_same_questions_whatever_the_rows_order(files, choosing, folder, split) -> None:
    rows = [json.loads(line) for line in choosing.read_text().splitlines()]
    turned = write_rows(folder / "turned.jsonl", rows[::-1])
    request = {"file": files["against"], "tokenizer": files["tokenizer"], "split": split, "limit": 5}
    first, second = (
        evaluate_files(EvaluationRequest(**request, questions=Questions(data=(path,)))).tasks[0]
        for path in (choosing, turned)
    )
    assert first.questions == second.questions
    assert len(first.questions) == 5
    assert first.plain is None


def test_batch_tokens_change_nothing_but_the_batches(report, files, choosing, writing) -> None:
    found = evaluate_files(EvaluationRequest(**files, questions=Questions(data=(choosing, writing)), batch_tokens=1))
    for mine, theirs in zip(found.tasks, (report.tasks[0], report.tasks[2]), strict=True):
        assert mine.calibrated.metrics == theirs.calibrated.metrics


def test_progress_begins_at_nothing_and_ends_with_all(files, choosing, writing) -> None:
    steps: list[tuple[str, float]] = []
    evaluate_files(
        EvaluationRequest(**files, questions=Questions(data=(choosing, writing))),
        progress=lambda step, done: steps.append((step, done)),
    )
    done = [part for _, part in steps]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == pytest.approx(1)
    assert list(dict.fromkeys(step for step, _ in steps)) == [
        "choosing.jsonl, calibrated",
        "writing.jsonl, calibrated",
        "choosing.jsonl, plain",
        "choosing.jsonl, label prior",
        "writing.jsonl, plain",
    ]


def test_scoring_of_data(files, without_control) -> None:
    request = {"file": files["file"], "tokenizer": files["tokenizer"]}
    sums, means = (
        evaluate_files(EvaluationRequest(**request, questions=Questions(data=(without_control,), scoring=scoring)))
        .tasks[0]
        .calibrated.log_likelihoods
        for scoring in ("likelihood", "likelihood-per-token")
    )
    for row, shorter in zip(sums, means, strict=True):
        assert shorter == pytest.approx([row[0] / 2, row[1] / 3, row[2] / 4], abs=1e-5)


def test_prompts_that_are_too_long(files, folder) -> None:
    rows = [{"prompt": "x" * 300 + f"{i}?", "choices": [" a", " b"], "answer": i % 2} for i in range(30)]
    path = write_rows(folder / "long.jsonl", rows)
    with pytest.raises(TaskError, match=r"line 1 of long\.jsonl"):
        evaluate_files(EvaluationRequest(**files, questions=Questions(data=(path,)), split="all"))
    found = evaluate_files(EvaluationRequest(**files, questions=Questions(data=(path,), truncate=True), limit=3))
    assert len(found.tasks[0].questions) == 3


def test_an_answer_needs_room(tiny_plain_file, checkpoint_folder, writing, tmp_path) -> None:
    small = tiny_checkpoint(max_position_embeddings=40)
    build_model(small, None, tmp_path / "small.onnx", source="tiny")
    request = EvaluationRequest(
        tmp_path / "small.onnx", questions=Questions(data=(writing,)), tokenizer=str(checkpoint_folder)
    )
    with pytest.raises(ActExportError, match=r"may have 50 tokens; the context of .*small.onnx holds 40"):
        evaluate_files(request)


def test_files_of_different_models_are_not_compared(files, choosing, tmp_path) -> None:
    build_model(tiny_checkpoint(seed=1), None, tmp_path / "other.onnx", source="tiny")
    request = EvaluationRequest(**{**files, "against": tmp_path / "other.onnx"}, questions=Questions(data=(choosing,)))
    with pytest.raises(ActExportError, match=r"other.onnx isn't the model of .* fingerprint of the weights is sha256"):
        evaluate_files(request)


def test_a_file_without_a_tokenizer(tiny_file, choosing) -> None:
    with pytest.raises(ActExportError, match=r"no tokenizer beside .*; name a folder .*: --tokenizer MODEL"):
        evaluate_files(EvaluationRequest(tiny_file, questions=Questions(data=(choosing,))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to evaluate on"),
        ({"questions": Questions(("sst2",)), "split": "test"}, "there is no split 'test'"),
        ({"questions": Questions(("sst2",)), "limit": 0}, "limit is 0; give 1 or more"),
        ({"questions": Questions(("sst2",)), "batch_tokens": -1}, "batch tokens is -1"),
    ],
)
def test_requests_that_make_no_sense(options, message) -> None:
    with pytest.raises(ActExportError, match=message):
        EvaluationRequest(Path("model.onnx"), **options)


def test_two_data_files_of_one_name(files, choosing, tmp_path) -> None:
    copy = tmp_path / choosing.name
    copy.write_text(choosing.read_text())
    with pytest.raises(TaskError, match=r"two of the tasks are called choosing.jsonl; rename a file"):
        evaluate_files(EvaluationRequest(**files, questions=Questions(data=(choosing, copy))))
