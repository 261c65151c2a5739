"""The verdict on top of the page: what the calibration's own record says, and no more."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from profiles import random_profile

from act_export.calibration.file import Calibration, Provenance
from act_export.profile.report.page import report_html
from act_export.profile.report.verdict import verdict_section

MODELS = Path(__file__).parents[3] / "models"
BEYOND = {"control": "offsets", "accuracy": 0.7708, "gain": 0.0208, "interval_95": [-0.0125, 0.0583]}


def words(section: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", section)).split())


def measured(notes: dict[str, Any], **changes: Any) -> Calibration:
    origin = Provenance("fit", ("mine",), {"report": 240}, 3, 0.6125, 0.7917, {}, notes)
    return Calibration({0: (1,)}, provenance=replace(origin, **changes))


def test_a_shipped_recipe() -> None:
    said = words(verdict_section(Calibration.load(MODELS / "smollm2-135m.json"), "smollm2-135m"))
    assert "+15.0 points (+8.3 to +21.7) on 240 questions of sst2 that took no part in its search: 61.3% plain" in said
    assert "lean to an answer taken off: 75.8% plain, 77.9% calibrated." in said
    assert "Elsewhere: it costs likelihood of other text" in said
    assert "act-export smollm2-135m --calibration smollm2-135m --out calibrated.onnx Copy" in said


@pytest.mark.parametrize(("low", "shown"), [(-0.0125, "That calibration adds anything isn't shown."), (0.01, "(+1.0")])
def test_what_is_gained_beyond_the_best_remedy(low: float, shown: str) -> None:
    notes = {"gain_beyond_control": {**BEYOND, "interval_95": [low, 0.0583]}, "gain_interval_95": [0.11, 0.246]}
    said = words(verdict_section(measured(notes), "m"))
    assert "+17.9 points (+11.0 to +24.6)" in said
    assert "Beyond the best cheap remedy, offsets (77.1%): +2.1 points" in said
    assert shown in said
    assert ("isn't shown" in said) == (low <= 0)
    assert "one draw of questions (seed 3)" in said
    assert "isn't recorded" in said


@pytest.mark.parametrize("low", [-0.01, 0.02])
def test_what_is_gained_with_the_remedy_on_both_models(low: float) -> None:
    beyond, both = {**BEYOND, "interval_95": [-0.4, -0.2]}, {**BEYOND, "gain": 0.07, "interval_95": [low, 0.13]}
    said = words(verdict_section(measured({"gain_beyond_control": beyond, "gain_with_remedy_on_both": both}), "m"))
    assert f"with that remedy on both models +7.0 ({100 * low:+.1f} to +13.0)" in said
    assert ("That calibration adds anything isn't shown." in said) == (low < 0)


def test_a_joint_set() -> None:
    average = {"gain": 0.03, "interval_95": [0.01, 0.05]}
    notes = {"average_gain": average, "average_gain_beyond_controls": {"gain": 0.01, "interval_95": [-0.01, 0.03]}}
    said = words(verdict_section(measured(notes, tasks=("a", "b")), "m"))
    assert "(+1.0 to +5.0) on 240 questions of a, b" in said
    assert "Beyond the best cheap remedy of each task: +1.0 points (-1.0 to +3.0). That calibration" in said


@pytest.mark.parametrize("calibration", [None, Calibration({})])
def test_without_heads_it_says_how_to_find_out(calibration: Calibration | None) -> None:
    assert "act-export try owner/model --data questions.jsonl" in words(verdict_section(calibration, "owner/model"))


def test_heads_that_were_never_measured() -> None:
    said = words(verdict_section(Calibration({0: (1,)}), "m"))
    assert "was never measured" in said
    assert "%" not in said


@pytest.mark.parametrize(
    "notes",
    [
        {"gain_beyond_control": "much", "gain_interval_95": 3, "controls": []},
        {"gain_beyond_control": {"gain": "a", "interval_95": []}, "average_gain": {}},
        {"controls": {"without_choice_bias": {"plain": "x"}}, "by_name_only": "<script>alert(1)</script>"},
    ],
)
def test_notes_that_anyone_wrote(notes: dict[str, Any]) -> None:
    section = verdict_section(measured(notes, tasks=("<img src=x>",)), "<b>")
    assert "+17.9 points on 240" in words(section).replace(" points ", " points ")
    assert not re.search(r"<(img|script|b)\b", section)


def test_one_source_is_all_there_is_to_choose() -> None:
    one, two = (report_html(random_profile(2, 2, names), None, ()) for names in (("sst2",), ("sst2", "boolq")))
    assert ">all prompts<" not in one
    assert two.count(">all prompts<") == 2  # to choose, and in the table
