"""Gluon on the CPU: Triton's interpreter, with a stand-in for what Gluon adds to Triton.

A kernel's own source is run, its partitions as groups of warps in an order that is drawn for each program. Beside what
`warp_groups` finds these are errors, whatever the order was:

- a number of a product that wasn't waited for; what it reads is in use until then. Copies of TMA arrive when a
  partition waits for them;
- a product of what was stored to shared memory without a fence behind it;
- partitions that all wait.

Shared memory begins as NaN.
"""

from __future__ import annotations

import ctypes
import random
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.experimental.gluon import GluonJITFunction
from triton.experimental.gluon import language as gluon_language
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle
from warp_groups import Barrier, Slot, program, require

MAP_TYPES = {"fp16": 6, "bf16": 9}
SWIZZLE_128 = 3

tl.block_type.layout = None  # tensors of Gluon have one; which thread has which element makes no difference here


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
    assert len(warps) == len(registers) == len(calls) - 1
    try:
        program.specialize(calls, order)
    finally:
        program.begin()


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
