"""The report's page for everyone: keyboard, names, contrast, themes, sizes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from browser_page import ACCURACIES, HEADS, LAYERS, Open, tooltip, whole_profile
from profiles import random_profile, some_calibration

from act_export.profile.report.page import plotting_library
from act_export.profile.report.theme import RAMP_ON_DARK, RAMP_ON_LIGHT
from act_export.profile.report.token_text import visible_text

pytestmark = pytest.mark.in_turn(5)

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
