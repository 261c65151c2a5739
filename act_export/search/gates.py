"""One backward pass ranks all heads.

Each head gets a gate g: its output is o + g * (o' - o), o plain and o' calibrated, and every gate is 0. The derivative
of the right answer's log-likelihood with respect to a gate is, to first order, what calibrating that head alone would
gain. At gate 0 it is the inner product of the loss's gradient at the head's output with o' - o, so o' - o needs no
graph of its own: the backward pass is that of the plain model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from act_export.attention.call import AttentionCall, LayerState, empty_state, flatten_heads
from act_export.attention.fast_attention import (
    calibrated_probabilities,
    head_groups,
    join_past,
    map_probabilities,
    plain_attention,
    values_of,
)
from act_export.attention.hook import attention_hook
from act_export.calibration.file import LayerCalibration
from act_export.errors import ActExportError
from act_export.search.decoder_layers import checkpointed
from act_export.tasks import EncodedExample
from act_export.tasks.language_model import TorchLanguageModel
from act_export.tasks.scoring import choice_scores

# float16 has no room for the small gradients inside the model: they are computed for a loss that is a multiple.
_LOSS_SCALES = (4096, 64, 1)


class GatedAttention:
    """An attention hook: the plain model, with a gate per head whose gradient is exact at 0.

    Away from 0 the value is right but the gradient is not: it leaves out how a gate changes later layers' o' - o.
    """

    def __init__(self, gates: Tensor, *, beta: float, threshold: float, threshold_mode: str) -> None:
        """Takes the gates (layers, heads), and how an open gate calibrates."""
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
                group = LayerCalibration(
                    heads, (self.beta,) * len(heads), (1.0,) * len(heads), self.threshold, self.threshold_mode
                )
                calibrated = calibrated_probabilities(call, maps, past.sink_scores[:, list(heads)].squeeze(-1), group)
                differences.append((calibrated.probabilities - maps) @ values_of(call, value, heads))
                sums.append(calibrated.column_sums)
            # a padding row has no calibrated output
            real_rows = call.attention_mask[:, -call.query.shape[2] :] != 0
            difference = torch.cat(differences, 1).masked_fill(~real_rows[:, None, :, None], 0)
        gate = self.gates[call.layer].to(difference)
        state = LayerState(key, value, torch.cat(sums, 1).unsqueeze(-1).float())
        return flatten_heads(plain + (gate[:, None, None] * difference).to(plain.dtype)), state


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
) -> Tensor:
    """Derivative of the right answers' log-likelihood with respect to each head's gate, summed over one batch.

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

    Returns:
        float64 (num_layers, num_heads); positive where calibrating the head makes the right answers likelier.

    Raises:
        ActExportError: If a score or a gradient isn't finite, naming the prompt, or for a gradient those of its batch;
            if gradient checkpointing doesn't know the model's layers.
    """
    for scale in _LOSS_SCALES if model.dtype == torch.float16 else (1,):
        gates = torch.zeros(num_layers, num_heads, device=model.device, requires_grad=True)
        hook = GatedAttention(gates, beta=beta, threshold=threshold, threshold_mode=threshold_mode)
        saving = checkpointed(model, num_layers) if gradient_checkpointing else nullcontext()
        with torch.enable_grad(), attention_hook(model, hook) as hooked, saving:
            scores = choice_scores(TorchLanguageModel(hooked), batch, length_normalized=length_normalized)
            (scaled,) = torch.autograd.grad(scale * log_likelihoods(batch, scores).sum(), gates)
        gradient = scaled.double() / scale
        if gradient.isfinite().all():
            break
    else:
        raise ActExportError(
            f"a gradient is not finite among the prompts {', '.join(example.text for example in batch)}; the weights "
            f"or their precision are at fault, float32 or bfloat16 may help"
        )
    return gradient.cpu()


def log_likelihoods(examples: Sequence[EncodedExample], scores: Sequence[Tensor]) -> Tensor:
    """Log-likelihood of each example's right answer, as its accuracy would have it.

    Among the choices, or its own where it is the only one (a generation task's reference answer). Its own too where
    first tokens are compared: there it has to beat the whole vocabulary, so what counts against it isn't the other
    choices alone, nor them and the one other token that happens to be the likeliest.

    Args:
        examples: n of them.
        scores: By example, as `act_export.tasks.scoring.choice_scores` gives them.

    Returns:
        (n,).
    """
    return torch.stack(
        [
            row[example.answer] if example.first_token or len(row) == 1 else row.log_softmax(0)[example.answer]
            for row, example in zip(scores, examples, strict=True)
        ]
    )
