"""Two processes against one, and a search that is killed and resumed, on the real command line.

    .venv/bin/python tools/bench/measure_search.py [--rounds 2]

Every process gets one thread. Times are those the command prints, without loading the model; they are taken in turns
(one process, two, one, two) and the ratio is that of the medians. Then one search gets SIGKILL when it has done about
half of its units, is started again, and must write the same file without doing a unit twice.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from act_export.commands.console import run_program

SEARCH = ["-m", "act_export", "search", "smollm2-135m", "--task", "sst2", "--method", "act", "--random-draws", "1"]
SEARCH += ["--rank", "48", "--choose", "48", "--report", "48", "--heads", "1,3,10", "--batch-tokens", "512"]
ONE = [sys.executable, *SEARCH]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *SEARCH]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    if rounds < 1:
        parser.error(f"--rounds is {rounds}; it must be at least 1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds: dict[str, list[float]] = {"one": [], "two": []}
        for turn in range(rounds):
            for label, command in (("one", ONE), ("two", TWO)):
                shutil.rmtree(folder / label, ignore_errors=True)
                seconds[label].append(search(command, folder / label))
                print(f"round {turn + 1}, {label}: {seconds[label][-1]:.1f} s", flush=True)
        speedup = median(seconds["one"]) / median(seconds["two"])
        print(f"two processes against one: {speedup:.2f} times as fast")
        first, second = (ranking(folder / label / "journal") for label in ("one", "two"))
        print(
            f"largest difference of a head's gradient: {np.abs(first - second).max():.1e} of {np.abs(first).max():.1e}"
        )
        print(f"same order of all heads: {bool((np.argsort(first) == np.argsort(second)).all())}")
        print(f"same heads in the file: {heads(folder / 'one') == heads(folder / 'two')}")
        print(kill_and_resume(folder))


def search(command: list[str], folder: Path) -> float:
    """Seconds of a search, without loading."""
    done = subprocess.run(
        [*command, "--journal", str(folder / "journal"), "--out", str(folder / "calibration.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    found = re.search(r"searched in ([\d.]+) s", done.stderr)
    if done.returncode != 0 or found is None:
        sys.exit(f"the search failed:\n{done.stderr}")
    return float(found[1])


def units(journal: Path) -> list[dict]:
    """All finished units of a journal; a line that was cut off isn't one."""
    lines = [line for path in sorted(journal.glob("units-*.jsonl")) for line in path.read_text().splitlines(True)]
    return [json.loads(line) for line in lines if line.endswith("\n")]


def ranking(journal: Path) -> np.ndarray:
    """Gradient of each head's gate, summed over all prompts."""
    parts = sorted((unit["unit"], unit["value"]) for unit in units(journal) if unit["unit"].startswith("gates "))
    return np.sum([value for _, value in parts], axis=0)


def heads(folder: Path) -> dict:
    found: dict = json.loads((folder / "calibration.json").read_text())["heads"]
    return found


def kill_and_resume(folder: Path) -> str:
    whole = len(units(folder / "one" / "journal"))
    killed = folder / "killed"
    command = [*ONE, "--journal", str(killed / "journal"), "--out", str(killed / "calibration.json")]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL) as process:
        while len(units(killed / "journal")) < whole // 2:
            if process.poll() is not None:
                sys.exit("the search ended before it could be killed")
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    before = len(units(killed / "journal"))
    search(ONE, killed)
    keys = [unit["unit"] for unit in units(killed / "journal")]
    same = (killed / "calibration.json").read_bytes() == (folder / "one" / "calibration.json").read_bytes()
    return (
        f"killed after {before} of {whole} units and resumed: {len(keys)} units, {len(keys) - len(set(keys))} of them "
        f"twice, file {'identical' if same else 'DIFFERENT'}"
    )


if __name__ == "__main__":
    run_program(main)
