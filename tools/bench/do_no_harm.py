"""What a calibration costs elsewhere: all other tasks, and the perplexity of a text.

    .venv/bin/python tools/bench/do_no_harm.py smollm2-135m [CALIBRATION ...] [--questions 128] [--text FILE]

CALIBRATION is a file or a shipped recipe; without one, every recipe that fits the model. Each is measured on questions
of every task with rows offline that no search of it used, and on a text (without --text the passages of SQuAD), in
pieces of 256 tokens, each token calibrated with what stands before it. The last column says whether anything is lost
beyond luck: an interval of a task's gain, or of the text's gain in log-likelihood, that lies below 0. Tasks by choices
are scored by likelihood, in bfloat16 where the processor is fast at that; written answers aren't measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from act_export.calibration.recipes import find_recipes, named_calibration
from act_export.checkpoint.load import load_checkpoint
from act_export.commands.console import run_program
from act_export.search.elsewhere import cost_in_answers, cost_in_text, pieces_of, questions_elsewhere, used_questions
from act_export.search.memory import freed_memory_kept
from act_export.search.precision import precision_for_search
from act_export.tasks.task import load_task, packaged_tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibrations", nargs="*")
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--pieces", type=int, default=32)
    parser.add_argument("--text", type=Path)
    arguments = parser.parse_args()
    named = {name: named_calibration(name) for name in arguments.calibrations}
    text = arguments.text.read_text() if arguments.text else None
    checkpoint = load_checkpoint(arguments.model, fits=tuple(named.values()))
    if not named:
        named = {r.name: r.calibration for r in find_recipes(checkpoint.identity, checkpoint.names)}
    if not named:
        parser.error(f"no recipe is shipped for {arguments.model}; name a calibration file")
    calibrations = list(named.values())
    used = used_questions(calibrations)
    print("| task | plain | " + " | ".join(f"{name}: gain, 95% interval" for name in named) + " |")
    print("| --- |" + " --- |" * (len(named) + 1), flush=True)
    lost: dict[str, list[str]] = {name: [] for name in named}
    for task in packaged_tasks():
        if "likelihood" not in load_task(task).scorings:
            continue
        questions = questions_elsewhere(task, arguments.questions, used)
        with freed_memory_kept(), precision_for_search(checkpoint.model, "auto"):
            plain, gains = cost_in_answers(checkpoint, task, questions, calibrations)
            precision = str(checkpoint.model.dtype).removeprefix("torch.")
        for name, gain in zip(named, gains, strict=True):
            if gain.interval[1] < 0:
                lost[name].append(task)
        row = [f"{100 * g.gain:+.1f}, {100 * g.interval[0]:+.1f} to {100 * g.interval[1]:+.1f}" for g in gains]
        print(
            f"| {task} ({len(questions)}, {precision}) | {plain.accuracy:.1%} | " + " | ".join(row) + " |", flush=True
        )
    pieces = pieces_of(checkpoint, text, arguments.pieces)
    cost = cost_in_text(checkpoint, pieces, calibrations)
    cells = []
    for name, perplexity, (low, high) in zip(named, cost.calibrated, cost.intervals, strict=True):
        cells.append(f"{perplexity:.3f} (log-likelihood {low:+.4f} to {high:+.4f})")
        if high < 0:
            lost[name].append("the text")
    print(f"| perplexity, {len(pieces)} pieces | {cost.plain:.3f} | " + " | ".join(cells) + " |")
    print("| lost beyond luck | | " + " | ".join(", ".join(of) or "nothing" for of in lost.values()) + " |")


if __name__ == "__main__":
    run_program(main)
