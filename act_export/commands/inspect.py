"""act-export inspect: what is baked into a file."""

from __future__ import annotations

import json
from dataclasses import asdict

from act_export.commands.options import (
    FileArgument,
    JsonOption,
)
from act_export.commands.printing import PlainConsole, PlainTable, printable


def inspect_command(file: FileArgument, as_json: JsonOption = False) -> None:
    """Shows what is baked into an exported file."""
    from act_export.calibration.calibration_set import CalibrationSet
    from act_export.calibration.recipes import describe_calibrations
    from act_export.onnx_file.inspect import inspect_file

    found = inspect_file(file)
    if as_json:
        print(json.dumps({**asdict(found), "weights_bytes": found.weights_bytes}, indent=2, default=str))
        return
    table = PlainTable(show_header=False)
    table.add_column(overflow="fold", max_width=26)
    table.add_column(overflow="fold")

    def row(name: str, text: str) -> None:
        table.add_row(printable(name, lines=False), printable(text, lines=False))

    row("file", str(found.path))
    for name, size in found.weights.items():
        row("needs", f"{name}, {size / 1e6:.1f} MB" if size else f"{name}, which isn't there")
    commit = f" at {found.revision}" if found.revision else ""
    row("made by", f"act-export {found.version} from {found.source}{commit}")
    row("model", f"{found.architecture}, {found.num_layers} layers, {found.num_heads} heads")
    if found.family:
        row("tower", f"for the text of a {found.family} model")
    if found.takes_embeddings:
        axes = "time, height and width" if found.position_axes > 1 else "one each"
        row("takes", f"embeddings of width {found.embedding_size} instead of token ids; positions: {axes}")
    row("precision", found.precision)
    if found.accuracy_level is not None:
        row("quantization", f"blocks of {found.block_size}, accuracy level {found.accuracy_level}")
    row("graph", f"opset {found.opset}, {found.nodes} nodes, {found.weights_bytes / 1e6:.0f} MB of weights")
    for operator, count in found.operators.items():
        row(operator, f"{count} nodes")
    for line in describe_calibrations(found.calibrations or CalibrationSet.of(None), found.identity, found.precision):
        name, _, text = line.partition(": ")
        row(*((name, text) if text else ("", line)))
    if found.sink_state:
        row("sink state", ", ".join(found.sink_state))
    PlainConsole().print(table)
