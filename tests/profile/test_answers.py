"""Answers before and after: what is said, which are shown, and what the page makes of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from profiles import random_profile, some_answers
from tiny import CALIBRATION, tiny_checkpoint, tiny_tokenizer

from act_export.attention.hook import attention_hook
from act_export.attention.reference_attention import ReferenceAttention
from act_export.calibration.file import Calibration
from act_export.profile import answers as module
from act_export.profile.answer_pair import AnswerPairs
from act_export.profile.answers import AskedSource, answer_pairs
from act_export.profile.job import ProfileJob, load_prompts, run_profile
from act_export.profile.report.answers import answers_section
from act_export.tasks import EncodedExample, Example, Generation, Questions, TaskExamples, encode_examples

STRONG = Calibration({0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}, 0.0, 0.01)


@pytest.fixture(scope="module")
def checkpoint():
    return replace(tiny_checkpoint(), tokenizer=tiny_tokenizer())


def questions(checkpoint, count: int = 6) -> tuple[list[Example], list[EncodedExample]]:
    words = ["a", "the cat", "on a mat", "is here", "and there", "12", "or not"]
    examples = [
        Example(f"{first} {second}:", ("b", "c", "d"), n % 3)
        for n, (first, second) in enumerate(list(product(words, words))[:count])
    ]
    return examples, encode_examples(checkpoint.tokenizer, examples)


def logits(checkpoint, ids, calibration) -> torch.Tensor:
    """By the reference, in one pass: of all positions."""
    with attention_hook(checkpoint.model, ReferenceAttention(calibration)) as hooked, torch.no_grad():
        tokens = torch.tensor([ids])
        return hooked(tokens, torch.ones_like(tokens), None).logits[0].log_softmax(-1)


def test_choices_are_the_likeliest_by_the_reference(checkpoint):
    examples, encoded = questions(checkpoint, 12)
    task = TaskExamples("mine", tuple(examples))
    found = answer_pairs(
        checkpoint, [AskedSource("mine", encoded, examples, task)], STRONG, batch_tokens=500, progress=None
    )
    by_prompt = {pair.prompt: pair for pair in found.shown}
    differing = 0
    for example, tokens in zip(examples, encoded, strict=True):
        said = []
        for calibration in (None, STRONG):
            after = logits(checkpoint, tokens.prompt, calibration)[-1]
            assert all(len(choice) == 1 for choice in tokens.choices)
            said.append(max(range(3), key=lambda n: after[tokens.choices[n][0]].item()))
        differing += said[0] != said[1]
        pair = by_prompt.get(checkpoint.tokenizer.decode(list(tokens.prompt), skip_special_tokens=True))
        if pair is not None:
            assert [pair.plain, pair.calibrated] == [example.choices[n].strip() for n in said]
            assert [pair.plain_right, pair.calibrated_right] == [n == example.answer for n in said]
            assert pair.right == example.choices[example.answer].strip()
    assert (found.tried, found.differing) == (12, differing)
    assert len(by_prompt) == 3


def test_texts_go_on_as_the_model_itself_generates(checkpoint):
    ids = tuple(checkpoint.tokenizer("the cat on a mat is here").input_ids)
    found = answer_pairs(checkpoint, [AskedSource("t", [EncodedExample(ids, (), 0)])], CALIBRATION, batch_tokens=500)
    generated = checkpoint.model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
    (pair,) = found.shown
    assert pair.plain == checkpoint.tokenizer.decode(generated, skip_special_tokens=True)
    assert (pair.plain_right, pair.calibrated_right, pair.right) == (None, None, "")


def test_a_written_answer_is_judged_only_where_it_is_whole(checkpoint):
    examples = [Example("the cat", ("x",), 0, references=("x", "y"))]
    encoded = encode_examples(checkpoint.tokenizer, examples)
    for tokens, known in ((4, True), (40, False)):
        task = TaskExamples("w", tuple(examples), generation=Generation(tokens, ("\n",), "exact"))
        (pair,) = answer_pairs(
            checkpoint, [AskedSource("w", encoded, examples, task)], CALIBRATION, batch_tokens=500
        ).shown
        assert (pair.plain_right is not None) == known
        assert pair.right == "x / y"


@pytest.mark.parametrize(
    ("after", "shown", "differing"),
    [("abcdef", "abc", 0), ("abcdeX", "fab", 1), ("XbXdXX", "ace", 4), ("aXcdef", "bac", 1)],
)
def test_those_that_differ_lead(checkpoint, monkeypatch, after, shown, differing):
    encoded = [EncodedExample(tuple(checkpoint.tokenizer(f"prompt {n}").input_ids), (), 0) for n in "abcdef"]
    sides = iter(([(letter, None) for letter in "abcdef"], [(letter, None) for letter in after]))
    monkeypatch.setattr(module, "_answers", lambda *_: next(sides))
    found = answer_pairs(checkpoint, [AskedSource("s", encoded)], CALIBRATION, batch_tokens=1)
    assert "".join(pair.plain for pair in found.shown) == shown
    assert (found.tried, found.differing) == (6, differing)


@pytest.mark.parametrize("answers", [True, False])
def test_a_profile_has_them_where_it_has_a_calibration(checkpoint, tmp_path, answers):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "the {n}", "choices": [" b", " c"], "answer": 0}}\n' for n in range(8)))
    text = tmp_path / "text.txt"
    text.write_text("the cat on a mat is here and there " * 20)
    job = ProfileJob(Questions((), (rows,)), texts=(text,), length=60, effects=False, answers=answers)
    steps = []
    for calibration in (None, CALIBRATION):
        steps.clear()
        found = run_profile(
            checkpoint,
            job,
            load_prompts(job),
            calibration=calibration,
            progress=lambda step, done: steps.append((done, step)),
        ).answers
        assert (found is not None) == (answers and calibration is not None)
        assert steps == sorted(steps, key=lambda step: step[0])
        if found is not None:
            assert {pair.source for pair in found.shown} <= {"rows.jsonl", "text.txt"}
            assert found.tried == 12
            assert any("answers before and after" in step for _, step in steps)


def test_prompts_that_leave_no_room_for_an_answer_are_left_out(checkpoint, tmp_path):
    job = ProfileJob(Questions((), (tmp_path / "rows.jsonl",)), effects=False)
    for lengths, tried in ((range(240, 248), None), ((245, 20, 246, 30), 2)):
        prompts = "".join(f'{{"prompt": "{"x" * length}"}}\n' for length in lengths)
        (tmp_path / "rows.jsonl").write_text(prompts)
        found = run_profile(checkpoint, job, load_prompts(job), calibration=CALIBRATION).answers
        assert (found and found.tried) == tried


def section(answers: AnswerPairs | None, shown: Calibration | None = CALIBRATION) -> str:
    profile = random_profile(2, 4, calibration=CALIBRATION)
    return answers_section(replace(profile, answers=answers), shown)


def test_the_page_marks_what_differs_and_says_what_is_right():
    found = section(some_answers("sst2", ("<b>", "\u202e")))
    assert "<h4>Plain: wrong</h4>" in found
    assert "<h4>Calibrated: right</h4>" in found
    assert "<mark>negative</mark>" in found
    assert "It is a <mark>town</mark>\nin the <mark>north.</mark>" in found
    assert "It is a <mark>city</mark>\nin the <mark>north, and old.</mark>" in found
    assert "&lt;b&gt;" in found
    assert "\u202e" not in found
    assert "(nothing)" in found
    assert "Of the 12 prompts that were tried, 2 are answered otherwise" in found


def test_the_page_says_where_all_are_the_same():
    alike = some_answers("sst2").shown[2:]
    assert "the same answer to the 9 prompts that were tried." in section(AnswerPairs(alike, 9, 0))
    assert "the same answer to the one prompt that was tried." in section(AnswerPairs(alike, 1, 0))
    assert "<mark>" not in section(AnswerPairs(alike, 9, 0))


def test_the_page_has_no_answers_of_another_calibration():
    answers = some_answers("sst2")
    assert section(None) == section(answers, None) == section(answers, Calibration({0: (3,)})) == ""
