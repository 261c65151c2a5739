"""The page in a real browser: what it shows, how it is operated, and that it asks the network for nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from browser_page import ACCURACIES, HEADS, LAYERS, Open, tooltip, whole_profile
from one_token import one_token_profile
from profiles import random_profile

from act_export.profile.report.facts import effect_facts, key_facts
from act_export.profile.sink_profile import SinkProfile

pytestmark = pytest.mark.in_turn(5)

CHARTS = (
    "heads-chart",
    "positions-relative-chart",
    "layers-relative-chart",
    "positions-absolute-chart",
    "layers-absolute-chart",
    "effects-chart",
    "accuracy-chart",
)


def cell(page: Any, chart: str, **place: int) -> Any:
    """The mark of a chart whose datum has these values."""
    handle = page.evaluate_handle(
        """([chart, place]) => [...document.querySelectorAll(`#${chart} .role-mark path[role="graphics-symbol"]`)]
            .find((path) => Object.entries(place).every(([name, value]) => path.__data__.datum[name] === value))""",
        [chart, place],
    )
    return handle.as_element()


def hover(element: Any) -> None:
    """Points at a mark, whatever lies on it, once the page has come to rest: scrolling hides what was pointed at."""
    element.scroll_into_view_if_needed()
    element.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    element.hover(force=True)


def point_away(page: Any) -> None:
    """From all that has a tooltip."""
    page.mouse.move(0, 0)
    page.wait_for_selector("#tooltip", state="hidden")


def test_every_figure_is_drawn(opened: Open) -> None:
    page = opened(whole_profile()).page
    page.click("#copy")
    page.wait_for_selector("#copy:has-text('Copied'), #copy:has-text('Selected')")
    assert page.evaluate("getSelection().toString()").startswith("act-export ")
    for chart in CHARTS:
        assert page.locator(f"#{chart} svg path[role='graphics-symbol']").count() > 1, chart
    assert page.locator("#layer-maps canvas:visible").count() == LAYERS
    assert page.locator("#head-maps canvas:visible").count() == HEADS
    drawn = page.evaluate(
        """[...document.querySelectorAll(".map canvas")].map((canvas) => new Set(
            canvas.getContext("2d").getImageData(0, 0, 32, 32).data).size)"""
    )
    assert min(drawn) > 10  # colours, not one blank square


def test_tooltip_of_a_head_has_its_numbers(opened: Open) -> None:
    profile = whole_profile()
    found = opened(profile)
    for source, mode in product(("all", "sst2"), ("absolute", "relative")):
        found.choose("#source", source)
        found.choose("#mode", mode)
        statistics, (layer, head) = profile[source], (LAYERS // 2, HEADS // 2)
        point_away(found.page)
        hover(cell(found.page, "heads-chart", layer=layer, head=head))
        sinks = statistics.by[mode]
        assert tooltip(found.page) == {
            "Layer": str(layer),
            "Head": str(head),
            "Calibration": "calibrated",
            "Beta": "0.4",
            "Later-sink mass": f"{sinks.mass[layer, head]:.2%}",
            "Later sinks per prompt": f"{sinks.count[layer, head]:.2f}",
            "Initial sink score": f"{statistics.initial_score[layer, head]:.3f}",
            "Entropy of a row": f"{statistics.entropy[layer, head]:.2f}",
        }, (source, mode)


def test_selectors_change_the_sentences_and_the_figures(opened: Open) -> None:
    profile = whole_profile()
    found = opened(profile)
    for source in ("boolq", "all"):
        for mode in ("relative", "absolute"):
            found.choose("#source", source)
            found.choose("#mode", mode)
            facts = found.page.locator("#facts li").all_inner_texts()
            assert facts == key_facts(profile[source], mode, profile.calibration)
            assert found.page.locator("#effect-facts li").all_inner_texts() == effect_facts(profile[source])
            rates = profile[source].by[mode].relative_positions.mean((0, 1), dtype=np.float64)
            rate = rates[4] * profile[source].prompts / profile[source].relative_exposure[4]
            hover(cell(found.page, "positions-relative-chart", start=20))
            assert tooltip(found.page)["Rate of later sinks"] == f"{rate:.3%}"
            first = found.page.locator("#token-table tbody td:nth-child(2)").first.inner_text()
            assert first == str(profile[source].by[mode].tokens.ids[0])


def test_effects_are_beside_the_mass_of_the_threshold_they_were_measured_at(opened: Open) -> None:
    profile = whole_profile()
    found = opened(profile)
    found.choose("#mode", "relative")
    overall, (layer, head) = profile.overall, (2, 1)
    mass = overall.by["absolute"].mass[layer, head]
    assert f"{mass:.2%}" != f"{overall.by['relative'].mass[layer, head]:.2%}"
    hover(cell(found.page, "effects-chart", layer=layer, head=head))
    assert tooltip(found.page)["Later-sink mass"] == f"{mass:.2%}"
    found.page.click("summary:has-text('The effects as a table')")
    rows = found.page.locator("[data-numbers=effects] tbody tr")
    rows.first.wait_for()
    assert rows.count() == LAYERS * HEADS
    texts = [row.split("\t") for row in rows.all_inner_texts()]
    assert [row[4] for row in texts if row[:2] == [str(layer), str(head)]] == [f"{mass:.2%}"]


def test_quantity_of_the_heatmap_can_be_chosen(opened: Open) -> None:
    page = opened(whole_profile()).page
    assert "Later-sink mass" in page.locator("#heads-chart").inner_text()
    page.select_option("#quantity", "entropy")
    page.wait_for_selector("#heads-chart[aria-label^='Entropy'] svg")
    assert "Entropy of a row" in page.locator("#heads-chart").inner_text()


def test_a_chart_whose_drawing_failed_can_be_drawn_again(opened: Open) -> None:
    found = opened(whole_profile())
    page = found.page
    page.evaluate(
        """() => {
            const real = window.vegaEmbed;
            window.vegaEmbed = () => { window.vegaEmbed = real; return Promise.reject(new Error("failed once")); };
        }"""
    )
    with page.expect_event("pageerror") as failure:
        page.select_option("#quantity", "entropy")
    assert "failed once" in str(failure.value)
    assert [complaint for complaint in found.complaints if "failed once" not in complaint] == []
    found.complaints.clear()
    page.select_option("#quantity", "count")
    page.wait_for_selector("#heads-chart[aria-label^='Later sinks per prompt'] svg")


def test_only_a_click_beside_the_dialog_closes_it(opened: Open) -> None:
    page = opened(whole_profile()).page
    page.locator("#layer-maps button").first.click()
    page.wait_for_selector("#enlarged[open] svg")
    box = page.locator("#enlarged").bounding_box()
    page.mouse.click(box["x"] + 5, box["y"] + box["height"] - 5)  # its padding
    assert page.locator("#enlarged").is_visible()
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] - 20, box["y"] + 5)
    page.mouse.up()  # drawn out of it
    assert page.locator("#enlarged").is_visible()
    page.mouse.click(box["x"] - 20, box["y"] + 5)
    page.wait_for_selector("#enlarged:not([open])", state="attached")


def test_a_map_is_enlarged_and_escape_closes_it(opened: Open) -> None:
    profile = whole_profile()
    page = opened(profile).page
    button = page.locator("#layer-maps button").nth(2)
    for way in ("click", "Enter"):
        button.scroll_into_view_if_needed()
        if way == "click":
            button.click()
        else:
            button.focus()
            page.keyboard.press("Enter")
        page.wait_for_selector("#enlarged[open] svg")
        assert page.inner_text("#enlarged-title") == "Layer 2, mean over heads (all prompts)"
        point_away(page)
        hover(cell(page, "map-chart", query=9, key=3))
        mean = profile.overall.mean_map[2].mean(0, dtype=np.float64)
        assert tooltip(page) == {
            "Queries": "28.1 to 31.3%",
            "Keys": "9.4 to 12.5%",
            "Attention": f"{round(mean[9, 3] * 10_000) / 100:.2f}%",
        }
        page.click("#enlarged-heads button:has-text('1')")
        page.wait_for_selector("#map-chart[aria-label='Attention map of layer 2, head 1'] svg")
        assert page.inner_text("#enlarged-title") == "Layer 2, head 1 (all prompts)"
        hover(cell(page, "map-chart", query=9, key=3))
        share = np.float64(profile.overall.mean_map[2, 1, 9, 3])
        assert tooltip(page)["Attention"] == f"{round(share * 10_000) / 100:.2f}%"
        page.keyboard.press("Escape")
        page.wait_for_selector("#enlarged:not([open])", state="attached")
        assert button.evaluate("(button) => button === document.activeElement")


def test_tokens_are_sorted_and_searched(opened: Open) -> None:
    profile = whole_profile()
    page = opened(profile).page
    occurrences = page.locator("#token-table tbody td:nth-child(3)")
    page.click("#token-table th[data-sort=occurrences] button")
    numbers = [int(text.replace(",", "")) for text in occurrences.all_inner_texts()]
    assert numbers == sorted(profile.overall.by["absolute"].tokens.occurrences.tolist(), reverse=True)
    assert page.get_attribute("#token-table th[data-sort=occurrences]", "aria-sort") == "descending"
    page.click("#token-table th[data-sort=occurrences] button")
    assert page.get_attribute("#token-table th[data-sort=occurrences]", "aria-sort") == "ascending"
    page.fill("#token-search", " the")
    assert page.locator("#token-table tbody th").all_inner_texts() == ["·the"]
    page.fill("#token-search", "no such token")
    assert page.locator("#token-table tbody tr").count() == 0
    assert page.inner_text("#token-count").startswith("0 of ")


def test_prompt_shows_scores_before_and_after(opened: Open) -> None:
    profile = whole_profile()
    for scores, score in ((profile.examples[1].scores, 0.5), (profile.examples[1].calibrated_scores, 0.2)):
        assert scores is not None
        scores[..., 7] = score
    page = opened(profile).page
    page.select_option("#example", "1")
    example, calibration = profile.examples[1], profile.calibration
    assert calibration is not None
    every = {
        "calibrated": [(layer, head) for layer, heads in calibration.heads.items() for head in heads],
        "all": [(layer, head) for layer in range(LAYERS) for head in range(HEADS)],
        "3": [(3, head) for head in range(HEADS)],
    }
    for over, chosen in every.items():
        page.select_option("#over", over)
        for part, scores in (("before", example.scores), ("after", example.calibrated_scores)):
            assert scores is not None
            means = np.mean([scores[place] for place in chosen], 0, dtype=np.float64)
            tokens = page.locator(f"#{part} [role=listitem]")
            assert tokens.count() == len(example.ids)
            point_away(page)
            hover(tokens.nth(2))
            shown = tooltip(page)
            assert shown["Sink score"] == f"{round(means[2] * 10_000) / 10_000:.4f}"
            assert shown["Id"] == str(example.ids[2])
            above = np.round(means, 4) > profile.overall.by["absolute"].threshold
            marked = page.evaluate(
                f"[...document.querySelectorAll('#{part} [role=listitem]')].map((e) => e.matches('.sink'))"
            )
            assert marked == above.tolist()
            hover(tokens.nth(7))
            assert tooltip(page)["Kind"] == "later sink"
            names = [token.get_attribute("aria-label") for token in tokens.all()]
            assert [name.endswith(", later sink") for name in names[1:]] == above[1:].tolist()
            assert names[0].endswith(", initial sink") == above[0]


def test_a_tooltip_goes_with_what_it_speaks_of(opened: Open) -> None:
    """Though no pointer is seen to leave an element that was replaced beneath it."""
    page = opened(whole_profile()).page
    page.select_option("#example", "1")
    point_away(page)
    for element, event, control in (
        ("#before [role=listitem]", "pointerenter", "#over"),
        ("#heads-chart .role-mark path", "pointermove", "#quantity"),
    ):
        page.locator(element).nth(2).evaluate(
            f"(it) => it.dispatchEvent(new PointerEvent('{event}', {{ bubbles: true, clientX: 9, clientY: 9 }}))"
        )
        assert page.locator("#tooltip").is_visible()
        page.locator(control).evaluate("(it) => { it.selectedIndex = 1; it.dispatchEvent(new Event('change')); }")
        page.wait_for_selector("#tooltip", state="hidden")


def test_a_profile_with_nothing_beside_the_sinks_says_how_to_get_the_rest(opened: Open) -> None:
    profile = random_profile(1, 1, ("text.jsonl",), effects=False, no_later_sinks=True, longest=2, prompts=1)
    page = opened(profile, accuracies=()).page
    text = page.inner_text("body")
    assert "act-export search MODEL" in text
    assert "act-export profile MODEL --calibration FILE" in text
    assert "act-export profile MODEL --task NAME" in text
    assert "No head of 1 has a later sink" in text
    assert page.locator("#accuracy").count() == 0
    assert page.locator("#effects-chart").count() == 0
    assert not page.locator("#after-part").is_visible()
    assert "NaN" not in text


def test_source_without_effects_says_so(opened: Open) -> None:
    profile = whole_profile()
    plain = random_profile(LAYERS, HEADS, ("text",), effects=False)
    mixed = SinkProfile(**{**vars(profile), "sources": {**profile.sources, **plain.sources}})
    found = opened(mixed)
    for summary in found.page.locator("details summary").all():
        summary.click()
    found.choose("#source", "text")
    first = found.page.inner_text("[data-numbers=heads] tbody tr")
    assert first.endswith(f"{plain.sources['text'].entropy[0, 0]:.2f}")  # of this source
    assert found.page.locator("#effect-facts li").all_inner_texts() == ["Not measured on these prompts."]
    assert not found.page.locator("#effects-chart").is_visible()
    found.choose("#source", "all")
    assert found.page.locator("#effects-chart").is_visible()
    assert found.page.locator("[data-numbers=effects] tbody tr").count() == LAYERS * HEADS


def test_prompts_of_one_token_have_no_positions(opened: Open) -> None:
    short, long = one_token_profile(LAYERS, HEADS), whole_profile()
    found = opened(replace(long, sources={**long.sources, **short.sources}))
    page, figures = found.page, found.page.locator("#positions ~ .pair figure")
    for source, empty in (("text.jsonl", True), ("all", False)):
        found.choose("#source", source)
        for figure in figures.all():
            assert figure.locator(".note").is_visible() == empty
            assert figure.locator(".chart").first.is_visible() == (not empty)
            assert figure.locator("details").is_visible() == (not empty)
    page = opened(short, accuracies=()).page
    assert page.inner_text("#positions ~ .pair").count("No prompt has more than its initial token") == 2
    for missing in ("NaN", "undefined", "Infinity"):
        assert missing not in page.inner_text("body")


def test_a_mean_of_tasks_shows_no_interval_of_its_accuracies(opened: Open) -> None:
    mean = replace(ACCURACIES[0], task="mean of 2 tasks", plain_interval=None, calibrated_interval=None)
    page = opened(whole_profile(), accuracies=(*ACCURACIES[1:], mean)).page
    hover(cell(page, "accuracy-chart", task="mean of 2 tasks (PyTorch)", model="plain"))
    assert tooltip(page) == {"Task": "mean of 2 tasks (PyTorch)", "Model": "plain", "Accuracy": "60.0%"}
    hover(cell(page, "accuracy-chart", task="sst2 (ONNX Runtime)", model="plain"))
    assert tooltip(page)["95% interval"] == "50.0% to 69.0%"
    assert "A mean of tasks has an interval of its gain alone." in page.inner_text("#accuracy-caption")
    assert "+8.0 to +21.0" in page.inner_text("#accuracy ~ .scroll")
