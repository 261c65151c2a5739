"""PyTorch that rounds activations to int8, as MatMulNBits does at accuracy level 4."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from act_export.verify.parity.stacked_experts import is_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LARGEST = 127


def round_to_int8(x: Tensor, block_size: int) -> Tensor:
    """Rounds (..., inputs) to 127 steps on either side of 0, in blocks of inputs, each with its own step."""
    inputs = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -inputs % block_size))
    blocks = padded.reshape(*x.shape[:-1], -1, block_size)
    step = blocks.abs().amax(-1, keepdim=True) / _LARGEST
    rounded = torch.where(step > 0, (blocks / step).round() * step, 0)
    return rounded.flatten(-2)[..., :inputs]


def int8_activations_model(model: PreTrainedModel, block_sizes: Mapping[str, int]) -> PreTrainedModel:
    """A copy over the same weights, in which the inputs of the named layers are rounded.

    Args:
        model: In float32.
        block_sizes: By layer, e.g. {"model.layers.0.mlp.up_proj": 32}, or by a projection of all experts, e.g.
            "model.layers.0.mlp.experts.down_proj".
    """
    rounding = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for name, block_size in block_sizes.items():
        parent = rounding.get_submodule(name.rpartition(".")[0])
        if is_experts(parent):
            _round_inputs_of_experts(parent, name.rpartition(".")[2], block_size)
        else:
            rounding.get_submodule(name).register_forward_pre_hook(_rounds_inputs(block_size))
    return rounding


def _rounds_inputs(block_size: int) -> Any:
    def hook(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (round_to_int8(inputs[0], block_size), *inputs[1:])

    return hook


def _round_inputs_of_experts(module: Any, projection: str, block_size: int) -> None:
    """Of the first projection, as the module gets them; of the second, what the gate or activation makes."""
    if projection != "down_proj":
        module.register_forward_pre_hook(_rounds_inputs(block_size))
        return
    module.config._experts_implementation = "grouped_mm"  # of those that call the gate; the configuration is a copy
    name = "_apply_gate" if module.has_gate else "act_fn"
    activate = getattr(module, name)
    vars(module).update({name: lambda x: round_to_int8(activate(x), block_size)})
    if name in module._modules:
        del module._modules[name]
