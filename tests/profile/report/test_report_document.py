"""The data in the page is the profile's, and stays data whatever the texts are."""

from __future__ import annotations

import base64
import html.parser
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from profiles import random_profile, some_calibration

from act_export.calibration.file import Calibration, CalibrationError, ModelIdentity
from act_export.errors import ActExportError
from act_export.profile.report import write_report
from act_export.profile.report.attention_maps import STEPS, encode_shares, head_maps
from act_export.profile.report.page import plotting_library, report_html
from act_export.profile.sink_statistics import GRID, MODES

EXACT = 0.5001 / 10_000
shapes = st.tuples(st.integers(1, 4), st.integers(1, 4))
PAGES = settings(max_examples=6)
texts = st.lists(st.text(max_size=12), min_size=1, max_size=6)


def floats_of(encoded: Mapping[str, Any]) -> NDArray[np.float32]:
    """An array of the document, as the script reads it."""
    return np.frombuffer(base64.b64decode(encoded["float32"]), "<f4").reshape(encoded["shape"])


def decode_shares(text: str, shape: Sequence[int]) -> NDArray[np.float64]:
    """What `encode_shares` was given, to the next ten-thousandth, as the script reads it."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u2").reshape(shape) / STEPS


class _Page(html.parser.HTMLParser):
    """What a browser makes of the page: the document, the kinds of script, and the text outside of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.words = ""
        self._script: dict[str, str | None] | None = None
        self.feed(text.replace(plotting_library(), "", 1))  # long, and none of the profile's

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._script = dict(attrs) if tag == "script" else None
        if self._script is not None:
            self.scripts.append((self._script, ""))

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            attributes, before = self.scripts.pop()
            self.scripts.append((attributes, before + data))
        else:
            self.words += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    @property
    def document(self) -> dict[str, Any]:
        (text,) = (text for attributes, text in self.scripts if attributes.get("id") == "data")
        found: dict[str, Any] = json.loads(text)
        return found


@PAGES
@given(shape=shapes, seed=st.integers(0, 99), effects=st.booleans(), longest=st.integers(2, 90))
def test_the_page_has_the_profiles_numbers(shape: tuple[int, int], seed: int, effects: bool, longest: int) -> None:
    calibration = some_calibration(*shape, seed=seed)
    profile = random_profile(
        *shape, ("sst2", "a.jsonl"), seed=seed, effects=effects, longest=longest, calibration=calibration
    )
    document = _Page(report_html(profile, calibration, ())).document
    assert list(document["sources"]) == ["all", "sst2", "a.jsonl"]
    for name, found in document["sources"].items():
        statistics = profile[name]
        for mode in MODES:
            sinks, columns = statistics.by[mode], found["by"][mode]["heads"]
            expected = {
                "mass": sinks.mass,
                "count": sinks.count,
                "rate": sinks.rate,
                "initial_rate": sinks.initial_rate,
                "initial_score": statistics.initial_score,
                "entropy": statistics.entropy,
            } | ({"effect": statistics.effects} if effects else {})
            assert columns.keys() == expected.keys()
            for column, values in expected.items():
                assert values is not None
                np.testing.assert_array_equal(floats_of(columns[column]), values.reshape(-1))
            tokens = found["by"][mode]["tokens"]
            assert [row["id"] for row in tokens] == sinks.tokens.ids.tolist()
            for row, times, occurrences in zip(tokens, sinks.tokens.sinks, sinks.tokens.occurrences, strict=True):
                assert row["share"] == pytest.approx(times.sum() / (occurrences * shape[0] * shape[1]))
            assert sum(row["mass"] for row in tokens) == pytest.approx(1 if tokens else 0, abs=1e-5)
            assert [row["outside"] for row in tokens] == pytest.approx([0.6 * row["mass"] for row in tokens], abs=1e-5)
        layers = document["layer_maps"][name]
        means = decode_shares(layers["shares"], layers["shape"])
        np.testing.assert_allclose(means, statistics.mean_map.mean(1, dtype=np.float64), atol=EXACT)
        heads = document["head_maps"]["by_source"][name]
        maps = decode_shares(heads["shares"], heads["shape"])
        np.testing.assert_allclose(maps, statistics.mean_map.reshape(-1, GRID, GRID), atol=EXACT)
    betas = dict(zip(zip(document["places"]["layer"], document["places"]["head"]), document["places"]["beta"]))  # noqa: B905
    marked = {place for place, beta in betas.items() if beta != ""}
    assert marked == {(layer, head) for layer, heads in calibration.heads.items() for head in heads}


@PAGES
@given(shape=shapes, longest=st.integers(2, 300), mode=st.sampled_from(MODES))
def test_rates_by_position_add_up_to_the_sinks(shape: tuple[int, int], longest: int, mode: str) -> None:
    profile = random_profile(*shape, longest=longest)
    document = _Page(report_html(profile, None, ())).document
    overall = profile.overall
    for positions, exposure in (("relative", overall.relative_exposure), ("absolute", overall.absolute_exposure)):
        rates = document["sources"]["all"]["by"][mode]["positions"][positions]
        seen = exposure[exposure > 0]
        start, end = floats_of(rates["start"]), floats_of(rates["end"])
        assert (start < end).all()
        assert (start[1:] >= end[:-1]).all()
        assert len(rates["range"]) == len(seen)
        by_layer = floats_of(rates["by_layer"])
        np.testing.assert_allclose(by_layer.mean(0), floats_of(rates["overall"]), rtol=1e-5, atol=1e-9)
        counts = getattr(overall.by[mode], f"{positions}_positions").sum(-1).mean(1) * overall.prompts
        np.testing.assert_allclose((by_layer * seen).sum(1), counts, rtol=1e-4, atol=1e-6)


@PAGES
@given(texts=texts, name=st.text(max_size=20).filter(lambda name: name.isprintable()))
def test_no_text_leaves_its_place(texts: list[str], name: str) -> None:
    hostile = [*texts, "</script><script>", "<!--", "]]>", "&amp;", '"', "'", "\u2028", "$model"]
    profile = replace(random_profile(1, 1, (f"<b>{name}",), texts=hostile), model_name=f"<i>{name}")
    page = _Page(report_html(profile, None, ()))
    assert [attributes.get("type") for attributes, _ in page.scripts] == ["application/json", None, None]
    raw = next(text for attributes, text in page.scripts if "id" in attributes)
    assert raw.isascii()
    assert not set("<>&") & set(raw)
    assert f"<i>{name}" in page.words
    assert len(page.document["examples"][0]["texts"]) == len(profile.examples[0].ids)


@given(st.integers(0, 99))
def test_shares_come_back_to_the_ten_thousandth(seed: int) -> None:
    shares = np.random.default_rng(seed).random((3, 5)).astype(np.float32) ** 4
    found = decode_shares(encode_shares(shares), shares.shape)
    np.testing.assert_allclose(found, shares, atol=EXACT)
    np.testing.assert_array_equal(np.rint(found * 10_000), np.rint(shares.astype(np.float64) * 10_000))


def test_maps_are_left_out_by_size_the_calibrated_heads_last() -> None:
    profile = random_profile(6, 8, ("sst2", "boolq"))
    calibrated = {(0, 7): 0.4, (5, 0): 0.4}
    every = head_maps(profile, calibrated)
    assert len(every.heads) == 48
    assert set(every.by_source) == {"all", "sst2", "boolq"}
    size = len(every.by_source["all"])
    overall = head_maps(profile, calibrated, size)
    assert overall.heads == every.heads
    assert set(overall.by_source) == {"all"}
    some = head_maps(profile, calibrated, size // 7)
    assert len(some.heads) == 6
    assert set(calibrated) < set(some.heads)
    others = [place for place in some.heads if place not in calibrated]
    mass = profile.overall.by["absolute"].mass
    assert {float(mass[place]) for place in others} == set(
        sorted((float(mass[place]) for place in np.ndindex(6, 8) if place not in calibrated), reverse=True)[:4]
    )
    maps = decode_shares(some.by_source["all"], (6, GRID, GRID))
    for place, shares in zip(some.heads, maps, strict=True):
        np.testing.assert_allclose(shares, profile.overall.mean_map[place], atol=EXACT)


def test_a_calibration_of_another_model_is_refused(tmp_path: Path) -> None:
    other = Calibration({0: (0,)}, model=ModelIdentity("gpt2", 12, 12))
    with pytest.raises(CalibrationError, match="another model"):
        write_report(random_profile(), tmp_path / "report.html", calibration=other)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ActExportError, match=r"can't write .*report\.html: .*--out"):
        write_report(random_profile(), tmp_path / "file" / "report.html")


def test_scores_after_are_shown_only_of_the_calibration_that_was_run() -> None:
    ran = some_calibration(3, 2)
    profile = random_profile(3, 2, calibration=ran)
    same = Calibration(heads=ran.heads, model=profile.model)
    assert _Page(report_html(profile, same, ())).document["examples"][0]["after"] is not None
    other = _Page(report_html(profile, replace(ran, beta=0.7), ()))
    assert other.document["examples"][0]["after"] is None
    assert "ran with another calibration" in other.words


def test_the_caption_says_at_which_beta_and_threshold_effects_are() -> None:
    profile = random_profile()
    words = " ".join(_Page(report_html(profile, None, ())).words.split())
    assert "Effect and mass are both by the absolute threshold, whichever threshold is chosen above." in words
    options = {**profile.options, "effects_beta": 0.4, "effects_threshold": 0.125}
    words = " ".join(_Page(report_html(replace(profile, options=options), None, ())).words.split())
    assert (
        "Calibrated with beta 0.4. Effect and mass are both by the absolute threshold of 0.125, whichever threshold is "
        "chosen above."
    ) in words


def test_the_page_names_no_address_but_the_papers() -> None:
    page = report_html(random_profile(), None, ())
    own = page[: page.index('<script type="application/json"')]
    assert [word for word in own.split('"') if "://" in word] == ["https://arxiv.org/abs/2406.15765"]
    assert "default-src 'none'" in own
