"""Gradient checkpointing under an attention hook: memory for one layer's activations instead of all layers'.

The model's own gradient checkpointing gives up its cache, which is where a hook's states live. Here each decoder layer
is computed again in the backward pass, with the states that it had before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from act_export.attention.call import activated, active
from act_export.search.decoder_layers import Forward, decoder_layers, interposed


@contextmanager
def checkpointed(model: PreTrainedModel, num_layers: int) -> Iterator[None]:
    """Hooked forward passes inside the block keep each decoder layer's input alone for their backward pass.

    Raises:
        UnsupportedModelError: If the model has no list of its decoder layers.
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
