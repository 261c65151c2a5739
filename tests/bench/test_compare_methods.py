"""The rivals in a comparison do what their authors say, on the rows that the search has."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
from compare_methods import Bench, compare
from planted import reference_scores, save_planted

from act_export.calibration.file import Calibration
from act_export.checkpoint.load import Checkpoint, load_checkpoint
from act_export.search import SearchOptions
from act_export.search.answers import CHOOSE, RANK, REPORT
from act_export.search.job import SearchJob
from act_export.tasks import EncodedExample, Questions
from act_export.tasks.scoring import predicted_choice

SIZES = {RANK: 24, CHOOSE: 20, REPORT: 20}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def checkpoint(planted: tuple[Path, Path]) -> Checkpoint:
    return load_checkpoint(str(planted[0]))


@pytest.fixture(scope="module")
def task(planted: tuple[Path, Path]) -> str:
    """The planted questions as a task file."""
    rows = [json.loads(line) for line in planted[1].read_text().splitlines()]
    path = planted[1].parent / "mood.json"
    fields = path.with_suffix(".jsonl")
    fields.write_text("".join(json.dumps({"text": r["prompt"], "label": r["answer"]}) + "\n" for r in rows))
    shape = {"name": "mood", "path": fields.name, "template": "{text}", "answer": "label"}
    path.write_text(json.dumps({**shape, "labels": rows[0]["choices"]}))
    return str(path)


def accuracy(checkpoint: Checkpoint, calibration: Calibration | None, examples: tuple[EncodedExample, ...]) -> float:
    rows = reference_scores(checkpoint, calibration, list(examples))
    return sum(predicted_choice(row) == e.answer for row, e in zip(rows, examples, strict=True)) / len(rows)


def test_zerotuning_takes_the_same_heads_of_all_layers_by_its_own_test(checkpoint: Checkpoint, task: str) -> None:
    bench = Bench(checkpoint, SearchJob(Questions((task,)), **SIZES, options=SearchOptions()), None)
    found = bench.zerotuning()
    ranking, choosing = bench.encoded.splits[RANK], bench.encoded.splits[CHOOSE]

    def tuned(heads: tuple[int, ...], gamma: float) -> Calibration:
        return Calibration({0: heads, 1: heads}, 1.0, gamma=gamma)

    plain = accuracy(checkpoint, None, ranking)
    changes = {head: accuracy(checkpoint, tuned((head,), 2.0), ranking) - plain for head in range(4)}
    up = sum(c > 0 for c in changes.values()) >= sum(c < 0 for c in changes.values())
    first = sorted(changes, key=lambda head: -changes[head] if up else changes[head])[:2]
    assert found.heads == {0: tuple(sorted(first)), 1: tuple(sorted(first))}
    assert found.beta == 1
    assert (found.gamma > 1) == up
    best = max(accuracy(checkpoint, tuned(found.heads[0], g), choosing) for g in (1.5, 2.0, 3.0, 4.0, 6.0, 0.25, 0.4))
    assert accuracy(checkpoint, found, choosing) == best


def test_a_comparison_of_two_seeds(
    checkpoint: Checkpoint, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"json": tmp_path / "rows.json", "journal": tmp_path / "journal"}
    arguments = Namespace(task=task, scoring=None, chat=False, goal="beyond-remedy", seeds=[0, 1], **SIZES, **places)
    compare(checkpoint, arguments, ["few-shot", "zerotuning", "act", "fit"])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["seed"] for row in rows} == {0, 1}
    ways = [row["way"].removesuffix(" (best remedy)") for row in rows if row["seed"] == 0]
    assert ways == ["plain", "label prior", "choice bias", "offsets", "few-shot"] + [
        way + more for way in ("zerotuning", "act", "fit") for more in ("", " + remedy")
    ]
    best = max(row["accuracy"] for row in rows[:4])
    assert [row["accuracy"] for row in rows[:4] if row["way"].endswith("(best remedy)")] == [best]
    for row in rows[:11]:
        assert row["gain"]["gain"] == pytest.approx(row["accuracy"] - rows[0]["accuracy"], abs=1e-4)
        assert row["beyond"]["gain"] == pytest.approx(row["accuracy"] - best, abs=1e-4)
    printed = capsys.readouterr().out
    assert "zerotuning, 2 seeds: gain " in printed
    accuracies = {(row["seed"], row["way"]): row["accuracy"] for row in rows}
    for seed in (0, 1):
        assert (
            f"seed {seed}: fit over act, on average {100 * (accuracies[seed, 'fit'] - accuracies[seed, 'act']):+.1f}, "
            in printed
        )
    compare(checkpoint, arguments, ["few-shot", "zerotuning", "act", "fit"])  # from its journal
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
