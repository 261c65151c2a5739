"""What a calibration costs elsewhere: all other tasks, and the perplexity of a text.

    .venv/bin/python tools/bench/do_no_harm.py smollm2-135m [CALIBRATION ...] [--questions 128] [--text FILE]

CALIBRATION is a file or a shipped recipe; without one, every recipe that fits the model. Each is measured on questions
of every task with rows offline that no search of it used, and on a text (without --text the passages of SQuAD), in
pieces of 256 tokens, each token calibrated with what stands before it. The last column says whether anything is lost
beyond luck: an interval of a task's gain, or of the text's gain in log-likelihood, that lies below 0. Tasks by choices
are scored by likelihood; written answers aren't measured.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from act_export.attention.fast_attention import FastAttention
from act_export.attention.hook import attention_hook
from act_export.calibration.file import Calibration
from act_export.calibration.recipes import find_recipes, named_calibration
from act_export.checkpoint.load import Checkpoint, load_checkpoint
from act_export.search import SearchOptions
from act_export.search.answers import REPORT, Answers, EncodedTask, answer
from act_export.search.processes import Workers
from act_export.search.request import SearchTask
from act_export.search.results import gain_of
from act_export.tasks import Splits, encode_examples, load_examples, unused
from act_export.tasks.splits import drawn
from act_export.tasks.statistics import mean_interval
from act_export.tasks.task import load_task, packaged_tasks

PIECE = 256  # tokens
SCORING = "likelihood"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibrations", nargs="*")
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--pieces", type=int, default=32)
    parser.add_argument("--text", type=Path)
    arguments = parser.parse_args()
    checkpoint = load_checkpoint(arguments.model)
    named = {name: named_calibration(name) for name in arguments.calibrations}
    if not named:
        named = {r.name: r.calibration for r in find_recipes(checkpoint.identity, checkpoint.names)}
    if not named:
        parser.error(f"no recipe is shipped for {arguments.model}; name a calibration file")
    used = {digest for c in named.values() if c.provenance is not None for digest in c.provenance.notes.get("used", ())}
    print("| task | plain | " + " | ".join(f"{name}: gain, 95% interval" for name in named) + " |")
    print("| --- |" + " --- |" * (len(named) + 1), flush=True)
    lost: dict[str, list[str]] = {name: [] for name in named}
    for task in packaged_tasks():
        if SCORING not in load_task(task).scorings:
            continue
        questions = drawn(unused(load_examples(task, scoring=SCORING).examples, used), 0)[: arguments.questions]
        plain, *others = answers_of(checkpoint, task, questions, [None, *named.values()])
        gains = {name: gain_of(plain, other) for name, other in zip(named, others, strict=True)}
        for name, gain in gains.items():
            if gain.interval[1] < 0:
                lost[name].append(task)
        row = [f"{100 * g.gain:+.1f}, {100 * g.interval[0]:+.1f} to {100 * g.interval[1]:+.1f}" for g in gains.values()]
        print(f"| {task} ({len(questions)}) | {plain.accuracy:.1%} | " + " | ".join(row) + " |", flush=True)
    pieces = pieces_of(checkpoint, arguments.text, arguments.pieces)
    before = log_likelihoods(checkpoint, pieces, None)
    cells = []
    for name, calibration in named.items():
        after = log_likelihoods(checkpoint, pieces, calibration)
        low, high = mean_interval([[b - a for a, b in zip(before, after, strict=True)]])
        cells.append(f"{math.exp(-np.mean(after)):.3f} (log-likelihood {low:+.4f} to {high:+.4f})")
        if high < 0:
            lost[name].append("the text")
    plain_text = f"{math.exp(-np.mean(before)):.3f}"
    print(f"| perplexity, {len(pieces)} pieces | {plain_text} | " + " | ".join(cells) + " |")
    print("| lost beyond luck | | " + " | ".join(", ".join(of) or "nothing" for of in lost.values()) + " |")


def answers_of(
    checkpoint: Checkpoint, name: str, questions: Sequence, calibrations: Sequence[Calibration | None]
) -> list[Answers]:
    report = tuple(encode_examples(checkpoint.tokenizer, questions, truncate=True))
    task = EncodedTask(SearchTask(name, Splits((), (), tuple(questions))), {REPORT: report})
    asked = [(task, REPORT, calibration) for calibration in calibrations]
    return answer(checkpoint, asked, SearchOptions(), Workers(), step=name)


def pieces_of(checkpoint: Checkpoint, text: Path | None, most: int) -> list[list[int]]:
    """So many pieces of the text, evenly spread."""
    if text is not None:
        whole = text.read_text()
    else:
        whole = "\n".join(dict.fromkeys(example.group for example in load_examples("squad").examples))
    tokens = checkpoint.tokenizer(whole).input_ids
    starts = range(0, len(tokens) - PIECE, PIECE)
    return [tokens[start : start + PIECE] for start in starts[:: max(1, len(starts) // most)]][:most]


def log_likelihoods(
    checkpoint: Checkpoint, pieces: Sequence[list[int]], calibration: Calibration | None
) -> list[float]:
    """By piece, mean log-likelihood of its tokens, each decoded after those before it."""
    found = []
    with torch.no_grad(), attention_hook(checkpoint.model, FastAttention(calibration)) as hooked:
        for piece in pieces:
            ids = torch.tensor([piece])
            logits = hooked(ids, torch.ones_like(ids), one_at_a_time=True).logits[0, :-1].float()
            found.append(float(logits.log_softmax(-1).gather(1, ids[0, 1:, None]).mean()))
    return found


if __name__ == "__main__":
    main()
