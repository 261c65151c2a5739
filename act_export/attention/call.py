"""One layer's attention, as a hook gets it, and the cache of a hooked forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from act_export.errors import ActExportError


class LayerState(NamedTuple):
    """What one layer keeps between calls.

    Attributes:
        key: (batch, kv_num_heads, past, head_size).
        value: As `key`.
        sink_scores: Running column sums (batch, calibrated heads, past, 1), float32.
    """

    key: Tensor
    value: Tensor
    sink_scores: Tensor


class AttentionCall(NamedTuple):
    """One layer's attention, as the model calls it.

    Attributes:
        layer: Index of the layer.
        query: (batch, num_heads, sequence, head_size), rotary already applied.
        key: (batch, kv_num_heads, sequence, head_size).
        value: As `key`.
        attention_mask: (batch, past + sequence), nonzero for real tokens.
        scale: Multiplies the logits.
        softcap: 0 for none.
        sliding_window: -1 for none.
        past: None on a first call.
        one_at_a_time: Each row is calibrated with the statistics up to itself, as if it came in a call of its own.
        sink_logits: Learned logit of one more key without a value (num_heads,); None where the model has none.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Tensor
    scale: float
    softcap: float
    sliding_window: int
    past: LayerState | None
    one_at_a_time: bool = False
    sink_logits: Tensor | None = None


class AttentionHook(Protocol):
    """An attention that stands in for the model's own."""

    def attend(self, call: AttentionCall) -> tuple[Tensor, LayerState]:
        """Returns the output (batch, sequence, num_heads * head_size) and the layer's present state."""
        ...


class SinkCache(Cache):
    """A transformers cache that never joins keys: `update` hands the new ones on, and the hook owns the state."""

    is_compileable = False

    def __init__(
        self, layers: Sequence[LayerState | None], attention_mask: Tensor, *, one_at_a_time: bool = False
    ) -> None:
        """Takes the state of each layer, None for a first call, and the mask (batch, past + sequence)."""
        self.attention_mask = attention_mask
        self.one_at_a_time = one_at_a_time
        self._masks_by_device = {attention_mask.device: attention_mask}
        self.states: list[LayerState | None] = list(layers)
        self.calls = [0] * len(self.states)
        self.masks: list[tuple[Tensor, int]] = []  # that the model had built, with their windows
        self.layers = []
        self.layer_class_to_replicate = None
        self.offloading = False

    def skip(self, layer: int, hidden: Tensor) -> None:
        """Stands for a layer that isn't run in this call.

        Args:
            layer: Its index.
            hidden: (batch, sequence, hidden size), for its batch and device.
        """
        self.calls[layer] += 1
        nothing = hidden.new_zeros(hidden.shape[0], 0, self.attention_mask.shape[1], 0)
        self.states[layer] = LayerState(nothing, nothing, nothing)

    def replay(self, layer: int, state: LayerState | None) -> SinkCache:
        """A cache with which one layer can compute this call again, from its state before the call."""
        again = SinkCache([None] * len(self.states), self.attention_mask, one_at_a_time=self.one_at_a_time)
        again.states[layer] = state
        again.masks = self.masks
        return again

    def mask_on(self, device: torch.device) -> Tensor:
        """The mask where a layer computes: a model may be spread over several devices."""
        if device not in self._masks_by_device:
            self._masks_by_device[device] = self.attention_mask.to(device)
        return self._masks_by_device[device]

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.states)

    @property
    def past_length(self) -> int:
        """Number of cached positions, padding included."""
        first = self.states[0]
        return 0 if first is None else first.key.shape[2]

    @property
    def is_sliding(self) -> list[bool]:
        """No layer drops keys: the attention itself applies the window."""
        return [False] * len(self.states)

    @property
    def is_linear(self) -> list[bool]:
        """No layer is a linear attention."""
        return [False] * len(self.states)

    @property
    def is_dummy(self) -> list[bool]:
        """No layer is a placeholder."""
        return [False] * len(self.states)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hands the new keys and values on as they are."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached positions, padding included."""
        return self.past_length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the first new token."""
        return self.past_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of keys of a call, and the first key's position."""
        return self.past_length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No maximum."""
        return -1


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids (batch, total) that count the real tokens of a mask (batch, total); padding gets 0 or more."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def flatten_heads(x: Tensor) -> Tensor:
    """(batch, heads, sequence, head_size) -> (batch, sequence, heads * head_size)."""
    x = x.transpose(1, 2)
    return x.reshape(x.shape[0], x.shape[1], x.shape[2] * x.shape[3])


def empty_state(call: AttentionCall, num_calibrated: int) -> LayerState:
    """State of a layer before its first call."""
    sums = call.key.new_zeros((call.key.shape[0], num_calibrated, 0, 1), dtype=torch.float32)
    return LayerState(call.key[:, :, :0], call.value[:, :, :0], sums)


ACTIVE: ContextVar[tuple[AttentionHook, SinkCache]] = ContextVar("act_export_hook")


@contextmanager
def activated(hook: AttentionHook, cache: SinkCache) -> Iterator[None]:
    """Attention layers that run inside the block call this hook, with this cache."""
    token = ACTIVE.set((hook, cache))
    try:
        yield
    finally:
        ACTIVE.reset(token)


def active() -> tuple[AttentionHook, SinkCache]:
    """The hook and the cache of the forward pass that is running.

    Raises:
        RuntimeError: If none is.
    """
    found = ACTIVE.get(None)
    if found is None:
        raise RuntimeError("the act_export attention runs only inside attention_hook(...)")
    return found


def attend(
    module: torch.nn.Module,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sliding_window: int = -1,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Has the running hook compute a layer's attention; arguments as in `AttentionCall`.

    Args:
        module: Named in errors.
        layer: Index of the layer.
        query: (batch, num_heads, sequence, head_size), rotary already applied.
        key: (batch, kv_num_heads, sequence, head_size).
        value: As `key`; its head size may be another.
        scale: Multiplies the logits.
        softcap: 0 for none.
        sliding_window: -1 for none.
        sink_logits: (num_heads,), or None.

    Returns:
        (batch, sequence, num_heads * head size of the value).

    Raises:
        ActExportError: If the layer's attention ran before in this forward pass.
    """
    hook, cache = active()
    cache.calls[layer] += 1
    if cache.calls[layer] > 1:
        raise ActExportError(f"{not_routed(type(module).__name__)}: layer {layer} called it twice")
    output, cache.states[layer] = hook.attend(
        AttentionCall(
            layer=layer,
            query=query,
            key=key,
            value=value,
            attention_mask=cache.mask_on(query.device),  # the caller's own: transformers made the other one boolean
            scale=scale,
            softcap=softcap,
            sliding_window=sliding_window,
            past=cache.states[layer],
            one_at_a_time=cache.one_at_a_time,
            sink_logits=sink_logits,
        )
    )
    return output


def not_routed(architecture: str) -> str:
    """Why a model can't be hooked whose layers don't call the attention as they should."""
    return (
        f"the attention of {architecture} doesn't pass through transformers' attention interface once per layer, so it "
        f"can't be replaced"
    )
