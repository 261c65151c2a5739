"""Units of work, shared out over the processes of `torchrun` and kept in a journal.

Every process plans the same units and gets all results, in the order of the plan, whoever computed them: the answer
doesn't depend on how many there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from act_export.errors import ActExportError
from act_export.journal import Journal, difference
from act_export.progress import Progress

_PATIENCE = timedelta(days=1)  # of a process that has done its units, for the others
_ALMOST_ALL = 0.99  # of the planned cost: what remains after it was spent is told as work, not as done


@dataclass(frozen=True)
class Unit:
    """A piece of work that one process does at a time.

    Attributes:
        key: Names it in the journal; different for different work of one search.
        cost: About how long it takes, in any unit.
        compute: Gives its result, which JSON can hold.
        fits: Whether a result that the journal has can be one; the unit is computed again where it can't.
    """

    key: str
    cost: float
    compute: Callable[[], Any]
    fits: Callable[[Any], bool] = lambda _: True


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that `torchrun` started, for the duration of the block; alone otherwise."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        yield
        return
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise ActExportError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes can't be joined: {error}; start them with "
            f"torchrun, or unset WORLD_SIZE"
        ) from error
    try:
        yield
    finally:
        distributed.destroy_process_group()


def own_device(device: str | None, device_map: str | None) -> str | None:
    """The GPU of this process, where each of several on a machine was given "cuda".

    Raises:
        ActExportError: For a device map, which would spread each process over all GPUs.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < 2:
        return device
    if device_map is not None:
        raise ActExportError(
            f"device map {device_map!r} spreads the model of each process over all devices of this machine; start one "
            f"process per machine, or pass --device cuda"
        )
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device


def process_index() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if _together() else 0


def process_count() -> int:
    """How many processes work together."""
    return distributed.get_world_size() if _together() else 1


class Workers:
    """Runs units: what the journal has is not computed again."""

    def __init__(self, journal: Journal | None = None, *, planned_cost: float = 0.0, progress: Progress | None = None):
        """Takes what is known before the first unit.

        Args:
            journal: Where results are kept; None keeps none.
            planned_cost: Of all units that will come, about.
            progress: Called after each unit of this process.

        Raises:
            ActExportError: If another process ended.
        """
        self.journal = journal
        self.planned_cost = planned_cost
        self.progress = progress
        self.cost_done = 0.0
        self.computed = 0
        self.needed: set[str] = set()
        self.found: dict[str, Any] = _merge(journal.values if journal is not None else {})

    def run(self, step: str, units: Sequence[Unit]) -> list[Any]:
        """Results of the units, in their order, on every process.

        Args:
            step: What to call them when reporting progress.
            units: The same on every process. Of units with the same key one is computed.

        Raises:
            ActExportError: If another process ended.
        """
        missing = list({unit.key: unit for unit in units if not self._has(unit)}.values())
        mine = _share(missing, process_index(), process_count())
        total, own = (sum(unit.cost for unit in part) for part in (units, mine))
        left = sum(unit.cost for unit in missing)
        self.cost_done += total - left
        self.needed |= {unit.key for unit in units}
        self._report(step)
        computed = {}
        for unit in mine:
            computed[unit.key] = unit.compute()
            self.computed += 1
            if self.journal is not None:
                self.journal.record(unit.key, computed[unit.key])
            self.cost_done += unit.cost * left / own
            self._report(step)
        if not mine:
            self.cost_done += left
        self.found |= _merge(computed)
        return [self.found[unit.key] for unit in units]

    def _has(self, unit: Unit) -> bool:
        return unit.key in self.found and unit.fits(self.found[unit.key])

    def _report(self, step: str) -> None:
        if self.progress is not None:
            self.progress(step, min(_ALMOST_ALL, self.cost_done / max(self.planned_cost, 1e-9)))

    def finish(self) -> None:
        """Reports that all is done."""
        if self.progress is not None:
            self.progress("done", 1.0)


def same_everywhere(search: Mapping[str, Any]) -> None:
    """Checks that all processes do the same search.

    Raises:
        ActExportError: If they don't, on every process, or if one ended.
    """
    first, *others = _gather(search)
    for number, other in enumerate(others, start=1):
        if other != first:
            raise ActExportError(
                f"the processes do different searches; in process 0 and then in process {number}, "
                f"{difference(first, other)}. Start all with the same command, the same versions and the same data"
            )


def _share(units: Sequence[Unit], index: int, count: int) -> list[Unit]:
    """The units of one process: the costliest go first, each to the process with the least to do."""
    loads = [0.0] * count
    shares: list[list[int]] = [[] for _ in range(count)]
    for position in sorted(range(len(units)), key=lambda position: -units[position].cost):
        least = loads.index(min(loads))
        loads[least] += units[position].cost
        shares[least].append(position)
    return [units[position] for position in sorted(shares[index])]


def _merge(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for part in _gather(values) for key, value in part.items()}


def _gather(mine: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What every process has, by its number."""
    parts: list[Mapping[str, Any]] = [mine] * process_count()
    if len(parts) > 1:
        try:
            distributed.all_gather_object(parts, mine)
        except RuntimeError as error:
            raise ActExportError(
                f"another process ended before its work was done; its own message says why. Start all again: finished "
                f"work is in the journal ({error})"
            ) from error
    return parts


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()
