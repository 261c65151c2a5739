"""One backward pass ranks all heads.

Each head gets a gate g: its output is o + g * (o' - o), o plain and o' calibrated, and every gate is 0. The derivative
of the right answer's log-likelihood with respect to a gate is, to first order, what calibrating that head alone would
gain. At gate 0 it is the inner product of the loss's gradient at the head's output with o' - o, so o' - o needs no
graph of its own: the backward pass is that of the plain model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from act_export.calibration import LayerCalibration
from act_export.hooks import AttentionCall, LayerState, attention_hook, empty_state, flatten_heads
from act_export.search.fast_attention import calibrated_probabilities, join_past, plain_attention, values_of
from act_export.tasks import EncodedExample, ScoringError, TorchLanguageModel, batches, choice_scores
from act_export.tasks.scoring import BATCH_SIZE


class GatedAttention:
    """An attention hook: the plain model, with a gate per head whose gradient is exact at 0.

    Away from 0 the value is right but the gradient is not: it leaves out how a gate changes later layers' o' - o.
    """

    def __init__(self, gates: Tensor, *, beta: float, threshold: float, threshold_mode: str) -> None:
        """Takes the gates (layers, heads), and how an open gate calibrates."""
        self.gates = gates
        heads = tuple(range(gates.shape[1]))
        self.layer = LayerCalibration(heads, (beta,) * len(heads), threshold, threshold_mode)

    def attend(self, call: AttentionCall) -> tuple[Tensor, LayerState]:
        """See `act_export.hooks.AttentionHook`."""
        past = call.past if call.past is not None else empty_state(call, call.query.shape[1])
        key, value = join_past(call, past)
        plain = plain_attention(call, key, value)
        with torch.no_grad():
            calibrated = calibrated_probabilities(call, key, past.sink_scores.squeeze(-1), self.layer)
            values = values_of(call, value, self.layer.heads)
            difference = (calibrated.probabilities @ values).to(plain.dtype) - plain
            # a padding row has no calibrated output, and its plain one is meaningless
            real_rows = call.attention_mask[:, -call.query.shape[2] :] != 0
            difference = difference.masked_fill(~real_rows[:, None, :, None], 0)
        gate = self.gates[call.layer].to(plain.dtype)
        state = LayerState(key, value, calibrated.column_sums.unsqueeze(-1).float())
        return flatten_heads(plain + gate[:, None, None] * difference), state


def gate_gradients(
    model: PreTrainedModel,
    examples: Sequence[EncodedExample],
    *,
    num_layers: int,
    num_heads: int,
    beta: float,
    threshold: float,
    threshold_mode: str = "absolute",
    batch_size: int = BATCH_SIZE,
    length_normalized: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Mean derivative of the right answer's log-likelihood, among the choices, with respect to each head's gate.

    The model's own parameters receive no gradient.

    Args:
        model: Any that `act_export.hooks.attention_hook` takes.
        examples: At least one.
        num_layers: Attention layers of the model.
        num_heads: Query heads per layer.
        beta: How an open gate calibrates, as in `act_export.calibration.Calibration`.
        threshold: The same.
        threshold_mode: The same.
        batch_size: Prompts that run together.
        length_normalized: Compare choices by log-likelihood per token.
        on_batch: Called after each batch with the number of examples in it.

    Returns:
        (num_layers, num_heads); positive where calibrating the head makes the right answer likelier.

    Raises:
        ScoringError: If a score or a gradient isn't finite, naming the prompt, or for a gradient those of its batch.
    """
    total = torch.zeros(num_layers, num_heads)
    for indices in batches(examples, batch_size):
        batch = [examples[index] for index in indices]
        gates = torch.zeros(num_layers, num_heads, device=model.device, requires_grad=True)
        hook = GatedAttention(gates, beta=beta, threshold=threshold, threshold_mode=threshold_mode)
        with torch.enable_grad(), attention_hook(model, hook) as hooked:
            scores = choice_scores(TorchLanguageModel(hooked), batch, length_normalized=length_normalized)
            gain = torch.stack([row.log_softmax(0)[example.answer] for row, example in zip(scores, batch, strict=True)])
            (gradient,) = torch.autograd.grad(gain.sum(), gates)
        if not gradient.isfinite().all():
            raise ScoringError(
                f"a gradient is not finite among the prompts {', '.join(example.text for example in batch)}"
            )
        total += gradient.float().cpu()
        if on_batch is not None:
            on_batch(len(indices))
    return total / len(examples)
