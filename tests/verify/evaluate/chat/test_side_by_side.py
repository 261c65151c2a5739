"""The page for people: which answer is whose isn't seen, what was chosen is kept, and no text is more than text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.verify.evaluate.chat.page import side_by_side
from act_export.verify.evaluate.chat.questions import ChatQuestion

HOSTILE = (
    "</script><script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 1'>",
    "<!-- <script>",
    "]]>&lt;b>&amp;",
    "\" onfocus=alert(1) '`",
    "${model} $data $$script javascript:alert(1)",
    "\u202egnp.exe",
    "\x00\x1b[31m",
    "\u2028\u2029",
    "# A\n\n  B",
    "x" * 3000,
)


class Parts(HTMLParser):
    """The elements of a page, and its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.data = ""
        self._is_data = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self._is_data = ("id", "data") in attrs

    def handle_endtag(self, tag):
        self._is_data = False

    def handle_data(self, data):
        if self._is_data:
            self.data += data


def question(name: int | str = 1, turns=("Why?",), category="math") -> ChatQuestion:
    return ChatQuestion(name, category, tuple(turns), ("",) * len(turns))


HARMLESS = Parts(side_by_side([question()], [["a"]], "c", [["b"]], 0)).elements


def shown(texts: list[str]) -> str:
    """A page in which all that comes from elsewhere is these texts."""
    questions = [question(text, [text], text) for text in texts]
    return side_by_side(questions, [[text] for text in texts], texts[0], [[f"{text}!"] for text in texts], 0)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=3, unique=True))
def test_no_text_becomes_an_element(texts):
    found = Parts(shown(texts))
    assert found.elements == HARMLESS
    assert [card["turns"] for card in json.loads(found.data)["cards"]] == [[text] for text in texts]


def test_hostile_texts_stay_data():
    found = Parts(shown(list(HOSTILE)))
    assert found.elements == HARMLESS
    assert {text for card in json.loads(found.data)["cards"] for text in card["turns"]} == set(HOSTILE)


def data_of(number: int = 40, seed: int = 0, name: str = "c") -> dict[str, Any]:
    questions = [question(each) for each in range(number)]
    page = side_by_side(questions, [["p"]] * number, name, [["c"] if each else ["p"] for each in range(number)], seed)
    return json.loads(Parts(page).data)


def test_the_order_is_drawn_for_each_question_and_repeatable():
    def order(**which):
        return [card["models"][0] for card in data_of(**which)["cards"]]

    assert order() == order()
    assert 8 < order().count("plain") < 31
    assert order(seed=1) != order() != order(name="d")
    for card in data_of()["cards"]:
        assert dict(zip(card["models"], card["answers"], strict=True)) == {"plain": ["p"], "c": ["c"]}


def test_answers_that_are_the_same_are_counted_and_not_shown():
    found = data_of()
    assert (len(found["cards"]), found["same"]) == (39, 1)
    assert 0 not in [card["id"] for card in found["cards"]]


Open = Callable[..., Any]


@pytest.fixture
def opened(chromium: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a page; complains at the end of every error and every request but the file's own."""
    complaints, contexts = [], []

    def open_page(text: str, width: int = 1200) -> Any:
        path = tmp_path / "side_by_side.html"
        path.write_text(text, encoding="utf-8", newline="")
        context = chromium.new_context(viewport={"width": width, "height": 900}, accept_downloads=True)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda asked: asked.url == path.as_uri() or complaints.append(asked.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [complaint for complaint in complaints if not complaint.startswith("blob:")] == []


@pytest.mark.parametrize("width", [360, 1200])
def test_hostile_texts_in_a_browser(opened, width):
    page = opened(shown(list(HOSTILE)), width)
    assert page.evaluate("window.broken === undefined")
    texts = page.locator(".asked").evaluate_all("all => all.map(each => each.textContent)")
    assert texts == [text.replace("\r\n", "\n") for text in HOSTILE]
    assert page.locator(".answer").count() == 2 * len(HOSTILE)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_choosing_revealing_and_counting(opened, tmp_path):
    questions = [question(number, ["First?", "Second?"]) for number in range(4)]
    plain, calibrated = ([[f"{name} one", f"{name} two"] for _ in questions] for name in ("plain", "calibrated"))
    calibrated[3] = plain[3]
    page = opened(side_by_side(questions, plain, "c0", calibrated, 0))
    cards = page.locator(".card")
    assert cards.count() == 3
    assert "1 question is left out" in page.inner_text("#same")
    assert cards.locator(".side").all_inner_texts() == ["A", "B"] * 6
    assert "c0" not in page.inner_text("body")

    def choose(card: int, wanted: str) -> None:
        texts = cards.nth(card).locator(".answer .text").all_inner_texts()
        label = f"{'AB'[texts.index(f'{wanted} one')]} is better" if wanted else "Tie"
        cards.nth(card).get_by_text(label, exact=True).click()

    choose(0, "plain")
    choose(0, "calibrated")
    choose(1, "")
    choose(2, "plain")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.inner_text("#done") == "3 of 3 chosen"
    cards.nth(2).locator("[aria-pressed=true]").click()
    assert page.inner_text("#done") == "2 of 3 chosen"
    page.click("#reveal")
    counts = dict(zip(*(page.locator(f"#counts {tag}").all_inner_texts() for tag in ("dt", "dd")), strict=True))
    assert counts == {
        "c0 is better": "1",
        "plain is better": "0",
        "Tie": "1",
        "Not chosen": "1",
        "The same text, not shown": "1",
    }
    for side in cards.locator(".answer").all():
        assert ("plain" in side.locator(".side").inner_text()) == side.locator(".text").inner_text().startswith("plain")
    assert cards.locator("button:enabled").count() == 0
    with page.expect_download() as download:
        page.click("#download")
    found = json.loads(Path(download.value.path()).read_text())
    assert (found["format"], found["revealed"]) == ("act-export choices", True)
    assert [(each["question_id"], each.get(each["winner"], "tie")) for each in found["choices"]] == [
        (0, "c0"),
        (1, "tie"),
    ]
    page.click("#again")
    assert page.inner_text("#done") == "0 of 3 chosen"
    assert cards.locator("button:enabled").count() == 9
