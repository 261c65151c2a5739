"""The paper's search, exact: what calibrating each head alone changes.

The paper switches heads on one at a time and runs all prompts anew: layers * heads passes. The same numbers come out of
less, because most of that work is the plain model's:

- below the calibrated head's layer nothing changes, so a pass starts at that layer, from the plain hidden states;
- where none of a head's keys is a later sink, calibrating it changes nothing at all, so that pair of head and prompt is
  not run;
- the pairs of a layer run together, as rows of a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from act_export.attention.call import AttentionCall, LayerState, active, empty_state, flatten_heads
from act_export.attention.fast_attention import (
    calibrated_probabilities,
    head_groups,
    join_past,
    map_probabilities,
    plain_attention,
)
from act_export.attention.hook import HookedModel, attention_hook
from act_export.calibration.reference import calibrate_one_at_a_time, calibrate_with_state
from act_export.calibration.reference_operator import attention_probabilities
from act_export.search.decoder_layers import Forward, decoder_layers, interposed, with_hidden
from act_export.search.gates import log_likelihoods
from act_export.search.request import Threshold
from act_export.tasks import EncodedExample
from act_export.tasks.batching import Batching, batches
from act_export.tasks.language_model import TorchLanguageModel
from act_export.tasks.remedies import Remedy
from act_export.tasks.scoring import choice_scores, predicted_choice


@dataclass(frozen=True)
class LayerEffects:
    """What calibrating each head of one layer alone changes, summed over a batch.

    Attributes:
        log_likelihood: By head, gain in the right answers' log-likelihood.
        correct: By head, right answers gained, less those lost.
        passes: What it took, in forward passes of one prompt through the whole model.
    """

    log_likelihood: tuple[float, ...]
    correct: tuple[int, ...]
    passes: float


class PlainRun:
    """The plain model on one batch, with all that passes from a layer on start from."""

    def __init__(
        self,
        model: PreTrainedModel,
        batch: Sequence[EncodedExample],
        *,
        num_layers: int,
        num_heads: int,
        threshold: Threshold,
        length_normalized: bool = False,
    ) -> None:
        """Runs it.

        Args:
            model: Any that `act_export.attention.hook.attention_hook` takes, with a list of decoder layers.
            batch: Examples that run together.
            num_layers: Attention layers of the model.
            num_heads: Query heads per layer.
            threshold: Of the calibrations whose effects are measured.
            length_normalized: Compare choices by log-likelihood per token.

        Raises:
            ActExportError: If a score isn't finite, naming the prompt; if the model has no list of its decoder layers.
        """
        self.model = model
        self.batch = batch
        self.layers = decoder_layers(model, num_layers)
        self.num_heads = num_heads
        self.length_normalized = length_normalized
        self.threshold = threshold
        hook = _FindSinks(num_layers, threshold)
        record = _Record(self.layers)
        with torch.no_grad(), attention_hook(model, hook) as hooked, record.recording():
            self.scores = choice_scores(TorchLanguageModel(hooked), batch, length_normalized=length_normalized)
        self.hidden = record.hidden
        self.outputs = record.outputs
        rows_of = [[row] for row in range(len(batch))]
        self.going_on = [sum(len(tokens) > 1 for tokens in example.choices) for example in batch]
        self.has_sinks = hook.has_sinks[0]
        if len(hook.has_sinks) > 1:  # sinks among the prompt's keys, or once the choice goes on
            starts = [sum(self.going_on[:index]) for index in range(len(batch))]
            rows_of = [list(range(start, start + n)) for start, n in zip(starts, self.going_on, strict=True)]
            later = hook.has_sinks[1]
            self.has_sinks = self.has_sinks | torch.stack(
                [later[:, rows].any(1) if rows else torch.zeros_like(later[:, 0]) for rows in rows_of], 1
            )
        self.rows_of = rows_of

    def effects(
        self,
        layer: int,
        heads: Collection[int] | None = None,
        *,
        beta: float,
        batch_tokens: int | None = None,
        remedy: Remedy | None = None,
    ) -> LayerEffects:
        """What calibrating each of these heads alone changes.

        Args:
            layer: Their layer.
            beta: How strongly.
            heads: Query heads; None for all. Those left out get 0.
            batch_tokens: Positions that run together at the most, as in `act_export.tasks.batching`.
            remedy: As `act_export.search.gates.log_likelihoods`.

        Raises:
            ActExportError: If a score isn't finite, naming the prompt.
        """
        pairs = [
            (example, head)
            for example in range(len(self.batch))
            for head in (range(self.num_heads) if heads is None else sorted(heads))
            if self.has_sinks[layer, example, head]
        ]
        gains, correct = [0.0] * self.num_heads, [0] * self.num_heads
        plain = log_likelihoods(self.batch, self.scores, remedy).tolist()
        for indices in batches([self.batch[example] for example, _ in pairs], Batching(None, batch_tokens)):
            together = [pairs[index] for index in indices]
            copies = [self.batch[example] for example, _ in together]
            scores = self._scores_from(layer, together, beta)
            for (example, head), copy, row, gained in zip(
                together, copies, scores, log_likelihoods(copies, scores, remedy).tolist(), strict=True
            ):
                gains[head] += gained - plain[example]
                right = predicted_choice(row.tolist()) == copy.answer
                correct[head] += right - (predicted_choice(self.scores[example].tolist()) == copy.answer)
        share = (len(self.layers) - layer) / len(self.layers)
        return LayerEffects(tuple(gains), tuple(correct), len(pairs) * share)

    def _scores_from(self, layer: int, pairs: Sequence[tuple[int, int]], beta: float) -> list[Tensor]:
        """Log-likelihoods of the choices, by pair of example and the one head that is calibrated for it."""
        hook = _OneHeadPerRow(layer, torch.tensor([head for _, head in pairs]), beta, self.threshold)
        with torch.no_grad(), attention_hook(self.model, hook) as hooked:
            model = _FromLayer(hooked, self, layer, [example for example, _ in pairs], hook)
            return choice_scores(
                model, [self.batch[example] for example, _ in pairs], length_normalized=self.length_normalized
            )


class _Record:
    """Keeps what goes into each decoder layer, and what comes out of the last call of each, call by call."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers
        self.hidden: list[list[Tensor]] = []
        self.outputs: list[Any] = [None] * len(layers)

    @contextmanager
    def recording(self) -> Iterator[None]:
        def call(index: int, forward: Forward, hidden: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
            if index == 0:
                self.hidden.append([])
            self.hidden[-1].append(hidden)
            self.outputs[index] = output = forward(hidden, *args, **kwargs)
            return output

        with interposed(self.layers, call):
            yield


class _FindSinks:
    """The plain model; notes in which heads there are later sinks."""

    def __init__(self, num_layers: int, threshold: Threshold) -> None:
        self.num_layers = num_layers
        self.threshold = threshold
        self.has_sinks: list[Tensor] = []  # by call, boolean (layers, batch, heads)

    def attend(self, call: AttentionCall) -> tuple[Tensor, LayerState]:
        batch, num_heads = call.query.shape[:2]
        past = call.past if call.past is not None else empty_state(call, num_heads)
        key, value = join_past(call, past)
        if call.layer == 0:
            self.has_sinks.append(torch.zeros(self.num_layers, batch, num_heads, dtype=torch.bool))
        sums = []
        for heads in head_groups(call):
            maps = map_probabilities(call, key, heads)
            sums_before = past.sink_scores[:, list(heads)].squeeze(-1)
            found = calibrated_probabilities(
                call,
                maps,
                sums_before,
                beta=1.0,
                threshold=self.threshold.value,
                threshold_mode=self.threshold.mode,
            )
            self.has_sinks[-1][call.layer, :, list(heads)] = found.sinks.flatten(2).any(2).cpu()
            sums.append(found.column_sums)
        state = LayerState(key, value, torch.cat(sums, 1).unsqueeze(-1).float())
        return flatten_heads(plain_attention(call, key, value)), state


class _OneHeadPerRow:
    """Calibrates one head of one layer, a different one for each row of the batch."""

    def __init__(self, layer: int, heads: Tensor, beta: float, threshold: Threshold) -> None:
        self.layer = layer
        self.heads = heads
        self.beta = beta
        self.threshold = threshold

    def attend(self, call: AttentionCall) -> tuple[Tensor, LayerState]:
        past = call.past if call.past is not None else empty_state(call, 1 if call.layer == self.layer else 0)
        key, value = join_past(call, past)
        output = plain_attention(call, key, value)
        if call.layer != self.layer:
            return flatten_heads(output), LayerState(key, value, past.sink_scores)
        rows = torch.arange(len(self.heads), device=output.device)
        heads = self.heads.to(output.device)
        kv_heads = heads // (call.query.shape[1] // call.key.shape[1])
        probabilities = attention_probabilities(
            call.query[rows, heads].unsqueeze(1),
            key[rows, kv_heads].unsqueeze(1),
            call.attention_mask != 0,
            scale=call.scale,
            softcap=call.softcap,
            sliding_window=call.sliding_window,
            sink_logits=call.sink_logits[heads].view(-1, 1) if call.sink_logits is not None else None,
        )
        calibrate = calibrate_one_at_a_time if call.one_at_a_time else calibrate_with_state
        calibrated = calibrate(
            probabilities,
            beta=self.beta,
            threshold=self.threshold.value,
            threshold_mode=self.threshold.mode,
            real=(call.attention_mask != 0)[:, None],
            past_column_sums=past.sink_scores.squeeze(-1).to(probabilities.dtype),
            sliding_window=call.sliding_window,
        )
        values = value[rows, kv_heads].unsqueeze(1).to(probabilities.dtype)
        output = output.index_put((rows, heads), (calibrated.probabilities @ values)[:, 0].to(output.dtype))
        return flatten_heads(output), LayerState(key, value, calibrated.column_sums.unsqueeze(-1).float())


class _FromLayer(TorchLanguageModel):
    """A language model that starts at a layer, from the plain model's hidden states of a batch's examples."""

    def __init__(
        self, hooked: HookedModel, plain: PlainRun, layer: int, examples: Sequence[int], hook: _OneHeadPerRow
    ) -> None:
        super().__init__(hooked)
        self.plain = plain
        self.layer = layer
        self.examples = examples
        self.hook = hook

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, state: list[LayerState] | None
    ) -> tuple[Tensor, list[LayerState]]:
        """The prompts, which are padded on the left."""
        hidden = self.plain.hidden[0][self.layer][self.examples, -input_ids.shape[1] :]
        with self._starting_from(hidden):
            return super().__call__(input_ids, attention_mask, state)

    def continue_at_once(
        self, input_ids: Tensor, following: Tensor, attention_mask: Tensor, state: list[LayerState]
    ) -> Tensor:
        """The choices that go on, which are padded on the right."""
        rows = [row for example in self.examples for row in self.plain.rows_of[example]]
        hidden = self.plain.hidden[1][self.layer][rows, : input_ids.shape[1]]
        with self._starting_from(hidden):
            return super().continue_at_once(input_ids, following, attention_mask, state)

    def select(self, state: list[LayerState], rows: Tensor) -> list[LayerState]:
        self.hook.heads = self.hook.heads[rows]
        return super().select(state, rows)

    @contextmanager
    def _starting_from(self, hidden: Tensor) -> Iterator[None]:
        def call(index: int, forward: Forward, below: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
            if index < self.layer:
                active()[1].skip(index, below)
                return with_hidden(self.plain.outputs[index], below)
            return forward(hidden if index == self.layer else below, *args, **kwargs)

        with interposed(self.plain.layers, call):
            yield
