"""Gelu in place of its approximation by a hyperbolic tangent, written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from act_export.export.passes.initializers import single_number
from act_export.export.passes.replace_node import replace_node

_BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "Add": np.add,
    "Mul": np.multiply,
    "Pow": np.power,
}
_MOST_STEPS = 8  # from the product to x
_SAMPLES = np.concatenate([np.linspace(-12, 12, 97), np.geomspace(1e-3, 1e3, 25), -np.geomspace(1e-3, 1e3, 25)])
_CLOSE = 1e-6


class FuseTanhGeluPass(ir.passes.InPlacePass):
    """Turns 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) into Gelu with approximate="tanh".

    transformers writes this formula in several ways, so it isn't compared by its form: a product that is made of one
    value, numbers and a Tanh is taken for it if it gives the same at many points. Other activations are left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every match in the main graph."""
        graph, modified = model.graph, False
        for tanh in list(graph):
            if tanh.op_type != "Tanh" or tanh.domain != "":
                continue
            for product in _products_after(tanh):
                x = _gelu_of(product)
                if x is not None and not product.outputs[0].is_graph_output():
                    replace_node(graph, product, ir.node("Gelu", [x], {"approximate": "tanh"}))
                    modified = True
                    break
        return ir.passes.PassResult(model, modified)


def _products_after(tanh: ir.Node) -> list[ir.Node]:
    """The Muls that a Tanh goes into, through nodes that have one user each, the last first."""
    found, node = [], tanh
    for _ in range(_MOST_STEPS):
        users = [user for user, _ in node.outputs[0].uses()]
        if len(users) != 1 or users[0].op_type not in _BINARY or users[0].domain != "":
            break
        node = users[0]
        if node.op_type == "Mul":
            found.append(node)
    return found[::-1]


def _gelu_of(product: ir.Node) -> ir.Value | None:
    """The x of which a node computes the Gelu."""
    for x in _candidates(product):
        with np.errstate(all="ignore"):
            values = _evaluate(product.outputs[0], {x: _SAMPLES}, _MOST_STEPS)
        if values is not None and np.allclose(values, _gelu(_SAMPLES), rtol=_CLOSE, atol=_CLOSE):
            return x
    return None


def _candidates(product: ir.Node) -> list[ir.Value]:
    """What a node multiplies, and what that is made of."""
    factors = [value for value in product.inputs if value is not None and single_number(value) is None]
    producers = [producer for value in factors if (producer := value.producer()) is not None]
    inner = [value for producer in producers if producer.op_type == "Mul" for value in producer.inputs]
    return [*factors, *(value for value in inner if value is not None and single_number(value) is None)]


def _evaluate(value: ir.Value, known: dict[ir.Value, np.ndarray], steps: int) -> np.ndarray | None:
    """What a formula gives for the known values; None if it has others, other operators or more steps."""
    if value in known:
        return known[value]
    number, node = single_number(value), value.producer()
    if number is not None:
        return np.asarray(number)
    if node is None or node.domain != "" or node.op_type not in (*_BINARY, "Tanh") or not steps:
        return None
    inputs = [None if given is None else _evaluate(given, known, steps - 1) for given in node.inputs]
    numbers = [given for given in inputs if given is not None]
    if len(numbers) != len(inputs):
        return None
    return np.tanh(numbers[0]) if node.op_type == "Tanh" else _BINARY[node.op_type](*numbers)


def _gelu(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return result
