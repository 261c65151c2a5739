"""What a profile is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from act_export.calibration.file import DEFAULT_THRESHOLD, Calibration
from act_export.errors import ActExportError
from act_export.profile.sink_statistics import ABSOLUTE, ALL, RELATIVE
from act_export.tasks import EncodedExample

if TYPE_CHECKING:
    from torch import Tensor

BATCH_TOKENS = 2048

EffectsOf = Callable[[Sequence[EncodedExample]], "Tensor"]
"""Gives the gradient of a batch of questions for every head's gate, summed over the batch: (layers, heads)."""


@dataclass(frozen=True)
class PromptSource:
    """Prompts that are profiled together.

    Attributes:
        name: A task's, or a file's.
        prompts: Token ids, one tuple per prompt.
        questions: The same prompts with their answers, where effects are measured; else none.
        effects: Measures effects on the questions; None where they aren't.
        form: All that decides what `effects` gives, besides the model and the questions; JSON.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    questions: tuple[EncodedExample, ...] = ()
    effects: EffectsOf | None = None
    form: str = ""


@dataclass(frozen=True)
class ProfileOptions:
    """What counts as a sink, and how prompts run.

    Attributes:
        absolute_threshold: tau.
        relative_threshold: alpha: a sink score counts where it is above alpha / tokens of the prompt.
        batch_tokens: Positions that run together at the most, padding included; one prompt alone may have more.
    """

    absolute_threshold: float = DEFAULT_THRESHOLD[ABSOLUTE]
    relative_threshold: float = DEFAULT_THRESHOLD[RELATIVE]
    batch_tokens: int = BATCH_TOKENS

    def __post_init__(self) -> None:
        """Raises CalibrationError or ActExportError for a value out of range, naming it."""
        for mode, threshold in self.thresholds.items():
            Calibration({}, threshold=threshold, threshold_mode=mode)
        if self.batch_tokens < 1:
            raise ActExportError(f"batch_tokens is {self.batch_tokens}; it must be at least 1")

    @property
    def thresholds(self) -> dict[str, float]:
        """By mode."""
        return {ABSOLUTE: self.absolute_threshold, RELATIVE: self.relative_threshold}


USUAL = ProfileOptions()


def check_names(names: Sequence[str]) -> None:
    """Raises ActExportError if two sources have the same name, or one that is taken."""
    for name in names:
        if names.count(name) > 1 or name == ALL:
            taken = "is taken: it stands for all prompts together" if name == ALL else "names two sources"
            raise ActExportError(f"the name {name!r} {taken}; rename a file")
