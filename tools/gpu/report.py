"""The tables of docs/cuda.md from results.json of one call on a GPU machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from plan import OK

Result = dict[str, Any]


def report(results: Result) -> str:
    """All in Markdown: what was run, and a section for each step that found something."""
    steps = {step["name"]: step for step in results["steps"]}
    parts = [
        "# Measured on a GPU",
        _table(
            ("step", "result", "seconds", "limit"),
            ((name, step["status"], f"{step['seconds']:.0f}", step["limit_s"]) for name, step in steps.items()),
        ),
    ]
    sections = {"machine": _machine, "images": _images, "parity": _parity, "times": _times}
    for name, step in steps.items():
        found = step["result"]
        if found is not None:
            section = sections.get(name.partition(",")[0], _operator if "workloads" in found else _plain)
            parts += [f"## {name[0].upper()}{name[1:]}", *section(found)]
        if step["status"] != OK:
            parts += [f"{name}: {step['status']}.", _quoted(step["output"])]
    return "\n\n".join(parts) + "\n"


def _machine(found: Result) -> list[str]:
    return [_table(("what", "found"), ((name, _number(value)) for name, value in found.items()))]


def _images(found: Result) -> list[str]:
    counts: dict[str, int] = {}
    for target in found["targets"].values():
        counts[target] = counts.get(target, 0) + 1
    lines = [_table(("image", "kernels"), sorted(counts.items()))]
    if found["fell back to PTX"]:
        lines.append(f"Fell back to PTX: {', '.join(found['fell back to PTX'])} ({found['refused']}).")
    return lines


def _parity(found: Result) -> list[str]:
    rows = []
    for storage in ("float32", "float16", "bfloat16"):
        calls = [errors for name, errors in found["calls"].items() if name.endswith(storage)]
        wrong = sum(name.endswith(storage) for name in found["wrong"])
        shares = [own / other for own, other in calls if other]
        rows.append((storage, len(calls), wrong, f"{max(shares):.2f}" if shares else "-"))
    lines = [_table(("type", "calls as they have to be", "wrong", "largest error, by PyTorch's eager attention"), rows)]
    return lines + [f"- {name}: {message}" for name, message in found["wrong"].items()]


def _times(found: Result) -> list[str]:
    names = list(dict.fromkeys(name for one in found.values() for name in one["seconds"]))
    header = ("call", *(f"{name}, ms" for name in names), "quarter / plain", "quarter / cuDNN", "quarter / Flash-2")
    rows = []
    for call, one in found.items():
        seconds = one["seconds"]
        ratios = (
            f"{seconds['quarter'] / seconds[other]:.2f}" if other in seconds else "-"
            for other in ("plain", "cuDNN", "Flash-2")
        )
        rows.append((call, *(f"{seconds[name] * 1e3:.3g}" if name in seconds else "-" for name in names), *ratios))
    lines = [_table(header, rows)]
    kernels = [
        (call, heads, name, f"{microseconds:.1f}")
        for call, one in found.items()
        for heads, times in one["kernels, us"].items()
        for name, microseconds in times.items()
    ]
    return [*lines, _table(("call", "calibrated heads", "kernel", "us"), kernels)]


def _operator(found: Result) -> list[str]:
    rows = []
    for one in found["workloads"]:
        what = f"{one['work']}, batch {one['batch']}, {one['length']}"
        rows += [(what, pair, f"{ratio:.2f}") for pair, ratio in one.get("ratios", {}).items()]
        rows += [(what, name, message) for name, message in one.get("failures", {}).items()]
        if "skipped" in one:
            rows.append((what, "skipped", one["skipped"]))
    return [_table(("call", "ratio", "of medians"), rows)]


def _plain(found: Result) -> list[str]:
    return [_table(("what", "found"), ((name, _number(value)) for name, value in found.items() if name != "output"))]


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _quoted(output: str) -> str:
    return "\n".join(f"    {line}" for line in output.splitlines()[-15:])


def _table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [list(map(str, header)), ["---"] * len(header), *(list(map(str, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
