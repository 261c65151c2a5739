"""Puts an attention of our own into a transformers model, for as long as a block runs.

    with attention_hook(model, ReferenceAttention(calibration)) as hooked:
        outputs = hooked(input_ids, attention_mask, state)

Every attention layer of the model then calls `AttentionHook.attend` with the plain 2-D mask, and the hook, not the
model's own cache, joins past and new keys. No T x T mask is ever built.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from act_export.attention.adapters import ADAPTERS, adapted
from act_export.attention.call import AttentionHook, LayerState, SinkCache, activated, not_routed, positions
from act_export.attention.reference_attention import ReferenceAttention
from act_export.attention.transformers_interface import ATTENTION_NAME
from act_export.checkpoint.identity import layers_and_heads
from act_export.checkpoint.low_memory import is_low_memory
from act_export.checkpoint.support import why_unsupported_model
from act_export.errors import ActExportError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
            ActExportError: If the model's attention didn't pass through the hook exactly once per layer, or asks
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
        ActExportError: If its attention can't be replaced, with the reason.
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
    """Turns whatever a model's own code raises where it doesn't fit into an ActExportError with the cause."""
    try:
        yield
    except (ActExportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if is_low_memory(error):
            raise MemoryError(str(error)) from error
        first_line = next(iter(str(error).strip().splitlines()), "")
        raise ActExportError(
            f"{architecture} models can't be exported yet: {type(error).__name__}: {first_line[:300]}"
        ) from error


@contextmanager
def attention_hook(model: PreTrainedModel, hook: AttentionHook) -> Iterator[HookedModel]:
    """Routes the model's attention through `hook` for the duration of the block.

    Raises:
        ActExportError: If the attention can't be exchanged, or needs what the operator can't express.
    """
    reason = why_unsupported_model(model)
    if reason is not None:
        raise ActExportError(reason)
    num_layers, _ = layers_and_heads(model.config)
    with _routed(model), contiguous_rows(model):
        yield HookedModel(model, hook, num_layers)


@contextmanager
def contiguous_rows(model: PreTrainedModel) -> Iterator[None]:
    """Has the rows that the output layer gets lie next to each other in memory, for the duration of the block.

    transformers slices the last positions out, and on a CPU PyTorch multiplies such rows by the vocabulary more slowly:
    in bfloat16 hundreds of times. A single row of a longer prompt counts as contiguous whatever its strides are, but
    PyTorch goes by them and copies the whole vocabulary: so a copy, not `contiguous`.
    """
    layer: torch.nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if layer is None:
        yield
        return
    handle = layer.register_forward_pre_hook(
        lambda _, rows: None if torch.compiler.is_exporting() else (_dense(rows[0]), *rows[1:])
    )
    try:
        yield
    finally:
        handle.remove()


def _dense(rows: torch.Tensor) -> torch.Tensor:
    """The same rows with the strides of a new tensor."""
    usual = torch.empty(rows.shape, device="meta").stride()
    return rows if rows.stride() == usual else rows.clone(memory_format=torch.contiguous_format)


@contextmanager
def _routed(model: PreTrainedModel) -> Iterator[None]:
    """Has every attention layer of the model call `attend`."""
    adapter = ADAPTERS.get(model.config.model_type)
    if adapter is not None:
        with adapted(model, adapter, ATTENTION_NAME):
            yield
        return
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(ATTENTION_NAME)
    except ValueError as error:
        raise ActExportError(not_routed(model.config.model_type)) from error
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _cache_argument(model: PreTrainedModel) -> str:
    """What the model's forward calls its cache; older transformers say `past_key_values`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _check_calls(calls: Sequence[int], architecture: str) -> None:
    if any(count != 1 for count in calls):
        raise ActExportError(f"{not_routed(architecture)} (calls by layer, expected one each: {list(calls)})")
