"""What act-export try says: each verdict in its words, what else would do, what it costs, the next command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace

import pytest

from act_export.calibration.file import Calibration
from act_export.commands.trial_table import print_trial
from act_export.search.elsewhere import TextCost
from act_export.search.results import Gain
from act_export.search.trial import Elsewhere, Trial
from act_export.search.trial_data import TrialData

UP, DOWN, FLAT = Gain(0.8, 0.1, (0.05, 0.15), 0.01), Gain(0.6, -0.1, (-0.15, -0.05), 0.01), Gain(0.7, 0, (-0.1, 0.1), 1)
EXPORT = "  act-export m --calibration c.json --out calibrated.onnx"


def data(different: int) -> TrialData:
    searches = tuple(SimpleNamespace(splits=SimpleNamespace(report=range(different // 3))) for _ in range(3))
    return TrialData("mine.jsonl", different, searches, 0.5)  # type: ignore[arg-type]


def said(
    capsys: pytest.CaptureFixture[str],
    calibrated: Gain = UP,
    beyond: Gain = UP,
    remedies: Mapping[str, Gain] | None = None,
    *,
    found: int = 3,
    cost: Elsewhere | None = None,
    different: int = 60,
    at_chance: bool = False,
    leans: bool = False,
) -> list[str]:
    remedies = remedies or {}
    best = next((name for name, gain in remedies.items() if gain is UP), "plain")
    offsets = {" no": -0.5, " yes": 0.5}
    calibration = Calibration({0: (1,)}) if found else None
    trial = Trial(0.7, at_chance, remedies, best, calibrated, beyond, offsets, found, calibration, leans)
    print_trial(data(different), trial, cost, model="m", source="--data mine.jsonl", file="c.json")
    return capsys.readouterr().out.splitlines()


def test_calibrate(capsys: pytest.CaptureFixture[str]) -> None:
    text = Elsewhere(
        {"rte": FLAT, "sst2": DOWN}, TextCost(20, (23.5,), ((-0.2, -0.1),)), ("obqa isn't measured: no rows",)
    )
    lines = said(capsys, cost=text)
    assert "3 of 3 searches found heads to calibrate." in lines
    assert "Elsewhere, rte: +0.0 points (-10.0 to +10.0)." in lines
    assert "Elsewhere, sst2: -10.0 points (-15.0 to -5.0) - lost beyond luck." in lines
    assert "Elsewhere, perplexity of a text: 20.00 -> 23.50 - lost beyond luck." in lines
    assert "obqa isn't measured: no rows" in lines
    assert (
        "Verdict: calibrate. It gains +10.0 points (+5.0 to +15.0), more than any cheaper remedy that was tried."
        in lines
    )
    assert "It costs elsewhere (sst2, text): use it for requests of this kind alone, by its name." in lines
    assert lines[-2:] == ["Next:", EXPORT]
    harmless = said(capsys, cost=replace(text, tasks={"rte": FLAT}, text=None, missing=()))
    assert not any("costs elsewhere" in line or "perplexity" in line for line in harmless)


@pytest.mark.parametrize(
    ("remedy", "how"),
    [
        ("offsets", "To use it, add an offset to each answer's log-probability."),
        ("choice bias", "To use it, take from each answer's log-probability its mean over other questions; needs no"),
        ("label prior", "To use it, take from each answer's log-probability that after the same prompt with N/A"),
        ("choices only", "To use it, allow no other first token than an answer's."),
    ],
)
@pytest.mark.parametrize("calibrated", [UP, FLAT])
def test_a_remedy_does_it(capsys: pytest.CaptureFixture[str], remedy: str, how: str, calibrated: Gain) -> None:
    lines = said(capsys, calibrated, FLAT, {"other": FLAT, remedy: UP})
    assert f"Verdict: {remedy} does it, without calibration: +10.0 points (+5.0 to +15.0). That" in " ".join(lines)
    assert any(line.startswith(how) for line in lines)
    assert lines[-1].endswith("--goal beyond-remedy")
    assert ("Fitted on all questions: ' no' -0.50, ' yes' +0.50" in lines) == (remedy == "offsets")
    assert (EXPORT in lines) == (calibrated is UP)


def test_a_model_that_leans_is_not_said_to_guess(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, FLAT, FLAT, {"offsets": UP}, at_chance=True, leans=True)
    assert not any("may be guessing" in line for line in lines)
    assert any(line.startswith("The plain model answers as if it guessed: 70.0%, and 50.0% is right") for line in lines)


def test_either(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, UP, FLAT, {"offsets": FLAT})
    assert any("calibration helps" in line and "more than the plain model isn't shown" in line for line in lines)
    assert lines[-1] == EXPORT


def test_plain(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, FLAT, FLAT, found=0, at_chance=True)
    assert any(line.startswith("The plain model may be guessing: 70.0%, and 50.0% is right without") for line in lines)
    assert any("leave the model as it is. No calibration gained more than luck explains" in line for line in lines)
    assert "So c.json isn't written." in lines
    assert "A gain below about 13 points would not have been seen" in lines[-1]
    assert "leave the model as it is. Calibration gained -10.0 points" in said(capsys, DOWN, DOWN, different=900)[-1]


def test_undecided(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, FLAT, FLAT, {"offsets": FLAT}, found=1)
    assert "Beyond the best of the others, the plain model: +0.0 points (-10.0 to +10.0)." in lines
    assert any("Verdict: undecided. Calibration gains +0.0 points" in line for line in lines)
    assert lines[-1] == "  act-export search m --data mine.jsonl --method act,gamma,fit"
