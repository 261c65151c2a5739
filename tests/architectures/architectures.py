"""The table of architectures: each proven on tiny random models, end to end.

    architectures.py              measures every row and writes act_export/docs/architectures.md
    architectures.py --only phi   measures and prints the rows of one architecture
    architectures.py --others     tries every other causal language model of transformers

A row is a variant of `tiny_models.VARIANTS`: exported with calibrated heads, then compared with PyTorch running the
reference in every case of `act-export verify`: prompts, left padding, chunks, decode, native library and portable
functions. The hook itself is compared with the model's own attention.

The others get the same tiny configuration where their configuration class takes it. What is exported is verified alike;
what isn't, is listed with the reason that a user would read.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the tiny models are

import onnx_ir as ir
import torch
from tiny_models import VARIANTS, Variant, tiny_config, variant_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from act_export.calibration.file import Calibration
from act_export.checkpoint.identity import identify
from act_export.checkpoint.load import Checkpoint
from act_export.errors import ActExportError
from act_export.export import build_model
from act_export.ops import schema
from act_export.verify.parity.job import describe_failures, verify_file

DOCUMENT = Path(__file__).parents[2] / "act_export" / "docs" / "architectures.md"
CALIBRATION = Calibration({0: (1,), 1: (0, 3)}, beta={0: (0.4,), 1: (0.2, 1.7)}, threshold=0.06)
LARGEST_DIFFERENCE = 1e-4  # of a logit, float32
_ROWS = ("<!-- rows: tests/architectures/architectures.py -->", "<!-- end of rows -->")
_OTHERS = ("<!-- others: tests/architectures/architectures.py --others -->", "<!-- end of others -->")
_Given, _Result = TypeVar("_Given"), TypeVar("_Result")
_MOST_PARAMETERS = 60e6  # of another model: beyond, the tiny configuration didn't reach all of it
_HEADER = (
    "| architecture | variant | hook | native | portable | float16, ratio | nodes for each layer | note |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
)


@dataclass(frozen=True)
class Row:
    """What was measured of a variant.

    Attributes:
        variant: Which.
        hook: Largest difference of a logit, reference hook without calibration by the model's own attention.
        native: The same, ONNX Runtime with the native library by PyTorch with the reference, in float32.
        portable: The same with the portable functions.
        half: Mean error in float16, without calibration, by that of PyTorch in float16, the larger of both ways to run;
            None where it wasn't measured.
        nodes: Of the second layer.
    """

    variant: Variant
    hook: float
    native: float
    portable: float
    half: float | None
    nodes: int

    @property
    def passed(self) -> bool:
        """Whether the float32 figures are what they must be."""
        return max(self.hook, self.native, self.portable) <= LARGEST_DIFFERENCE

    def __str__(self) -> str:
        half = "-" if self.half is None else f"{self.half:.2f}"
        cells = (self.variant.architecture, self.variant.name, f"{self.hook:.1e}", f"{self.native:.1e}")
        return f"| {' | '.join((*cells, f'{self.portable:.1e}', half, str(self.nodes), self.variant.note))} |"


def measure(variant: Variant, *, half: bool = False) -> Row:
    """Exports and verifies a variant.

    Raises:
        ActExportError: If it can't be exported, or the parity gate of float32 doesn't hold.
    """
    model = variant_model(variant)
    checkpoint = Checkpoint(f"tiny {variant}", model, None, identify(model))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        build_model(checkpoint, CALIBRATION, path)
        nodes = nodes_of_a_layer(path)
        report = verify_file(path, checkpoint, CALIBRATION)
        if not report.passed:
            raise ActExportError(f"parity in float32 failed:\n{describe_failures(report)}")
        return Row(
            variant,
            report.hook.max_difference,
            *(engine.max_difference for engine in report.engines),
            half=_half_ratio(checkpoint, Path(folder)) if half else None,
            nodes=nodes,
        )


def _half_ratio(checkpoint: Checkpoint, folder: Path) -> float:
    """Of the plain model: tiny random ones have sink scores so near the threshold that rounding moves some across."""
    path = folder / "half.onnx"
    build_model(checkpoint, None, path, dtype="float16")
    report = verify_file(path, checkpoint, None)
    ratios = [report.error_ratio(engine) for engine in report.engines]
    return max(ratio for ratio in ratios if ratio is not None)


def nodes_of_a_layer(path: Path) -> int:
    """Nodes that depend on the attention of the first layer but not on that of the second, itself included.

    The slices for `logits_to_keep`, of the last layer alone, don't count.
    """
    graph = ir.load(path).graph
    first, second = (node for node in graph if node.domain == schema.DOMAIN)
    layer = _dependents(first) - _dependents(second)
    return sum(node.op_type != "Slice" or _is_constant(node.inputs[1]) for node in layer)


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def _dependents(start: ir.Node) -> set[ir.Node]:
    found: set[ir.Node] = set()
    waiting = [start]
    while waiting:
        for value in waiting.pop().outputs:
            for node, _ in value.uses():
                if node not in found:
                    found.add(node)
                    waiting.append(node)
    return found


@dataclass(frozen=True)
class Other:
    """What became of an architecture that isn't in the table.

    Attributes:
        architecture: `model_type`.
        difference: Largest difference of a logit in float32; None where it wasn't exported.
        reason: Why it wasn't exported; empty where it was.
        tried: Whether there was a tiny model to try.
    """

    architecture: str
    difference: float | None
    reason: str = ""
    tried: bool = True


def measure_other(architecture: str) -> Other:
    """Exports and verifies an architecture, or tells why not."""
    try:
        with torch.device("meta"):
            parameters = sum(
                p.numel() for p in AutoModelForCausalLM.from_config(tiny_config(architecture)).parameters()
            )
    except Exception as error:
        return Other(architecture, None, _first_line(error), tried=False)
    if parameters > _MOST_PARAMETERS:
        return Other(architecture, None, f"{parameters / 1e6:.0f} million parameters", tried=False)
    try:
        row = measure(Variant(architecture, "as it comes"))
    except ActExportError as error:
        return Other(architecture, None, _first_line(error))
    except Exception as error:
        return Other(architecture, None, f"{type(error).__name__}: {_first_line(error)}", tried=False)
    return Other(architecture, max(row.hook, row.native, row.portable))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(lines[:2]).strip() if lines else type(error).__name__


def rows_of_document(path: Path = DOCUMENT) -> list[list[str]]:
    """The cells of every row in the documentation's table."""
    text = path.read_text(encoding="utf-8")
    table = text[text.index(_ROWS[0]) + len(_ROWS[0]) : text.index(_ROWS[1])].strip().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def write_rows(rows: Sequence[Row]) -> None:
    """Replaces the rows of the documentation's table."""
    _replace(_ROWS, _HEADER + "".join(f"{row}\n" for row in rows))


def write_others(others: Sequence[Other]) -> None:
    """Replaces the documentation's lists of other architectures."""
    proven = [f"{other.architecture} ({other.difference:.1e})" for other in others if other.difference is not None]
    refused: dict[str, list[str]] = {}
    for other in others:
        if other.tried and other.difference is None:
            reason = other.reason.replace(other.architecture, "MODEL")
            refused.setdefault(reason, []).append(other.architecture)
    untried = [other.architecture for other in others if not other.tried]
    lines = [f"Exported, largest difference of a logit: {', '.join(proven)}.\n"]
    lines += ["| refused | what the command says |", "| --- | --- |"]
    lines += [
        f"| {', '.join(names)} | {reason} |" for reason, names in sorted(refused.items(), key=lambda i: -len(i[1]))
    ]
    lines += [f"\nNot tried, as the tiny configuration doesn't fit: {', '.join(untried)}.\n"]
    _replace(_OTHERS, "\n".join(lines))


def _replace(marks: tuple[str, str], content: str) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    begin, end = text.index(marks[0]) + len(marks[0]), text.index(marks[1])
    DOCUMENT.write_text(f"{text[:begin]}\n{content}{text[end:]}", encoding="utf-8")


def try_others() -> None:
    """Tries every architecture that has no row, and writes what became of each."""
    known = {variant.architecture for variant in VARIANTS}
    others = []
    for other in _in_processes(
        measure_other, [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in known]
    ):
        others.append(other)
        print(other, flush=True)
    write_others(others)


def _row_or_error(variant: Variant, *, half: bool) -> Row | str:
    try:
        return measure(variant, half=half)
    except ActExportError as error:
        return f"{variant}: {error}"


def _in_processes(call: Callable[[_Given], _Result], given: Sequence[_Given]) -> Iterator[_Result]:
    """The results in order, computed by a process of one thread a core."""
    with multiprocessing.get_context("spawn").Pool(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.imap(call, given)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures rows; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="ARCHITECTURE", help="print its rows, and leave the document as it is")
    parser.add_argument("--no-half", action="store_true", help="leave float16 out")
    parser.add_argument("--others", action="store_true", help="try the architectures that have no row instead")
    given = parser.parse_args(arguments)
    if given.others:
        try_others()
        return 0
    chosen = [variant for variant in VARIANTS if given.only in (None, variant.architecture)]
    if not chosen:
        known = ", ".join(sorted({variant.architecture for variant in VARIANTS}))
        parser.error(f"there is no architecture {given.only}; pass one of {known}")
    rows, failed = [], 0
    print(_HEADER, end="", flush=True)
    for row in _in_processes(partial(_row_or_error, half=not given.no_half), chosen):
        if isinstance(row, str):
            print(row, file=sys.stderr, flush=True)
            failed += 1
            continue
        print(row, flush=True)
        failed += not row.passed
        rows.append(row)
    if failed:
        print(f"{failed} of {len(chosen)} rows failed", file=sys.stderr)
        return 1
    if given.only is None and not given.no_half:
        write_rows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
