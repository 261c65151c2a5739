"""What strengths are fitted by, on the same questions: is there a loss that serves accuracy better?

    .venv/bin/python tools/bench/compare_losses.py --task obqa,arc_easy [--model smollm2-135m] [--scoring likelihood]
        [--rank 64] [--report 160] [--seed 0]

- likelihood: the right answer's log-likelihood among the choices, which `--method fit` takes;
- per token: the same of choices' log-likelihoods divided by their number of tokens;
- margin: how far the right answer leads the best other one, by 1 at the most.

For each, the gain in accuracy on the report split after each number of steps, without choosing any: what a search
chooses among. Scoring stays the task's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from unittest.mock import patch

import torch
from torch import Tensor

from act_export.checkpoint.load import load_checkpoint
from act_export.commands.console import run_program
from act_export.search import SearchOptions, gates
from act_export.search.answers import REPORT, answer, encode_task
from act_export.search.fit import fit_strengths
from act_export.search.job import SearchJob
from act_export.search.memory import freed_memory_kept
from act_export.search.precision import precision_for_search
from act_export.search.processes import Workers
from act_export.search.proposals import fitted
from act_export.search.rank import rank_heads
from act_export.search.results import average_gain, gain_of
from act_export.tasks import EncodedExample, Questions

Loss = Callable[[Sequence[EncodedExample], Sequence[Tensor], object], Tensor]


def per_token(examples: Sequence[EncodedExample], scores: Sequence[Tensor], remedy: object = None) -> Tensor:
    rows = [
        row[: len(e.choices)] / row.new_tensor([len(tokens) for tokens in e.choices])
        for row, e in zip(scores, examples, strict=True)
    ]
    return torch.stack([row.log_softmax(0)[e.answer] for row, e in zip(rows, examples, strict=True)])


def margin(examples: Sequence[EncodedExample], scores: Sequence[Tensor], remedy: object = None) -> Tensor:
    leads = []
    for row, example in zip(scores, examples, strict=True):
        others = torch.ones(len(row), dtype=torch.bool).index_fill(0, torch.tensor(example.answer), False)
        leads.append((row[example.answer] - row[others].max()).clamp(max=1))
    return torch.stack(leads)


LOSSES: dict[str, Loss] = {"likelihood": gates.log_likelihoods, "per token": per_token, "margin": margin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="obqa,arc_easy,csqa")
    parser.add_argument("--scoring", choices=("letter", "likelihood"), default="likelihood")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--report", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    options = SearchOptions(methods=("fit",), precision="own")
    (threshold,) = options.thresholds
    questions = Questions(tuple(arguments.task.split(",")), scoring=arguments.scoring, seed=arguments.seed)
    tasks = SearchJob(questions, rank=arguments.rank, choose=1, report=arguments.report).load()
    checkpoint = load_checkpoint(arguments.model)
    print("| task | plain | loss | " + " | ".join(f"{steps} steps" for steps in options.fit_steps) + " |")
    print("| --- | --- | --- |" + " --- |" * len(options.fit_steps), flush=True)
    plain: dict = {}
    found: dict[tuple[str, str], dict] = {}
    with freed_memory_kept(), precision_for_search(checkpoint.model, "auto"):
        for task in tasks:
            encoded = encode_task(checkpoint, task)
            (plain[task.name],) = answer(checkpoint, [(encoded, REPORT, None)], options, Workers(), step=REPORT)
            for name, loss in LOSSES.items():
                with patch.object(gates, "log_likelihoods", loss):
                    ((effects,),) = rank_heads(checkpoint, [encoded], options, Workers()).own
                    assert effects.slopes is not None  # of the gradient
                    strengths = fit_strengths(
                        checkpoint, [encoded], effects.slopes, threshold, options.fit_l2[0], options, Workers()
                    )
                cells = []
                for steps, of_step in strengths.items():
                    (proposal,) = fitted({steps: of_step}, "", threshold, checkpoint.identity)
                    asked = [(encoded, REPORT, proposal.calibration)]
                    (answers,) = answer(checkpoint, asked, options, Workers(), step=REPORT)
                    found.setdefault((name, str(steps)), {})[task.name] = answers
                    cells.append(points(gain_of(plain[task.name], answers)))
                accuracy = f"{plain[task.name].accuracy:.1%}"
                print(f"| {task.name} | {accuracy} | {name} | " + " | ".join(cells) + " |", flush=True)
    for name in LOSSES:
        cells = [points(average_gain(plain, found[name, str(steps)])) for steps in options.fit_steps]
        print(f"| average of {len(tasks)} | | {name} | " + " | ".join(cells) + " |")


def points(gain) -> str:
    low, high = gain.interval
    return f"{100 * gain.gain:+.1f}, {100 * low:+.1f} to {100 * high:+.1f}"


if __name__ == "__main__":
    run_program(main)
