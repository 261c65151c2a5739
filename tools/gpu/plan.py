"""What runs on a GPU machine, each step with a limit of its own, and its results written as they come.

The machine may be had for minutes, once: one call does everything, what fails or hangs costs its own limit alone, and
what was found until then is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("", "tests", "tools/gpu", "tools/bench", "tools/bench/attention")  # folders with what the steps import
LIMIT_S = 480  # of all steps together
OUTPUT_CHARACTERS = 4000  # of a step's output that are kept: its end
RESULT = "CHECK_GPU_RESULT"  # environment: the file that a step writes what it found to, again and again if it likes
OK, FAILED, TIMED_OUT, SKIPPED = "ok", "failed", "timed out", "skipped"


@dataclass(frozen=True)
class Step:
    """One program.

    Attributes:
        name: In the results.
        command: What Python runs, from the repository's root.
        limit_s: Seconds after which it is ended.
        stops: Nothing else is worth running where it fails.
        environment: Variables of its own.
    """

    name: str
    command: tuple[str, ...]
    limit_s: int
    stops: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def _benchmark(name: str, limit_s: int, *options: str, **environment: str) -> Step:
    command = ("tools/bench/attention/bench_attention.py", "--device", "cuda", *options)
    return Step(name, command, limit_s, environment=environment)


_GRAPHS = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-n", "1", "--timeout-method", "thread")
_HOPPER = {"ACT_CUDA_FORWARD": "hopper"}
_OTHERS = {"ORT_ENABLE_CUDNN_FLASH_ATTENTION": "0", "ORT_ENABLE_XQA": "0"}
STEPS = (
    Step("machine", ("tools/gpu/machine.py",), 25),
    Step("images", ("tools/gpu/harness_steps.py", "images"), 25, stops=True),
    Step("parity", ("tools/gpu/harness_steps.py", "parity"), 65),
    Step("memcheck", ("tools/gpu/harness_steps.py", "sanitize", "memcheck"), 40),
    Step("racecheck", ("tools/gpu/harness_steps.py", "sanitize", "racecheck"), 40),
    Step("times", ("tools/gpu/times.py",), 75),
    Step("graphs", (*_GRAPHS, "tests/gpu/test_gpu_parity.py", "-k", "replayed_graph or layouts"), 45),
    _benchmark("operator, prompts", 35, "--work", "prompt"),
    _benchmark("operator, prompts, Flash-2", 30, "--work", "prompt", **_OTHERS),
    _benchmark("operator, decode, graph", 30, "--work", "decode", "--cuda-graph"),
    _benchmark("operator, decode, graph, no XQA", 20, "--work", "decode", "--cuda-graph", **_OTHERS),
    # Last: it hasn't been run on a GPU, and may hang.
    Step("parity, hopper", ("tools/gpu/harness_steps.py", "hopper"), 20, environment=_HOPPER),
    Step("times, hopper", ("tools/gpu/times.py", "prompt"), 25, environment=_HOPPER),
)


@dataclass
class Outcome:
    """What became of a step."""

    name: str
    status: str
    limit_s: int
    seconds: float = 0.0
    output: str = ""
    result: Any = None


def run(
    out: Path,
    steps: Sequence[Step] = STEPS,
    *,
    limit_s: float = LIMIT_S,
    environment: Mapping[str, str] = os.environ,
    say: Callable[[str], object] = print,
) -> list[Outcome]:
    """Runs steps one after the other; `out/results.json` is written anew after each.

    Args:
        out: A folder, made where it isn't there.
        steps: In order.
        limit_s: Of all together: what comes after is skipped, and the step that it comes in ended.
        environment: Of the steps.
        say: Gets a line for each.
    """
    out.mkdir(parents=True, exist_ok=True)
    begin, outcomes, stopped = time.monotonic(), [], ""
    for step in steps:
        left = limit_s - (time.monotonic() - begin)
        reason = stopped or ("no time is left" if left < 1 else "")
        if reason:
            outcome = Outcome(step.name, SKIPPED, step.limit_s, output=reason)
        else:
            outcome = _run_step(step, out, min(step.limit_s, left), environment)
            if step.stops and outcome.status != OK:
                stopped = f"{step.name} {outcome.status}"
        outcomes.append(outcome)
        say(f"{outcome.name}: {outcome.status}, {outcome.seconds:.0f} of {outcome.limit_s} s")
        _write(out / "results.json", {"limit_s": limit_s, "steps": [asdict(one) for one in outcomes]})
    return outcomes


def _run_step(step: Step, out: Path, limit_s: float, environment: Mapping[str, str]) -> Outcome:
    result, log = out / "step.json", out / "step.log"
    result.unlink(missing_ok=True)
    begin = time.monotonic()
    command = [sys.executable, *step.command]
    if step.command[0].startswith("tools/bench/"):
        command += ["--json", str(result)]
    folders = [str(ROOT / folder) for folder in MODULES]
    path = os.pathsep.join([*folders, *filter(None, [environment.get("PYTHONPATH")])])
    variables = {**environment, **step.environment, RESULT: str(result), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = OK if process.wait(limit_s) == 0 else FAILED
        except subprocess.TimeoutExpired:
            status = TIMED_OUT
        finally:
            _end(process)
    seconds = round(time.monotonic() - begin, 1)
    output = log.read_text(encoding="utf-8", errors="replace")[-OUTPUT_CHARACTERS:]
    return Outcome(step.name, status, step.limit_s, seconds, output, _read(result))


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write_result(found: object) -> None:
    """What a step found so far, for the results; the file is whole at any time."""
    _write(Path(os.environ[RESULT]), found)


def _write(path: Path, content: object) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    beside.replace(path)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # it wrote none, or was ended while it did
        return None
