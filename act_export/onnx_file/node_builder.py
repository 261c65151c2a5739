"""New nodes for a graph, each with a name of its own under a prefix that says whose they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

PREFIX = "act/"
POSITIONS = PREFIX + "positions"
"""Position of each new token, (batch, sequence), int64: the number of real tokens before it; made once for a graph."""


class NodeBuilder:
    """Collects nodes; values are named after the prefix and what they hold.

    Attributes:
        nodes: In the order in which they were added.
    """

    def __init__(self, prefix: str = PREFIX) -> None:
        """Takes the prefix of all names, which must end in a slash."""
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []

    def add(
        self, operator: str, inputs: Sequence[str], name: str, *, domain: str = "", output: str = "", **attributes: Any
    ) -> str:
        """Adds a node with one output.

        Args:
            operator: Its type.
            inputs: Names of values.
            name: Of the node and of its output, after the prefix.
            domain: Of the operator.
            output: Its output's name, if that has to be another.
            attributes: Of the node.

        Returns:
            The output's name.
        """
        return self.add_many(operator, inputs, name, [output or self.prefix + name], domain=domain, **attributes)[0]

    def add_many(
        self,
        operator: str,
        inputs: Sequence[str],
        name: str,
        outputs: Sequence[str],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[str]:
        """Adds a node with outputs of the given names, and returns these."""
        node = helper.make_node(operator, inputs, outputs, name=self.prefix + name, domain=domain, **attributes)
        self.nodes.append(node)
        return outputs

    def constant(self, values: NDArray[Any] | Sequence[int], name: str) -> str:
        """Adds a constant (a list of numbers is int64), and returns its name."""
        array = values if isinstance(values, np.ndarray) else np.asarray(values, np.int64)
        output = self.prefix + name
        self.nodes.append(
            helper.make_node("Constant", [], [output], name=output, value=numpy_helper.from_array(array, output))
        )
        return output

    def flatten_heads(self, value: str, name: str) -> str:
        """(batch, heads, sequence, head size) -> (batch, sequence, heads * head size)."""
        rows = self.add("Transpose", [value], f"{name}_rows", perm=[0, 2, 1, 3])
        return self.add("Reshape", [rows, self.constant([0, 0, -1], f"{name}_shape")], name)

    def split_heads(self, value: str, heads: int, name: str, *, output: str = "") -> str:
        """(batch, sequence, heads * head size) -> (batch, heads, sequence, head size)."""
        rows = self.add("Reshape", [value, self.constant([0, 0, heads, -1], f"{name}_shape")], f"{name}_rows")
        return self.add("Transpose", [rows], name, output=output, perm=[0, 2, 1, 3])
