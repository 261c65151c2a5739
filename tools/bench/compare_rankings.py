"""Gates against the paper's exhaustive search: the same order of heads, at what cost?

    .venv/bin/python tools/bench/compare_rankings.py [--model smollm2-135m] [--task sst2] [--journal FOLDER]
        [--rankings "gradient,exhaustive,gradient in bfloat16"]

Ranks all heads of the model on one task's ranking split in each way, prints Spearman's correlation of each two, what
each took in forward passes of one prompt, the time, and the held-out accuracy that each's own search reaches. The
paper's loop, every head switched on for all prompts, is timed on a few heads. With a journal an interrupted run goes on
where it stopped; times are then those of the last run alone.
"""

from __future__ import annotations

import argparse
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress as ProgressBar
from rich.table import Table

from act_export.calibration.file import Calibration
from act_export.checkpoint.load import load_checkpoint
from act_export.commands.console import run_program
from act_export.journal import Journal
from act_export.search import SearchOptions, search_heads
from act_export.search.answers import RANK, answer, encode_task
from act_export.search.job import SearchJob
from act_export.search.journal_description import describe_search
from act_export.search.precision import bfloat16_is_fast, precision_for_search
from act_export.search.processes import Workers
from act_export.search.rank import rank_heads
from act_export.search.request import RANKINGS
from act_export.tasks import Questions

NAIVE_HEADS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--scoring")
    parser.add_argument("--journal", type=Path, help="a folder that keeps finished work")
    parser.add_argument("--rankings", default="gradient,exhaustive")
    arguments = parser.parse_args()

    for ranking in arguments.rankings.split(","):
        if ranking not in (*RANKINGS, "gradient in bfloat16"):
            parser.error(f"there is no ranking {ranking!r}; there are {', '.join(RANKINGS)} and gradient in bfloat16")

    (task,) = SearchJob(Questions((arguments.task,), scoring=arguments.scoring)).load()
    checkpoint = load_checkpoint(arguments.model)
    layers, heads = checkpoint.identity.num_layers, checkpoint.identity.num_heads
    orders, rows = {}, []
    for ranking in arguments.rankings.split(","):
        way, _, rounded = ranking.partition(" in ")
        if rounded and not bfloat16_is_fast(checkpoint.model):
            parser.error(f"{ranking}: a search of this model is in float32 here")
        options = SearchOptions(methods=("act",), ranking=way, precision="own")
        encoded = encode_task(checkpoint, task)
        journal = arguments.journal / ranking if arguments.journal is not None else None
        with (
            precision_for_search(checkpoint.model, "auto" if rounded else "own"),
            ProgressBar(console=Console(stderr=True)) as bar,
        ):
            kept = Journal(journal, describe_search(checkpoint, [encoded], options)) if journal is not None else None
            row = bar.add_task(ranking, total=1.0)
            workers = Workers(kept, planned_cost=1.0)
            started = time.monotonic()
            ((effects,),) = rank_heads(checkpoint, [encoded], options, workers).own
            seconds = time.monotonic() - started
            if kept is not None:
                kept.close()  # the search writes to it
            orders[ranking] = effects.log_likelihood[options.betas[0]].flatten()
            found = search_heads(
                checkpoint,
                [task],
                options,
                journal=journal,
                progress=lambda _, done, bar=bar, row=row: bar.update(row, completed=done),
            )
        rows.append((ranking, effects.passes, seconds, workers.computed, found.reports[task.name], found))

    prompts = len(task.splits.rank)
    naive_passes = layers * heads * prompts
    naive_seconds = time_of_the_loop(checkpoint, encoded, options) * layers * heads / NAIVE_HEADS
    table = Table(title=f"{arguments.model}, {arguments.task}, {layers * heads} heads, {prompts} prompts to rank with")
    for column in ("ranking", "passes", "of the loop's", "ranking", "heads found", "plain", "calibrated"):
        table.add_column(column, justify="left" if column == "ranking" else "right")
    table.add_row("the paper's loop", str(naive_passes), "100%", f"{naive_seconds:.0f} s (extrapolated)", "", "", "")
    for ranking, passes, seconds, computed, report, found in rows:
        accuracy = report.own.accuracy if report.own is not None else report.plain_accuracy
        table.add_row(
            ranking,
            f"{passes:.0f}",
            f"{passes / naive_passes:.1%}",
            f"{seconds:.0f} s" if computed else "in the journal",
            str(found.calibrations[task.name].num_calibrated_heads),
            f"{report.plain_accuracy:.1%}",
            f"{accuracy:.1%}",
        )
    Console(width=140).print(table)
    for one, other in combinations(orders, 2):
        agreement = float(((orders[one] > 0) == (orders[other] > 0)).double().mean())
        print(f"{one}, {other}: Spearman {spearman(orders[one], orders[other]):.3f}, same sign {agreement:.1%}")
    print(f"{torch.get_num_threads()} threads")


def time_of_the_loop(checkpoint, encoded, options) -> float:
    """Seconds for a few heads, each switched on for all prompts."""
    picked = np.random.default_rng(0).permutation(checkpoint.identity.num_layers * checkpoint.identity.num_heads)
    started = time.monotonic()
    for index in picked[:NAIVE_HEADS].tolist():
        layer, head = divmod(index, checkpoint.identity.num_heads)
        calibration = Calibration({layer: (head,)}, options.betas[0])
        answer(checkpoint, [(encoded, RANK, calibration)], options, Workers(), step="loop")
    return time.monotonic() - started


def spearman(first: torch.Tensor, second: torch.Tensor) -> float:
    """Correlation of the ranks of two vectors; equal values share their mean rank."""
    ranks = []
    for values in (first, second):
        _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
        last = counts.cumsum(0)
        ranks.append((last - (counts - 1) / 2)[inverse].double())
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


if __name__ == "__main__":
    run_program(main)
