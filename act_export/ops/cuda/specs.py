"""Which kernels the library carries: each Triton function with its types, block sizes and head sizes.

The launches in csrc/attention_cuda.cc take names, block sizes and argument orders from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from triton.experimental.gluon import language as gl

from act_export.ops.cuda import hopper, kernels

TARGETS = (80, 90, 100)  # compute capability, times ten, of machine code; other GPUs compile PTX for PTX_TARGET
PTX_TARGET = 80
# For head sizes of HEAD_SIZES; for multiples of 16, soft capping and any scale; for any head size.
KINDS = ("", "general", "odd")
HEAD_SIZES = (64, 128, 256)  # with kernels of their own; others take the general ones, padded to one of these
DTYPES = ("fp16", "bf16", "fp32")

POSITIONS = 32  # of the cache that one program of `prepare` copies
CHUNK = 4096  # tokens of the mask that one program of `prepare` counts, after those before it
STEP = 8192  # of which it takes so many at a time
SELECT_BLOCK = 1024
SINKS = 16  # later sinks that `correct` takes at a time: the smallest that tensor cores do
TOKENS = 16  # new tokens of a call that the decode kernels take, at the most
DECODE_COLUMNS = 64  # sections of the cache are multiples of it
SECTIONS = 64  # that the cache is split into, at the most
COMBINE_STEP = 8

HOPPER = 90  # the target that `hopper` is for
HOPPER_DTYPES = ("fp16", "bf16")
HOPPER_HEAD_SIZES = (64, 128)
HOPPER_ROWS, HOPPER_COLUMNS, HOPPER_STAGES = 128, 128, 2
MAP_ROWS = 128  # of a box that TMA copies: kMapRows of csrc/attention_cuda.cc
SWIZZLED_BYTES = 128  # of a row of a box that TMA copies, which is narrower than a tile


@dataclass(frozen=True)
class KernelSpec:
    """One kernel to compile.

    Attributes:
        name: In the catalogue, e.g. "forward.bf16.128", "forward.bf16.general128", "forward.bf16.odd128".
        function: Triton's function, or Gluon's.
        signature: Argument -> "*bf16", "*fp32", "*i64", "*i32", "i32", "fp32", "tensordesc<...>" or "constexpr", in
            order.
        constexprs: Values of the latter.
        aligned: Arguments that are multiples of 16 (pointers: bytes).
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
        architecture: That Triton compiles for. Kernels that gain nothing from a newer one's instructions are made for
            the oldest, which takes fewer registers, and its PTX is assembled for the newer.
    """

    name: str
    function: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    architecture: int = PTX_TARGET


@dataclass(frozen=True)
class _Family:
    """Kernels of one storage type and head size."""

    dtype: str
    head_size: int
    kind: str

    @property
    def general(self) -> bool:
        return self.kind != ""

    @property
    def suffix(self) -> str:
        return f"{self.dtype}.{self.kind}{self.head_size}"

    @property
    def wide(self) -> bool:
        return self.dtype == "fp32"

    @property
    def constexprs(self) -> dict[str, Any]:
        return {"D": self.head_size, "EXACT": not self.general, "GENERAL": self.general, "WIDE": self.wide}


# Rows and columns of the attention map that a program takes at a time, by head size: as many as registers hold.
_HALF_BLOCKS = {
    "forward": {64: (128, 64), 128: (128, 64), 256: (64, 32)},
    "columns": {64: (64, 128), 128: (64, 128), 256: (64, 64)},
    "correct": {64: (64, 32), 128: (64, 32), 256: (64, 32)},
}
_WIDE_BLOCKS = {
    "forward": {64: (32, 32), 128: (16, 32), 256: (16, 16)},
    "columns": {64: (64, 32), 128: (16, 32), 256: (16, 16)},
    "correct": {64: (32, 32), 128: (16, 32), 256: (16, 16)},
}


def rows_and_columns(kernel: str, dtype: str, head_size: int) -> tuple[int, int]:
    """Block sizes of `forward`, `columns` and `correct`: rows of the attention map, and columns, at the most."""
    return (_WIDE_BLOCKS if dtype == "fp32" else _HALF_BLOCKS)[kernel][head_size]


def decode_rows(dtype: str, head_size: int) -> tuple[int, ...]:
    """New tokens * query heads of a group that the decode kernels take: there is one for few and one for more."""
    if dtype == "fp32":
        return (16, 32) if head_size <= 64 else (16,)
    return (16, 64)


_POINTERS = {
    "mask": "*i64",
    "real_before": "*i32",
    "bounds": "*i32",
    "calibrated_index": "*i32",
    "calibrated_heads": "*i32",
    "sinks": "*i32",
    "sinks_before": "*i32",
    "past_sums": "*fp32",
    "present_sums": "*fp32",
    "calibration": "*fp32",
    "sink_logits": "*fp32",
    "row_lse": "*fp32",
    "row_maxima": "*fp32",
    "row_inverse": "*fp32",
    "rows_output": "*fp32",
    "logits": "*fp32",
    "part_maxima": "*fp32",
    "part_sums": "*fp32",
    "part_output": "*fp32",
    "sink_mass": "*fp32",
    "sink_output": "*fp32",
    "arrived": "*i32",
}
# Parts of a call's scratch memory, each of which csrc/attention_cuda.cc puts at a multiple of 256 bytes.
SCRATCH = (
    *("real_before", "bounds", "sinks", "sinks_before", "row_lse", "row_maxima", "row_inverse", "rows_output"),
    *("logits", "part_maxima", "part_sums", "part_output", "sink_mass", "sink_output", "arrived"),
)
_STORED = ("past_key", "past_value", "key", "value", "present_key", "present_value", "query", "output")
_FLOATS = ("scale", "softcap")
_MAPS = ("key_map", "value_map")


def _map_type(dtype: str, rows: int, head_size: int) -> str:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=SWIZZLED_BYTES, element_bitwidth=16, rank=2)
    return f"tensordesc<{dtype}[{rows}, {head_size}],{layout!r}>"


def _spec(
    name: str,
    function: Any,
    constants: dict[str, Any],
    *,
    dtype: str,
    num_warps: int,
    num_stages: int,
    architecture: int = PTX_TARGET,
) -> KernelSpec:
    signature = {}
    for argument in function.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in _MAPS:
            signature[argument] = _map_type(dtype, constants["COLUMNS"], constants["D"])
        elif argument in _STORED:
            signature[argument] = f"*{dtype}"
        elif argument in _POINTERS:
            signature[argument] = _POINTERS[argument]
        else:
            signature[argument] = "fp32" if argument in _FLOATS else "i32"
    used = {key: value for key, value in constants.items() if key in function.arg_names}
    aligned = tuple(argument for argument in signature if argument in (*_STORED, *SCRATCH))
    if ".odd" not in name:
        aligned += tuple(argument for argument in ("size", "value_size") if argument in signature)
    return KernelSpec(name, function, signature, used, aligned, num_warps, num_stages, architecture)


def specs(target: int = PTX_TARGET) -> Iterator[KernelSpec]:
    """Every kernel for a compute capability; names and arguments are the same for all, but Hopper has some more."""
    for dtype in DTYPES:
        for head_size in HEAD_SIZES:
            for kind in KINDS:
                yield from _family(_Family(dtype, head_size, kind), target)
    if target == HOPPER:
        for dtype in HOPPER_DTYPES:
            for head_size in HOPPER_HEAD_SIZES:
                yield _hopper(dtype, head_size)
    constants = {"BLOCK": SELECT_BLOCK}
    yield _spec("select", kernels.select, constants, dtype="fp32", num_warps=8, num_stages=1)


def _hopper(dtype: str, head_size: int) -> KernelSpec:
    constants = {"D": head_size, "ROWS": HOPPER_ROWS, "COLUMNS": HOPPER_COLUMNS, "STAGES": HOPPER_STAGES}
    name, function = f"hopper.{dtype}.{head_size}", hopper.forward
    return _spec(name, function, constants, dtype=dtype, num_warps=4, num_stages=1, architecture=HOPPER)


def _family(family: _Family, target: int) -> Iterator[KernelSpec]:
    base, suffix, dtype = family.constexprs, family.suffix, family.dtype
    wide_head = family.head_size > 128
    constants = {**base, "POSITIONS": POSITIONS, "CHUNK": CHUNK, "STEP": STEP}
    for unused in ("GENERAL", "WIDE"):
        constants.pop(unused)
    yield _spec(f"prepare.{suffix}", kernels.prepare, constants, dtype=dtype, num_warps=8, num_stages=1)

    for name, function in (("forward", kernels.forward), ("columns", kernels.columns), ("correct", kernels.correct)):
        rows, columns = rows_and_columns(name, dtype, family.head_size)
        newer = target >= 90 and not family.wide and not (wide_head and name == "correct")
        stages = 3 if not wide_head and (newer or name != "correct") else 2
        if (name, family.head_size) == ("forward", 128) and not newer:
            columns, stages = (32, 3) if family.wide else (32, 4)  # more columns would take too many registers
        constants = {**base, "ROWS": rows, "COLUMNS": columns}
        if name == "correct":
            constants["SINKS"] = SINKS
        yield _spec(
            f"{name}.{suffix}",
            function,
            constants,
            dtype=dtype,
            num_warps=4 if name == "forward" and family.wide and family.head_size == 128 else 8,
            num_stages=stages,
            architecture=target if newer else PTX_TARGET,
        )

    for rows in decode_rows(dtype, family.head_size):
        columns = DECODE_COLUMNS // (4 if wide_head and (family.wide or rows > 16) else 2)
        constants = {**base, "ROWS": rows, "COLUMNS": columns}
        name = f"decode_split.{suffix}.{rows}"
        warps = 4 if rows == 16 else 8
        stages = 3 if family.wide or wide_head else 4
        yield _spec(name, kernels.decode_split, constants, dtype=dtype, num_warps=warps, num_stages=stages)
        constants = {**constants, "TOKENS": TOKENS, "SECTIONS": SECTIONS, "STEP": COMBINE_STEP}
        constants.pop("GENERAL")
        name = f"decode_finish.{suffix}.{rows}"
        warps = 8 if family.wide else 4
        yield _spec(name, kernels.decode_finish, constants, dtype=dtype, num_warps=warps, num_stages=2)
