"""Puts an attention of our own into a transformers model, through its attention registry.

    with attention_hook(model, ReferenceAttention(calibration)) as hooked:
        outputs = hooked(input_ids, attention_mask, cache)

Every attention layer of the model then calls `AttentionHook.attend` with the plain 2-D mask, and the hook, not the
model's own cache, joins past and new keys. No T x T mask is ever built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from act_export.calibration.file import Calibration
from act_export.calibration.reference import calibrated_attention
from act_export.checkpoint.identity import layers_and_heads
from act_export.checkpoint.low_memory import is_low_memory
from act_export.checkpoint.support import why_unsupported_model
from act_export.errors import ActExportError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_NAME = "act_export"
_HARMLESS_KEYWORDS = {"position_ids", "cache_position", "position_embeddings"}  # used before the attention


class UnsupportedModelError(ActExportError):
    """A model whose attention can't be replaced faithfully."""


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


class HookedOutputs(NamedTuple):
    """Result of a hooked forward pass.

    Attributes:
        logits: (batch, sequence, vocabulary), or (batch, logits_to_keep, vocabulary).
        state: One per layer; pass it to the next call.
    """

    logits: Tensor
    state: list[LayerState]


@dataclass(frozen=True)
class HookedModel:
    """A model under a hook; see `attention_hook`."""

    model: PreTrainedModel
    hook: AttentionHook
    num_layers: int

    @property
    def fewest_logits(self) -> int:
        """The smallest `logits_to_keep` that the model takes: 1, or 0 (all) where it always computes all."""
        return 1 if "logits_to_keep" in inspect.signature(self.model.forward).parameters else 0

    def __call__(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor,
        state: Sequence[LayerState] | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        one_at_a_time: bool = False,
    ) -> HookedOutputs:
        """One forward pass.

        Args:
            input_ids: (batch, sequence); None with `inputs_embeds`.
            attention_mask: (batch, past + sequence), 1 for real tokens.
            state: The previous call's state; None for a first call.
            inputs_embeds: (batch, sequence, hidden size), instead of token ids.
            position_ids: (batch, sequence), with M-RoPE also (3, batch, sequence); None to count the real tokens.
            logits_to_keep: Number of last positions to compute logits for; 0 for all.
            one_at_a_time: Gives what a call for each token would, which is how a decoder calls.

        Raises:
            UnsupportedModelError: If the model's attention didn't pass through the hook exactly once per layer, or asks
                for something the operator doesn't have.
        """
        tokens = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        if position_ids is None:
            (new,) = tokens.values()
            assert new is not None  # one of both is given
            position_ids = positions(attention_mask)[:, -new.shape[1] :]
        states = state if state is not None else [None] * self.num_layers
        cache = SinkCache(states, attention_mask, one_at_a_time=one_at_a_time)
        extra = {"logits_to_keep": logits_to_keep} if logits_to_keep else {}
        with activated(self.hook, cache):
            logits = self.model(
                **tokens,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=True,
                **{_cache_argument(self.model): cache},
                **extra,
            ).logits
        _check_calls(cache.calls, self.model.config.model_type)
        return HookedOutputs(logits, [layer for layer in cache.states if layer is not None])


def check_supported(model: PreTrainedModel) -> None:
    """Runs the model once under the hook, on a few tokens.

    Raises:
        UnsupportedModelError: If its attention can't be replaced, with the reason.
    """
    ids = torch.zeros(2, 5, dtype=torch.long, device=model.device)
    with (
        torch.no_grad(),
        as_unsupported(model.config.model_type),
        attention_hook(model, ReferenceAttention(None)) as hooked,
    ):
        first = hooked(ids, torch.ones_like(ids), logits_to_keep=1)
        hooked(ids, ids.new_ones(2, 10), first.state, logits_to_keep=1)


@contextmanager
def as_unsupported(architecture: str) -> Iterator[None]:
    """Turns whatever a model's own code raises where it doesn't fit into an UnsupportedModelError with the cause."""
    try:
        yield
    except (ActExportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if is_low_memory(error):
            raise MemoryError(str(error)) from error
        first_line = next(iter(str(error).strip().splitlines()), "")
        raise UnsupportedModelError(
            f"{architecture} models can't be exported yet: {type(error).__name__}: {first_line[:300]}"
        ) from error


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids (batch, total) that count the real tokens of a mask (batch, total); padding gets 0 or more."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


class ReferenceAttention:
    """The reference, calibrated or (with None) plain, as a hook."""

    def __init__(self, calibration: Calibration | None) -> None:
        """Takes the calibration to apply; None leaves every head as it is."""
        self.calibration = calibration
        self.sliding_windows: dict[int, int] = {}  # by layer, as the model asked for them
        self.sink_logits: dict[int, Tensor] = {}  # of the layers that have some, (num_heads,)

    def attend(self, call: AttentionCall) -> tuple[Tensor, LayerState]:
        """Runs `act_export.calibration.reference.calibrated_attention`."""
        if call.one_at_a_time and call.query.shape[2] > 1:
            return self._attend_one_at_a_time(call)
        layer = self.calibration.layer(call.layer) if self.calibration is not None else None
        heads = layer.heads if layer is not None else ()
        self.sliding_windows[call.layer] = call.sliding_window
        if call.sink_logits is not None:
            self.sink_logits[call.layer] = call.sink_logits.detach()
        past = call.past if call.past is not None else empty_state(call, len(heads))
        outputs = calibrated_attention(
            flatten_heads(call.query),
            flatten_heads(call.key),
            flatten_heads(call.value),
            *past,
            call.attention_mask,
            num_heads=call.query.shape[1],
            kv_num_heads=call.key.shape[1],
            scale=call.scale,
            softcap=call.softcap,
            sliding_window=call.sliding_window,
            calibrated_heads=heads,
            beta=layer.beta if layer is not None else (),
            threshold=layer.threshold if layer is not None else 0.0,
            threshold_mode=layer.threshold_mode if layer is not None else "absolute",
            sink_logits=call.sink_logits,
        )
        return outputs.output, LayerState(*outputs[1:])

    def _attend_one_at_a_time(self, call: AttentionCall) -> tuple[Tensor, LayerState]:
        sequence = call.query.shape[2]
        past = call.attention_mask.shape[1] - sequence
        outputs, state = [], call.past
        for row in range(sequence):
            step = call._replace(
                query=call.query[:, :, row : row + 1],
                key=call.key[:, :, row : row + 1],
                value=call.value[:, :, row : row + 1],
                attention_mask=call.attention_mask[:, : past + row + 1],
                past=state,
            )
            output, state = self.attend(step)
            outputs.append(output)
        assert state is not None  # a call has at least one row
        return torch.cat(outputs, 1), state


def flatten_heads(x: Tensor) -> Tensor:
    """(batch, heads, sequence, head_size) -> (batch, sequence, heads * head_size)."""
    return x.transpose(1, 2).flatten(2)


def empty_state(call: AttentionCall, num_calibrated: int) -> LayerState:
    """State of a layer before its first call."""
    sums = call.key.new_zeros((call.key.shape[0], num_calibrated, 0, 1), dtype=torch.float32)
    return LayerState(call.key[:, :, :0], call.value[:, :, :0], sums)


@contextmanager
def attention_hook(model: PreTrainedModel, hook: AttentionHook) -> Iterator[HookedModel]:
    """Routes the model's attention through `hook` for the duration of the block.

    Raises:
        UnsupportedModelError: If the attention can't be exchanged, or needs what the operator can't express.
    """
    reason = why_unsupported_model(model)
    if reason is not None:
        raise UnsupportedModelError(reason)
    num_layers, _ = layers_and_heads(model.config)
    with _routed(model):
        yield HookedModel(model, hook, num_layers)


@contextmanager
def _routed(model: PreTrainedModel) -> Iterator[None]:
    """Has every attention layer of the model call `attend`."""
    from act_export.adapters import ADAPTERS, adapted  # which call back

    adapter = ADAPTERS.get(model.config.model_type)
    if adapter is not None:
        with adapted(model, adapter, ATTENTION_NAME):
            yield
        return
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(ATTENTION_NAME)
    except ValueError as error:
        raise UnsupportedModelError(_not_routed(model.config.model_type)) from error
    try:
        yield
    finally:
        model.set_attn_implementation(before)


_active: ContextVar[tuple[AttentionHook, SinkCache]] = ContextVar("act_export_hook")


@contextmanager
def activated(hook: AttentionHook, cache: SinkCache) -> Iterator[None]:
    """Attention layers that run inside the block call this hook, with this cache."""
    token = _active.set((hook, cache))
    try:
        yield
    finally:
        _active.reset(token)


def active() -> tuple[AttentionHook, SinkCache]:
    """The hook and the cache of the forward pass that is running.

    Raises:
        RuntimeError: If none is.
    """
    found = _active.get(None)
    if found is None:
        raise RuntimeError("the act_export attention runs only inside attention_hook(...)")
    return found


def _cache_argument(model: PreTrainedModel) -> str:
    """What the model's forward calls its cache; older transformers say `past_key_values`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of the model's own attention."""
    _, cache = active()
    layer = getattr(module, "layer_idx", None)
    name = type(module).__name__
    if layer is None:
        raise UnsupportedModelError(f"{name} doesn't know its layer_idx")
    if position_bias is not None:
        raise UnsupportedModelError(f"{name} adds a position bias to its attention, which the operator can't express")
    if s_aux is not None and s_aux.shape != (query.shape[1],):
        raise UnsupportedModelError(
            f"{name} has sink logits of shape {tuple(s_aux.shape)}; the operator takes one for each of its "
            f"{query.shape[1]} heads"
        )
    if attention_mask is None or attention_mask.ndim != 2:
        raise UnsupportedModelError(f"{name} builds an attention mask of its own, which the operator can't express")
    for keyword, value_given in others.items():
        if keyword not in _HARMLESS_KEYWORDS and not isinstance(value_given, bool | int | float | str | None):
            raise UnsupportedModelError(f"{name} passes {keyword!r} to its attention, which the operator doesn't know")
    output = attend(
        module,
        layer,
        query,
        key,
        value,
        scale=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
        softcap=float(softcap or 0.0),
        sliding_window=_window_of(attention_mask, sliding_window, cache, name),
        sink_logits=s_aux,
    )
    return output.view(*output.shape[:2], query.shape[1], -1), None


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
        UnsupportedModelError: If the layer's attention ran before in this forward pass.
    """
    hook, cache = active()
    cache.calls[layer] += 1
    if cache.calls[layer] > 1:
        raise UnsupportedModelError(f"{_not_routed(type(module).__name__)}: layer {layer} called it twice")
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


def _plain_mask(
    *,
    attention_mask: Tensor | None = None,
    mask_function: Callable[..., Any] | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    local_size: int | None = None,
    **_: Any,
) -> Tensor | None:
    """Hands the 2-D mask on; refuses masks that are more than causal, windowed and padded."""
    if use_vmap or not (allow_is_causal_skip or mask_function is causal_mask_function):
        raise UnsupportedModelError(
            "the model overlays its causal mask with another (packed, blockwise or bidirectional); the operator can't "
            "express that"
        )
    running = _active.get(None)
    if running is None or attention_mask is None:
        return attention_mask
    mask = attention_mask.view(attention_mask.shape)  # an object of its own, to know it by
    running[1].masks.append((mask, int(local_size) if local_size else -1))
    return mask


def _check_calls(calls: Sequence[int], architecture: str) -> None:
    if any(count != 1 for count in calls):
        raise UnsupportedModelError(f"{_not_routed(architecture)} (calls by layer, expected one each: {list(calls)})")


def _window_of(attention_mask: Tensor, asked: int | None, cache: SinkCache, name: str) -> int:
    """The sliding window of the mask that a layer was given, -1 for none.

    The mask decides, as it does in transformers' own attention; what the layer asks for beside it is for kernels that
    build their mask themselves, and some models ask for a window that their masks don't have.

    Raises:
        UnsupportedModelError: If the mask was made anew on its way to the layer and there are windows to tell apart.
    """
    for mask, window in cache.masks:
        if mask is attention_mask:
            return window
    windows = {window for _, window in cache.masks}
    if len(windows) == 1 and all(mask.device != attention_mask.device for mask, _ in cache.masks):
        return windows.pop()  # a copy for a layer on another device
    if asked or any(window > 0 for _, window in cache.masks):
        raise UnsupportedModelError(
            f"{name} changes its attention mask on the way, so its sliding window can't be told"
        )
    return -1


def _not_routed(architecture: str) -> str:
    return (
        f"the attention of {architecture} doesn't pass through transformers' attention interface once per layer, so it "
        f"can't be replaced"
    )


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, _plain_mask)
