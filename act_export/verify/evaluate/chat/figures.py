"""What can be said of answers without a judge: how long, how repetitive, how likely, and right where that is known."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from act_export.tasks.metrics import exact_match
from act_export.tasks.statistics import best_gain_p, mean_interval
from act_export.verify.evaluate.chat.conversation import Turn
from act_export.verify.evaluate.chat.questions import ChatQuestion

LUCK = 0.05
_GRAM = 4
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


@dataclass(frozen=True)
class Figure:
    """A number that answers have.

    Attributes:
        name: In JSON.
        title: In a table.
        better: 1 where more is better, -1 where less is, 0 where neither is.
        share: Whether it is a share, in [0, 1].
        tolerance: A change for the worse by this much is none.
    """

    name: str
    title: str
    better: int
    share: bool = True
    tolerance: float = 0.0


FIGURES = (
    Figure("tokens", "tokens of an answer", 0, share=False),
    Figure("at_limit", "answers at the limit", -1),
    Figure("distinct_1", "distinct-1", 1),
    Figure("distinct_2", "distinct-2", 1),
    Figure("repeated", "most repeated 4-gram", -1),
    Figure("log_likelihood", "log-likelihood of a token", 1, share=False, tolerance=0.1),
    Figure("right", "as the reference", 1),
)


@dataclass(frozen=True)
class Change:
    """A figure of both models, on the same questions.

    Attributes:
        figure: Which.
        questions: That have it.
        plain: Mean over them, each the mean over its turns.
        calibrated: The same.
        difference: Calibrated minus plain.
        interval: 95% interval of the difference, by a paired bootstrap over the questions.
        p: How often luck alone would make it this much worse, by a permutation test; None where no direction is.
    """

    figure: Figure
    questions: int
    plain: float
    calibrated: float
    difference: float
    interval: tuple[float, float]
    p: float | None


@dataclass(frozen=True)
class ChatComparison:
    """A calibration beside the plain model.

    Attributes:
        calibration: Its name.
        answers: Number of answers of each model.
        differing: Those whose texts differ.
        changes: Of all figures that the questions have.
    """

    calibration: str
    answers: int
    differing: int
    changes: tuple[Change, ...]

    @property
    def worse(self) -> tuple[Change, ...]:
        """What got worse beyond luck, for which there are as many chances as figures."""
        return tuple(each for each in self._judged if each.p is not None and each.p * len(self._judged) <= LUCK)

    @property
    def can_tell(self) -> bool:
        """Whether there are enough questions for something to be beyond luck."""
        return any(len(self._judged) * 0.5**each.questions <= LUCK for each in self._judged)

    @property
    def verdict(self) -> str:
        """In words."""
        if self.worse:
            return f"worse than plain beyond luck: {', '.join(each.figure.title for each in self.worse)}"
        if not self.can_tell:
            return f"{self.changes[0].questions} questions are too few to tell luck from a change"
        return "no worse than plain within luck"

    @property
    def _judged(self) -> list[Change]:
        return [each for each in self.changes if each.p is not None]


def compare_chats(
    calibration: str,
    questions: Sequence[ChatQuestion],
    plain: Sequence[Sequence[Turn]],
    calibrated: Sequence[Sequence[Turn]],
) -> ChatComparison:
    """Compares the answers of two models.

    Args:
        calibration: Name of the second.
        questions: One or more.
        plain: By question, the answers to its turns.
        calibrated: The same.
    """
    by_question = [
        [figures_of(*each) for each in zip(*answers, question.references, strict=True)]
        for question, *answers in zip(questions, plain, calibrated, strict=True)
    ]
    pairs = [turns for answers in zip(plain, calibrated, strict=True) for turns in zip(*answers, strict=True)]
    changes = [_change(figure, by_question) for figure in FIGURES]
    return ChatComparison(
        calibration,
        len(pairs),
        sum(first.text != second.text for first, second in pairs),
        tuple(change for change in changes if change is not None),
    )


def figures_of(plain: Turn, calibrated: Turn, reference: str) -> Mapping[str, tuple[float, float]]:
    """By figure, that of the plain model's answer and of the calibrated one's, to the same turn.

    Longer texts repeat themselves more, so distinct-1 and distinct-2 (Li et al. 2016) are of as many tokens of both as
    the shorter answer has.

    Args:
        plain: An answer.
        calibrated: The other.
        reference: What is right; "" where that isn't known.
    """
    both = (plain, calibrated)
    common = min(len(turn.tokens) for turn in both)
    found = {
        "tokens": [float(len(turn.tokens)) for turn in both],
        "at_limit": [float(not turn.ended) for turn in both],
        "distinct_1": [distinct(turn.tokens[:common], 1) for turn in both],
        "distinct_2": [distinct(turn.tokens[:common], 2) for turn in both],
        "repeated": [repeated(turn.tokens) for turn in both],
        "log_likelihood": [turn.log_likelihood for turn in both],
    }
    if reference.strip():
        found["right"] = [is_right(turn.text, reference) for turn in both]
    return {name: (first, second) for name, (first, second) in found.items()}


def distinct(tokens: Sequence[int], size: int) -> float:
    """Different n-grams of so many tokens, by all there are; 1 where there is none."""
    grams = _grams(tokens, size)
    return len(set(grams)) / len(grams) if grams else 1.0


def repeated(tokens: Sequence[int]) -> float:
    """Largest share of the tokens that lie in one 4-gram that is there more than once; 0 where none is."""
    grams = _grams(tokens, _GRAM)
    most = 0
    for gram, count in Counter(grams).items():
        if count > 1 and count * _GRAM > most:
            starts = [start for start, each in enumerate(grams) if each == gram]
            most = max(most, len({start + place for start in starts for place in range(_GRAM)}))
    return most / len(tokens) if most else 0.0


def is_right(text: str, reference: str) -> float:
    """1 where an answer is the reference, see `act_export.tasks.metrics`, or ends in the same number; else 0."""
    numbers = [_NUMBER.findall(each) for each in (text, reference)]
    same_number = all(numbers) and len({Decimal(found[-1].replace(",", "")) for found in numbers}) == 1
    return float(same_number or exact_match(text, [reference]) == 1)


def _grams(tokens: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]


def _change(figure: Figure, by_question: Sequence[Sequence[Mapping[str, tuple[float, float]]]]) -> Change | None:
    """The change of a figure; None where no question has it."""
    plain, calibrated = [], []
    for turns in by_question:
        values = [found[figure.name] for found in turns if figure.name in found]
        if values:
            plain.append(sum(first for first, _ in values) / len(values))
            calibrated.append(sum(second for _, second in values) / len(values))
    if not plain:
        return None
    differences = [after - before for before, after in zip(plain, calibrated, strict=True)]
    worse = [-figure.better * difference - figure.tolerance for difference in differences]
    return Change(
        figure,
        len(plain),
        sum(plain) / len(plain),
        sum(calibrated) / len(plain),
        sum(differences) / len(plain),
        mean_interval([differences]),
        best_gain_p([0.0] * len(worse), [worse]) if figure.better else None,
    )
