"""Whether calibration is worth it: what several searches on different questions come to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import CHOICES, PLANTED, Words, planted_task, reference_scores, words_checkpoint

from act_export.calibration.file import Calibration
from act_export.errors import ActExportError
from act_export.search import SearchOptions, SearchTask
from act_export.search.answers import Answers
from act_export.search.elsewhere import cost_in_answers, cost_in_text, pieces_of
from act_export.search.results import Gain, SearchResult
from act_export.search.trial import Trial, elsewhere, run_trial, summarize
from act_export.search.trial_data import TrialData, trial_data
from act_export.tasks import Example, Questions, Splits, TaskError, encode_examples
from act_export.tasks.scoring import predicted_choice
from act_export.tasks.splits import split_folds
from act_export.tasks.statistics import detectable_gain, gain_interval


def examples(count: int, *, choices: int = 2) -> list[Example]:
    return [
        Example(f"question {number}", tuple("abcdef"[:choices]), number * number % choices) for number in range(count)
    ]


@given(count=st.integers(24, 900), searches=st.integers(2, 6), choices=st.integers(2, 4), seed=st.integers(0, 9))
@settings(max_examples=30)
def test_folds_report_on_different_questions_and_never_on_their_own(
    count: int, searches: int, choices: int, seed: int
) -> None:
    folds = split_folds(examples(count, choices=choices), searches, seed=seed)
    assert len(folds) == searches
    reported = [e.prompt for fold in folds for e in fold.report]
    assert len(set(reported)) == len(reported) == searches * min(240, count // searches)
    for fold in folds:
        own = [e.prompt for split in (fold.rank, fold.choose, fold.report) for e in split]
        assert len(set(own)) == len(own)
        assert (len(fold.rank), len(fold.choose)) == (
            min(96, (count - len(fold.report)) * 96 // 224),
            min(128, count - len(fold.report) - len(fold.rank)),
        )


def test_too_few_questions_are_counted() -> None:
    with pytest.raises(TaskError, match="there are 23 different prompts; 24 are needed, and 464"):
        split_folds(examples(23), 3)


def test_what_rows_can_show_is_half_the_interval_where_a_quarter_changes() -> None:
    """Against the bootstrap, with as many gained as lost."""
    before = np.tile([True, False, True, True, False, False, True, True], 40)
    after = np.tile([False, True, True, True, False, False, True, True], 40)
    low, high = gain_interval(before, after)
    assert detectable_gain(320) == pytest.approx((high - low) / 2, abs=0.005)
    assert detectable_gain(32) == pytest.approx(0.173, abs=0.001)


def gain(low: float, high: float) -> Gain:
    return Gain(0.5, (low + high) / 2, (low, high), None)


HELPS, HURTS, UNCLEAR = gain(0.02, 0.1), gain(-0.1, -0.02), gain(-0.02, 0.1)


@pytest.mark.parametrize(
    ("calibrated", "remedies", "beyond", "found", "verdict"),
    [
        (HELPS, {}, HELPS, 3, "calibrate"),
        (HELPS, {"offsets": HELPS}, HELPS, 3, "calibrate"),
        (HELPS, {"offsets": HELPS}, UNCLEAR, 3, "remedy"),
        (UNCLEAR, {"offsets": HELPS}, UNCLEAR, 1, "remedy"),
        (HELPS, {"offsets": UNCLEAR}, UNCLEAR, 3, "either"),
        (UNCLEAR, {}, UNCLEAR, 2, "undecided"),
        (HURTS, {"offsets": UNCLEAR}, HURTS, 2, "plain"),
        (gain(0, 0), {}, gain(0, 0), 0, "plain"),
    ],
)
def test_verdicts(calibrated: Gain, remedies: dict[str, Gain], beyond: Gain, found: int, verdict: str) -> None:
    best = next(iter(remedies), "plain")
    assert Trial(0.5, False, remedies, best, calibrated, beyond, {}, found, None).verdict == verdict


def result(plain: str, own: str | None, offsets: str, *, p: float = 0.01) -> SearchResult:
    """Answers as words of R (right) and W (wrong)."""

    def answers(word: str) -> Answers:
        scores = tuple((0.0, -1.0) if sign == "R" else (-1.0, 0.0) for sign in word)
        return Answers(scores, tuple(float(sign == "R") for sign in word), 0.0)

    of = {"plain": answers(plain), "control plain": answers(plain), "control offsets": answers(offsets)}
    found = Calibration({0: (1,)}, beta=round(p, 3)) if own is not None else Calibration({})
    if own is not None:
        of["own"] = answers(own)
    reports = {"mine": type("Report", (), {"p": p})()}
    return SearchResult({"mine": found}, None, reports, answers={"mine": of})  # type: ignore[arg-type]


def data_of(sizes: Sequence[int], chance: float = 0.5) -> TrialData:
    tasks = [
        SearchTask("mine", Splits((), (), tuple(Example(f"{n} {i}", ("a", "b"), 0) for i in range(size))))
        for n, size in enumerate(sizes)
    ]
    return TrialData("mine", sum(sizes), tuple(tasks), chance)


def test_searches_are_taken_together_and_nothing_found_is_the_plain_model() -> None:
    first, second = result("RRWW", "RRRW", "RRRR", p=0.03), result("RW", None, "WW")
    third = result("WWWW", "RRRR", "WWWW", p=0.01)
    trial = summarize(data_of([4, 2, 4]), [first, second, third])
    assert (trial.plain, trial.found) == (0.3, 2)
    assert (trial.calibrated.accuracy, trial.calibrated.gain) == (0.8, 0.5)
    assert (trial.remedy, trial.remedies["offsets"].accuracy) == ("offsets", 0.4)
    assert trial.beyond.gain == 0.4
    assert trial.calibration is not None
    assert trial.calibration.beta == 0.01  # of the search that is surest
    assert trial.at_chance
    assert not summarize(data_of([4, 2, 4], chance=0.05), [first, second, third]).at_chance
    a, b = trial.offsets.values()
    assert (a < b) is False  # all right answers are the first choice
    assert a == -b


@pytest.mark.parametrize(
    ("remedied", "leans"),
    [("W" * 16 + "R" * 24, False), ("R" * 36 + "W" * 4, True)],
    ids=["the other answer each time", "nearly all right"],
)
def test_only_what_is_above_chance_shows_that_a_model_leans(remedied: str, leans: bool) -> None:
    """Of 40 questions, 24 have the answer that the plain model never gives."""
    trial = summarize(data_of([40], chance=0.6), [result("R" * 16 + "W" * 24, None, remedied)])
    assert trial.at_chance
    assert trial.leans == leans


def test_planted_heads_on_questions_that_no_search_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("act_export.search.job.cache_folder", lambda: tmp_path)
    checkpoint = words_checkpoint()
    task = planted_task(checkpoint, PLANTED, seed=3, sizes=(80, 80, 80))
    questions = [*task.splits.rank, *task.splits.choose, *task.splits.report]
    folds = split_folds(questions, 2)
    data = TrialData("planted", len(questions), tuple(replace(task, splits=fold) for fold in folds), 0.5)
    shown: list[tuple[str, float]] = []
    options = SearchOptions(methods=("act",), betas=(0.0,), head_counts=(1, 2))
    trial = run_trial(checkpoint, data, options, progress=lambda step, done: shown.append((step, done)))

    reported = [example for fold in folds for example in fold.report]
    scores = reference_scores(checkpoint, None, encode_examples(checkpoint.tokenizer, reported))
    right = [predicted_choice(row[: len(CHOICES)]) == e.answer for row, e in zip(scores, reported, strict=True)]
    assert trial.plain == pytest.approx(np.mean(right), abs=1e-4)
    assert (trial.calibrated.accuracy, trial.found) == (1, 2)
    assert trial.verdict == "calibrate"
    assert trial.calibration is not None
    assert trial.calibration.heads == PLANTED.heads
    assert [done for _, done in shown] == sorted(done for _, done in shown)
    assert {step.split(":")[0] for step, _ in shown} == {"1 of 2", "2 of 2"}

    plain, (same, lost) = cost_in_answers(checkpoint, "planted", reported, [Calibration({}), PLANTED])
    assert plain.accuracy == pytest.approx(np.mean(right))
    assert (same.gain, lost.accuracy) == (0, 1)


def test_one_source_is_tried(tmp_path: Path) -> None:
    with pytest.raises(ActExportError, match="0 sets of questions are named; name one, with --data"):
        trial_data(Questions())
    with pytest.raises(ActExportError, match="2 sets of questions"):
        trial_data(Questions(("sst2", "rte")))
    rows = tmp_path / "mine.jsonl"
    rows.write_text(
        "".join(f'{{"prompt": "p{n}", "choices": ["a", "b"], "answer": {int(n > 9)}}}\n' for n in range(40))
    )
    with pytest.raises(ActExportError, match="--searches is 1; it must be at least 2"):
        trial_data(Questions(data=(rows,)), searches=1)
    data = trial_data(Questions(data=(rows,)), searches=2)
    assert (data.name, data.different, data.reported, data.recommended) == ("mine.jsonl", 40, 40, 464)
    assert data.chance == 0.75


def test_a_text_costs_what_its_tokens_lose() -> None:
    """Against the reference, one token after the other."""
    checkpoint = words_checkpoint()
    pieces = [[5, 17, 40, 5, 5, 23, 61, 5, 8], [9, 9, 31, 4, 70, 12, 9, 33]]
    calibration = replace(PLANTED, threshold=0.05)
    cost = cost_in_text(checkpoint, pieces, [Calibration({}), calibration])
    for used, perplexity in ((None, cost.plain), (None, cost.calibrated[0]), (calibration, cost.calibrated[1])):
        means = []
        for piece in pieces:
            asked = Example(f"w{piece[0]}", ("".join(f" w{token}" for token in piece[1:]), " w3"), 0)
            (row,) = reference_scores(checkpoint, used, encode_examples(checkpoint.tokenizer, [asked]))
            means.append(row[0] / (len(piece) - 1))
        assert perplexity == pytest.approx(np.exp(-np.mean(means)), rel=1e-5)
    assert cost.intervals[0] == (0, 0)
    assert cost.plain != pytest.approx(cost.calibrated[1], rel=1e-4)


def test_pieces_are_spread_over_the_text() -> None:
    words = " ".join(f"w{number}" for number in range(256 * 5 + 9))
    pieces = pieces_of(words_checkpoint(), words, 2)
    assert [(piece[0], len(piece)) for piece in pieces] == [(0, 256), (512, 256)]
    assert pieces_of(words_checkpoint(), "w1 w2", 2) == []


class BegunWords(Words):
    all_special_ids = (63,)

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        ids = super().__call__(text).input_ids
        return SimpleNamespace(input_ids=[63, *ids] if add_special_tokens else ids)


def test_every_piece_begins_as_the_tokenizer_begins_a_sequence() -> None:
    words = " ".join(f"w{number % 60}" for number in range(255 * 3))
    pieces = pieces_of(replace(words_checkpoint(), tokenizer=BegunWords()), words, 3)
    assert [(piece[0], len(piece)) for piece in pieces] == [(63, 256)] * 3
    assert [token for piece in pieces for token in piece[1:]] == [number % 60 for number in range(255 * 3)]


def test_costs_elsewhere_name_what_could_not_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = words_checkpoint()
    mine = planted_task(checkpoint, PLANTED, seed=3, sizes=(1, 1, 24)).splits.report

    def questions(name: str, count: int, used: frozenset[str]) -> list[Example]:
        if name == "obqa":
            raise TaskError("there are no rows")
        return list(mine[:count])

    monkeypatch.setattr("act_export.search.trial.questions_elsewhere", questions)
    monkeypatch.setattr("act_export.search.trial.pieces_of", lambda *_: [[5, 17, 40, 5, 5, 23]])
    steps: list[tuple[str, float]] = []
    cost = elsewhere(checkpoint, PLANTED, without="sst2", progress=lambda *step: steps.append(step))
    assert set(cost.tasks) == {"rte", "csqa", "arc_easy"}
    assert {gain.accuracy for gain in cost.tasks.values()} == {1}
    assert cost.text is not None
    assert cost.missing == ("obqa isn't measured: there are no rows",)
    assert [step for step, _ in steps][-1] == "elsewhere: a text"

    def none(*_: object) -> list[list[int]]:
        raise TaskError("there is no text")

    monkeypatch.setattr("act_export.search.trial.pieces_of", none)
    again = elsewhere(checkpoint, Calibration({}), without="rte")
    assert (again.text, again.missing[-1]) == (None, "perplexity isn't measured: there is no text")
    assert again.lost == ()


def test_chance_is_the_most_frequent_answer_or_guessing(tmp_path: Path) -> None:
    for name, choices, chance in (("same", ["a", "b"], 0.75), ("own", None, 0.5)):
        rows = [{"prompt": f"p{n}", "choices": choices or [f"a{n}", "b"], "answer": int(n > 9)} for n in range(40)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        assert trial_data(Questions(data=(path,))).chance == chance
    path = tmp_path / "written.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"p{n}", "answers": [f"a{n}"]}) for n in range(40)))
    assert trial_data(Questions(data=(path,))).chance is None
