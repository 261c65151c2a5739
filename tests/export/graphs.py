"""Small graphs for tests of rewrites: written as text, run before and after."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime

_HEADER = '<ir_version: 10, opset_import: ["" : 23]> '


def parse(text: str, **constants: np.ndarray) -> ir.Model:
    """A graph `g (inputs) => (outputs) <value infos> {nodes}`, with the shapes that can be inferred.

    Args:
        text: As `onnx.parser` takes it; the header may be left out.
        constants: Initializers beside those in the text.
    """
    model = onnx.parser.parse_model(text if text.lstrip().startswith("<") else _HEADER + text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    return ir.serde.deserialize_model(inferred)


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    """What ONNX Runtime computes, after a full check of the model."""
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feeds)


def operators(model: ir.Model) -> list[str]:
    """The types of the nodes, in order."""
    return [node.op_type for node in model.graph]


def counts(model: ir.Model) -> Counter[str]:
    """How many nodes there are of each type."""
    return Counter(operators(model))


def clean(model: ir.Model) -> ir.Model:
    """The model without what nothing uses."""
    return common.RemoveUnusedNodesPass()(model).model


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Random float32."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def rewritten(model: ir.Model, rewrite: ir.passes.PassBase, *, rtol: float = 1e-5, **feeds: np.ndarray) -> ir.Model:
    """Applies a rewrite that must change the model and keep its results, and removes what nothing uses then."""
    before = run(model, **feeds)
    result = rewrite(model)
    assert result.modified
    model = clean(result.model)
    common.CheckerPass()(model)
    for new, old in zip(run(model, **feeds), before, strict=True):
        assert new.shape == old.shape
        np.testing.assert_allclose(new, old, rtol=rtol, atol=rtol)
    return model


def is_left_alone(model: ir.Model, rewrite: ir.passes.PassBase) -> bool:
    """Whether a rewrite leaves a model as it is, and says so."""
    before = operators(model)
    return not rewrite(model).modified and operators(model) == before
