"""Mixtures of experts: each row of activations is multiplied by the weights of its own expert.

transformers keeps the weights of a layer's experts in one tensor, and lets the computation over it be replaced. The one
here sorts rows by expert, so that every expert's rows lie together, and hands them to one torch custom operator per
projection; gates, biases and routing weights stay ordinary operators over all rows. `UnrollExpertsPass` makes matrix
products of the operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import onnxscript
import torch
from onnx import TensorProto
from onnx.defs import OpSchema
from torch import Tensor
from torch.nn.functional import embedding
from transformers.integrations.moe import ExpertsInterface

from act_export.errors import ActExportError
from act_export.export.passes.unroll_experts import OPERATOR
from act_export.ops import schema

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERTS_NAME = "act_export"
_OF_INTERFACE = ("config", "has_gate", "has_bias", "is_transposed", "num_experts")


@torch.library.custom_op("act::SortByExpert", mutates_args=())
def _sort_by_expert(
    top_k_index: Tensor, chosen: int, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(tokens * k) each: the order by expert, its inverse, tokens and experts in that order; and counts (experts,)."""
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    return order, torch.argsort(order), order // chosen, experts, torch.bincount(experts, minlength=num_experts)


@_sort_by_expert.register_fake
def _(top_k_index: Tensor, chosen: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    choices = top_k_index.shape[0] * chosen
    order, inverse, tokens, experts = (top_k_index.new_empty(choices) for _ in range(4))
    return order, inverse, tokens, experts, top_k_index.new_empty(num_experts)


@torch.library.custom_op("act::ExpertMatMul", mutates_args=())
def _expert_matmul(rows: Tensor, counts: Tensor, weights: Tensor, inputs_first: bool) -> Tensor:
    by_expert = weights if inputs_first else weights.transpose(1, 2)
    parts = torch.split(rows, counts.tolist())
    return torch.cat([part @ weight for part, weight in zip(parts, by_expert, strict=True)])


@_expert_matmul.register_fake
def _(rows: Tensor, counts: Tensor, weights: Tensor, inputs_first: bool) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2 if inputs_first else 1])


def sorted_experts(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in place of an experts module's own computation.

    Args:
        module: The experts module, with the attributes that `use_experts_implementation` gives it.
        hidden: (tokens, hidden size).
        top_k_index: The experts of each token, (tokens, k).
        top_k_weights: Their weights, (tokens, k).

    Returns:
        (tokens, hidden size).
    """
    chosen = top_k_index.shape[1]
    order, inverse, tokens, experts, counts = torch.ops.act.SortByExpert(top_k_index, chosen, module.num_experts)

    def project(rows: Tensor, name: str) -> Tensor:
        product = torch.ops.act.ExpertMatMul(rows, counts, getattr(module, name), module.is_transposed)
        result: Tensor = product + embedding(experts, getattr(module, f"{name}_bias")) if module.has_bias else product
        return result

    rows = embedding(tokens, hidden)  # rows by index, as one Gather
    if module.has_gate:
        rows = module._apply_gate(project(rows, "gate_up_proj"))
    else:
        rows = module.act_fn(project(rows, "up_proj"))
    rows = project(rows, "down_proj")
    if getattr(module, "has_post_expert_norm", False):
        rows = module.post_expert_norm(rows)
    weighted = rows * embedding(order, top_k_weights.reshape(-1, 1))
    per_token = embedding(inverse, weighted).view(hidden.shape[0], chosen, -1)
    return per_token.sum(1).to(hidden.dtype)


@contextmanager
def exportable_experts(model: PreTrainedModel) -> Iterator[None]:
    """Routes the model's experts through `sorted_experts` for the duration of the block; other models are left alone.

    Raises:
        ActExportError: If it has experts that can't be replaced.
    """
    check_experts(model)
    # On the attribute itself, since the property would change configurations inside this one too.
    experts: list[Any] = [module for module in model.modules() if _is_routed(module)]
    configs = {id(module.config): module.config for module in experts}
    before = [config._experts_implementation_internal for config in configs.values()]
    try:
        for config in configs.values():
            config._experts_implementation_internal = EXPERTS_NAME
        yield
    finally:
        for config, implementation in zip(configs.values(), before, strict=True):
            config._experts_implementation_internal = implementation


def check_experts(model: PreTrainedModel) -> None:
    """Refuses a model whose experts don't pass through transformers' experts interface.

    Raises:
        ActExportError: Naming the first such module.
    """
    for name, module in model.named_modules():
        if _is_routed(module):
            if getattr(module, "_is_expert_parallel", False):
                raise ActExportError(
                    f"the experts of {name} are spread over several processes; load the model in one to export it"
                )
        elif _holds_experts(name, module):
            raise ActExportError(
                f"the experts of {model.config.model_type} models can't be exported: {name} "
                f"({type(module).__name__}) doesn't pass through transformers' experts interface"
            )


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How torch's exporter writes the operators: the products as nodes for `UnrollExpertsPass`."""
    ours = onnxscript.values.Opset(schema.DOMAIN, schema.VERSION)
    product = onnxscript.values.Op(ours, OPERATOR, _schema())
    return {
        torch.ops.act.SortByExpert.default: _write_sort,
        torch.ops.act.ExpertMatMul.default: lambda *inputs: product(*inputs[:-1], inputs_first=int(inputs[-1])),
    }


def _write_sort(top_k_index: Any, chosen: int, num_experts: int) -> tuple[Any, Any, Any, Any, Any]:
    op: Any = onnxscript.opset23
    flat = op.Reshape(top_k_index, op.Constant(value_ints=[-1]))
    length = op.Shape(flat)
    experts, order = op.TopK(flat, length, largest=0)
    _, inverse = op.TopK(order, length, largest=0)
    tokens = op.Div(order, op.Constant(value_int=chosen))
    column = op.Reshape(top_k_index, op.Constant(value_ints=[-1, 1]))
    is_of = op.Equal(column, op.Constant(value_ints=list(range(num_experts))))
    counts = op.ReduceSum(op.Cast(is_of, to=TensorProto.INT64), op.Constant(value_ints=[0]), keepdims=0)
    return order, inverse, tokens, experts, counts


def _schema() -> OpSchema:
    """Not registered with onnx: no file has this operator."""
    return OpSchema(
        OPERATOR,
        schema.DOMAIN,
        schema.VERSION,
        inputs=[
            OpSchema.FormalParameter(name, kind) for name, kind in (("rows", "T"), ("counts", "C"), ("weights", "T"))
        ],
        outputs=[OpSchema.FormalParameter("product", "T")],
        type_constraints=[("T", ["tensor(float)"], ""), ("C", ["tensor(int64)"], "")],
        attributes=[OpSchema.Attribute("inputs_first", OpSchema.AttrType.INT, "", required=True)],
    )


def _is_routed(module: torch.nn.Module) -> bool:
    return all(hasattr(module, name) for name in _OF_INTERFACE)


def _holds_experts(name: str, module: torch.nn.Module) -> bool:
    """Whether it has the weights of several experts: stacked, or as modules in a list."""
    called = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    if "expert" not in called or "shared" in called:
        return False
    stacked = any(parameter.ndim == 3 and len(parameter) > 1 for parameter in module.parameters(recurse=False))
    listed = isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict) and len(module) > 1
    return stacked or listed


ExpertsInterface.register(EXPERTS_NAME, sorted_experts)
