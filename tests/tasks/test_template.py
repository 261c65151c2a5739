from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.tasks.template import CONTENT_FREE, FILTERS, Template


@given(before=st.text(), value=st.text(), after=st.text())
def test_only_the_fields_of_a_template_are_replaced(before: str, value: str, after: str) -> None:
    doubled = [text.replace("{", "{{").replace("}", "}}") for text in (before, after)]
    template = Template(f"{doubled[0]}{{name}}{doubled[1]}")
    assert template.fields == {"name"}
    assert template.render({"name": value, "other": "x"}) == before + value + after


def test_filters_change_a_value() -> None:
    template = Template("{a:no_period} {b:lower_first} {c:spaced} {a}")
    assert (
        template.render({"a": "It rained.", "b": "The road", "c": "New_York"})
        == "It rained the road New York It rained."
    )


@pytest.mark.parametrize("name", FILTERS)
def test_the_content_free_value_goes_through_every_filter(name: str) -> None:
    assert Template(f"{{a:{name}}}").render({"a": CONTENT_FREE}) == CONTENT_FREE


@pytest.mark.parametrize("name", FILTERS)
def test_filters_take_an_empty_text(name: str) -> None:
    assert Template(f"{{a:{name}}}").render({"a": ""}) == ""


def test_a_missing_field_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no field 'question'.*there is 'text', 'label'"):
        Template("Q: {question}").render({"text": "a", "label": "b"})


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("{a.b}", "isn't the name of a field"),
        ("{a[0]}", "isn't the name of a field"),
        ("{0}", "isn't the name of a field"),
        ("{}", "isn't the name of a field"),
        ("{a!r}", "isn't the name of a field"),
        ("{a:upper}", "has the filter .upper.; there is lower_first, no_period, spaced"),
        ("{a", "the template '{a'"),
    ],
)
def test_what_is_no_template_is_refused(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        Template(text)
