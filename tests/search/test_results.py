"""Every figure of a report, computed anew through the reference hook, one prompt at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import (
    CHOICES,
    GENERATION,
    PLANTED,
    planted_task,
    reference_scores,
    reference_texts,
    words_checkpoint,
    written_by,
)

from act_export.calibration.file import Calibration
from act_export.checkpoint.load import Checkpoint
from act_export.search import SearchOptions, SearchResult, SearchTask, search_heads
from act_export.search.answers import Answers
from act_export.search.controls import predicted_shares
from act_export.search.proposals import other_heads
from act_export.search.results import average_gain, gain_of
from act_export.tasks import EncodedExample, Example, Questions, encode_examples, prompt_digest
from act_export.tasks.metrics import token_f1
from act_export.tasks.scoring import predicted_choice

OPTIONS = SearchOptions(methods=("act",), random_draws=3, betas=(0.0,), head_counts=(1, 2, 4))
PUBLISHED = {
    "theirs": Calibration({0: (2,), 1: (0,)}, beta=0.4, threshold=0.2),
    "the same": replace(PLANTED, beta={0: (0.0,)}),
}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return words_checkpoint()


@pytest.fixture(scope="module")
def tasks(checkpoint: Checkpoint) -> list[SearchTask]:
    """Head 1 of layer 0 helps in two of them, and does harm in the third."""
    return [
        planted_task(checkpoint, PLANTED, name="first"),
        planted_task(checkpoint, None, name="second", seed=1, sizes=(30, 30, 40)),
        written_by(checkpoint, PLANTED, name="third"),
    ]


@pytest.fixture(scope="module")
def result(checkpoint: Checkpoint, tasks: list[SearchTask]) -> SearchResult:
    return search_heads(checkpoint, tasks, OPTIONS, published=PUBLISHED)


def log_shares(rows: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array([[value - math.log(sum(map(math.exp, row))) for value in row] for row in rows])


def credits_of(checkpoint: Checkpoint, task: SearchTask, calibration: Calibration | None) -> list[float]:
    """By question of the report split."""
    examples = encode_examples(checkpoint.tokenizer, task.splits.report)
    if task.generation is not None:
        texts = reference_texts(checkpoint, calibration, examples, GENERATION)
        return [token_f1(text, e.references) for text, e in zip(texts, task.splits.report, strict=True)]
    scores = reference_scores(checkpoint, calibration, examples)
    return [float(predicted_choice(row) == e.answer) for row, e in zip(scores, examples, strict=True)]


def accuracy(checkpoint: Checkpoint, task: SearchTask, calibration: Calibration | None) -> float:
    return round(float(np.mean(credits_of(checkpoint, task, calibration))), 4)


def test_accuracies_are_those_of_the_reference(
    checkpoint: Checkpoint, tasks: list[SearchTask], result: SearchResult
) -> None:
    assert result.joint is not None
    assert result.joint.heads == PLANTED.heads
    for task in tasks:
        report, own = result.reports[task.name], result.calibrations[task.name]
        assert report.plain_accuracy == accuracy(checkpoint, task, None)
        assert (report.own is None) == (not own.heads)
        if report.own is not None:
            assert report.own.accuracy == accuracy(checkpoint, task, own)
            random = [other_heads(own, checkpoint.identity, seed=seed) for seed in range(3)]
            assert report.random_heads == tuple(accuracy(checkpoint, task, other) for other in random)
        assert report.joint.accuracy == accuracy(checkpoint, task, result.joint)
        assert report.published == {name: accuracy(checkpoint, task, one) for name, one in PUBLISHED.items()}


def test_each_task_has_its_own_set_and_what_the_joint_set_costs_it(result: SearchResult) -> None:
    assert {name: found.heads for name, found in result.calibrations.items()} == {
        "first": {0: (1,)},
        "second": {},
        "third": {0: (1,)},
    }
    joint = {name: report.joint.gain for name, report in result.reports.items()}
    assert joint["first"] > 0
    assert joint["third"] > 0.5
    assert joint["second"] < 0
    assert result.reports["second"].joint.interval[1] <= 0.1


def test_averages_are_over_all_tasks(result: SearchResult) -> None:
    """A task without a set of its own gains nothing."""
    own = {name: report.own.gain if report.own else 0 for name, report in result.reports.items()}
    assert result.average.gain == pytest.approx(sum(own.values()) / 3, abs=1e-4)
    assert result.joint_average.gain == pytest.approx(
        sum(report.joint.gain for report in result.reports.values()) / 3, abs=1e-4
    )
    assert result.joint_average.gain < result.average.gain
    for average in (result.average, result.joint_average):
        assert average.interval[0] < average.gain < average.interval[1]
        assert average.p is None


def test_a_joint_calibration_says_what_it_gains_on_each_task(tasks: list[SearchTask], result: SearchResult) -> None:
    origin = result.joint.provenance
    assert origin.tasks == ("first", "second", "third")
    assert origin.samples == {"rank": 90, "choose": 110, "report": 120}
    plain = [report.plain_accuracy for report in result.reports.values()]
    assert origin.plain_accuracy == pytest.approx(sum(plain) / 3, abs=1e-4)
    assert origin.calibrated_accuracy == pytest.approx(origin.plain_accuracy + result.joint_average.gain, abs=2e-4)
    assert origin.notes["average_gain"] == {
        "gain": result.joint_average.gain,
        "interval_95": list(result.joint_average.interval),
    }
    assert origin.notes["gains"] == {
        name: [report.joint.gain, *report.joint.interval] for name, report in result.reports.items()
    }
    used = {prompt_digest(e.question) for task in tasks for e in (*task.splits.rank, *task.splits.choose)}
    assert origin.notes["used"] == sorted(used)
    assert Calibration.from_json(result.joint.to_json()).to_json() == result.joint.to_json()


def test_without_a_joint_set(checkpoint: Checkpoint, tasks: list[SearchTask], result: SearchResult) -> None:
    alone = search_heads(checkpoint, tasks, OPTIONS, published=PUBLISHED, joint=False)
    assert (alone.joint, alone.joint_average) == (None, None)
    assert alone.average == result.average
    assert alone.calibrations == result.calibrations
    assert all(report.joint is None for report in alone.reports.values())


def test_a_joint_set_that_helps_nothing_on_average_is_not_taken(checkpoint: Checkpoint) -> None:
    tasks = [planted_task(checkpoint, planted, name=str(planted)[:30]) for planted in (PLANTED, None)]
    result = search_heads(checkpoint, tasks, OPTIONS)
    assert result.joint.heads == {}
    assert result.joint.provenance.notes["result"].startswith("no head is calibrated")
    assert result.joint_average.gain == 0
    assert result.average.gain > 0


def test_the_label_prior_is_that_of_the_content_free_prompt(
    checkpoint: Checkpoint, tasks: list[SearchTask], result: SearchResult
) -> None:
    report = encode_examples(checkpoint.tokenizer, tasks[0].splits.report)
    (prior,) = reference_scores(
        checkpoint, None, encode_examples(checkpoint.tokenizer, [Example("w3 w3 w3", CHOICES, 0)])
    )
    rows = np.array(reference_scores(checkpoint, None, report)) - np.array(prior)
    right = [int(row.argmax()) == e.answer for row, e in zip(rows, report, strict=True)]
    first = result.reports["first"]
    assert first.controls["label prior"] == pytest.approx(np.mean(right), abs=1e-4)
    assert first.controls["label prior"] != first.controls["plain"] == first.plain_accuracy
    assert "label prior" not in result.reports["third"].controls


def test_there_is_no_label_prior_where_a_question_has_no_content_free_form(checkpoint: Checkpoint) -> None:
    task = planted_task(checkpoint, PLANTED, content_free="")
    result = search_heads(checkpoint, [task], OPTIONS)
    assert "label prior" not in result.reports["planted"].controls
    assert "label prior" not in result.calibrations["planted"].provenance.notes["controls"]["plain"]


def test_the_choice_bias_is_that_of_the_choose_split(
    checkpoint: Checkpoint, tasks: list[SearchTask], result: SearchResult
) -> None:
    report, choose = (
        encode_examples(checkpoint.tokenizer, part) for part in (tasks[0].splits.report, tasks[0].splits.choose)
    )

    def unbiased(calibration: Calibration | None) -> float:
        bias = log_shares(reference_scores(checkpoint, calibration, choose)).mean(0)
        rows = log_shares(reference_scores(checkpoint, calibration, report)) - bias
        return float(np.mean([int(row.argmax()) == e.answer for row, e in zip(rows, report, strict=True)]))

    first = result.reports["first"]
    assert first.choice_bias == pytest.approx((unbiased(None), unbiased(PLANTED)), abs=1e-4)
    assert first.controls["choice bias"] == first.choice_bias[0]


def test_what_a_set_gains_beyond_the_best_remedy(
    checkpoint: Checkpoint, tasks: list[SearchTask], result: SearchResult
) -> None:
    """Offsets are the best that a grid finds for the ranking and choosing questions; the rest is arithmetic."""
    splits = tasks[0].splits
    rank, report = (
        encode_examples(checkpoint.tokenizer, part) for part in ((*splits.rank, *splits.choose), splits.report)
    )
    rows = log_shares(reference_scores(checkpoint, None, rank))
    right = np.array([e.answer for e in rank])

    def loss(lean: float) -> float:
        shifted = log_shares((rows + np.array([lean / 2, -lean / 2])).tolist())
        return float(-shifted[np.arange(len(right)), right].sum() + 0.05 * lean**2 / 2)

    lean = min(np.linspace(-10, 10, 4001), key=loss)
    shifted = np.array(reference_scores(checkpoint, None, report)) + np.array([lean / 2, -lean / 2])
    accuracy = np.mean([int(row.argmax()) == e.answer for row, e in zip(shifted, report, strict=True)])
    first = result.reports["first"]
    assert first.controls["offsets"] == pytest.approx(accuracy, abs=0.011)  # a question may lie on the edge
    assert first.controls[first.control] == max(first.controls.values())
    assert first.beyond.gain == pytest.approx(first.own.accuracy - first.controls[first.control], abs=1e-4)
    assert first.beyond.interval[0] <= first.beyond.gain <= first.beyond.interval[1]
    assert result.average_beyond.gain <= result.average.gain
    noted = result.calibrations["first"].provenance.notes
    assert noted["gain_beyond_control"]["gain"] == first.beyond.gain
    assert noted["measures"]["calibrated"]["auroc"] == first.measures[1].auroc >= first.measures[0].auroc


def test_the_best_remedy_on_both_models(checkpoint: Checkpoint) -> None:
    """The plain model leans, so the best remedy is more than none: an offset, or less its mean."""
    tasks = [
        planted_task(checkpoint, PLANTED, name=name, content_free="", seed=seed)
        for seed, name in enumerate(("first", "second"))
    ]
    output = checkpoint.model.get_output_embeddings()
    output.bias = torch.nn.Parameter(torch.eye(output.out_features)[97] * 2)
    try:
        result = search_heads(checkpoint, tasks, replace(OPTIONS, random_draws=0, goal="beyond-remedy"))
        report, choose, rank = (
            encode_examples(checkpoint.tokenizer, getattr(tasks[0].splits, name))
            for name in ("report", "choose", "rank")
        )
        first = result.reports["first"]
        assert first.control in ("choice bias", "offsets")

        def accuracy_of(calibration: Calibration) -> float:
            rows = log_shares(reference_scores(checkpoint, calibration, report))
            seen = log_shares(reference_scores(checkpoint, calibration, [*choose, *rank]))
            if first.control == "offsets":
                labels = np.array([e.answer for e in (*choose, *rank)])
                leans = np.linspace(-10, 10, 4001)
                sides = np.where(labels == 0, 1, -1)[:, None]
                odds = (seen[:, :1] - seen[:, 1:]) + leans
                lean = leans[(np.logaddexp(0, -sides * odds).sum(0) + 0.05 * leans**2 / 2).argmin()]
                rows = rows + np.array([lean / 2, -lean / 2])
            else:
                rows = rows - seen[: len(choose)].mean(0)
            return float(np.mean([int(row.argmax()) == e.answer for row, e in zip(rows, report, strict=True)]))

        for gain, found in ((first.with_remedy, result.calibrations["first"]), (first.joint_with_remedy, result.joint)):
            assert gain.accuracy == pytest.approx(accuracy_of(found), abs=0.011)  # a question may lie on the edge
            assert gain.gain == pytest.approx(gain.accuracy - first.controls[first.control], abs=1e-4)
        average = np.mean([report.with_remedy.gain if report.with_remedy else 0 for report in result.reports.values()])
        assert result.average_with_remedy.gain == pytest.approx(average, abs=1e-4)
        noted = result.joint.provenance.notes["average_gain_with_remedies_on_both"]
        assert noted["gain"] == result.joint_with_remedy.gain
    finally:
        output.bias = None


@pytest.mark.parametrize("goal", ["accuracy", "beyond-remedy"])
def test_questions_with_fewer_choices(checkpoint: Checkpoint, goal: str) -> None:
    """As letters: every third question lacks the last one. A lean is told and taken off all the same."""
    task = planted_task(checkpoint, PLANTED, choices=(" w97", " w98", " w5"))

    def shortened(examples: Sequence[Example]) -> tuple[Example, ...]:
        few = (index % 3 == 0 and e.answer < 2 for index, e in enumerate(examples))
        return tuple(replace(e, choices=e.choices[:2]) if short else e for short, e in zip(few, examples, strict=True))

    splits = {name: shortened(getattr(task.splits, name)) for name in ("rank", "choose", "report")}
    ragged = replace(task, splits=replace(task.splits, **splits))
    assert len({len(e.choices) for e in ragged.splits.report}) == 2
    result = search_heads(checkpoint, [ragged], replace(OPTIONS, methods=("act", "fit"), goal=goal))
    report = result.reports["planted"]
    assert {"choice bias", "offsets"} <= set(report.controls)
    assert report.measures[0].auroc is None
    assert report.own.accuracy > report.plain_accuracy
    assert report.with_remedy.accuracy > report.controls[report.control]
    assert next(iter(report.choose_accuracy)) == "plain"
    worth = result.calibrations["planted"].provenance.notes.get("choose_log_likelihood_with_remedy")
    assert (worth is not None) == (goal == "beyond-remedy")
    assert worth is None or max(worth.values()) > worth["plain"]


def test_first_tokens_that_are_no_answer_are_counted(checkpoint: Checkpoint) -> None:
    """A remedy that allows the choices alone makes every answer valid."""
    task = planted_task(checkpoint, PLANTED)
    splits = {
        name: tuple(replace(e, first_token=True) for e in getattr(task.splits, name))
        for name in ("rank", "choose", "report")
    }
    task = replace(task, splits=replace(task.splits, **splits), questions=Questions(scoring="first-token"))
    report = search_heads(checkpoint, [task], replace(OPTIONS, head_counts=(1,), random_draws=0)).reports["planted"]
    plain = report.invalid[0]
    rows = reference_scores(checkpoint, None, encode_examples(checkpoint.tokenizer, task.splits.report))
    invalid = np.mean([int(np.argmax(row)) == len(CHOICES) for row in rows])
    assert plain.share == pytest.approx(invalid, abs=1e-4)
    assert plain.share > 0.5
    assert report.plain_accuracy == pytest.approx((1 - plain.share) * (plain.accuracy or 0), abs=1e-3)
    assert report.controls["choices only"] > report.plain_accuracy


def test_there_is_no_choice_bias_where_choices_differ(checkpoint: Checkpoint) -> None:
    task = planted_task(checkpoint, PLANTED)
    others = tuple(
        replace(e, choices=e.choices[::-1], answer=1 - e.answer) if index % 2 else e
        for index, e in enumerate(task.splits.report)
    )
    turned = replace(task, splits=replace(task.splits, report=others))
    report = search_heads(checkpoint, [turned], OPTIONS).reports["planted"]
    assert report.choice_bias is None
    assert set(report.controls) == {"plain", "label prior"}
    assert report.measures[0].auroc is None
    assert report.own.accuracy == 1


def test_shares_of_what_is_answered(checkpoint: Checkpoint, tasks: list[SearchTask], result: SearchResult) -> None:
    examples: list[EncodedExample] = encode_examples(checkpoint.tokenizer, tasks[0].splits.report)
    for calibration, shares in zip((None, PLANTED), result.reports["first"].predicted_shares, strict=True):
        said = [predicted_choice(row) for row in reference_scores(checkpoint, calibration, examples)]
        assert shares == pytest.approx((said.count(0) / len(said), said.count(1) / len(said)))


def test_a_choice_that_is_never_given_has_a_share_too() -> None:
    rows = ((0.0, -1.0, -2.0), (0.0, -1.0))
    answers = Answers(rows, (1.0, 1.0), 0.0)
    assert predicted_shares(answers, answers) == ((1.0, 0.0, 0.0), (1.0, 0.0, 0.0))


def test_gains() -> None:
    plain, calibrated = (Answers(((),) * 8, tuple(map(float, credits)), 0.0) for credits in ("10000000", "01111000"))
    gain = gain_of(plain, calibrated)
    assert (gain.accuracy, gain.gain, gain.p) == (0.5, 0.375, 0.38)  # 4 gained, 1 lost: 2 * 6 / 32
    assert gain.interval[0] < 0 < gain.gain < gain.interval[1]
    halves = Answers(((),) * 8, (0.5,) * 8, 0.0)
    gain = gain_of(halves, replace(halves, credits=(0.75,) * 8))
    assert (gain.accuracy, gain.gain, gain.interval, gain.p) == (0.75, 0.25, (0.25, 0.25), None)
    average = average_gain({"a": plain, "b": halves}, {"a": calibrated, "b": halves})
    assert (average.accuracy, average.gain) == (0.5, 0.1875)
    assert average.interval[0] < 0.1875 < average.interval[1]
