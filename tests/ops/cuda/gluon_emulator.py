"""Gluon on the CPU: Triton's interpreter, with a stand-in for what Gluon adds to Triton.

A kernel's own source is run. Partitions of `warp_specialize` are threads, one of which runs at a time until it waits;
which goes first is drawn for each program. Wrong synchronization is an error, whatever the order was:

- Clocks say what a partition may know: what was done before an arrival that its waits saw. What is read was written
  before, what is overwritten was read before, each in that sense, and products that run have read nothing to the end.
- Copies of TMA arrive when a partition waits for them, products when they are waited for; until then there is nothing.
- Tensor cores don't see what was stored to shared memory before a fence.
- Partitions that all wait are an error.

Shared memory begins as NaN.
"""

from __future__ import annotations

import ctypes
import random
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.experimental.gluon import GluonJITFunction
from triton.experimental.gluon import language as gluon_language
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle

Clock = dict[object, int]
Event = tuple[object, int]
NOT_A_NUMBER = {"bf16": 0x7FC0, "fp16": 0x7E00}
NUMPY_TYPES = {"bf16": np.uint16, "fp16": np.float16}  # of the interpreter
MAP_TYPES = {"fp16": 6, "bf16": 9}
SWIZZLE_128 = 3

tl.block_type.layout = None  # tensors of Gluon have one; which thread has which element makes no difference here


class WrongSynchronizationError(Exception):
    """The kernel reads or overwrites what it must not yet, or waits forever."""


class _StoppedError(BaseException):
    """Another partition failed."""


class Partition:
    """What runs by itself: its clock, its products that run, and what it stored without a fence."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name = name
        self.clock = {**clock, name: 1}
        self.running: list[Product] = []
        self.unfenced: set[Slot] = set()
        self.condition: Callable[[], bool] = lambda: True
        self.may_go = threading.Semaphore(0)
        self.is_done = False

    def now(self) -> Event:
        return self.name, self.clock[self.name]

    def knows(self, event: Event) -> bool:
        return self.clock.get(event[0], 0) >= event[1]


class Program:
    """One program of the grid: the partition whose turn it is, and the others."""

    def __init__(self) -> None:
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


class View:
    """A descriptor of shared memory: matrices in `slots`, or rows of one, perhaps transposed."""

    def __init__(self, slots: Sequence[Any], rows: slice = slice(None), *, is_transposed: bool = False) -> None:
        self._slots, self._rows, self._is_transposed = slots, rows, is_transposed

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self._slots), *self._slots[0].data.shape)

    @property
    def dtype(self) -> tl.dtype:
        return self.only().dtype

    def only(self) -> Any:
        assert len(self._slots) == 1
        return self._slots[0]

    def index(self, number: Any) -> View:
        return View([self._slots[int(number)]])

    def permute(self, order: Sequence[int]) -> View:
        assert tuple(order) == (1, 0)
        return View(self._slots, self._rows, is_transposed=not self._is_transposed)

    def slice(self, start: int, length: int) -> View:
        assert start % 8 == length % 8 == 0, "a swizzled matrix is cut between groups of 8 rows"
        return View(self._slots, slice(start, start + length))

    def store(self, tensor: tl.tensor) -> None:
        self.only().store(self._rows, tensor.handle.data)

    def load(self, layout: object) -> tl.tensor:
        del layout
        slot = self.only()
        slot.before_read()
        slot.read.append(program.current.now())
        return as_tensor(slot.data.copy(), slot.dtype)

    def numbers(self) -> TensorHandle:
        data = self.only().data[self._rows]
        return TensorHandle(data.T if self._is_transposed else data, self.dtype)


class TensorMap:
    """TMA's map of a matrix, as the stand-in for the driver encodes it."""

    layout = None

    def __init__(self, numbers: Sequence[int], kind: str, box: tuple[int, int]) -> None:
        """Takes the driver's numbers, and what the kernel was compiled for: type, and rows and columns of a tile."""
        _, type_number, address, columns, rows, stride_bytes, *others = numbers
        box_columns, box_rows, interleave, swizzle, _, fill, *_ = others
        assert (type_number, columns, stride_bytes) == (MAP_TYPES[kind], box[1], 2 * box[1])
        assert (box_rows, box_columns, interleave, swizzle, fill) == (box[0], 64, 0, SWIZZLE_128, 0)
        memory = (ctypes.c_uint16 * (rows * columns)).from_address(address)
        self.rows = np.frombuffer(memory, np.uint16).reshape(rows, columns)
        self.box = box
        self.nbytes_per_cta = 2 * box[0] * box[1]


class Product:
    """A product of a group of warps that runs: neither a number of it, nor its operands, may be used."""

    def __init__(self, left: Any, right: View, addend: tl.tensor | None, shape: Sequence[int]) -> None:
        self._operands, self._addend, self._shape = (left, right), addend, shape
        self.result: tl.tensor | None = None
        for slot in self._slots():
            slot.before_read()
            require(slot.is_fenced, "multiplies without a fence")
            slot.readers += 1
        program.current.running.append(self)

    def _slots(self) -> list[Slot]:
        return [operand.only() for operand in self._operands if isinstance(operand, View)]

    def finish(self) -> None:
        operands = (view.numbers() if isinstance(view, View) else view.handle for view in self._operands)
        zeros = TensorHandle(np.zeros(self._shape, np.float32), tl.float32)
        addend = zeros if self._addend is None else self._addend.handle
        product = interpreter.interpreter_builder.create_dot(*operands, addend, None, None)
        self.result = as_tensor(product.data, tl.float32)
        for slot in self._slots():
            slot.readers -= 1
            slot.read.append(program.current.now())


def as_tensor(data: np.ndarray, kind: tl.dtype) -> tl.tensor:
    return tl.tensor(TensorHandle(data, kind), tl.block_type(kind, list(data.shape)))


# What a kernel calls, by Gluon's names.


def _warpgroup_mma(left: Any, right: View, accumulator: Any, *, use_acc: bool = True, is_async: bool) -> Product:
    assert is_async
    require(isinstance(accumulator, tl.tensor), "adds to a product that runs")
    return Product(left, right, accumulator if use_acc else None, accumulator.handle.data.shape)


def _warpgroup_mma_wait(number: int, deps: Sequence[Any]) -> Any:
    running = program.current.running
    while len(running) > number:
        running.pop(0).finish()
    results = []
    for one in deps:
        result = one.result if isinstance(one, Product) else one
        require(result is not None, "takes the result of a product that runs")
        results.append(result)
    return results[0] if len(results) == 1 else tuple(results)


def _fence() -> None:
    for slot in program.current.unfenced:
        slot.is_fenced = True
    program.current.unfenced.clear()


def _async_load(map: TensorMap, place: Sequence[Any], barrier: View, target: View) -> None:
    row, column = map_ints(place)
    assert column == 0
    assert 0 <= row <= len(map.rows) - map.box[0], "the kernel copies nothing from beyond the cache"
    barrier.only().copy(target.only().copy(map.rows[row : row + map.box[0]]))


def map_ints(numbers: Sequence[Any]) -> list[int]:
    return [int(number) for number in numbers]


def _allocate(kind: tl.dtype, shape: Sequence[Any], layout: object) -> View:
    del layout
    count, *rest = map_ints(shape)
    if kind == tl.int64:
        return View([Barrier() for _ in range(count)])
    return View([Slot(rest, kind) for _ in range(count)])


def _specialize(calls: Sequence[tuple[Any, Sequence[Any]]], warps: Sequence[int], registers: Sequence[int]) -> None:
    global program
    assert len(warps) == len(registers) == len(calls) - 1
    try:
        program.specialize(calls, order)
    finally:
        program = Program()


def _where_pred(do: Callable[[], object], pred: Any) -> None:
    if pred:
        do()


def _inline_asm(assembly: str, constraints: str, arguments: Sequence[Any], *_: object) -> Any:
    assert (assembly, constraints) == ("mov.b32 $0, $1;", "=r,r")
    return arguments[0]


def _no_layout(*_: object) -> None:
    return None


MBARRIER = types.SimpleNamespace(
    MBarrierLayout=_no_layout,
    init=lambda barrier, count: barrier.only().init(int(count)),
    wait=lambda barrier, phase, pred=True: _where_pred(lambda: barrier.only().wait(int(phase)), pred),
    arrive=lambda barrier, count: barrier.only().arrive(count),
    expect=lambda barrier, size: barrier.only().arrive(1, size),
)
GLUON = types.SimpleNamespace(
    **{name: _no_layout for name in dir(gluon_language) if name.endswith("Layout")},
    allocate_shared_memory=_allocate,
    arange=lambda start, end, layout: tl.arange(int(start), int(end)),
    zeros=lambda shape, kind, layout: tl.zeros(map_ints(shape), kind),
    convert_layout=lambda tensor, layout: tensor,
    inline_asm_elementwise=_inline_asm,
    static_range=range,
    warp_specialize=_specialize,
)
HOPPER = {
    "gl": GLUON,
    "tl": tl,  # the interpreter looks for it
    "mbarrier": MBARRIER,
    "tma": types.SimpleNamespace(async_load=_async_load),
    "fence_async_shared": _fence,
    "warpgroup_mma": _warpgroup_mma,
    "warpgroup_mma_wait": _warpgroup_mma_wait,
}
SAME_IN_TRITON = (
    *("constexpr", "exp2", "float32", "fma", "int32", "int64", "load", "log2", "max", "maximum", "minimum"),
    *("num_programs", "program_id", "store", "sum", "where"),
)

program = Program()
order = random.Random(0)


def emulated(function: GluonJITFunction[Any]) -> InterpretedFunction[Any]:
    """A kernel of a module, as one that Triton's interpreter runs."""
    names: dict[str, Any] = {}
    for name, value in function.fn.__globals__.items():
        if isinstance(value, GluonJITFunction):
            code = value.fn
            names[name] = InterpretedFunction(types.FunctionType(code.__code__, names, code.__name__))
        else:
            names[name] = value.value if isinstance(value, tl.constexpr) else value
    names.update(HOPPER)
    return names[function.fn.__name__]


class _Gluon:
    """Names of Gluon's language, those that are Triton's too when they are asked for: the interpreter replaces them."""

    def __getattr__(self, name: str) -> Any:
        return getattr(tl if name in SAME_IN_TRITON else GLUON, name)


HOPPER["gl"] = _Gluon()
