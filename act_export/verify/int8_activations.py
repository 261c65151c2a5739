"""PyTorch that rounds activations to int8, as MatMulNBits does at accuracy level 4."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
        block_sizes: By layer, e.g. {"model.layers.0.mlp.up_proj": 32}.
    """
    rounding = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for name, block_size in block_sizes.items():
        rounding.get_submodule(name).register_forward_pre_hook(_rounds_inputs(block_size))
    return rounding


def _rounds_inputs(block_size: int) -> Any:
    def hook(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (round_to_int8(inputs[0], block_size), *inputs[1:])

    return hook
