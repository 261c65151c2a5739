"""What an evaluation is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from act_export.errors import ActExportError
from act_export.runtime.device import Device
from act_export.tasks import Questions
from act_export.verify.evaluate.held_out import DEFAULT_SPLIT, SPLITS

CALIBRATED, PLAIN = "calibrated", "plain"  # the two sides


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate, and how.

    Attributes:
        file: The exported model, or its folder.
        against: Another file of the same model to compare with; None for this one without calibration.
        questions: What to ask, and how. Without a seed, that of the file's own search.
        split: "report", "held-out" or "all", see `act_export.verify.evaluate.held_out`.
        limit: Questions of each task at the most; None for all.
        batch_tokens: Tokens that run together at the most; None leaves it to act-export.
        portable: Run the portable functions, not the native library.
        device: "cpu", "cuda" or "cuda:N".
        tokenizer: Where the tokenizer is; None looks beside the file, then where the model came from.
        trust_remote_code: Whether code that comes with the tokenizer may run.
        calibration: Name of one of the file's calibrations, or a calibration file; None for the file's default.
    """

    file: Path
    against: Path | None = None
    questions: Questions = field(default_factory=Questions)
    split: str = DEFAULT_SPLIT
    limit: int | None = None
    batch_tokens: int | None = None
    portable: bool = False
    device: str = "cpu"
    tokenizer: str | None = None
    trust_remote_code: bool = False
    calibration: str | None = None

    def __post_init__(self) -> None:
        """Raises ActExportError for a value out of range, SessionError for a device that isn't one."""
        Device.parse(self.device)
        if self.split not in SPLITS:
            raise ActExportError(f"there is no split {self.split!r}; pass report, held-out or all")
        if not self.questions.sources:
            raise ActExportError("there is nothing to evaluate on; pass a task or a data file")
        for name, value in (("limit", self.limit), ("batch tokens", self.batch_tokens)):
            if value is not None and value < 1:
                raise ActExportError(f"{name} is {value}; give 1 or more")
