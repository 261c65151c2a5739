"""The answers of the plain and of the calibrated model to the same prompts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AnswerPair:
    """A prompt, and what is said to it.

    Attributes:
        source: Name of the prompt's source.
        prompt: Its text.
        plain: The greedy answer of the plain model: a choice where there are some, else its first tokens.
        calibrated: Of the calibrated model.
        right: The right answer, or several by " / "; empty where none is known.
        plain_right: Whether the plain model's answer is right; None where that isn't known.
        calibrated_right: The same of the calibrated model's.
    """

    source: str
    prompt: str
    plain: str
    calibrated: str
    right: str = ""
    plain_right: bool | None = None
    calibrated_right: bool | None = None

    @property
    def same(self) -> bool:
        """Whether both say the same."""
        return self.plain == self.calibrated


@dataclass(frozen=True)
class AnswerPairs:
    """Some of the prompts that were tried.

    Attributes:
        shown: Those to show; where the two models' answers differ first.
        tried: How many were tried.
        differing: On how many of them the two differ.
    """

    shown: tuple[AnswerPair, ...]
    tried: int
    differing: int
