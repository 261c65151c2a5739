"""Answers before and after calibration, to show on the page: to the first prompts on which the two differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from act_export.attention.fast_attention import FastAttention
from act_export.attention.hook import attention_hook
from act_export.calibration.file import Calibration
from act_export.checkpoint.load import Checkpoint
from act_export.checkpoint.stop_tokens import stop_tokens
from act_export.profile.answer_pair import AnswerPair, AnswerPairs
from act_export.progress import Progress
from act_export.tasks import EncodedExample, Example, TaskExamples
from act_export.tasks.batching import Batching
from act_export.tasks.generation import generate_answers
from act_export.tasks.language_model import TorchLanguageModel
from act_export.tasks.metrics import exact_match
from act_export.tasks.scoring import predicted_choice, score_choices

SHOWN = 3
TRIED = 12
NEW_TOKENS = 24
NO_CHOICE = "(none of the choices)"

_Said = tuple[str, bool | None]  # an answer, and whether it is right; None where that isn't known


@dataclass(frozen=True)
class AskedSource:
    """Prompts of one source.

    Attributes:
        name: The source's.
        encoded: The prompts, at least one, with room for `NEW_TOKENS` more.
        examples: The same as texts, where they are questions; else none.
        task: How they are answered; None where no answers are known.
    """

    name: str
    encoded: Sequence[EncodedExample]
    examples: Sequence[Example] = ()
    task: TaskExamples | None = None


def answer_pairs(
    checkpoint: Checkpoint,
    asked: Sequence[AskedSource],
    calibration: Calibration,
    *,
    batch_tokens: int,
    progress: Progress | None = None,
) -> AnswerPairs | None:
    """The first `SHOWN` prompts whose answers differ among the first `TRIED`, of each source in turn.

    Where fewer differ, others that were tried follow. Answers are greedy, and no longer than `NEW_TOKENS`.

    Args:
        checkpoint: The model, with its tokenizer.
        asked: The sources.
        calibration: For the answers after.
        batch_tokens: Positions that run together at the most.
        progress: Called before each model's answers to a source.

    Returns:
        None where there is no prompt.
    """
    found: list[list[AnswerPair]] = []
    for number, source in enumerate(asked):
        sides = []
        for side, chosen in enumerate((None, calibration)):
            if progress is not None:
                progress(f"{source.name}, answers before and after", (2 * number + side) / (2 * len(asked)))
            sides.append(_answers(checkpoint, source, chosen, Batching(None, batch_tokens)))
        found.append(list(_pairs(checkpoint, source, *sides)))
    tried = [pair for pair in chain.from_iterable(zip_longest(*found)) if pair is not None][:TRIED]
    shown = sorted(tried, key=lambda pair: pair.same)[:SHOWN]
    return AnswerPairs(tuple(shown), len(tried), sum(not pair.same for pair in tried)) if tried else None


def _answers(
    checkpoint: Checkpoint, source: AskedSource, calibration: Calibration | None, batching: Batching
) -> list[_Said]:
    assert checkpoint.tokenizer is not None  # or nothing could have been encoded
    generation = source.task.generation if source.task is not None else None
    with attention_hook(checkpoint.model, FastAttention(calibration)) as hooked:
        model = TorchLanguageModel(hooked)
        if source.task is not None and generation is None:
            per_token = source.task.length_normalized
            rows = score_choices(model, source.encoded, batching, length_normalized=per_token)
            return [_choice(predicted_choice(row), e) for row, e in zip(rows, source.examples, strict=True)]
        texts = generate_answers(
            model,
            source.encoded,
            batching,
            tokenizer=checkpoint.tokenizer,
            max_new_tokens=NEW_TOKENS if generation is None else min(NEW_TOKENS, generation.max_new_tokens),
            stop=() if generation is None else generation.stop,
            stop_tokens=stop_tokens(checkpoint),
        )
    if generation is None or generation.max_new_tokens > NEW_TOKENS:  # what is cut off may be wrong for that alone
        return [(text, None) for text in texts]
    return [(text, exact_match(text, e.references) == 1) for text, e in zip(texts, source.examples, strict=True)]


def _choice(index: int, example: Example) -> _Said:
    return example.choices[index].strip() if index < len(example.choices) else NO_CHOICE, index == example.answer


def _pairs(
    checkpoint: Checkpoint, source: AskedSource, before: Sequence[_Said], after: Sequence[_Said]
) -> Iterator[AnswerPair]:
    tokenizer = checkpoint.tokenizer
    for number, ((plain, plain_right), (calibrated, right)) in enumerate(zip(before, after, strict=True)):
        assert tokenizer is not None
        prompt = str(tokenizer.decode(list(source.encoded[number].prompt), skip_special_tokens=True))
        expected = ""
        if source.task is not None:
            example = source.examples[number]
            expected = " / ".join(example.references[:3]) or example.choices[example.answer].strip()
        yield AnswerPair(source.name, prompt, plain, calibrated, expected, plain_right, right)
