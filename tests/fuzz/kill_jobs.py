#!/usr/bin/env python3
"""Kills jobs at random times, and checks that doing them again gives what an undisturbed run gives, and leaves nothing.

    tests/fuzz/kill_jobs.py [--job export|graft|search|conversion ...] [--times 10] [--seed 0]

A job is a command on a tiny model. Its process gets SIGKILL at times spread over those that it takes, and every third
time while a result is put together; each time in folders of its own: for the output, the cache and temporary files.
Every second time there is an older output already, made with another calibration. After the kill, the output must be
the older one whole, the new one whole, or without a graph.
The same command then runs to its end. What is there afterwards must be what an undisturbed run left: the same files
with the same bytes in the output, and nothing else in the three folders.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / name) for name in (".", "checkpoint/gguf")]  # where the tiny models are
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import act_export.export.job
import act_export.search.job  # noqa: F401
from act_export.calibration.file import Calibration
from act_export.commands.main import main as act_export_main
from act_export.graft.job import graft  # noqa: F401
from act_export.staging import is_staging

OUTPUT = "output"
_WRITING_S = 0.05


@dataclass(frozen=True)
class Job:
    """A command, and another one that writes something else to the same place."""

    command: list[str]
    older: list[str]


@dataclass(frozen=True)
class Run:
    """How a command ended: its exit code, negative for a signal, and the seconds it took."""

    code: int
    seconds: float


def export_job(inputs: Path) -> Job:
    from tiny import CALIBRATION, save_checkpoint

    return calibrated("export", save_checkpoint(inputs / "checkpoint"), CALIBRATION, inputs)


def graft_job(inputs: Path) -> Job:
    from foreign_models import CALIBRATION, Decoder

    return calibrated("graft", Decoder().save_folder(inputs / "model"), CALIBRATION, inputs)


def calibrated(command: str, model: Path, calibration: Calibration, inputs: Path) -> Job:
    """A command that takes a model and a calibration; the older output was made with another."""
    commands = []
    for name, strength in (("new", 0.5), ("older", 0.25)):
        file = inputs / f"{name}.json"
        calibration.with_overrides(beta=strength).save(file)
        commands.append([command, str(model), "--calibration", str(file), "--out", f"{OUTPUT}/model"])
    return Job(*commands)


def search_job(inputs: Path) -> Job:
    from planted import save_planted

    checkpoint, rows = save_planted(inputs)
    sizes = ["--rank", "40", "--choose", "50", "--report", "40", "--batch-tokens", "200"]
    command = ["search", str(checkpoint), "--data", str(rows), "--out", f"{OUTPUT}/found.json", *sizes, "--heads"]
    return Job([*command, "1,2"], [*command, "4"])


def conversion_job(inputs: Path) -> Job:
    from gguf_files import write
    from tiny import CALIBRATION, tiny_model

    CALIBRATION.save(inputs / "calibration.json")
    file = write(inputs / "model.gguf", tiny_model(vocab_size=260))  # as many as the tokens of the tokenizer
    command = ["export", str(file), "--no-verify", "--out", f"{OUTPUT}/model"]
    return Job([*command, "--plain"], [*command, "--calibration", str(inputs / "calibration.json")])


JOBS: dict[str, Callable[[Path], Job]] = {
    "export": export_job,
    "graft": graft_job,
    "search": search_job,
    "conversion": conversion_job,
}


def run(command: list[str], place: Path, *, kill_after_s: float | None = None, writing: bool = False) -> Run:
    """Runs a command of act-export in a fork of this process, with its folders in `place`.

    Args:
        command: Its arguments.
        place: Where the folders are.
        kill_after_s: When to kill it; None to let it end.
        writing: Count from when a result is begun to be put together.
    """
    for name in (OUTPUT, "cache", "temporary"):
        (place / name).mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            os.chdir(place)
            log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= {"XDG_CACHE_HOME": str(place / "cache"), "TMPDIR": str(place / "temporary")}
            tempfile.tempdir = None
            sys.argv = ["act-export", *command]
            act_export_main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    if kill_after_s is not None:
        while writing and not any(map(is_staging, place.rglob("*"))) and not has_ended(child):
            time.sleep(0.001)
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)  # or it ended before, and waits to be asked how
    _, status = os.waitpid(child, 0)
    return Run(os.waitstatus_to_exitcode(status), time.monotonic() - started)


def has_ended(child: int) -> bool:
    """Whether a process has ended; it can be waited for all the same."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def contents(place: Path) -> dict[str, str]:
    """What a run left: by name the digest of an output, and of all else just that it is there."""
    found = {}
    for folder in (OUTPUT, "cache", "temporary"):
        for path in sorted((place / folder).rglob("*")):
            name = str(path.relative_to(place))
            is_output = folder == OUTPUT and path.is_file()
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if is_output else "there"
    return found


def output_of(place: Path) -> dict[str, str]:
    """The output's files by name, each with its digest; those that are being put together left out."""
    folder = place / OUTPUT
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not any(map(is_staging, (path, *path.parents)))
    }


def fault_of(found: Mapping[str, str], older: Mapping[str, str], new: Mapping[str, str]) -> str:
    """What is wrong with an output after a kill, in words; empty where nothing is.

    It is that of the older run or the new one, or has no graph; of a search's, the file is either run's.
    """
    if found in (older, new) or not any(name.endswith((".onnx", "found.json")) for name in found):
        return ""
    mixed = sorted(name for name, digest in found.items() if digest not in (older.get(name), new.get(name)))
    return f"neither the older output nor the new one ({', '.join(mixed) or 'files of both, or of a part'})"


def check(job: str, times: int, seed: int, folder: Path) -> int:
    """Number of kills after which something was wrong."""
    inputs = folder / "inputs"
    inputs.mkdir(parents=True)
    made = JOBS[job](inputs)
    command = made.command
    for name, arguments in (("older", made.older), ("whole", command)):
        whole = run(arguments, folder / name)
        if whole.code != 0:
            sys.exit(f"{job} ends with code {whole.code} when nobody kills it:\n{(folder / name / 'log').read_text()}")
    older, new = output_of(folder / "older"), output_of(folder / "whole")
    if older == new:
        sys.exit(f"{job}: the older output is the new one, so that they can't be told apart")
    expected, drawn, wrong, killed = contents(folder / "whole"), random.Random(seed), 0, 0
    for number in range(times):
        place = folder / str(number)
        if number % 2:
            shutil.copytree(folder / "older" / OUTPUT, place / OUTPUT)
        writing = number % 3 == 0
        after_s = drawn.uniform(0, _WRITING_S) if writing else (number + drawn.random()) / times * whole.seconds
        first = run(command, place, kill_after_s=after_s, writing=writing)
        left = sorted(set(contents(place)) - set(expected))
        fault = fault_of(output_of(place), older if number % 2 else {}, new)
        again = run(command, place)
        found = contents(place)
        differences = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        killed += first.code == -signal.SIGKILL
        wrong += bool(fault or differences or again.code)
        ended = (
            f"killed after {after_s:.3f} s{' of writing' if writing else ''}"
            if first.code == -signal.SIGKILL
            else f"ended with code {first.code}"
        )
        over = ", over an older output" if number % 2 else ""
        result = ", ".join(differences) or "the same, and nothing left"
        print(
            f"{job} {number + 1}: {ended}{over}; {fault or 'nothing mixed'}, {len(left)} paths more; again: code "
            f"{again.code}, {result}",
            flush=True,
        )
    print(
        f"{job}: {whole.seconds:.2f} s undisturbed; killed {killed} of {times} times, wrong {wrong} times", flush=True
    )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", action="append", choices=JOBS, help="repeatable; default: all")
    parser.add_argument("--times", type=int, default=10, help="kills of each job")
    parser.add_argument("--seed", type=int, default=0, help="of the times")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-jobs-") as folder:
        wrong = [check(job, arguments.times, arguments.seed, Path(folder) / job) for job in arguments.job or JOBS]
    return min(sum(wrong), 1)


if __name__ == "__main__":
    sys.exit(main())
