"""What a block of a GPU does at a time, on the CPU: groups of warps that wait for each other, and their shared memory.

Groups of warps are threads, one of which runs until it waits; which goes first is the caller's order. Wrong
synchronization is an error, whatever the order was: clocks say what a group may know, which is what was done before an
arrival that its waits saw. What is read was written before, what is overwritten was read before, each in that sense.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton.language as tl

Clock = dict[object, int]
Event = tuple[object, int]
NOT_A_NUMBER = {"bf16": 0x7FC0, "fp16": 0x7E00}
NUMPY_TYPES = {"bf16": np.uint16, "fp16": np.float16}  # of Triton's interpreter


class WrongSynchronizationError(Exception):
    """The kernel reads or overwrites what it must not yet, or waits forever."""


class _StoppedError(BaseException):
    """Another partition failed."""


class Partition:
    """What runs by itself: its clock, its products that run, and what it stored without a fence."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name = name
        self.clock = {**clock, name: 1}
        self.running: list[Any] = []  # products
        self.unfenced: set[Slot] = set()
        self.condition: Callable[[], bool] = lambda: True
        self.may_go = threading.Semaphore(0)
        self.is_done = False

    def now(self) -> Event:
        return self.name, self.clock[self.name]

    def knows(self, event: Event) -> bool:
        return self.clock.get(event[0], 0) >= event[1]


class Program:
    """One program of the grid: the partition whose turn it is."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begins anew, with one partition."""
        self.current = Partition("all", {})
        self._back = threading.Semaphore(0)
        self._error: BaseException | None = None

    def wait(self, condition: Callable[[], bool]) -> None:
        """Lets others run until the condition holds."""
        me = self.current
        me.condition = condition
        self._back.release()
        me.may_go.acquire()
        if self._error is not None:
            raise _StoppedError

    def specialize(self, calls: Sequence[tuple[Any, Sequence[Any]]], order: random.Random) -> None:
        """Runs all calls to their ends.

        Raises:
            WrongSynchronizationError: All wait.
        """
        partitions = [Partition(f"partition {number}", self.current.clock) for number in range(len(calls))]
        threads = [
            threading.Thread(target=self._run, args=(partition, *call), daemon=True)
            for partition, call in zip(partitions, calls, strict=True)
        ]
        for thread in threads:
            thread.start()
        order.shuffle(partitions)
        while left := [partition for partition in partitions if not partition.is_done]:
            ready = next((partition for partition in left if partition.condition()), None)
            if ready is None and self._error is None:
                self._error = WrongSynchronizationError("all partitions wait")
            self.current = ready or left[0]
            self.current.may_go.release()
            self._back.acquire()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _run(self, partition: Partition, function: Any, arguments: Sequence[Any]) -> None:
        partition.may_go.acquire()
        try:
            if self._error is None:
                function(*arguments)
                require(not partition.running, "products run at the end of a partition")
        except _StoppedError:
            pass
        except BaseException as error:
            self._error = self._error or error
        partition.is_done = True
        self._back.release()


program = Program()


def require(condition: object, what: str) -> None:
    if not condition:
        raise WrongSynchronizationError(f"{program.current.name}: {what}")


class Barrier:
    """An mbarrier: arrivals and bytes of its phase that are missing."""

    def __init__(self) -> None:
        self._count = self._missing = self._bytes = self._phases = 0
        self._arrived: Clock = {}
        self._seen: Clock = {}
        self._copies: list[Callable[[], Event]] = []

    def init(self, count: int) -> None:
        require(self._count == 0, "a barrier is made twice")
        self._count = self._missing = count

    def arrive(self, count: int, expected_bytes: int = 0) -> None:
        me = program.current
        require(self._missing >= count, "more arrive at a barrier than it counts")
        self._missing -= count
        self._bytes += expected_bytes
        merge(self._arrived, me.clock)
        me.clock[me.name] += 1
        self._complete()

    def copy(self, arrive: Callable[[], Event]) -> None:
        self._copies.append(arrive)

    def wait(self, parity: int) -> None:
        require(self._count > 0, "waits at a barrier that isn't made")
        program.wait(lambda: self._is_over(parity))
        merge(program.current.clock, self._seen)

    def _is_over(self, parity: int) -> bool:
        """Whether the current phase is of the other parity, after the copies that are on their way."""
        for arrive in self._copies:
            event, size = arrive()
            merge(self._arrived, dict([event]))
            self._bytes -= size
        self._copies.clear()
        self._complete()
        return self._phases % 2 != parity

    def _complete(self) -> None:
        if self._missing == 0 and self._bytes == 0:
            self._phases += 1
            self._missing = self._count
            merge(self._seen, self._arrived)
            self._arrived.clear()


def merge(clock: Clock, other: Clock) -> None:
    for key, value in other.items():
        clock[key] = max(clock.get(key, 0), value)


class Slot:
    """A matrix in shared memory: who wrote what is in it, and who has read that or does."""

    def __init__(self, shape: Sequence[int], kind: tl.dtype) -> None:
        self.dtype = kind
        self.data = np.full(shape, NOT_A_NUMBER[kind.name], np.uint16).view(NUMPY_TYPES[kind.name])
        self.written: list[Event] = []
        self.read: list[Event] = []
        self.readers = 0  # products that run
        self.is_fenced = True

    def before_write(self) -> None:
        require(self.readers == 0, "overwrites what a product reads")
        require(all(map(program.current.knows, self.read)), "overwrites what may not have been read")

    def before_read(self) -> None:
        require(self.written, "reads what nobody wrote")
        require(all(map(program.current.knows, self.written)), "reads what may not have been written")

    def store(self, rows: slice, data: np.ndarray) -> None:
        """By threads; until the partition's next arrival all of it is one content."""
        self.before_write()
        now = program.current.now()
        if self.read or (self.written and self.written[-1] != now):
            self.written, self.read = [], []
        assert self.data[rows].shape == data.shape
        self.data[rows] = data
        self.written.append(now)
        self.is_fenced = False
        program.current.unfenced.add(self)

    def copy(self, data: np.ndarray) -> Callable[[], tuple[Event, int]]:
        """By TMA: returns what makes it arrive."""
        self.before_write()
        event = (object(), 1)
        self.written, self.read, self.is_fenced = [event], [], True
        self.data.view(np.uint16)[...] = NOT_A_NUMBER[self.dtype.name]

        def arrive() -> tuple[Event, int]:
            self.data.view(np.uint16)[...] = data
            return event, data.nbytes

        return arrive
