"""The page in a real browser: what it shows, how it is operated, and that it asks the network for nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_token import one_token_profile
from profiles import random_profile, some_calibration

from act_export.calibration.file import Calibration
from act_export.profile.report import TaskAccuracy, write_report
from act_export.profile.report.facts import effect_facts, key_facts
from act_export.profile.report.page import plotting_library
from act_export.profile.report.theme import RAMP_ON_DARK, RAMP_ON_LIGHT
from act_export.profile.report.token_text import visible_text
from act_export.profile.sink_statistics import SinkProfile

LAYERS, HEADS = 6, 4
HOSTILE = (
    "</script><script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 1'>",
    "\" onfocus=alert(1) '",
    "\u202egnp.exe",
    "<|im_end|>",
    "\x00\x1b[31m",
    "a\u0301\u0301",
    "\u0301",
    "${model} $data &lt;!-- <!--",
    "\n\r\n\t ",
    "\u2028",
    "x" * 300,
)
ACCURACIES = (
    TaskAccuracy("sst2", 240, 0.6, (0.54, 0.66), 0.75, (0.69, 0.8), 0.15, (0.08, 0.21), "PyTorch"),
    TaskAccuracy("sst2", 100, 0.6, (0.5, 0.69), 0.58, (0.48, 0.67), -0.02, None, "ONNX Runtime"),
)
CHARTS = (
    "heads-chart",
    "positions-relative-chart",
    "layers-relative-chart",
    "positions-absolute-chart",
    "layers-absolute-chart",
    "effects-chart",
    "accuracy-chart",
)


@dataclass
class Opened:
    """A page, and what it did that it mustn't."""

    page: Any
    complaints: list[str] = field(default_factory=list)

    def ready(self) -> None:
        self.page.wait_for_selector("html[data-ready]", timeout=30_000)

    def choose(self, select: str, value: str) -> None:
        self.page.select_option(select, value)
        self.ready()


Open = Callable[..., Opened]


@pytest.fixture
def opened(chromium: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the report of a profile; complains at the end of every error, and of every request but the file's own."""
    contexts, pages = [], []

    def open_report(
        profile: SinkProfile,
        *,
        calibration: Calibration | None = None,
        accuracies: tuple[TaskAccuracy, ...] = ACCURACIES,
        width: int = 1200,
        scheme: str = "light",
    ) -> Opened:
        path = tmp_path / "report.html"
        write_report(profile, path, calibration=calibration, accuracies=accuracies)
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        found = Opened(page)
        pages.append(found)

        def guard(route: Any) -> None:
            if route.request.url == path.as_uri():
                route.continue_()
            else:
                found.complaints.append(f"asked for {route.request.url}")
                route.abort()

        context.route("**/*", guard)
        page.on("request", lambda request: _check_request(request.url, path, found))
        page.on("console", lambda message: _check_message(message, found))
        page.on("pageerror", lambda error: found.complaints.append(str(error)))
        page.goto(path.as_uri())
        found.ready()
        return found

    yield open_report
    complaints = [complaint for found in pages for complaint in found.complaints]
    for context in contexts:
        context.close()
    assert complaints == []


def _check_request(url: str, path: Path, found: Opened) -> None:
    if url != path.as_uri() and not url.startswith("data:"):
        found.complaints.append(f"asked for {url}")


def _check_message(message: Any, found: Opened) -> None:
    if message.type in ("error", "warning"):
        found.complaints.append(message.text)


def whole_profile(**more: Any) -> SinkProfile:
    calibration = some_calibration(LAYERS, HEADS)
    return random_profile(LAYERS, HEADS, ("sst2", "boolq"), calibration=calibration, **more)


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


def tooltip(page: Any) -> dict[str, str]:
    page.wait_for_selector("#tooltip:not([hidden])")
    names, values = (page.locator(f"#tooltip {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def test_every_figure_is_drawn(opened: Open) -> None:
    page = opened(whole_profile()).page
    for chart in CHARTS:
        assert page.locator(f"#{chart} svg path[role='graphics-symbol']").count() > 1, chart
    assert page.locator("#layer-maps canvas:visible").count() == LAYERS
    assert page.locator("#head-maps canvas:visible").count() == HEADS
    drawn = page.evaluate(
        """[...document.querySelectorAll(".map canvas")].map((canvas) => new Set(
            canvas.getContext("2d").getImageData(0, 0, 32, 32).data).size)"""
    )
    assert min(drawn) > 10  # colours, not one blank square


@pytest.mark.parametrize("source", ["all", "sst2"])
@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_tooltip_of_a_head_has_its_numbers(opened: Open, source: str, mode: str) -> None:
    profile = whole_profile()
    found = opened(profile)
    found.choose("#source", source)
    found.choose("#mode", mode)
    statistics, (layer, head) = profile[source], (LAYERS // 2, HEADS // 2)
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
        "Entropy of a row (nats)": f"{statistics.entropy[layer, head]:.2f}",
    }


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


@pytest.mark.parametrize("way", ["click", "Enter"])
def test_a_map_is_enlarged_and_escape_closes_it(opened: Open, way: str) -> None:
    profile = whole_profile()
    page = opened(profile).page
    button = page.locator("#layer-maps button").nth(2)
    button.scroll_into_view_if_needed()
    if way == "click":
        button.click()
    else:
        button.focus()
        page.keyboard.press("Enter")
    page.wait_for_selector("#enlarged[open] svg")
    assert page.inner_text("#enlarged-title") == "Layer 2, mean over heads (all prompts)"
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


def test_focus_stays_in_the_dialog(opened: Open) -> None:
    page = opened(whole_profile()).page
    page.locator("#layer-maps button").first.click()
    page.wait_for_selector("#enlarged[open] svg")
    for _ in range(HEADS + 6):
        page.keyboard.press("Tab")
        assert page.evaluate(
            "document.activeElement === document.body || document.activeElement.closest('dialog') !== null"
        )


def test_arrow_keys_move_over_the_heads_and_show_them(opened: Open) -> None:
    page = opened(whole_profile()).page
    page.locator("#heads-chart path[tabindex='0']").focus()
    assert tooltip(page)["Layer"] == "0"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    shown = tooltip(page)
    assert (shown["Layer"], shown["Head"]) == ("2", "1")
    page.keyboard.press("ArrowLeft")
    assert tooltip(page)["Layer"] == "1"
    assert page.locator("#heads-chart path[tabindex='0']").count() == 1


def test_theme_is_the_systems_until_the_button_is_used_and_is_remembered(opened: Open) -> None:
    found = opened(whole_profile(), scheme="dark")
    page = found.page

    def background() -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, colour.removeprefix("rgb(").rstrip(")").split(",")))

    def fill_of_most() -> str:
        return str(page.evaluate("document.querySelector('#heads-chart .role-axis-label text').getAttribute('fill')"))

    assert background() < 150
    assert page.get_attribute("#theme", "aria-pressed") == "true"
    page.click("#theme")
    found.ready()
    assert background() > 700
    assert page.get_attribute("#theme", "aria-pressed") == "false"
    assert fill_of_most() == "var(--muted)"  # the style sheet's, whatever the theme
    page.reload()
    found.ready()
    assert background() > 700


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


@pytest.mark.parametrize("over", ["calibrated", "all", "3"])
def test_prompt_shows_scores_before_and_after(opened: Open, over: str) -> None:
    profile = whole_profile()
    for scores, score in ((profile.examples[1].scores, 0.5), (profile.examples[1].calibrated_scores, 0.2)):
        assert scores is not None
        scores[..., 7] = score
    page = opened(profile).page
    page.select_option("#example", "1")
    page.select_option("#over", over)
    example, calibration = profile.examples[1], profile.calibration
    assert calibration is not None
    chosen = {
        "calibrated": [(layer, head) for layer, heads in calibration.heads.items() for head in heads],
        "all": [(layer, head) for layer in range(LAYERS) for head in range(HEADS)],
        "3": [(3, head) for head in range(HEADS)],
    }[over]
    for part, scores in (("before", example.scores), ("after", example.calibrated_scores)):
        assert scores is not None
        means = np.mean([scores[place] for place in chosen], 0, dtype=np.float64)
        tokens = page.locator(f"#{part} [role=listitem]")
        assert tokens.count() == len(example.ids)
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


def test_hostile_texts_are_text(opened: Open) -> None:
    profile = whole_profile(texts=HOSTILE)
    page = opened(profile).page
    assert page.evaluate("window.broken === undefined")
    shown = page.locator("#token-table tbody th").all_text_contents()
    assert sorted(shown) == sorted(visible_text(text) for text in profile.overall.by["absolute"].tokens.texts)
    assert page.locator("#before [role=listitem]").count() == len(profile.examples[0].ids)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("width", [400, 1200])
def test_page_is_no_wider_than_the_window_and_has_no_number_missing(opened: Open, width: int) -> None:
    page = opened(whole_profile(), width=width).page
    for details in page.locator("details summary").all():
        details.click()
    assert page.locator("details[open] table tbody tr").count() > LAYERS * HEADS
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    text = page.evaluate(
        "document.body.innerText + [...document.querySelectorAll('svg')].map((s) => s.textContent).join()"
    )
    for missing in ("NaN", "undefined", "null", "Infinity", "[object"):
        assert missing not in text


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


def test_everything_has_a_name_and_a_place(opened: Open) -> None:
    page = opened(whole_profile()).page
    for details in page.locator("details summary").all():
        details.click()
    problems = page.evaluate(
        """() => {
            const problems = [];
            const drawn = (element) => element.closest("[role=graphics-document]") ?? element;  // of an svg
            const named = (element) => element.getAttribute("aria-label")?.trim() || document.getElementById(
                element.getAttribute("aria-labelledby"))?.textContent.trim();
            const hidden = (element) => element.closest("[aria-hidden=true], [hidden]");
            for (const picture of document.querySelectorAll("svg, canvas, img, [role=img]"))
                if (!hidden(picture) && !named(drawn(picture))) problems.push(`no name: ${picture.outerHTML}`);
            for (const control of document.querySelectorAll("select, input, button, summary, a[href]"))
                if (!named(control) && !control.labels?.[0]?.textContent.trim() && !control.textContent.trim())
                    problems.push(`no label: ${control.outerHTML.slice(0, 80)}`);
            const regions = "section, form, nav, dialog, figure, [role=region], [role=list]";
            for (const region of document.querySelectorAll(regions))
                if (!named(region)) problems.push(`no name: ${region.outerHTML.slice(0, 80)}`);
            let level = 0;
            for (const heading of document.querySelectorAll("h1, h2, h3, h4")) {
                const its = Number(heading.tagName[1]);
                if (its > level + 1) problems.push(`heading skips a level: ${heading.textContent}`);
                level = its;
            }
            if (document.querySelectorAll("h1").length !== 1) problems.push("not one h1");
            if (document.querySelectorAll("main").length !== 1) problems.push("not one main");
            const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
            for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) problems.push(`twice: ${id}`);
            for (const link of document.querySelectorAll("a[href^='#']"))
                if (!document.querySelector(link.hash)) problems.push(`leads nowhere: ${link.outerHTML}`);
            for (const table of document.querySelectorAll("table")) {
                if (!table.caption) problems.push("a table without a caption");
                for (const cell of table.tHead.rows[0].cells)
                    if (!cell.scope) problems.push("a heading without a scope");
            }
            if (!document.documentElement.lang) problems.push("no language");
            return problems;
        }"""
    )
    assert problems == []


CONTRAST = """() => {
    const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
    const bright = ([red, green, blue]) => [red, green, blue].map((value) => value / 255)
        .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, at) => sum + value * [0.2126, 0.7152, 0.0722][at], 0);
    const behind = (element) => {
        for (; element; element = element.parentElement) {
            const colour = rgb(getComputedStyle(element).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
        return null;
    };
    const low = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        const text = walker.currentNode.textContent.trim();
        if (!text || !element.getClientRects().length || element.closest("script")) continue;
        const style = getComputedStyle(element);
        const inSvg = element.closest("svg");
        const ink = bright(rgb(inSvg ? style.fill : style.color));
        const page = bright(behind(inSvg ? inSvg.parentElement : element));
        const ratio = (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
        if (ratio < 4.5) low.push(`${ratio.toFixed(2)}: ${element.outerHTML.slice(0, 90)}`);
    }
    return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(opened: Open, scheme: str) -> None:
    page = opened(whole_profile(), scheme=scheme).page
    assert page.evaluate(CONTRAST) == []


COLOURS = """() => {
    const seen = (element) => element.getClientRects().length > 0;
    const copy = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const corner = (canvas) => {
        copy.drawImage(canvas, 31, 0, 1, 1, 0, 0, 1, 1);
        return [...copy.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
    const of = (selector, name) => rgb(getComputedStyle(document.querySelector(selector))[name]);
    const cells = [...document.querySelectorAll("#layers-relative-chart .mark-rect.role-mark path")];
    const least = cells.reduce((one, other) => other.__data__.datum.rate < one.__data__.datum.rate ? other : one);
    const most = cells.reduce((one, other) => other.__data__.datum.rate > one.__data__.datum.rate ? other : one);
    return {
        page: of("body", "backgroundColor"),
        label: of("#heads-chart .role-axis-label text", "fill"),
        corners: [...document.querySelectorAll(".map canvas")].filter(seen).map(corner),
        none: rgb(getComputedStyle(least).fill),
        most: rgb(getComputedStyle(most).fill),
        legend: [...document.querySelectorAll("#heads-chart linearGradient stop")]
            .map((stop) => rgb(getComputedStyle(stop).stopColor)),
        words: of("#before [role=listitem]", "color"),
    };
}"""


def _rgb(colour: str) -> list[int]:
    return [int(colour[at : at + 2], 16) for at in (1, 3, 5)]


def _check_colours(found: dict[str, Any], ramp: tuple[str, ...]) -> None:
    assert found["corners"] == [_rgb(ramp[0])] * (LAYERS + HEADS)  # no key is later than its query
    assert max(np.abs(np.subtract(found["none"], _rgb(ramp[0])))) < 40
    assert found["most"] == _rgb(ramp[-1])
    assert len(found["legend"]) > 5
    assert (found["legend"][0], found["legend"][-1]) == (_rgb(ramp[0]), _rgb(ramp[-1]))


def test_colours_are_those_of_the_theme_and_light_on_paper_at_once(opened: Open) -> None:
    found = opened(whole_profile(), scheme="dark")
    page = found.page
    dark = page.evaluate(COLOURS)
    _check_colours(dark, RAMP_ON_DARK)
    for chosen in (None, "dark"):  # the system's theme, then the button's
        page.emulate_media(media="print")  # nothing is drawn anew, and nothing waits
        printed = page.evaluate(COLOURS)
        _check_colours(printed, RAMP_ON_LIGHT)
        assert printed["page"] == [255, 255, 255]
        assert sum(printed["label"]) < 300
        assert not page.locator("#source").is_visible()
        page.emulate_media(media="screen")
        assert page.evaluate(COLOURS) == dark
        if chosen is None:
            page.click("#theme")
            assert page.evaluate(COLOURS) == printed  # the light theme
            page.click("#theme")
            assert page.evaluate(COLOURS) == dark
    assert page.pdf().startswith(b"%PDF-")


def test_a_large_model_keeps_its_page_small_and_says_what_is_left_out(opened: Open) -> None:
    calibration = some_calibration(44, 64, share=0.02)
    page = opened(random_profile(44, 64, ("sst2",), calibration=calibration, prompts=4), accuracies=()).page
    layer = 22
    page.select_option("#layer", str(layer))
    shown = page.locator("#head-maps button").count()
    assert 0 < shown < 64
    assert f"{shown} of 64 heads" in page.inner_text("#head-maps-note")
    labels = page.locator("#head-maps button.calibrated").all_inner_texts()
    assert [int(label.split()[0]) for label in labels] == list(calibration.heads[layer])


def test_size_of_the_page_without_the_plotting_library() -> None:
    from act_export.profile.report.page import report_html

    profile = random_profile(30, 9, ("sst2", "boolq", "agnews"), calibration=some_calibration(30, 9), longest=200)
    text = report_html(profile, profile.calibration, ACCURACIES)
    assert len(text.encode()) - len(plotting_library().encode()) < 3_000_000
    assert json.dumps(profile.model_name)[1:-1] in text
