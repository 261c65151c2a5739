"""Rotary embeddings whose frequencies depend on the run: how they get into a graph, and what a file says of them.

With most kinds of rotary scaling the frequencies are constants. With "longrope" they are one of two sets, by the length
of the sequence; transformers' own code for that can be traced. With "dynamic" (NTK by parts, see the formula at
`transformers.modeling_rope_utils`) they are computed from the length; transformers keeps the last ones in the module,
which depends on what ran before and can't be traced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@contextmanager
def traceable_rotation(model: PreTrainedModel) -> Iterator[None]:
    """Has dynamic rotary embeddings compute their frequencies from the positions alone, within the block."""
    replaced = [module for module in model.modules() if _is_dynamic(module)]
    for module in replaced:
        module.forward = _DynamicRotation(module)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def context_of(config: PreTrainedConfig) -> int | None:
    """The largest number of tokens of a sequence; None if there is none.

    Dynamic scaling exists to go beyond `max_position_embeddings`, by its factor.
    """
    longest: int | None = getattr(config, "max_position_embeddings", None)
    factors = [float(rope.get("factor") or 1) for rope in _rotations(config) if "dynamic" in _kind(rope)]
    return int(longest * min(factors)) if longest and factors else longest


def recomputed_beyond(model: PreTrainedModel) -> int | None:
    """The length after which the model's own code computes a sequence again, as its frequencies are others; or None.

    Phi-3 and its kin do so while they generate, with longrope.
    """
    from transformers import GenerationMixin

    own: Any = getattr(type(model), "prepare_inputs_for_generation", None)
    limit = getattr(model.config, "original_max_position_embeddings", None)
    if own is GenerationMixin.prepare_inputs_for_generation or not isinstance(limit, int):
        return None
    return limit if any(_kind(rope) == "longrope" for rope in _rotations(model.config)) else None


class _DynamicRotation:
    """Stands in for the forward pass of a dynamic rotary embedding."""

    def __init__(self, rotary: nn.Module) -> None:
        self.rotary: Any = rotary
        self.plain: Any = type(rotary).forward.__wrapped__  # type: ignore[attr-defined]  # below transformers' decorator

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """Cosine and sine for activations `x`; arguments as of the module."""
        rotary, prefix = self.rotary, "" if layer_type is None else f"{layer_type}_"
        kind = rotary.rope_type if layer_type is None else rotary.rope_type[layer_type]
        named = {} if layer_type is None else {"layer_type": layer_type}
        if "dynamic" not in kind:
            return self.plain(rotary, x, position_ids, **named)
        frequencies = _dynamic_frequencies(rotary, kind, position_ids, prefix, named)
        return self.plain(_With(rotary, f"{prefix}inv_freq", frequencies), x, position_ids, **named)


class _With:
    """A module with another value for one of its attributes."""

    def __init__(self, module: nn.Module, name: str, value: Tensor) -> None:
        self._module = module
        setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _dynamic_frequencies(rotary: Any, kind: str, position_ids: Tensor, prefix: str, named: Mapping[str, str]) -> Tensor:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    length = position_ids.max() + 1
    own: Tensor = getattr(rotary, f"{prefix}original_inv_freq")
    stretched, _ = ROPE_INIT_FUNCTIONS[kind](rotary.config, position_ids.device, seq_len=length, **named)
    return torch.where(length > rotary.original_max_seq_len, stretched, own.to(position_ids.device))


def _is_dynamic(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    named = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    return any(isinstance(kind, str) and "dynamic" in kind for kind in named) and hasattr(
        type(module).forward, "__wrapped__"
    )


def _rotations(config: PreTrainedConfig) -> list[Mapping[str, Any]]:
    """The parameters of a configuration's rotary embeddings: one for all layers, or one for each kind of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    inner = [each for each in found.values() if isinstance(each, Mapping)]
    return inner or [found]


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")
