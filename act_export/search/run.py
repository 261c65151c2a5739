"""Checkpoint and questions -> calibrations: which heads answer better when their later sinks are calibrated."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from act_export.calibration.file import Calibration
from act_export.checkpoint.load import Checkpoint
from act_export.errors import ActExportError
from act_export.journal import Journal, own_journal
from act_export.progress import Progress
from act_export.search.answers import (
    CHOOSE,
    CONTENT_FREE,
    RANK,
    REPORT,
    Answers,
    EncodedTask,
    answer,
    cost_of,
    encode_task,
)
from act_export.search.choose import Choice, choose
from act_export.search.controls import can_lean, credits_with_remedy, log_likelihoods_beyond_remedy
from act_export.search.fit import fit_strengths, fitting_cost
from act_export.search.journal_description import describe_search
from act_export.search.memory import freed_memory_kept
from act_export.search.precision import precision_for_search
from act_export.search.processes import Workers, process_index, same_everywhere
from act_export.search.proposals import Proposal, first_heads_by_beta, first_heads_by_gamma, fitted, other_heads
from act_export.search.provenance import search_provenance
from act_export.search.rank import Effects, rank_heads, ranking_cost
from act_export.search.request import SearchOptions, SearchTask, Threshold, check_goal
from act_export.search.results import (
    CONTROL,
    NO_AVERAGES,
    WITH_REMEDY,
    Averages,
    Gain,
    SearchResult,
    TaskReport,
    average_gain,
)
from act_export.search.task_report import JOINT, OWN, answers_with_controls, on_split, task_report
from act_export.tasks import Example, question_digests
from act_export.tasks.batching import Batching, batches
from act_export.tasks.remedies import Remedy, fitted_remedy


def search_heads(
    checkpoint: Checkpoint,
    tasks: Sequence[SearchTask],
    options: SearchOptions | None = None,
    *,
    journal: str | os.PathLike[str] | None = None,
    journals: str | os.PathLike[str] | None = None,
    own: bool = True,
    joint: bool = True,
    published: Mapping[str, Calibration] | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Ranks all heads, chooses how many, and measures what that gains, for each task and for all together.

    The three splits of a task keep the three steps honest: heads are ranked on one, their number and strength (or
    none) are decided on the second, and the accuracies come from the third, which takes no part in either. Every
    calibration's provenance has the digests of the first two's questions, so that no later evaluation counts them.

    Under `torchrun` the processes share the work, and all get the same result.

    Args:
        checkpoint: The model; its parameters stay as they are and receive no gradient.
        tasks: At least one, with different names.
        options: How to search; None for the defaults.
        journal: Folder that keeps finished work: the same search goes on from there.
        journals: Instead, a folder in which every search has such a folder of its own. With neither nothing is kept.
        own: Find a set for each task; without it there is only the joint one.
        joint: With several tasks, also find one set for all.
        published: Head sets to report beside the found ones, by name.
        progress: Called after every batch.

    Returns:
        Calibrations that fit this checkpoint only, and what they gain.

    Raises:
        ActExportError: For no task, or two of one name; if the model's scores aren't finite, naming the prompt; if the
            processes don't do the same search; if the model's attention can't be replaced.
        TaskError: If the checkpoint has no tokenizer or an example can't be scored.
        JournalError: If the journal is another search's.
    """
    options = options or SearchOptions()
    names = [task.name for task in tasks]
    check_goal(options.goal, tasks)
    if not names or len(set(names)) < len(names):
        raise ActExportError(f"the tasks are {', '.join(names) or 'none'}; name at least one, and none twice")
    with freed_memory_kept(), precision_for_search(checkpoint.model, options.precision):
        encoded = [encode_task(checkpoint, task) for task in _apart(tasks)]
        description = describe_search(checkpoint, encoded, options)
        joint = joint and len(encoded) > 1
        seeds = {task.name: task.questions.drawing_seed for task in tasks}
        sets = {"own": own, "joint": joint, "published": sorted(published or ())}
        same_everywhere({**description, **asdict(options), "seed": seeds, **sets})
        if journal is None and journals is not None:
            kept = own_journal(Path(journals), description, process=process_index())
        else:
            kept = Journal(journal, description, process=process_index()) if journal is not None else None
        workers = Workers(
            kept,
            planned_cost=_planned_cost(checkpoint, encoded, options, len(published or {}), own=own, joint=joint),
            progress=progress,
        )
        search = _Search(checkpoint, encoded, options, published or {}, workers)
        try:
            result = search.run(own=own, joint=joint)
        finally:
            if kept is not None:
                kept.close()
        workers.finish()
        return result


@dataclass(frozen=True)
class _Found:
    """A decision: the calibration, and the choice that led to it."""

    calibration: Calibration
    choice: Choice


@dataclass(frozen=True)
class _Search:
    checkpoint: Checkpoint
    tasks: Sequence[EncodedTask]
    options: SearchOptions
    published: Mapping[str, Calibration]
    workers: Workers

    def run(self, *, own: bool, joint: bool) -> SearchResult:
        remedies = self._remedies()
        ranking = rank_heads(self.checkpoint, self.tasks, self.options, self.workers, joint=joint, remedies=remedies)
        plain = self._answer("choosing", [(task, CHOOSE, None) for task in self.tasks])
        found = {
            task.name: self._choose([task], effects, [answers], remedies)
            if own
            else self._found(choose([], [answers], []))
            for task, effects, answers in zip(self.tasks, ranking.own, plain, strict=True)
        }
        together = self._choose(self.tasks, ranking.joint, plain, remedies) if joint else None
        answered = self._report(found, together)
        reports = {
            task.name: task_report(task, found[task.name].choice, answered[task.name], sum(e.passes for e in effects))
            for task, effects in zip(self.tasks, ranking.own, strict=True)
        }
        calibrations = {
            task.name: self._recorded([task], found[task.name], reports, [reports[task.name].own])
            for task in self.tasks
        }

        def averages(kind: str) -> Averages:
            plain = {name: of["plain"] for name, of in answered.items()}
            control = {name: of[CONTROL + reports[name].control] for name, of in answered.items()}
            as_it_is = {name: of.get(kind, plain[name]) for name, of in answered.items()}
            remedied = {name: of.get(kind + WITH_REMEDY, control[name]) for name, of in answered.items()}
            return Averages(
                average_gain(plain, as_it_is), average_gain(control, as_it_is), average_gain(control, remedied)
            )

        shared, of_joint = None, NO_AVERAGES
        if together is not None:
            of_joint = averages(JOINT)
            gains = [report.joint for report in reports.values()]
            shared = self._recorded(self.tasks, together, reports, gains, of_joint)
        return SearchResult(
            calibrations,
            shared,
            reports,
            *(averages(OWN) if len(self.tasks) > 1 else NO_AVERAGES),
            *of_joint,
            (self.workers.computed, len(self.workers.needed)),
            self.workers.journal.damaged if self.workers.journal is not None else 0,
            answered,
        )

    def _remedies(self) -> dict[str, Remedy]:
        """By task, the plain model's best on the ranking questions; nothing where accuracy is the goal."""
        if self.options.goal == "accuracy":
            return {}
        answered = self._answer("answering plainly", [(task, RANK, None) for task in self.tasks])
        return {
            task.name: fitted_remedy(answers.scores, [e.answer for e in task.splits[RANK]], offsets=can_lean(task))
            for task, answers in zip(self.tasks, answered, strict=True)
        }

    def _choose(
        self,
        tasks: Sequence[EncodedTask],
        effects: Sequence[Effects],
        plain: Sequence[Answers],
        remedies: Mapping[str, Remedy],
    ) -> _Found:
        """The decision on these tasks together.

        Args:
            tasks: One, or all.
            effects: By threshold.
            plain: By task, the plain model's answers.
            remedies: By task, see `_remedies`.
        """
        proposals = [
            proposal
            for threshold, of_threshold in zip(self.options.thresholds, effects, strict=True)
            for proposal in self._propose(tasks, threshold, of_threshold, remedies)
        ]
        flat = self._answer(
            "choosing" if len(tasks) == 1 else "choosing a joint set",
            [(task, CHOOSE, proposal.calibration) for proposal in proposals for task in tasks],
        )
        rows = [flat[start : start + len(tasks)] for start in range(0, len(flat), len(tasks))]
        if self.options.goal == "accuracy":
            return self._found(choose(proposals, plain, rows))

        def worth(index: int, answers: Answers) -> tuple[float, ...]:
            return log_likelihoods_beyond_remedy(tasks[index], CHOOSE, answers)

        def right(index: int, answers: Answers) -> tuple[float, ...]:
            return credits_with_remedy(tasks[index], CHOOSE, answers)

        return self._found(choose(proposals, plain, rows, worth, right))

    def _found(self, choice: Choice) -> _Found:
        if choice.chosen.proposal is not None:
            return _Found(choice.chosen.proposal.calibration, choice)
        first = self.options.thresholds[0]
        nothing = Calibration({}, self.options.betas[0], first.value, first.mode, self.checkpoint.identity)
        return _Found(nothing, choice)

    def _propose(
        self, tasks: Sequence[EncodedTask], threshold: Threshold, effects: Effects, remedies: Mapping[str, Remedy]
    ) -> list[Proposal]:
        """What each method has to offer at this threshold."""
        options, model = self.options, self.checkpoint.identity
        proposals: list[Proposal] = []
        if "act" in options.methods:
            proposals += first_heads_by_beta(effects.log_likelihood, options.head_counts, threshold, model)
        if "gamma" in options.methods:
            assert effects.slopes is not None  # other methods than "act" have them computed
            proposals += first_heads_by_gamma(effects.slopes[1], options.gammas, options.head_counts, threshold, model)
        if "fit" in options.methods:
            assert effects.slopes is not None
            for l2 in options.fit_l2:
                strengths = fit_strengths(
                    self.checkpoint, tasks, effects.slopes, threshold, l2, options, self.workers, remedies
                )
                said = f", L2 {l2:g}" if len(options.fit_l2) > 1 else ""
                proposals += fitted(strengths, said, threshold, model)
        if len(options.thresholds) > 1:
            said = f", {threshold.mode} {threshold.value:g}"
            proposals = [proposal._replace(label=proposal.label + said) for proposal in proposals]
        return proposals

    def _report(self, found: Mapping[str, _Found], together: _Found | None) -> dict[str, dict[str, Answers]]:
        """By task, answers to the report split: plain, own, joint, random heads, published sets, and controls."""
        requests: list[tuple[EncodedTask, str, Calibration | None]] = []
        labels: list[tuple[str, str]] = []

        def ask(task: EncodedTask, label: str, calibration: Calibration | None, split: str = REPORT) -> None:
            requests.append((task, split, calibration))
            labels.append((task.name, label))

        for task in self.tasks:
            own = found[task.name].calibration
            shared = together.calibration if together is not None else None
            asked = {"plain": None, OWN: own, JOINT: shared}
            for label, calibration in asked.items():
                if label == "plain" or (calibration is not None and calibration.heads):
                    ask(task, label, calibration)
                    for split in (CONTENT_FREE, *([RANK] if can_lean(task) else [])):
                        ask(task, on_split(label, split), calibration, split)
            if own.heads:
                for draw in range(self.options.random_draws):
                    seed = task.task.questions.drawing_seed + draw
                    ask(task, f"random {draw}", other_heads(own, self.checkpoint.identity, seed=seed))
            for name, calibration in self.published.items():
                ask(task, f"published {name}", calibration)
        reported: dict[str, dict[str, Answers]] = {}
        for (task_name, label), answers in zip(labels, self._answer("measuring the gain", requests), strict=True):
            reported.setdefault(task_name, {})[label] = answers
        for number, task in enumerate(self.tasks):
            own_choice = found[task.name].choice
            chosen = {"plain": own_choice.candidates[0].answers[0], OWN: own_choice.chosen.answers[0]}
            if together is not None:
                chosen[JOINT] = together.choice.chosen.answers[number]
            of_task = reported[task.name]
            chosen = {label: answers for label, answers in chosen.items() if label in of_task}
            of_task |= answers_with_controls(task, of_task, chosen)
        return reported

    def _recorded(
        self,
        tasks: Sequence[EncodedTask],
        found: _Found,
        reports: Mapping[str, TaskReport],
        gains: Sequence[Gain | None],
        averages: Averages = NO_AVERAGES,
    ) -> Calibration:
        """What was found, with where it came from."""
        of_tasks = [reports[task.name] for task in tasks]
        provenance = search_provenance(
            self.checkpoint,
            found.calibration,
            found.choice,
            [task.task for task in tasks],
            of_tasks,
            gains,
            options=self.options,
            averages=averages,
        )
        return replace(found.calibration, provenance=provenance)

    def _answer(self, step: str, requests: Sequence[tuple[EncodedTask, str, Calibration | None]]) -> list[Answers]:
        return answer(self.checkpoint, requests, self.options, self.workers, step=step)


def _planned_cost(
    checkpoint: Checkpoint,
    tasks: Sequence[EncodedTask],
    options: SearchOptions,
    published: int,
    *,
    own: bool,
    joint: bool,
) -> float:
    """About what the whole search costs, in the unit of `Unit.cost`."""
    layers, heads = checkpoint.identity.num_layers, checkpoint.identity.num_heads
    weak = sum(beta < 1 for beta in options.betas)
    ways = len(options.betas) + weak * (len(options.betas) - weak)
    counts = len(options.head_counts)
    of_methods = {
        "act": ways * counts,
        "gamma": len(options.gammas) * counts,
        "fit": len(options.fit_l2) * len(options.fit_steps),
    }
    candidates = len(options.thresholds) * sum(of_methods[method] for method in options.methods)
    times = {
        CHOOSE: 1 + candidates * (own + joint),
        REPORT: 1 + own * (1 + options.random_draws) + published + joint,
        RANK: 1 + own + joint,
        CONTENT_FREE: 1 + own + joint,
    }
    total = 0.0
    for task in tasks:
        total += ranking_cost(task, options, layers, heads)
        if "fit" in options.methods:
            total += fitting_cost(task, options) * (own + joint)
        for split, count in times.items():
            examples = task.splits[split]
            parts = batches(examples, Batching(None, options.batch_tokens))
            total += count * sum(cost_of([examples[index] for index in part]) for part in parts)
    return total


def _apart(tasks: Sequence[SearchTask]) -> list[SearchTask]:
    """The tasks without questions to choose with that another ranks with, or to report on that another uses.

    Raises:
        ActExportError: If a task has none left.
    """

    def without(examples: Sequence[Example], used: Sequence[set[str]], index: int) -> tuple[Example, ...]:
        others = set().union(*used[:index], *used[index + 1 :])
        return tuple(e for e in examples if others.isdisjoint(question_digests(e)))

    ranking = [{digest for e in task.splits.rank for digest in question_digests(e)} for task in tasks]
    used = [
        {digest for e in (*task.splits.rank, *task.splits.choose) for digest in question_digests(e)} for task in tasks
    ]
    apart = []
    for index, task in enumerate(tasks):
        choose = without(task.splits.choose, ranking, index)
        left = without(task.splits.report, used, index)
        if not left or not choose:
            raise ActExportError(
                f"all questions that {task.name} would {'be reported on' if choose else 'choose with'} are used by "
                f"another task's search; search on them one at a time"
            )
        apart.append(replace(task, splits=replace(task.splits, choose=choose, report=left)))
    return apart
