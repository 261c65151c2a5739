"""What `act-export bench` prints: every time and size beside its ratio, then what ran, and on which machine."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

from rich import box
from rich.console import Console

from act_export.commands.printing import PlainConsole, PlainTable, printable
from act_export.verify.bench.measurements import BenchReport, Measured, Ratio, Ratios

_STEADY = 1.5  # slowest by fastest round


def print_bench_report(report: BenchReport, console: Console | None = None) -> None:
    """Prints a report on standard output, or on another console."""
    console = console or PlainConsole()
    console.print(_title(report), soft_wrap=True)
    file, *others = report.contenders
    for other, ratios in zip(others, report.ratios, strict=True):
        console.print(_table(report, other, ratios))
    if not others:
        console.print(_table(report, None, None))
    else:
        name = printable(file.contender.name)
        console.print(
            f"Each ratio is of time or memory, {name} / the other: below 1, {name} takes less. +- is half the\n"
            f"distance between the quartiles of the rounds' ratios. Other numbers are medians."
        )
    for note in _notes(report):
        console.print(printable(note), soft_wrap=True)
    console.print()
    for line in _machine(report):
        console.print(printable(line), soft_wrap=True)


def _title(report: BenchReport) -> str:
    request = report.request
    return (
        f"{request.prompt_tokens} prompt tokens, {request.new_tokens} new tokens, batch {request.batch}, "
        f"{report.threads} thread{'s' if report.threads > 1 else ''}, {request.rounds} "
        f"round{'s' if request.rounds > 1 else ''}"
    )


def _table(report: BenchReport, other: Measured | None, ratios: Ratios | None) -> PlainTable:
    """The file beside one other; alone where there is none."""
    file = report.contenders[0]
    table = PlainTable(box=box.SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in (file.contender.name, *((other.contender.name, "ratio") if other is not None else ())):
        table.add_column(heading, justify="right", overflow="fold")
    rows: list[tuple[str, Callable[[Measured], str], Callable[[Ratios], Ratio | None]]] = [
        ("prompt", _prompt, lambda ratios: ratios.prompt),
        ("first token", lambda one: f"{one.first_token_ms:.1f} ms", lambda ratios: ratios.first_token),
        ("decode", _decode, lambda ratios: ratios.decode),
        ("peak memory", lambda one: _megabytes(one.memory.peak_bytes), lambda ratios: ratios.memory),
        (
            "beyond the weights",
            lambda one: _megabytes(one.memory.beyond_weights_bytes),
            lambda ratios: ratios.memory_beyond_weights,
        ),
    ]
    if any(one.memory.gpu_bytes is not None for one in report.contenders):
        rows.append(("GPU memory", _gpu_memory, lambda ratios: ratios.gpu_memory))
    for name, number, ratio in rows:
        beside = [number(other), _describe_ratio(ratio(ratios))] if other is not None and ratios is not None else []
        table.add_row(name, number(file), *beside)
    if other is not None:
        table.add_row("same greedy tokens", "", f"{other.same_tokens} of {other.contender.new_tokens}", "")
    return table


def _prompt(one: Measured) -> str:
    return f"{one.prompt_ms:.1f} ms\n{one.prompt_tokens_per_s:.1f} tokens/s"


def _decode(one: Measured) -> str:
    return f"{one.decode_ms:.2f} ms a token\n{one.decode_tokens_per_s:.1f} tokens/s"


def _gpu_memory(one: Measured) -> str:
    return _megabytes(one.memory.gpu_bytes) if one.memory.gpu_bytes is not None else "-"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def _describe_ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio.of_medians:.3f}" + (f" +-{ratio.spread:.3f}" if ratio.quartiles is not None else "")


def _notes(report: BenchReport) -> list[str]:
    lines = []
    for one in report.contenders:
        contender = one.contender
        lines.append("; ".join([f"{contender.name}: {contender.kernel}", *contender.notes]))
        if (contender.rounds, contender.new_tokens) != (report.request.rounds, report.request.new_tokens):
            ratios = next(found for found in report.ratios if found.against == contender.name)
            lines[-1] += (
                f"; {ratios.rounds} of {report.request.rounds} rounds, the first {contender.new_tokens} of "
                f"{report.request.new_tokens} new tokens. The ratios are over the same of both: "
                f"{report.contenders[0].contender.name} took {ratios.file_prompt_ms:.1f} ms and "
                f"{ratios.file_decode_ms:.2f} ms a token there"
            )
        if one.placement is not None:
            lines.append(f"{contender.name}: {one.placement.describe()}")
    unsteady = max(_unsteadiness(one) for one in report.contenders)
    if unsteady > _STEADY:
        lines.append(f"Rounds of the same contender differ {unsteady:.1f} times: other work was running; measure again")
    before = ", ".join(_megabytes(one.memory.before_bytes) for one in report.contenders)
    lines.append(
        f"Peak memory: largest resident size of a process that loads one of them and runs this once. Of it, Python and "
        f"libraries before the model: {before}"
    )
    if report.machine.gpu is not None:
        lines.append(
            "GPU memory: what the GPU has less free after that turn than before the model was loaded; other "
            "processes on it count too"
        )
    return lines


def _unsteadiness(one: Measured) -> float:
    """Slowest by fastest round, of the prompt or of decoding."""
    decode_ms = [mean(turn.step_ms) for turn in one.turns]
    prompt_ms = [turn.prompt_ms for turn in one.turns]
    return max(max(times) / min(times) for times in (prompt_ms, decode_ms))


def _machine(report: BenchReport) -> list[str]:
    machine, gpu = report.machine, report.machine.gpu
    of_gpu = []
    if gpu is not None:
        driver = f"driver {gpu.driver}, " if gpu.driver else ""
        of_gpu = [
            f"GPU: {gpu.name}, compute capability {gpu.capability}, {gpu.memory_bytes / 1e9:.1f} GB memory, "
            f"{driver}CUDA {gpu.cuda} of the driver"
        ]
    return [
        f"machine: {machine.processor}, {machine.architecture}, {machine.cores} cores ({machine.usable_cores} usable), "
        f"{machine.memory_bytes / 1e9:.1f} GB memory",
        *of_gpu,
        f"load average: {report.load_before:.1f} before, {report.load_after:.1f} after; what exceeds the threads used "
        f"is other work",
        "versions: " + ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
    ]
