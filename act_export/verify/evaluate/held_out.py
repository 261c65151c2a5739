"""Which questions of a task an evaluation may count: none that the heads of a file were ranked or chosen with."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from act_export.calibration.file import Calibration, Provenance
from act_export.errors import ActExportError, shown
from act_export.tasks import Example, Splits, TaskError, question_digests, split_examples, unused

SPLITS = ("report", "held-out", "all")
DEFAULT_SPLIT = "report"
_NO_SEARCH = "none"


def held_out(
    examples: Sequence[Example],
    calibrations: Sequence[Calibration | None],
    *,
    split: str,
    seed: int | None = None,
    task: str | None = None,
) -> Sequence[Example]:
    """The examples of one task to evaluate on: none that heads were ranked or chosen with.

    A calibration was searched where its provenance has a seed, and on this task where its provenance names it or
    records one of these questions as used. Where no search was on this task, the examples are those that a search with
    the default sizes would leave, so that a plain model, and one that was searched on other tasks, are measured on the
    same ones.

    Args:
        examples: All of the task or the data.
        calibrations: Of every model that will be evaluated; None for a plain one.
        split: "report", the search's report split; "held-out", all that no search used; "all", used or not.
        seed: Of the search; None for the one in the calibrations, or 0 where there is none.
        task: What a search would call the examples; None where any search was on them.

    Raises:
        ActExportError: For another split, a seed that isn't the search's, or where no example is left.
        TaskError: If there are too few examples to draw the search's splits again.
    """
    if split not in SPLITS:
        raise ActExportError(f"there is no split {split!r}; pass report, held-out or all")
    if split == "all":
        return examples
    origins = [calibration.provenance for calibration in calibrations if calibration is not None]
    searches = [origin for origin in origins if origin is not None and origin.seed is not None]
    on_these = [search for search in searches if _was_on(search, examples, task)]
    drawing = _drawing(on_these, seed)
    used = {digest for search in on_these or [drawing] for digest in _used_questions(search, examples)}
    used.update(*(_recorded(search) or () for search in searches))
    left = unused(_drawn_again(drawing, examples).report if split == "report" else examples, used)
    if not left:
        raise ActExportError(
            f"heads were ranked or chosen with all of these examples{f' of {task}' if task else ''}; evaluate on others"
        )
    return left


def _was_on(search: Provenance, examples: Sequence[Example], task: str | None) -> bool:
    if task is None or not search.tasks or task in search.tasks:
        return True
    recorded = frozenset(_recorded(search) or ())  # of data under another name
    return any(not recorded.isdisjoint(question_digests(example)) for example in examples)


def _drawing(searches: Sequence[Provenance], seed: int | None) -> Provenance:
    """The search whose splits are drawn again; where there was none, one with the default sizes."""
    if not searches:
        return Provenance(_NO_SEARCH, seed=seed or 0)
    for search in searches:
        if seed in (None, search.seed):
            return search
    raise ActExportError(
        f"the seed is {seed}, but the heads were searched with seed "
        f"{' and '.join(str(search.seed) for search in searches)}; leave it out to evaluate on what that search "
        f"didn't use"
    )


def _recorded(search: Provenance) -> Collection[str] | None:
    found = search.notes.get("used")
    if found is not None and not (isinstance(found, list | tuple) and all(isinstance(each, str) for each in found)):
        raise ActExportError(f"the calibration's notes have used = {shown(found)}; it must be a list of digests")
    return found


def _used_questions(search: Provenance, examples: Sequence[Example]) -> Collection[str]:
    """Digests of the questions that heads were ranked or chosen with: recorded, or else drawn again."""
    recorded = _recorded(search)
    if recorded is not None:
        return recorded
    splits = _drawn_again(search, examples)
    return {digest for example in (*splits.rank, *splits.choose) for digest in question_digests(example)}


def _drawn_again(search: Provenance, examples: Sequence[Example]) -> Splits:
    """The splits of a search on these examples; `samples` has their sizes where they were its only task."""
    samples = search.samples if len(search.tasks) <= 1 else {}
    rank, choose, report = (samples.get(name) for name in ("rank", "choose", "report"))
    try:
        return split_examples(examples, rank=rank, choose=choose, report=report, seed=search.seed or 0)
    except TaskError as error:
        whose = "the report split" if search.method == _NO_SEARCH else "the search's splits"
        drawn = "drawn" if search.method == _NO_SEARCH else "drawn again"
        raise TaskError(f"{whose} can't be {drawn}: {error}; or pass another split") from error
