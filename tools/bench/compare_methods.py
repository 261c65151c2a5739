"""Ways to better answers, side by side: the same rows to learn from, the same rows to report on.

    .venv/bin/python tools/bench/compare_methods.py --task sst2,rte [--model smollm2-135m] [--scoring first-token]
        [--seeds 0,1,2] [--ways act,fit,zerotuning] [--goal beyond-remedy] [--chat] [--rank 96]
        [--choose 128] [--report 240] [--journal FOLDER] [--json FILE]

- few-shot: the plain model with four examples before each question;
- label prior, choice bias, offsets, choices only: cheap remedies, see act_export/docs/search.md;
- zerotuning: gamma for the same 40% of heads in all layers, those whose gamma of 2 alone changes the ranking questions'
  accuracy most, up or down; gamma from a grid, by the choosing questions (Han et al., arXiv 2505.11739);
- act, gamma, fit: `act-export search --method`; what they and zerotuning's gamma are chosen by is `--goal`;
- exhaustive: act, heads ranked one by one as the paper does.

A calibration has a second row, with the remedy on top that is best for the plain model on the reported questions; the
same row again where none is. That is what it adds for a program that has the remedy anyway.

For each task and seed: accuracy on the report split, the gain over the plain model and beyond the best cheap remedy
with their 95% intervals; then the average over tasks, by seed. With several seeds: mean and spread, and how alike the
head sets are (mean of their intersection over union). With a journal an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev

from act_export.calibration.file import Calibration
from act_export.checkpoint.load import Checkpoint, load_checkpoint
from act_export.commands.console import run_program
from act_export.journal import Journal
from act_export.search import SearchOptions, search_heads
from act_export.search.answers import CHOOSE, CONTENT_FREE, RANK, REPORT, Answers, EncodedTask, answer, encode_task
from act_export.search.controls import (
    PLAIN,
    best_control,
    can_lean,
    control_answers,
    log_likelihoods_beyond_remedy,
    measures_of,
)
from act_export.search.job import SearchJob
from act_export.search.journal_description import describe_search
from act_export.search.precision import precision_for_search
from act_export.search.processes import Workers
from act_export.search.proposals import strengths_by_head
from act_export.search.results import average_gain, gain_of
from act_export.tasks import Questions, load_examples

SHOTS = 4
SHARE = 0.4  # of the heads that ZeroTuning tunes
UP, DOWN = (1.5, 2.0, 3.0, 4.0, 6.0), (0.25, 0.4, 0.6, 0.8)
WAYS = ("few-shot", "zerotuning", "act", "gamma", "fit", "exhaustive")


class Bench:
    """One task with one seed."""

    def __init__(self, checkpoint: Checkpoint, job: SearchJob, journal: Path | None):
        (self.task,) = job.load()
        self.checkpoint, self.questions, self.options = checkpoint, job.questions, job.options
        self.encoded = encode_task(checkpoint, self.task)
        self.journal = journal
        self.kept = Journal(journal, describe_search(checkpoint, [self.encoded], self.options)) if journal else None
        self.workers = Workers(self.kept)
        self.found: dict[str, Calibration] = {}

    def answers(self, split: str, calibration: Calibration | None = None, task: EncodedTask | None = None) -> Answers:
        asked = [(task or self.encoded, split, calibration)]
        return answer(self.checkpoint, asked, self.options, self.workers, step=split)[0]

    def controls(self, calibration: Calibration | None = None) -> dict[str, Answers]:
        splits = [CHOOSE, CONTENT_FREE, REPORT] + [RANK] * can_lean(self.encoded)
        return control_answers(self.encoded, {split: self.answers(split, calibration) for split in splits})

    def by(self, way: str) -> Answers:
        """Answers to the report split."""
        if way == "few-shot":
            return self.few_shot()
        if way == "zerotuning":
            self.found[way] = self.zerotuning()
            return self.answers(REPORT, self.found[way])
        method = "act" if way == "exhaustive" else way
        ranking = "exhaustive" if way == "exhaustive" else "gradient"
        options = replace(self.options, methods=(method,), ranking=ranking, random_draws=0)
        if self.kept is not None:
            self.kept.close()  # the search writes to it
        result = search_heads(self.checkpoint, [self.task], options, journal=self.journal)
        if self.journal is not None:
            self.kept = Journal(self.journal, describe_search(self.checkpoint, [self.encoded], self.options))
            self.workers = Workers(self.kept)
        self.found[way] = result.calibrations[self.task.name]
        return self.answers(REPORT, self.found[way])

    def few_shot(self) -> Answers:
        """The same questions with examples before them."""
        asked = load_examples(
            self.questions.tasks[0], scoring=self.questions.scoring, shots=SHOTS, seed=self.questions.drawing_seed
        )
        with_shots = {example.question: example for example in asked.examples}
        report = tuple(with_shots[example.question] for example in self.task.splits.report)
        splits = replace(self.task.splits, rank=(), choose=(), report=report)
        task = encode_report(self.checkpoint, replace(self.task, name=f"{self.task.name} few-shot", splits=splits))
        return self.answers(REPORT, None, task)

    def zerotuning(self) -> Calibration:
        """Its head test over the ranking questions, its gamma by the choosing questions."""
        layers, heads = self.checkpoint.identity.num_layers, self.checkpoint.identity.num_heads

        def tuned(chosen: list[int], gamma: float) -> Calibration:
            at = dict.fromkeys(range(layers), tuple(sorted(chosen)))
            return Calibration(at, 1.0, model=self.checkpoint.identity, gamma=gamma)

        plain = self.answers(RANK).accuracy
        effect = {head: self.answers(RANK, tuned([head], 2.0)).accuracy - plain for head in range(heads)}
        up = sum(change > 0 for change in effect.values()) >= sum(change < 0 for change in effect.values())
        order = sorted(effect, key=lambda head: -effect[head] if up else effect[head])
        tried = {gamma: tuned(order[: max(1, round(SHARE * heads))], gamma) for gamma in (UP if up else DOWN)}
        scored = {gamma: self.answers(CHOOSE, calibration) for gamma, calibration in tried.items()}
        worth = {gamma: (of.accuracy, of.log_likelihood) for gamma, of in scored.items()}
        if self.options.goal != "accuracy":
            worth = {g: (mean(log_likelihoods_beyond_remedy(self.encoded, CHOOSE, of)),) for g, of in scored.items()}
        best = max(worth, key=lambda gamma: worth[gamma])
        return tried[best]


def encode_report(checkpoint: Checkpoint, task) -> EncodedTask:
    """A task of which only the report split is asked."""
    report = task.splits.report
    whole = encode_task(checkpoint, replace(task, splits=replace(task.splits, rank=report[:1], choose=report[:1])))
    return replace(whole, splits={REPORT: whole.splits[REPORT], CONTENT_FREE: ()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--scoring")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--seeds", type=seeds_of, default="0")
    parser.add_argument("--ways", default="few-shot,zerotuning,act,fit")
    parser.add_argument("--goal", default="accuracy")
    for size in ("--rank", "--choose", "--report"):
        parser.add_argument(size, type=int)
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ways = arguments.ways.split(",")
    if unknown := set(ways) - set(WAYS):
        parser.error(f"there is no way {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    for job in jobs_of(arguments).values():
        job.load()  # what can't be had is refused before the model is loaded

    checkpoint = load_checkpoint(arguments.model)
    with precision_for_search(checkpoint.model, "auto"):
        compare(checkpoint, arguments, ways)


def seeds_of(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",")]


def jobs_of(arguments: argparse.Namespace) -> dict[tuple[str, int], SearchJob]:
    """By task and seed."""
    sizes = {split: getattr(arguments, split) for split in (RANK, CHOOSE, REPORT)}

    def job_of(task: str, seed: int) -> SearchJob:
        questions = Questions((task,), scoring=arguments.scoring, chat=arguments.chat, seed=seed)
        return SearchJob(questions, **sizes, options=SearchOptions(precision="own", goal=arguments.goal))

    return {(task, seed): job_of(task, seed) for task in arguments.task.split(",") for seed in arguments.seeds}


def compare(checkpoint: Checkpoint, arguments: argparse.Namespace, ways: list[str]) -> None:
    jobs = jobs_of(arguments)
    rows: list[dict] = []
    heads: dict[tuple[str, str], list[set]] = {}
    answered: dict[tuple[int, str], dict[str, dict[str, Answers]]] = {}
    print("| task | seed | way | accuracy | gain over plain | gain beyond the best remedy | AUROC | heads |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for task in arguments.task.split(","):
        for seed in arguments.seeds:
            journal = arguments.journal / f"{task}-{seed}" if arguments.journal is not None else None
            bench = Bench(checkpoint, jobs[task, seed], journal)
            controls = bench.controls()
            best = best_control(controls)
            for way, answers in [*controls.items(), *by_ways(bench, ways, best)]:
                found = bench.found.get(way.partition(" + ")[0])
                measures = measures_of(bench.encoded, answers)
                row = {
                    "task": task,
                    "seed": seed,
                    "goal": arguments.goal,
                    "way": way + (" (best remedy)" if way == best else ""),
                    "accuracy": answers.accuracy,
                    "gain": vars(gain_of(controls["plain"], answers)),
                    "beyond": vars(gain_of(controls[best], answers)),
                    "auroc": measures.auroc if measures is not None else None,
                    "invalid": answers.invalid,
                    "heads": found.num_calibrated_heads if found is not None else None,
                }
                rows.append(row)
                print_row(row)
                if way in bench.found:
                    heads.setdefault((task, way), []).append(set(strengths_by_head(found)))
                per_way = answered.setdefault((seed, way), {})
                per_way[task] = {"plain": controls["plain"], "control": controls[best], "way": answers}
            if bench.kept is not None:
                bench.kept.close()
    print_summary(rows, answered, heads)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def by_ways(bench: Bench, ways: list[str], remedy: str) -> Iterator[tuple[str, Answers]]:
    """Answers by each way, and of calibrations with a remedy too."""
    for way in ways:
        answers = bench.by(way)
        yield way, answers
        if way in bench.found:
            yield f"{way} + remedy", answers if remedy == PLAIN else bench.controls(bench.found[way])[remedy]


def print_row(row: dict) -> None:
    auroc = "" if row["auroc"] is None else f"{row['auroc']:.3f}"
    cells = [row["task"], row["seed"], row["way"], f"{row['accuracy']:.1%}", points(row["gain"]), points(row["beyond"])]
    print("|", " | ".join(map(str, [*cells, auroc, "" if row["heads"] is None else row["heads"]])), "|", flush=True)


def print_summary(rows: list[dict], answered: dict, heads: dict[tuple[str, str], list[set]]) -> None:
    """Averages over tasks; over seeds, mean and spread; how alike the head sets are."""
    averages: dict[str, list[tuple[float, float]]] = {}
    for (seed, way), tasks in answered.items():
        plain, control, own = ({task: a[kind] for task, a in tasks.items()} for kind in ("plain", "control", "way"))
        gain, beyond = vars(average_gain(plain, own)), vars(average_gain(control, own))
        averages.setdefault(way, []).append((gain["gain"], beyond["gain"]))
        print_row(
            {
                "task": f"average of {len(tasks)}",
                "seed": seed,
                "way": way,
                "accuracy": gain["accuracy"],
                "gain": gain,
                "beyond": beyond,
                "auroc": None,
                "heads": None,
            }
        )
    for seed in sorted({seed for seed, _ in answered}):
        for said in ("", " + remedy"):
            if {(seed, "act" + said), (seed, "fit" + said)} <= answered.keys():
                act, fit = (
                    {task: a["way"] for task, a in answered[seed, way + said].items()} for way in ("act", "fit")
                )
                print(f"seed {seed}: fit{said} over act{said}, on average {points(vars(average_gain(act, fit)))}")
    for way, of_seeds in averages.items():
        if len(of_seeds) > 1:
            gain, beyond = ([100 * pair[which] for pair in of_seeds] for which in (0, 1))
            print(
                f"{way}, {len(of_seeds)} seeds: gain {mean(gain):+.1f} +- {stdev(gain):.1f}, beyond the best remedy "
                f"{mean(beyond):+.1f} +- {stdev(beyond):.1f}"
            )
    for (task, way), sets in heads.items():
        pairs = [len(a & b) / len(a | b) for a, b in combinations(sets, 2) if a | b]
        if pairs:
            print(f"{task}, {way}: head sets of two seeds share {mean(pairs):.0%} of all in either")


def points(gain: dict) -> str:
    low, high = gain["interval"]
    return f"{100 * gain['gain']:+.1f}, {100 * low:+.1f} to {100 * high:+.1f}"


if __name__ == "__main__":
    run_program(main)
