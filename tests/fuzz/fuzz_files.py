"""Damaged files of every kind given to the commands that read them: none may crash, hang, or end as a defect.

`run` draws cases from a seed. Each damages one file of a set that is whole (fuzz_mutations.py), and gives it to a
command in another process, which is killed where it takes too long or too much memory. A case is a failure unless the
command ends with exit code 0, 1 or 2, and, where it isn't 0, leaves no output; or if it changes other files.
"""

from __future__ import annotations

import json
import os
import random
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import fuzz_mutations as damage
from whole_files import GRAFT, SEARCH, UNCHECKED, invoke, prepare

LONGEST_SECONDS = 10.0  # of a case, on a processor of its own
_LONGEST_WAIT = 120.0  # on a busy machine
_LARGEST_BYTES = 8 << 30
_CASES_OF_A_WORKER = 200
_DEFECT = "this is a defect of act-export"


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        file: The one that is damaged, in the folder of a case.
        mutate: How.
        commands: Of which one is run; "{}" stands for the folder.
        same: A file of the set that the command's output must be equal to, whatever was damaged; empty for none.
    """

    file: str
    mutate: str
    commands: tuple[tuple[str, ...], ...]
    same: str = ""


@dataclass(frozen=True)
class Failure:
    """A case that ended as none may."""

    kind: str
    seed: int
    reason: str


@dataclass
class Summary:
    """What a run found.

    Attributes:
        counts: Cases by kind.
        codes: Cases by exit code.
        failures: With the seeds that give them again.
    """

    counts: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)


_INSPECT = ("inspect", "{}/model.onnx", "--json")
_GENERATE = ("generate", "{}/model.onnx", "hi", "--max-new-tokens", "2")
_CHAT = (*_GENERATE, "--chat")
_TRITON = ("triton", "{}/model.onnx", "--out", "{}/new", "--name", "m")
_REPORT = ("report", "{}/profile.safetensors", "--out", "{}/new.html")
_EVAL = ("eval", "{}/model.onnx", "--limit", "2", "--split", "all", "--json")
_EXPORT = ("export", "{}", "--out", "{}/new.onnx", "--plain", "--no-verify")
_GRAFT_FOLDER = ("graft", "{}", "--calibration", "{}/heads.json", "--out", "{}-new")

KINDS: dict[str, Kind] = {
    "calibration": Kind("heads.json", "damaged_json", (UNCHECKED,)),
    "whole calibration": Kind(
        "calibration.json", "damaged_json", ((*GRAFT[:3], "{}/calibration.json", *GRAFT[4:], "--no-check"),)
    ),
    "task file": Kind("task.json", "damaged_json", ((*_EVAL, "--task", "{}/task.json"),)),
    "rows": Kind("rows.jsonl", "damaged_lines", ((*_EVAL, "--data", "{}/rows.jsonl"),)),
    "task rows": Kind("task-rows.jsonl", "damaged_lines", ((*_EVAL, "--task", "{}/task.json"),)),
    "profile": Kind("profile.json", "damaged_json", (_REPORT,)),
    "profile tensors": Kind("profile.safetensors", "damaged_safetensors", (_REPORT,)),
    "accuracies": Kind("search.json", "damaged_json", ((*_REPORT, "--accuracy", "{}/search.json"),)),
    "metadata": Kind(
        "model.onnx", "damaged_property", (_INSPECT, _GENERATE, _TRITON, (*_EVAL, "--data", "{}/rows.jsonl"))
    ),
    "graft's metadata": Kind(
        "grafted.onnx",
        "damaged_property",
        (
            ("inspect", "{}/grafted.onnx"),
            ("graft", "{}/grafted.onnx", "--remove", "--out", "{}/new.onnx"),
            ("generate", "{}/grafted.onnx", "hi", "--max-new-tokens", "2"),
        ),
    ),
    "config beside": Kind("config.json", "damaged_json", (GRAFT, _GENERATE, ("inspect", "{}"))),
    "genai_config": Kind("genai_config.json", "damaged_json", (_GRAFT_FOLDER, ("inspect", "{}"), _TRITON)),
    "tokenizer": Kind("tokenizer.json", "damaged_json", (_GENERATE, (*_EVAL, "--data", "{}/rows.jsonl"))),
    "tokenizer_config": Kind("tokenizer_config.json", "damaged_json", (_CHAT, _GENERATE)),
    "chat template": Kind("chat_template.jinja", "damaged_bytes", (_CHAT,)),
    "onnx": Kind("model.onnx", "damaged_model", (_INSPECT, _GENERATE, _TRITON)),
    "onnx to graft": Kind("plain.onnx", "damaged_model", (GRAFT, UNCHECKED, UNCHECKED)),
    "external data": Kind("plain.onnx.data", "damaged_bytes", (GRAFT,)),
    "config.json": Kind("config.json", "damaged_json", (_EXPORT,)),
    "weights": Kind("model.safetensors", "damaged_safetensors", (_EXPORT,)),
    "journal": Kind("journal/units-0.jsonl", "damaged_lines", (SEARCH,), same="found.json"),
    "gguf": Kind("model.gguf", "damaged_bytes", (("export", "{}/model.gguf", *_EXPORT[2:]),)),
}
_ONLY: dict[str, tuple[str, ...]] = {
    "genai_config": ("genai_config.json",),
    "gguf": ("model.gguf",),
    "journal": ("journal",),
}
"""Files that only the cases of some kinds have: they change what others read."""


def _case(base: Path, scratch: Path, kind: Kind, name: str, seed: int) -> dict[str, Any]:
    """Runs a case, in the worker."""
    rng = random.Random(f"{name} {seed}")
    folder = scratch / "case"
    folder.mkdir()
    for file in base.iterdir():
        if (
            file.name == kind.file.partition("/")[0]
            or all(file.name not in only for only in _ONLY.values())
            or file.name in _ONLY.get(name, ())
        ):
            (shutil.copytree if file.is_dir() else shutil.copyfile)(file, folder / file.name)
    content = (folder / kind.file).read_bytes()
    mutate = getattr(damage, kind.mutate)
    given = content.decode() if kind.mutate in ("damaged_json", "damaged_lines") else content
    (folder / kind.file).write_bytes(mutate(given, rng))
    words = [word.format(folder) for word in rng.choice(kind.commands)]
    before = _listing(scratch)
    begun = time.process_time()
    code, said = invoke(words)
    seconds = time.process_time() - begun
    after = _listing(scratch)
    continued = {f"case/{kind.file}"} if kind.same else set()  # a journal, which the command goes on with
    changed = [place for place, stamp in before.items() if after.get(place) != stamp and place not in continued]
    new = [place for place in after if place not in before]
    reason = ""
    if code not in (0, 1, 2) or _DEFECT in said:
        reason = f"exit code {code}: {said}"
    elif code and seconds > LONGEST_SECONDS:  # an export that succeeds may take longer on a busy machine
        reason = f"{seconds:.0f} seconds"
    elif changed or (code and new):
        reason = f"exit code {code}, changed {changed}, left {new}"
    elif kind.same and not code and (folder / "new.json").read_bytes() != (base / kind.same).read_bytes():
        reason = f"another result than that of {kind.same}"
    elif code and not said.strip():
        reason = f"exit code {code} without a message"
    shutil.rmtree(scratch / "case-new", ignore_errors=True)
    shutil.rmtree(folder)
    return {"code": code, "reason": reason and f"{' '.join(words[:2])} ...: {reason}", "said": said[-300:]}


def _listing(scratch: Path) -> dict[str, tuple[int, int]]:
    found = [path for path in scratch.rglob("*") if path.is_file() or path.is_symlink()]
    return {str(path.relative_to(scratch)): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in found}


def _worker() -> None:
    """Runs the cases that come by standard input, a line each."""
    base, scratch = Path(sys.argv[2]), Path(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    invoke(["graft", str(base / "plain.onnx")])  # loads what a case would otherwise be charged with
    import act_export.checkpoint.load
    import act_export.onnx_file.inspect  # noqa: F401

    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        name, seed = json.loads(line)
        print(json.dumps(_case(base, scratch, KINDS[name], name, seed)), file=answers, flush=True)


class _Process:
    """A worker, which is made again when it was killed."""

    def __init__(self, base: Path, scratch: Path) -> None:
        self.base, self.scratch = base, scratch
        self.process: subprocess.Popen[str] | None = None
        self.said: IO[bytes]
        self.cases = 0

    def answer(self, name: str, seed: int) -> dict[str, Any]:
        """What a case gives; where the worker died, or was killed, why."""
        if self.process is None or self.cases >= _CASES_OF_A_WORKER:
            self.end()
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir(parents=True)
            command = [sys.executable, __file__, "--worker", str(self.base), str(self.scratch)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(self.base.parent / "cache")}
            self.said = tempfile.TemporaryFile()  # noqa: SIM115 - the process writes to it
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True, env=environment
            )
            assert self.process.stdout is not None
            self.process.stdout.readline()  # it has loaded its libraries
            self.cases = 0
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps([name, seed]), file=process.stdin, flush=True)
        self.cases += 1
        begun, spent = time.monotonic(), _spent(process.pid)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not selector.select(0.1):
                took = _spent(process.pid) - spent
                if took > 2 * LONGEST_SECONDS or time.monotonic() - begun > _LONGEST_WAIT:
                    return self._killed(f"a hang: {took:.0f} seconds of a processor")
                if _resident_bytes(process.pid) > _LARGEST_BYTES:
                    return self._killed(f"more than {_LARGEST_BYTES >> 30} GB of memory")
        line = process.stdout.readline()
        if not line:
            code = process.wait()
            self.process = None
            self.said.seek(0)
            last = self.said.read()[-800:].decode(errors="replace")
            return {"code": code, "reason": f"the process ended with {code}: {last}"}
        found: dict[str, Any] = json.loads(line)
        return found

    def _killed(self, reason: str) -> dict[str, Any]:
        self.end()
        return {"code": -9, "reason": reason}

    def end(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _spent(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def run(
    seed: int,
    seconds: float,
    report: Callable[[str], None] = lambda _: None,
    kinds: tuple[str, ...] = tuple(KINDS),
    only: int | None = None,
) -> Summary:
    """Tries damaged files.

    Args:
        seed: Cases have this number and those that follow.
        seconds: To go on for.
        report: Called with a line for each failure.
        kinds: Names of `KINDS`, in turn.
        only: The seed of the one case to try of each kind.
    """
    summary = Summary()
    with _workplace() as place, tempfile.TemporaryDirectory() as scratch:
        process = _Process(place, Path(scratch) / "worker")
        end = time.monotonic() + seconds
        try:
            for number in (only,) if only is not None else _from(seed):
                for name in kinds:
                    found = process.answer(name, number)
                    summary.counts[name] += 1
                    summary.codes[found["code"]] += 1
                    if found["reason"]:
                        summary.failures.append(Failure(name, number, found["reason"]))
                        report(f"{name}, seed {number}: {found['reason']}")
                    if time.monotonic() > end:
                        return summary
        finally:
            process.end()
    return summary


def _from(seed: int) -> Iterator[int]:
    while True:
        yield seed
        seed += 1


@contextmanager
def _workplace() -> Iterator[Path]:
    """The set of whole files, made in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        subprocess.run([sys.executable, __file__, "--prepare", str(base)], check=True, stdout=subprocess.DEVNULL)
        yield base


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        _worker()
    else:
        prepare(Path(sys.argv[2]))
