"""How tools/check_gpu runs programs, with a time limit each, and what it notes of them.

Nothing is imported that isn't Python's own: the check can't be brought down by what it checks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
PASSED, FAILED, SKIPPED, NOT_FOUND = "passed", "failed", "skipped", "not found"
RECIPE = "llama-2-7b-chat-classification"
RECIPE_LAYERS = 32
FIRST_LAYERS = 3  # so many hold the first heads of the recipe

Report = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the result."""

    step: str
    result: str
    detail: str


@dataclass
class Check:
    """What the steps share.

    Attributes:
        out: Folder of logs and results.
        device: "cuda", "cuda:N", or "cpu" to try the check itself.
        library: Native library; None until it is found or built.
        limit_s: Of a program that takes longest; others have less.
        dtypes: Types to check.
        cases: Words that a case's name must have.
        quick: Fewer rounds and lengths.
        model: "auto", "yes" or "no".
        layers: Of the random model.
        environment: What gpu_environment.py said.
        rows: Results so far.
        markdown: Tables of benchmarks.
        measurements: Their numbers.
    """

    out: Path
    device: str = "cuda"
    library: Path | None = None
    limit_s: float = 1800
    dtypes: Sequence[str] = ("float32", "float16", "bfloat16")
    cases: Sequence[str] = ()
    quick: bool = False
    model: str = "auto"
    layers: int = RECIPE_LAYERS
    environment: Report = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    markdown: list[str] = field(default_factory=list)
    measurements: Report = field(default_factory=dict)

    def add(self, step: str, result: str, detail: str) -> None:
        """Notes and says one result."""
        self.rows.append(Row(step, result, detail))
        print(f"{step}: {result}, {detail}", file=sys.stderr, flush=True)

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is checked."""
        return self.device != "cpu"

    @property
    def library_options(self) -> list[str]:
        """For the other tools."""
        return [] if self.library is None else ["--library", str(self.library)]


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        code: Exit code, negative for a signal; None where it ran past its time limit.
        seconds: That it ran.
        output: Of standard output.
        last_words: The last lines of standard error, or of the output where there are none.
    """

    code: int | None
    seconds: float
    output: str
    last_words: str

    @property
    def how(self) -> str:
        """In words."""
        if self.code is None:
            return f"stopped after its time limit of {self.seconds:.0f} s"
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        return f"exit code {self.code}"

    @property
    def failure(self) -> str:
        """How it ended, and its last words."""
        return f"{self.how}: {self.last_words}" if self.last_words else self.how


def run(name: str, command: Sequence[object], check: Check, limit_s: float | None = None, path: str = "") -> Outcome:
    """Runs a program with this checkout's package; its output goes to NAME.out and NAME.log too.

    Args:
        name: Of the files.
        command: Program and arguments.
        check: Whose folder and time limit.
        limit_s: Another limit, if that is shorter.
        path: Folder to import the package from, in place of the checkout.
    """
    limit_s = min(limit_s or check.limit_s, check.limit_s)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (path or str(ROOT), inherited_path())))}
    said, log = check.out / f"{name}.out", check.out / f"{name}.log"
    print(f"{name} ...", file=sys.stderr, flush=True)
    began = time.monotonic()
    with said.open("w", encoding="utf-8") as output, log.open("w", encoding="utf-8") as errors:
        # A session of its own: a time limit ends its children too. Not in the checkout: -m would import from there.
        child = subprocess.Popen(
            list(map(str, command)),
            stdout=output,
            stderr=errors,
            env=environment,
            cwd=check.out,
            start_new_session=True,
        )
        try:
            code: int | None = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    text = said.read_text(encoding="utf-8", errors="replace")
    complaints = log.read_text(encoding="utf-8", errors="replace").strip() or text.strip()
    last_words = " ".join(complaints.splitlines()[-3:])[-500:]
    return Outcome(code, time.monotonic() - began, text, last_words)


def inherited_path() -> str:
    return os.environ.get("PYTHONPATH", "")


def python(script: str, *arguments: object) -> list[object]:
    """Command line of a script of this folder."""
    return [sys.executable, TOOLS / script, *arguments]


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(header), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )
