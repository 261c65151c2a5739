"""Figures as files, the sentences, and what makes texts and colours fit to be seen."""

from __future__ import annotations

import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_token import one_token_profile
from profiles import random_profile, some_calibration

from act_export.calibration.file import Calibration, CalibrationError, ModelIdentity
from act_export.errors import ActExportError
from act_export.profile import report
from act_export.profile.report import TaskAccuracy, write_figures
from act_export.profile.report.facts import effect_facts, key_facts
from act_export.profile.report.theme import RAMP_ON_DARK, RAMP_ON_LIGHT
from act_export.profile.report.token_text import visible_text

ACCURACY = TaskAccuracy("sst2", 240, 0.6, (0.54, 0.66), 0.75, (0.69, 0.8), 0.15, (0.08, 0.21), "PyTorch")
SVG = "{http://www.w3.org/2000/svg}"


def test_all_figures_as_svg(tmp_path: Path) -> None:
    calibration = some_calibration(5, 4)
    profile = random_profile(5, 4, calibration=calibration)
    paths = write_figures(profile, tmp_path / "new", "svg", accuracies=(ACCURACY,))
    names = ["sink-mass", "attention-maps", "sink-positions", "effects", "accuracy"]
    assert [path.name for path in paths] == [f"{name}.svg" for name in names]
    roots = {path.stem: ElementTree.parse(path).getroot() for path in paths}
    assert all(root.tag == f"{SVG}svg" for root in roots.values())
    assert len(list(roots["attention-maps"].iter(f"{SVG}image"))) == 5
    labels = [path.get("aria-label", "") for path in roots["sink-mass"].iter(f"{SVG}path")]
    assert sum("Later-sink mass: " in label for label in labels) == 20
    words = " ".join(text.text or "" for text in roots["sink-mass"].iter(f"{SVG}text"))
    assert "calibrated" in words
    assert "var(" not in "".join(path.read_text() for path in paths)  # a file has no style sheet


def test_figures_as_png_are_as_wide_as_columns_of_a_paper(tmp_path: Path) -> None:
    calibration = some_calibration(30, 9)
    paths = write_figures(random_profile(30, 9, calibration=calibration), tmp_path, "png", accuracies=(ACCURACY,))
    for path in paths:
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, _ = struct.unpack(">II", content[16:24])
        inches = 3.4 if path.stem in ("effects", "accuracy") else 7.1
        assert 0.75 * inches < width / 300 < 1.1 * inches, path.stem


@pytest.mark.in_turn(2)
@settings(max_examples=20)  # each draws three figures
@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 5)), longest=st.integers(2, 40))
def test_figures_of_any_shape(tmp_path_factory, shape: tuple[int, int], longest: int) -> None:
    folder = tmp_path_factory.mktemp("figures")
    profile = random_profile(*shape, longest=longest, effects=False, no_later_sinks=longest < 4)
    paths = write_figures(profile, folder, "svg")
    assert [path.stem for path in paths] == ["sink-mass", "attention-maps", "sink-positions"]
    text = paths[0].read_text()
    assert text.count("Later-sink mass: ") == shape[0] * shape[1]
    assert "NaN" not in text


def test_a_mean_of_tasks_has_points_alone(tmp_path: Path) -> None:
    mean = replace(ACCURACY, task="mean of 2 tasks", plain_interval=None, calibrated_interval=None)

    def drawn(*accuracies: TaskAccuracy) -> tuple[int, int, str]:
        paths = write_figures(random_profile(), tmp_path, "svg", accuracies=accuracies)
        root = ElementTree.parse(next(path for path in paths if path.stem == "accuracy")).getroot()
        marks = {
            kind: [child for group in root.iter(f"{SVG}g") if kind in group.get("class", "").split() for child in group]
            for kind in ("mark-rule", "mark-symbol")
        }
        rules = [mark for mark in marks["mark-rule"] if mark.get("stroke-width") == "1.5"]
        points = [mark for mark in marks["mark-symbol"] if mark.get("aria-roledescription") == "point"]
        return len(rules), len(points), " ".join(text.text or "" for text in root.iter(f"{SVG}text"))

    rules, points, words = drawn(ACCURACY, mean)
    assert (rules, points) == (2, 4)
    assert "Accuracy, 95% interval" in words
    rules, points, words = drawn(mean)
    assert (rules, points) == (0, 2)
    assert "interval" not in words


def test_prompts_of_one_token_have_no_figure_of_positions(tmp_path: Path) -> None:
    paths = write_figures(one_token_profile(), tmp_path, "svg")
    assert [path.stem for path in paths] == ["sink-mass", "attention-maps"]


def test_sentences_need_no_plotting_library() -> None:
    script = (
        "import sys, act_export.profile.report.facts\n"
        "from act_export.profile.report import accuracies_of\n"
        "assert not {'altair', 'vl_convert'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="no attribute 'write_book'"):
        _ = report.write_book


def test_figures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ActExportError, match="no format 'pdf'; pass png or svg"):
        write_figures(random_profile(), tmp_path, "pdf")
    with pytest.raises(CalibrationError, match="another model"):
        write_figures(
            random_profile(), tmp_path, "svg", calibration=Calibration({0: (0,)}, model=ModelIdentity("gpt2", 3, 2))
        )
    (tmp_path / "file").write_text("")
    with pytest.raises(ActExportError, match="pass another folder"):
        write_figures(random_profile(), tmp_path / "file", "svg")


def test_facts_have_the_numbers() -> None:
    profile = random_profile(2, 2)
    sinks = profile.overall.by["absolute"]
    sinks.count[:], sinks.mass[:] = [[0, 1], [2, 0]], [[0, 0.1], [0.3, 0]]
    sinks.initial_rate[:], profile.overall.initial_score[:] = [[0.4, 1], [0.6, 0.9]], 0.5
    assert key_facts(profile.overall, "absolute", Calibration({1: (0,)})) == [
        "Later sinks exist in 2 of 4 heads (50%), in 2 of 2 layers.",
        "They take 10.0% of all attention; layer 1 has 75% of that.",
        "The initial token is a sink in 75% of heads, in most prompts; its sink score is 0.50 in the mean over all "
        "heads.",
        "Calibrated are 1 of 4 heads (25%); of all attention on later sinks, 75% is theirs.",
    ]
    assert profile.overall.effects is not None
    profile.overall.effects[:] = [[0, 0.1], [0.2, -0.3]]
    profile.overall.by["relative"].mass[:] = [[0.4, 0.3], [0.1, 0.2]]
    assert effect_facts(profile.overall) == [
        "Of 4 heads, calibrating one alone would make right answers likelier in 2 (their sinks hurt) and less likely "
        "in 1 (their sinks help). In 1 it would change nothing.",
        "The strongest effect is -0.3 in a right answer's log-likelihood, in layer 1, head 1.",
        "The Spearman rank correlation of effect and later-sink mass (absolute threshold) is +0.95.",
        "Effects are means over 20 prompts.",
    ]


@given(st.text(max_size=20))
def test_visible_texts_leave_nothing_unseen(text: str) -> None:
    shown = visible_text(text)
    assert shown.isprintable()
    assert " " not in shown
    assert visible_text(shown) == shown
    assert len(shown) >= len(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [(" the", "·the"), ("\n\n", "⏎⏎"), ("<|im_end|>", "<|im_end|>"), ("\u202ea", "⟨U+202E⟩a"), ("\u0301", "◌\u0301")],
)
def test_visible_texts(text: str, shown: str) -> None:
    assert visible_text(text) == shown


@pytest.mark.parametrize("ramp", [RAMP_ON_LIGHT, RAMP_ON_DARK])
def test_steps_of_a_ramp_look_alike(ramp: tuple[str, ...]) -> None:
    steps = np.array([after - before for before, after in pairwise(map(_lightness, ramp))])
    assert np.abs(steps - steps.mean()).max() < 0.01
    assert abs(steps.mean()) > 0.05


def _lightness(colour: str) -> float:
    """L of OKLab."""
    values = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    to_cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    return float(np.cbrt(np.array(to_cones) @ linear) @ [0.2104542553, 0.7936177850, -0.0040720468])
