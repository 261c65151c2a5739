"""What a model must be able to do to be scored, and how PyTorch and ONNX Runtime do it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from act_export.attention.call import LayerState
from act_export.attention.hook import HookedModel


class LanguageModel(Protocol):
    """A causal language model with a state."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, state: Any | None) -> tuple[Tensor, Any]:
        """One forward pass.

        Args:
            input_ids: int64 (batch, sequence).
            attention_mask: int64 (batch, past + sequence), 1 for real tokens.
            state: What the previous call returned; None for a first call.

        Returns:
            Logits of the last position (batch, vocabulary), at least float32, and the state.
        """
        ...

    def select(self, state: Any, rows: Tensor) -> Any:
        """The state of a batch made of these rows (int64) of the old one; rows may repeat."""
        ...


@runtime_checkable
class ContinuesAtOnce(Protocol):
    """A language model that computes in one pass what decoding token by token would give."""

    def continue_at_once(self, input_ids: Tensor, following: Tensor, attention_mask: Tensor, state: Any) -> Tensor:
        """Log-likelihood of each token that follows one of several decoded tokens.

        Args:
            input_ids: int64 (batch, sequence), padded on the right.
            following: int64 (batch, sequence), the token that comes after each.
            attention_mask: int64 (batch, past + sequence), 1 for real tokens.
            state: Of the prompts, as in `LanguageModel`.

        Returns:
            (batch, sequence), at least float32; meaningless at padding.
        """
        ...


class TorchLanguageModel:
    """A transformers model under an attention hook; differentiable where gradients are enabled."""

    def __init__(self, hooked: HookedModel) -> None:
        """Takes what `act_export.attention.hook.attention_hook` yields."""
        self.hooked = hooked

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, state: list[LayerState] | None
    ) -> tuple[Tensor, list[LayerState]]:
        """See `LanguageModel`."""
        device = self.hooked.model.device
        outputs = self.hooked(
            input_ids.to(device), attention_mask.to(device), state, logits_to_keep=self.hooked.fewest_logits
        )
        last = outputs.logits[:, -1].cpu()
        return last.to(torch.promote_types(last.dtype, torch.float32)), outputs.state

    def continue_at_once(
        self, input_ids: Tensor, following: Tensor, attention_mask: Tensor, state: list[LayerState]
    ) -> Tensor:
        """See `ContinuesAtOnce`."""
        device = self.hooked.model.device
        logits = self.hooked(input_ids.to(device), attention_mask.to(device), state, one_at_a_time=True).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = logits.gather(2, following.to(logits.device)[..., None])[..., 0]
        return (chosen - logits.logsumexp(-1)).cpu()

    def select(self, state: list[LayerState], rows: Tensor) -> list[LayerState]:
        """See `LanguageModel`."""
        return [LayerState(*(part.index_select(0, rows.to(part.device)) for part in layer)) for layer in state]


class RunsModel(Protocol):
    """The part of `act_export.runtime.Session` that scoring needs."""

    def run(self, input_ids: Any, attention_mask: Any, state: Any = None, *, logits_to_keep: int = 0) -> Any:
        """Returns `logits` of the last positions, and `state`, arrays by name with the batch as first axis."""
        ...


class SessionLanguageModel:
    """An exported model in ONNX Runtime."""

    def __init__(self, session: RunsModel) -> None:
        """Takes an open session."""
        self.session = session

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, state: Mapping[str, np.ndarray[Any, Any]] | None
    ) -> tuple[Tensor, Mapping[str, np.ndarray[Any, Any]]]:
        """See `LanguageModel`."""
        outputs = self.session.run(input_ids.numpy(), attention_mask.numpy(), state, logits_to_keep=1)
        # In float64, so that what is summed over the tokens of a long choice isn't rounded again for each.
        last = np.ascontiguousarray(outputs.logits[:, -1], dtype=np.float64)
        return torch.from_numpy(last), outputs.state

    def select(self, state: Mapping[str, np.ndarray[Any, Any]], rows: Tensor) -> dict[str, np.ndarray[Any, Any]]:
        """See `LanguageModel`."""
        return {name: array[rows.numpy()] for name, array in state.items()}
