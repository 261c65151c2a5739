"""The weights of experts that transformers keeps in one tensor: of each expert by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ExpertWeight:
    """One expert's weight of a projection.

    Attributes:
        projection: The parameter that all experts' are in.
        expert: Which of them.
        weight: (outputs, inputs), a view.
    """

    projection: str
    expert: int
    weight: Tensor


def is_experts(module: torch.nn.Module) -> bool:
    """Whether it is an experts module of transformers' experts interface."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "num_experts")


def expert_weights(module: Any) -> Iterator[ExpertWeight]:
    """The weights of an experts module, by projection and expert."""
    for projection in _PROJECTIONS:
        stack = getattr(module, projection, None)
        if isinstance(stack, torch.nn.Parameter) and stack.ndim == 3:
            for expert, weight in enumerate(stack):
                yield ExpertWeight(projection, expert, weight.T if module.is_transposed else weight)


def replace_expert_weights(module: Any, replaced: list[ExpertWeight]) -> None:
    """Gives the module a new parameter for each projection that has one of the weights; the old one is left alone."""
    for projection in dict.fromkeys(each.projection for each in replaced):
        stack = getattr(module, projection).detach().clone()
        for each in replaced:
            if each.projection == projection:
                stack[each.expert] = each.weight.T if module.is_transposed else each.weight
        setattr(module, projection, torch.nn.Parameter(stack, requires_grad=False))
