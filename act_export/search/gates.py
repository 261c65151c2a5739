"""One backward pass ranks all heads, by both knobs.

Each head gets two gates, all 0. The first, g, is of its later sinks: the output is o + g * (o' - o), o plain and o'
calibrated. The derivative of the right answer's log-likelihood with respect to g is, to first order, what calibrating
that head alone would gain. At gate 0 it is the inner product of the loss's gradient at the head's output with o' - o,
so o' - o needs no graph of its own: the backward pass is that of the plain model.

The second is log(gamma), of the initial token. Its derivative of row i's output is A[i, 0] * (v[0] - o[i]), by the
softmax's own derivative, and needs no graph either.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from act_export.attention.call import AttentionCall, AttentionHook, LayerState, empty_state, flatten_heads
from act_export.attention.fast_attention import (
    calibrated_probabilities,
    head_groups,
    join_past,
    map_probabilities,
    plain_attention,
    values_of,
)
from act_export.attention.hook import attention_hook
from act_export.calibration.reference import initial_tokens
from act_export.errors import ActExportError
from act_export.search.decoder_layers import checkpointed
from act_export.tasks import EncodedExample
from act_export.tasks.language_model import TorchLanguageModel
from act_export.tasks.remedies import Remedy
from act_export.tasks.scoring import choice_scores, scores_of_choices

# float16 has no room for the small gradients inside the model: they are computed for a loss that is a multiple.
_LOSS_SCALES = (4096, 64, 1)


class Slopes(NamedTuple):
    """What a backward pass gives.

    Attributes:
        gradient: float64, of the parameter's shape.
        scores: By example, log-likelihoods of its choices.
    """

    gradient: Tensor
    scores: list[list[float]]


class GatedAttention:
    """An attention hook: the plain model, with two gates per head whose gradient is exact at 0.

    Away from 0 the first gate's value is right but its gradient is not: it leaves out how a gate changes later layers'
    o' - o. Of the second only the gradient at 0 is right.
    """

    def __init__(self, gates: Tensor, *, beta: float, threshold: float, threshold_mode: str) -> None:
        """Takes the gates (2, layers, heads), and how an open gate calibrates later sinks."""
        self.gates = gates
        self.beta = beta
        self.threshold = threshold
        self.threshold_mode = threshold_mode

    def attend(self, call: AttentionCall) -> tuple[Tensor, LayerState]:
        """See `act_export.attention.call.AttentionHook`."""
        past = call.past if call.past is not None else empty_state(call, call.query.shape[1])
        key, value = join_past(call, past)
        plain = plain_attention(call, key, value)
        differences, sums = [], []
        with torch.no_grad():
            for heads in head_groups(call):
                maps = map_probabilities(call, key, heads)
                sums_before = past.sink_scores[:, list(heads)].squeeze(-1)
                calibrated = calibrated_probabilities(
                    call,
                    maps,
                    sums_before,
                    beta=self.beta,
                    threshold=self.threshold,
                    threshold_mode=self.threshold_mode,
                )
                values = values_of(call, value, heads)
                initial = initial_tokens(call.attention_mask != 0)[:, None, None, :].to(values.dtype)
                of_gamma = (maps * initial).sum(-1, keepdim=True) * (initial @ values - maps @ values)
                differences.append(torch.stack([(calibrated.probabilities - maps) @ values, of_gamma]))
                sums.append(calibrated.column_sums)
            # a padding row has no calibrated output
            real_rows = call.attention_mask[:, -call.query.shape[2] :] != 0
            difference = torch.cat(differences, 2).masked_fill(~real_rows[:, None, :, None], 0)
        gate = self.gates[:, call.layer].to(difference)
        opened = (gate[:, None, :, None, None] * difference).sum(0)
        state = LayerState(key, value, torch.cat(sums, 1).unsqueeze(-1).float())
        return flatten_heads(plain + opened.to(plain.dtype)), state


def gate_gradients(
    model: PreTrainedModel,
    batch: Sequence[EncodedExample],
    *,
    num_layers: int,
    num_heads: int,
    beta: float,
    threshold: float,
    threshold_mode: str = "absolute",
    length_normalized: bool = False,
    gradient_checkpointing: bool = False,
    remedy: Remedy | None = None,
) -> Tensor:
    """Derivative of the right answers' log-likelihood with respect to each head's two gates, summed over one batch.

    The likelihood is that of `log_likelihoods`. The model's parameters receive no gradient.

    Args:
        model: Any that `act_export.attention.hook.attention_hook` takes.
        batch: Examples that run together.
        num_layers: Attention layers of the model.
        num_heads: Query heads per layer.
        beta: How an open gate calibrates, as in `act_export.Calibration`. The derivative is
            proportional to 1 - beta, as long as no row of a beta above 1 is cut back.
        threshold: The same.
        threshold_mode: The same.
        length_normalized: Compare choices by log-likelihood per token.
        gradient_checkpointing: Compute each layer twice to keep one layer's activations instead of all layers'.
        remedy: As `log_likelihoods`.

    Returns:
        float64 (2, num_layers, num_heads): first positive where calibrating the head's later sinks makes the right
        answers likelier; then by log(gamma), positive where a stronger initial token does.

    Raises:
        ActExportError: If a score or a gradient isn't finite, naming the prompt, or for a gradient those of its batch;
            if gradient checkpointing doesn't know the model's layers.
    """
    gates = torch.zeros(2, num_layers, num_heads, device=model.device)
    hook = GatedAttention(gates, beta=beta, threshold=threshold, threshold_mode=threshold_mode)
    return likelihood_gradient(
        model,
        hook,
        gates,
        batch,
        length_normalized=length_normalized,
        checkpointed_layers=num_layers if gradient_checkpointing else None,
        remedy=remedy,
    ).gradient


def likelihood_gradient(
    model: PreTrainedModel,
    hook: AttentionHook,
    parameter: Tensor,
    batch: Sequence[EncodedExample],
    *,
    length_normalized: bool = False,
    checkpointed_layers: int | None = None,
    remedy: Remedy | None = None,
) -> Slopes:
    """Derivative of the right answers' log-likelihood, summed over one batch, by a parameter of an attention hook.

    Args:
        model: Any that `act_export.attention.hook.attention_hook` takes.
        hook: Uses the parameter.
        parameter: Of any shape.
        batch: Examples that run together.
        length_normalized: Compare choices by log-likelihood per token.
        checkpointed_layers: The model's layers, to compute each twice and keep one layer's activations; None not to.
        remedy: As `log_likelihoods`.

    Raises:
        ActExportError: If a score isn't finite, naming the prompt, or a gradient, naming those of its batch.
    """
    parameter.requires_grad_(True)
    for scale in _LOSS_SCALES if model.dtype == torch.float16 else (1,):
        saving = checkpointed(model, checkpointed_layers) if checkpointed_layers is not None else nullcontext()
        with torch.enable_grad(), attention_hook(model, hook) as hooked, saving:
            scores = choice_scores(TorchLanguageModel(hooked), batch, length_normalized=length_normalized)
            (scaled,) = torch.autograd.grad(scale * log_likelihoods(batch, scores, remedy).sum(), parameter)
        gradient: Tensor = scaled.double() / scale
        if gradient.isfinite().all():
            said = scores_of_choices([row.detach().double().tolist() for row in scores], batch)
            return Slopes(gradient.cpu(), [list(row) for row in said])
    raise ActExportError(
        f"a gradient is not finite among the prompts {', '.join(example.text for example in batch)}; the weights "
        f"or their precision are at fault, float32 or bfloat16 may help"
    )


def log_likelihoods(
    examples: Sequence[EncodedExample], scores: Sequence[Tensor], remedy: Remedy | None = None
) -> Tensor:
    """Log-likelihood of each example's right answer, as its accuracy would have it, or among the choices with a remedy.

    As accuracy has it: among the choices, or its own where it is the only one (a generation task's reference answer).
    Its own too where first tokens are compared: there it has to beat the whole vocabulary, so what counts against it
    isn't the other choices alone, nor them and the one other token that happens to be the likeliest.

    Args:
        examples: n of them.
        scores: By example, as `act_export.tasks.scoring.choice_scores` gives them.
        remedy: To apply to the choices; None to count as accuracy does.

    Returns:
        (n,).
    """
    if remedy is not None:
        widest = max(len(example.choices) for example in examples)
        offsets = [*remedy.offsets, *[0.0] * widest]
        rows = [row[: len(example.choices)] for row, example in zip(scores, examples, strict=True)]
        rows = [remedy.sharpness * row + row.new_tensor(offsets[: len(row)]) for row in rows]
        return torch.stack([row.log_softmax(0)[e.answer] for row, e in zip(rows, examples, strict=True)])
    return torch.stack(
        [
            row[example.answer] if example.first_token or len(row) == 1 else row.log_softmax(0)[example.answer]
            for row, example in zip(scores, examples, strict=True)
        ]
    )
