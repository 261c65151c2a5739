"""When torch's exporter may leave out its second trace, and that the graph is the same then."""

from collections import Counter
from contextlib import suppress

import pytest
import tiny
import torch
from torch.export import ExportedProgram

from act_export.calibration.calibration_set import CalibrationSet
from act_export.export import decompose, trace
from act_export.export.decompose import decomposed_where_needed, made_ready
from act_export.ops.functions import OPSET


def ready(x):
    """A cast, arithmetic of lengths, several outputs, and what does nothing."""
    x = torch.nn.functional.linear(x, torch.ones(4, 4)).to(torch.float16)
    x = torch.nn.functional.dropout(x.split(2, 1)[1], 0.5, training=False).chunk(2, 1)[0]
    return x.reshape(x.shape[0], 1, -1).flatten(1)


NOT_READY = {
    "flattened lengths": lambda x: x.flatten(0, 1),
    "a scalar flattened": lambda x: x.sum().flatten(),
    "a length to be found": lambda x: x.reshape(-1, 2),
    "fewer parts than asked for": lambda x: x.chunk(3, 1)[1],
    "in place": lambda x: (x * 2).add_(1),
    "without a translation": lambda x: torch.float_power(x, 1.5),
    "composite without one": lambda x: x.T,
    "with a graph of its own": lambda x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,)),
}


class Called(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def decomposed(program: ExportedProgram) -> bool:
    """Whether the exporter decomposed it."""
    asked = []
    whole = ExportedProgram.run_decompositions

    def run(*arguments, **named):
        asked.append(arguments)
        return whole(*arguments, **named)

    ExportedProgram.run_decompositions = run
    try:
        with decomposed_where_needed(decompose.translation_table()):
            torch.onnx.export(
                program,
                opset_version=OPSET,
                custom_translation_table=decompose.translation_table(),
                verbose=False,
            )
    finally:
        ExportedProgram.run_decompositions = whole
    return bool(asked)


def program_of(function) -> ExportedProgram:
    return torch.export.export(Called(function), (torch.ones(2, 4),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


def test_what_can_be_written_as_it_is_is_not_decomposed():
    assert not decomposed(program_of(ready))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NOT_READY)
def test_what_can_not_is_decomposed(name):
    assert decomposed(program_of(NOT_READY[name]))


def test_the_exporter_is_as_before_after_an_error():
    before = ExportedProgram.run_decompositions
    with suppress(KeyError), decomposed_where_needed({}):
        assert ExportedProgram.run_decompositions is not before
        raise KeyError
    assert ExportedProgram.run_decompositions is before


@pytest.mark.in_turn(4)
@pytest.mark.usefixtures("traced_anew")
def test_the_graph_has_the_nodes_of_a_decomposed_one(monkeypatch):
    heads = CalibrationSet.of(tiny.CALIBRATION).heads
    nodes = []
    for answer in (None, False):
        verdicts = []

        def judged(*arguments, answer=answer, verdicts=verdicts):
            verdicts.append(made_ready(*arguments))
            return verdicts[0] if answer is None else answer

        monkeypatch.setattr(decompose, "made_ready", judged)
        traced = trace.trace(tiny.tiny_checkpoint().model, heads)
        assert verdicts == [True]
        nodes.append(Counter(node.op_type for node in traced.graph))
    assert nodes[0] == nodes[1]
