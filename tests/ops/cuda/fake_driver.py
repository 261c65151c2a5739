"""A CUDA driver without a GPU: launches of the library run in Triton's interpreter, over host memory.

`csrc/cuda/fake_cuda.cc` is the driver: once loaded, the library's own look-up of libcuda.so.1 finds it. Images are
placeholders with a kernel's name, and a launch comes back here, where the Triton function of that name is run.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it where a function is defined, its own included

import ml_dtypes
import numpy as np
import triton.language as tl
from compiled import cmake
from gluon_emulator import TensorMap, emulated
from harness_calls import Harness
from triton.experimental.gluon import GluonJITFunction
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

import act_export.ops
from act_export.ops.cuda import catalogue as catalogue_file
from act_export.ops.cuda import kernels
from act_export.ops.cuda.build import PTX, parameter_letters
from act_export.ops.cuda.catalogue import KernelImage, write_catalogue
from act_export.ops.cuda.specs import HOPPER, PTX_TARGET, SCRATCH, TARGETS, KernelSpec, specs


def _dot(_: InterpreterBuilder, a: TensorHandle, b: TensorHandle, c: TensorHandle, *__: Any) -> TensorHandle:
    """The interpreter's matrix product; its own takes the bits of bfloat16 for integers (Triton 3.9).

    Summed in float64 and rounded once: float32 sums have an order of their own on each processor and for each shape, so
    that two kernels which compute a logit in tiles of two shapes would not agree on it.
    """

    def numbers(handle: TensorHandle) -> np.ndarray:
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    product = np.matmul(numbers(a).astype(np.float64), numbers(b).astype(np.float64))
    return TensorHandle((product + c.data).astype(c.data.dtype), c.dtype.scalar)


def _round(self: InterpreterBuilder, source: TensorHandle, kind: tl.dtype) -> TensorHandle:
    """float32 to bfloat16 by rounding to nearest, as GPUs do; the interpreter cuts digits off (Triton 3.9)."""
    if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
        return TensorHandle(source.data.astype(ml_dtypes.bfloat16).view(np.uint16), kind.scalar)
    return self.cast_impl(source, kind)


def _call(self: InterpretedFunction, *arguments: Any, **named: Any) -> Any:
    """A call of one function by another, without the interpreter's own work of each, a third of its time (Triton 3.9).

    It puts its operations in the place of Triton's before every call. Those stay until the launch ends, or beyond it,
    for all functions of a module.
    """
    if id(self.fn.__globals__) not in _prepared_modules:
        interpreter._patch_lang(self.fn)
        _prepared_modules.add(id(self.fn.__globals__))
    try:
        return self.rewrite()(*arguments, **named)
    except Exception as error:
        raise InterpreterError(repr(error)) from error


def _check_overflow(_: TritonSemantic, left: tl.tensor, right: tl.tensor, operation: Callable[..., Any]) -> None:
    """Of a sum, difference or product of integers.

    Triton's own check takes ten operations of the interpreter for each one, and says nothing without its debug mode.
    """
    kind = left.type.scalar
    if kind.int_bitwidth >= 64:
        return
    numbers = (operand.handle.data.astype(np.int64) for operand in (left, right))
    result = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__](*numbers)
    within = kind.get_int_min_value() <= result.min() and result.max() <= kind.get_int_max_value()
    assert within, f"int{kind.int_bitwidth} overflow in {operation.__name__}"


def _numpy_type(kind: tl.dtype) -> np.dtype:
    """As the interpreter's own, which makes a table of them all each time."""
    scalar = kind.scalar
    if scalar.is_ptr():
        return _numpy_type_of_address
    if scalar.name not in _numpy_types:
        _numpy_types[scalar.name] = _find_numpy_type(scalar)
    return _numpy_types[scalar.name]


_find_numpy_type = interpreter._get_np_dtype
_numpy_types: dict[str, np.dtype] = {}
_numpy_type_of_address = np.dtype(np.uint64)
_prepared_modules: set[int] = set()  # of the launch, by the addresses of their names

InterpreterBuilder.create_dot = _dot
InterpreterBuilder.create_fp_trunc = _round
InterpretedFunction.__call__ = _call
TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow
interpreter._get_np_dtype = _numpy_type

if not all(isinstance(function, InterpretedFunction) for function in (tl.sum, kernels.prepare)):
    raise ImportError("Triton was imported for a GPU before: what compiles kernels has to do so in another process")

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda"
THREADS_OF_TEST_KERNEL = 64
LARGE_SHARED_BYTES = 100 * 1024
LAUNCH_FAILED = 719
C_TYPES = {"p": ctypes.c_uint64, "i": ctypes.c_int32, "l": ctypes.c_int64, "f": ctypes.c_float}
MAP_TYPE = ctypes.c_uint64 * 16
NUMPY_TYPES = {"i": np.int32, "l": np.int64, "f": np.float32}
TRITON_TYPES = {"i": tl.int32, "l": tl.int64, "f": tl.float32}

OnLaunch = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
)


@dataclass(frozen=True)
class Launch:
    """One launch that came to the driver.

    Attributes:
        kernel: Name in the catalogue.
        target: Of the image that was taken: "sm_90", ..., "ptx".
        grid: Blocks in x, y and z.
        threads: Of a block.
        shared_bytes: Dynamic shared memory of a block.
        stream: Handle, None for CUDA's default stream.
        arguments: Values in order, without hidden ones.
        scratch: Allocations, by their first address, that arguments which are parts of a call's scratch memory are in;
            0 for those that are in none.
    """

    kernel: str
    target: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    stream: int | None
    arguments: tuple[int | float, ...]
    scratch: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Libraries:
    """What `build` made: a driver, one of CUDA 11.8, one without maps, kernels as C functions, the native library."""

    driver: Path
    old_driver: Path
    mapless_driver: Path
    harness: Path
    act_ops: Path


def has_driver() -> bool:
    """Whether this machine has a CUDA driver; asked in another process, so that it isn't loaded here."""
    command = [sys.executable, "-c", "import ctypes; ctypes.CDLL('libcuda.so.1')"]
    return subprocess.run(command, capture_output=True).returncode == 0


def placeholders(kernel_specs: Iterable[KernelSpec], target: int) -> list[KernelImage]:
    """Images that the driver here takes for the kernels of one target (0: PTX)."""
    return [
        placeholder(spec.name, target, parameter_letters(spec), threads=32 * spec.num_warps) for spec in kernel_specs
    ]


def placeholder(
    name: str,
    target: int,
    parameters: str,
    *,
    threads: int = THREADS_OF_TEST_KERNEL,
    shared_bytes: int = 0,
    damaged: bool = False,
) -> KernelImage:
    """An image that the driver here takes for a kernel; one that is damaged loads, but has no code that runs."""
    text = f"fake kernel {name} {f'sm_{target}' if target else 'ptx'}{' damaged' if damaged else ''}"
    return KernelImage(name, target, parameters, 2, threads, shared_bytes, name.partition(".")[0], text.encode())


def catalogue() -> list[KernelImage]:
    """Every kernel for every target, and a few for tests of the host side alone, with parameters "pilf"."""
    images = []
    for target in (*TARGETS, PTX):
        images += placeholders(specs(target or PTX_TARGET), target)
        images.append(placeholder("test.plain", target, "pilf"))
    images.append(placeholder("test.large", 80, "pilf", shared_bytes=LARGE_SHARED_BYTES))
    images.append(placeholder("test.large", 90, "pilf", shared_bytes=LARGE_SHARED_BYTES))
    images.append(placeholder("test.newest", 100, "pilf"))
    images.append(placeholder("test.damaged", 90, "pilf", damaged=True))
    images.append(placeholder("test.damaged", PTX, "pilf"))
    return images


def build() -> Libraries:
    """Builds the driver, the harness and the native library, with placeholders for kernels.

    Raises:
        AssertionError: They don't build; with the compiler's output.
    """

    def prepare(folder: Path) -> dict[str, object]:
        write_catalogue(folder / "kernels.bin", images)
        return {"ACT_CUDA_KERNELS": folder / "kernels.bin"}

    images = catalogue()
    operators = Path(act_export.ops.__file__).parent
    sources = (SOURCE, SOURCE.parent / "test_host.h", operators / "CMakeLists.txt", operators / "csrc")
    folder = cmake(SOURCE, (repr(images), Path(catalogue_file.__file__), *sources), prepare)
    drivers = (folder / name / "libcuda.so.1" for name in ("fake", "old", "mapless"))
    return Libraries(*drivers, folder / "libcuda_harness.so", folder / "ops" / "libact_ops.so")


class FakeDriver(Harness):
    """The driver, loaded into this process for the rest of its life, and the harness that calls it.

    Attributes:
        library: The driver.
        launches: What was launched since `recording` began.
        interpret: Whether launches are run, and not only recorded.
        device: Of calls.
        replaced: Functions that are run in the place of some kernels', by the first part of the kernels' names.
        before_launch: Is called at each, on the thread that it comes from.
    """

    def __init__(self, libraries: Libraries) -> None:
        """Loads the driver, with one device of compute capability 9.0.

        Raises:
            RuntimeError: A driver is loaded already.
        """
        if "libcuda.so" in Path("/proc/self/maps").read_text(encoding="utf-8"):
            raise RuntimeError("a CUDA driver is loaded already: the library would find it, not the one of the tests")
        # By its name, libcuda.so.1, it is found from now on.
        self.library = ctypes.CDLL(str(libraries.driver))
        super().__init__(libraries.harness)
        self.library.FakeCudaAllocation.restype = ctypes.c_uint64
        for name in ("FakeCudaLiveAllocations", "FakeCudaLoads", "FakeCudaContexts"):
            getattr(self.library, name).restype = ctypes.c_int64
        self.library.FakeCudaFailAllocations.argtypes = [ctypes.c_int64]
        self.launches: list[Launch] = []
        self.interpret = True
        self.before_launch: Callable[[], object] = lambda: None
        self.device = 0
        self.replaced: dict[str, Any] = {}
        self._specs = {spec.name: spec for target in (HOPPER, PTX_TARGET) for spec in specs(target)}
        self._errors: list[Exception] = []
        self._lock = threading.Lock()  # the interpreter runs one kernel at a time
        self._devices = 0
        self._on_launch = OnLaunch(self._launch)
        self.library.FakeCudaOnLaunch(self._on_launch)
        self.add_device(9, 0)

    def add_device(self, major: int, minor: int, *, multiprocessors: int = 4, shared_bytes: int = 232_448) -> int:
        """Adds a device; returns its ordinal."""
        self.library.FakeCudaAddDevice(major, minor, multiprocessors, shared_bytes)
        self._devices += 1
        return self._devices - 1

    def attention(self, storage: str, call: Any, device: int | None = None, stream: int | None = None) -> None:
        """As the harness's, on `device` of this where none is given."""
        super().attention(storage, call, self.device if device is None else device, stream)

    def call(self, function: str, *arguments: Any) -> None:
        """Calls a function of the harness.

        Raises:
            RuntimeError: It throws; with its message. An error of the interpreter is the cause.
        """
        try:
            super().call(function, *arguments)
        except RuntimeError as error:
            raise error from (self._errors.pop() if self._errors else None)

    @contextmanager
    def recording(self, *, interpret: bool = True) -> Iterator[list[Launch]]:
        """Gives the list that launches are added to inside."""
        self.launches.clear()
        before, self.interpret = self.interpret, interpret
        try:
            yield self.launches
        finally:
            self.interpret = before

    def _launch(
        self, name: bytes, target: bytes, grid: Any, threads: int, shared_bytes: int, stream: int, parameters: Any
    ) -> int:
        try:
            kernel = name.decode()
            spec = self._specs.get(kernel)
            letters = parameter_letters(spec) if spec else "pilf"
            values = tuple(_value(parameters[i], letter) for i, letter in enumerate(letters))
            blocks = tuple(grid.contents)
            names = parameter_names(spec) if spec else []
            parts = [value for name, value in zip(names, values, strict=False) if name in SCRATCH]
            scratch = frozenset(self.library.FakeCudaAllocation(ctypes.c_uint64(part)) for part in parts)
            self.before_launch()
            with self._lock:
                self.launches.append(
                    Launch(kernel, target.decode(), blocks, threads, shared_bytes, stream, values, scratch)
                )
                if spec is not None and self.interpret:
                    assert threads == 32 * spec.num_warps, f"{kernel} is launched with {threads} threads"
                    function = self.replaced.get(kernel.partition(".")[0], spec.function)
                    interpret(spec, function, blocks, letters, values)
        except Exception as error:
            self._errors.append(error)
            return LAUNCH_FAILED
        return 0


def _value(parameter: int, letter: str) -> Any:
    if letter == "t":
        assert parameter % 64 == 0
        return tuple(MAP_TYPE.from_address(parameter))
    return ctypes.cast(parameter, ctypes.POINTER(C_TYPES[letter])).contents.value


def parameter_names(spec: KernelSpec) -> list[str]:
    """As `parameter_letters`: a map has its name, what is behind it has none."""
    names = []
    for name, kind in spec.signature.items():
        if kind != "constexpr":
            names += [name, *[""] * 4] if kind.startswith("tensordesc") else [name]
    return names


def interpret(spec: KernelSpec, function: Any, grid: Sequence[int], letters: str, values: Sequence[Any]) -> None:
    """Runs a kernel in Triton's interpreter; pointers are addresses of host memory, which it reads and writes.

    Raises:
        AssertionError: An address that the kernel was compiled to find aligned isn't.
    """
    arguments = dict(spec.constexprs)
    for name, letter, value in zip(parameter_names(spec), letters, values, strict=True):
        if not name:
            continue
        if letter == "t":
            box = (spec.constexprs["COLUMNS"], spec.constexprs["D"])
            arguments[name] = TensorMap(value, spec.name.split(".")[1], box)
            continue
        if letter == "p":
            assert name not in spec.aligned or value % 16 == 0, f"{spec.name}: {name} is at {value:#x}"
            kind = tl.str_to_ty(spec.signature[name], None)
            handle = TensorHandle(np.array([value], np.uint64), kind)
        else:
            kind = TRITON_TYPES[letter]
            handle = TensorHandle(np.array([value], NUMPY_TYPES[letter]), kind)
        arguments[name] = tl.tensor(handle, kind)
    _prepared_modules.clear()
    if isinstance(function, GluonJITFunction):
        function = emulated(function)
    function[tuple(grid)](**arguments)


def address(array: np.ndarray | None) -> int | None:
    """The address of an array's memory; None for None."""
    return None if array is None else array.ctypes.data


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy of an array at a multiple of 256 bytes, as device memory is."""
    memory = np.empty(array.nbytes + 256, np.uint8)
    start = -memory.ctypes.data % 256
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
