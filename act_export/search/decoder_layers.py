"""Stands in front of a model's decoder layers: to start above the lowest ones, or to compute a layer twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from act_export.attention.call import activated, active
from act_export.errors import ActExportError

Forward = Callable[..., Any]
Interposed = Callable[[int, Forward, Tensor, Sequence[Any], dict[str, Any]], Any]
"""Called with a layer's index, its own forward, hidden states (batch, sequence, hidden size) and other arguments."""


def decoder_layers(model: PreTrainedModel, num_layers: int) -> nn.ModuleList:
    """The model's list of decoder layers.

    Raises:
        ActExportError: If it has no list of as many layers as it has attentions.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and all(map(_has_attention, module)):
            return module
    raise ActExportError(
        f"{model.config.model_type} has no list of {num_layers} decoder layers, so it can't be run from a layer on; "
        f"search with --ranking gradient and without --gradient-checkpointing"
    )


@contextmanager
def interposed(layers: nn.ModuleList, call: Interposed) -> Iterator[None]:
    """Has `call` answer for each layer's forward for the duration of the block."""

    def stand_in(index: int, forward: Forward) -> Forward:
        return lambda hidden, *args, **kwargs: call(index, forward, hidden, args, kwargs)

    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.__dict__["forward"] = stand_in(index, layer.forward)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = own


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """A decoder layer's output with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _has_attention(layer: nn.Module) -> bool:
    names = ("layer_idx", "layer_id")  # the second is gpt_neo's
    return any(getattr(module, name, None) is not None for module in layer.modules() for name in names)


@contextmanager
def checkpointed(model: PreTrainedModel, num_layers: int) -> Iterator[None]:
    """Hooked forward passes inside the block keep each decoder layer's input alone for their backward pass.

    Raises:
        ActExportError: If the model has no list of its decoder layers.
    """
    with interposed(decoder_layers(model, num_layers), _checkpoint_layer):
        yield


def _checkpoint_layer(index: int, forward: Forward, hidden: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    hook, cache = active()
    before = cache.states[index]
    runs = 0

    def run(hidden: Tensor) -> Any:
        nonlocal runs
        runs += 1
        if runs == 1:
            return forward(hidden, *args, **kwargs)
        with activated(hook, cache.replay(index, before)):
            return forward(hidden, *args, **kwargs)

    return checkpoint(run, hidden, use_reentrant=False)
