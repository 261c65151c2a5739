"""What an evaluation is asked for: files, tasks and data, and how their questions are put."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from act_export.runtime.device import Device
from act_export.verify.held_out import DEFAULT_SPLIT, SPLITS, EvaluationError


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate, and how.

    Attributes:
        file: The exported model, or its folder.
        against: A plain export of the same model to compare with; None for none.
        tasks: Names of tasks, or paths of task files.
        data: JSON Lines files of questions.
        split: "report", "held-out" or "all", see `act_export.verify.held_out`.
        seed: Of the splits and of the shots; None for that of the file's own search, or 0.
        scoring: How answers are told, see `act_export.tasks.TaskOptions`; None for each task's own.
        shots: Examples before each question.
        chat: Put prompts into the tokenizer's chat template.
        truncate: Cut prompts that are too long, on the left.
        limit: Questions of each task at the most; None for all.
        batch_tokens: Tokens that run together at the most; None leaves it to act-export.
        portable: Run the portable functions, not the native library.
        device: "cpu", "cuda" or "cuda:N".
        tokenizer: Where the tokenizer is; None looks beside the file, then where the model came from.
        trust_remote_code: Whether code that comes with the tokenizer may run.
    """

    file: Path
    against: Path | None = None
    tasks: tuple[str, ...] = ()
    data: tuple[Path, ...] = ()
    split: str = DEFAULT_SPLIT
    seed: int | None = None
    scoring: str | None = None
    shots: int = 0
    chat: bool = False
    truncate: bool = False
    limit: int | None = None
    batch_tokens: int | None = None
    portable: bool = False
    device: str = "cpu"
    tokenizer: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Raises EvaluationError for a value out of range, SessionError for a device that isn't one."""
        Device.parse(self.device)
        if self.split not in SPLITS:
            raise EvaluationError(f"there is no split {self.split!r}; pass report, held-out or all")
        if not self.tasks and not self.data:
            raise EvaluationError("there is nothing to evaluate on; pass a task or a data file")
        for name, value in (("limit", self.limit), ("batch tokens", self.batch_tokens)):
            if value is not None and value < 1:
                raise EvaluationError(f"{name} is {value}; give 1 or more")
