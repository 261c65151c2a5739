from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from act_export.attention.call import AttentionCall, LayerState, flatten_heads
from act_export.attention.fast_attention import FastAttention
from act_export.attention.hook import HookedModel, attention_hook
from act_export.calibration.file import Calibration
from act_export.calibration.reference import calibrate_with_state
from act_export.calibration.reference_operator import attention_probabilities
from act_export.search.decoder_layers import decoder_layers
from act_export.search.gates import GatedAttention, gate_gradients
from act_export.tasks import EncodedExample
from act_export.tasks.batching import Batching, batches
from act_export.tasks.language_model import TorchLanguageModel
from act_export.tasks.scoring import choice_scores

KNOBS = {"beta": 0.2, "threshold": 0.08}
ONE_TOKEN = [
    EncodedExample((5, 17, 99, 5, 40, 5, 3), ((1,), (2,)), 1),
    EncodedExample((8, 8, 64), ((1,), (2,), (9,)), 0),
    EncodedExample((100, 3, 77, 21, 3, 3, 50, 11, 90, 3), ((7,), (4,)), 0),
]
MORE_TOKENS = [
    EncodedExample((5, 17, 99, 5, 40, 5, 3), ((1, 30, 4), (2,)), 0),
    EncodedExample((8, 64), ((1, 5), (2, 6), (9, 9, 9)), 2),
]
FIRST_TOKEN = [replace(example, first_token=True) for example in ONE_TOKEN]
EXAMPLES = {"one token": ONE_TOKEN, "more tokens": MORE_TOKENS, "first token": FIRST_TOKEN}


class NaiveGates:
    """The gated model written down directly, differentiated through everything, column sums included."""

    def __init__(self, gates: Tensor) -> None:
        self.gates = gates

    def attend(self, call: AttentionCall) -> tuple[Tensor, LayerState]:
        batch, heads = call.query.shape[:2]
        key, value = call.key, call.value
        sums = call.query.new_zeros(batch, heads, 0)
        if call.past is not None:
            key, value = torch.cat([call.past.key, key], 2), torch.cat([call.past.value, value], 2)
            sums = call.past.sink_scores[..., 0]
        group = heads // key.shape[1]
        real = call.attention_mask != 0
        plain = attention_probabilities(call.query, key.repeat_interleave(group, 1), real, scale=call.scale)
        calibrated = calibrate_with_state(plain, real=real[:, None], past_column_sums=sums, **KNOBS)
        gate, log_gamma = self.gates[:, call.layer]
        first = torch.arange(real.shape[1]) == real.long().argmax(1)[:, None]
        weighted = plain * torch.where(first[:, None, None], log_gamma.exp()[:, None, None], 1)
        weighted = weighted / weighted.sum(-1, keepdim=True).clamp(min=1e-12)
        mixed = weighted + gate[:, None, None] * (calibrated.probabilities - plain)
        output = mixed @ value.repeat_interleave(group, 1)
        return flatten_heads(output), LayerState(key, value, calibrated.column_sums[..., None])


class Stepwise:
    """A model that decodes one token a call."""

    def __init__(self, hooked: HookedModel) -> None:
        self.model = TorchLanguageModel(hooked)

    def __call__(self, *inputs: Any) -> tuple[Tensor, Any]:
        return self.model(*inputs)

    def select(self, state: Any, rows: Tensor) -> Any:
        return self.model.select(state, rows)


def gain(model: PreTrainedModel, hook: GatedAttention | NaiveGates, examples: Sequence[EncodedExample]) -> Tensor:
    """Mean log-likelihood of the right answers, each example alone and token by token."""
    with attention_hook(model, hook) as hooked:
        scores = [choice_scores(Stepwise(hooked), [example])[0] for example in examples]
    return torch.stack(
        [
            (row if example.first_token else row.log_softmax(0))[example.answer]
            for row, example in zip(scores, examples, strict=True)
        ]
    ).mean()


def gradients(
    model: PreTrainedModel, examples: Sequence[EncodedExample], batch_size: int = 16, **options: Any
) -> Tensor:
    """Mean over the examples, batch by batch."""
    total = torch.zeros(2, 3, 4, dtype=torch.float64)
    for indices in batches(examples, Batching(batch_size)):
        batch = [examples[index] for index in indices]
        total += gate_gradients(model, batch, num_layers=3, num_heads=4, **(KNOBS | options))
    return total / len(examples)


@pytest.mark.parametrize("examples", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_gradients_are_those_of_the_whole_graph(llama: PreTrainedModel, examples: list[EncodedExample]) -> None:
    gates = torch.zeros(2, 3, 4, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(gain(llama, NaiveGates(gates), examples), gates)
    assert expected.abs().min() > 0
    torch.testing.assert_close(gradients(llama, examples), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("examples", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_gradients_are_finite_differences(llama: PreTrainedModel, examples: list[EncodedExample]) -> None:
    step = 1e-3  # the model's own norms are float32, so no smaller one
    measured = torch.zeros(2, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        for place in product(range(2), range(3), range(4)):
            gates = torch.zeros(2, 3, 4, dtype=torch.float64)
            gates[place] = step
            above = gain(llama, NaiveGates(gates), examples)
            below = gain(llama, NaiveGates(-gates), examples)
            measured[place] = (above - below) / (2 * step)
    torch.testing.assert_close(gradients(llama, examples), measured, atol=5e-4, rtol=1e-2)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_an_open_gate_calibrates_its_head(name: str, request: pytest.FixtureRequest) -> None:
    model: PreTrainedModel = request.getfixturevalue(name)
    ids = torch.tensor([[0, 0, 5, 17, 99, 5, 40, 5, 3], [9, 8, 7, 8, 8, 7, 1, 2, 2]])
    mask = (ids > 0).long()
    gates = torch.zeros(2, 3, 4, dtype=torch.float64)
    gates[0, 0, 2] = gates[0, 2, 1] = 1
    as_in_a_file = KNOBS | {"beta": torch.tensor(KNOBS["beta"]).item()}  # float32
    opened = GatedAttention(gates, threshold_mode="absolute", **as_in_a_file)
    fixed = FastAttention(Calibration({0: (2,), 2: (1,)}, **KNOBS))
    plain = FastAttention(None)
    logits = []
    for hook in (opened, fixed, plain):
        with attention_hook(model, hook) as hooked, torch.no_grad():
            logits.append(hooked(ids, mask).logits[mask > 0])
    torch.testing.assert_close(logits[0], logits[1], atol=1e-7, rtol=1e-7)
    assert (logits[1] - logits[2]).abs().max() > 1e-3


@pytest.mark.parametrize("examples", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_batches_and_padding_change_nothing(llama: PreTrainedModel, examples: list[EncodedExample]) -> None:
    alone = torch.stack([gradients(llama, [example]) for example in examples]).mean(0)
    for batch_size in (1, 2, 16):
        torch.testing.assert_close(gradients(llama, examples, batch_size), alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("examples", EXAMPLES.values(), ids=EXAMPLES.keys())
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_gradient_checkpointing_changes_memory_not_gradients(
    name: str, examples: list[EncodedExample], request: pytest.FixtureRequest
) -> None:
    model: PreTrainedModel = request.getfixturevalue(name)
    calls: list[int] = []
    layers = decoder_layers(model, 3)
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    plain = gradients(model, examples)
    assert plain.abs().max() > 0
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda x: x):
        torch.testing.assert_close(gradients(model, examples, gradient_checkpointing=True), plain, atol=1e-9, rtol=1e-7)
        with_checkpoints = sum(saved)
        saved.clear()
        gradients(model, examples)
    assert with_checkpoints < sum(saved)
    assert [layer.forward.__func__ for layer in layers] == [type(layer).forward for layer in layers]


def test_the_gradient_is_proportional_to_one_minus_beta(llama: PreTrainedModel) -> None:
    """So that one backward pass ranks heads for every strength."""
    erased = gradients(llama, ONE_TOKEN, beta=0.0)[0]
    for beta in (0.4, 0.9, 1.0):
        gradient = gradients(llama, ONE_TOKEN, beta=beta)[0]
        torch.testing.assert_close(gradient, (1 - beta) * erased, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_ranks_about_as_float32_does(llama: PreTrainedModel, dtype: torch.dtype) -> None:
    exact = gradients(llama.float(), ONE_TOKEN).flatten()
    half = gradients(llama.to(dtype), ONE_TOKEN).flatten()
    assert torch.corrcoef(torch.stack([exact, half]))[0, 1] > 0.95


def test_weights_receive_no_gradient(llama: PreTrainedModel) -> None:
    llama.requires_grad_(True)
    gradients(llama, ONE_TOKEN)
    assert all(parameter.grad is None for parameter in llama.parameters())


def test_the_only_choice_counts_by_its_own_likelihood(llama: PreTrainedModel) -> None:
    """A reference answer has no rivals; among one choice its likelihood would be 1 whatever the heads do."""
    alone = [EncodedExample((5, 17, 99, 5, 40, 5, 3), ((1, 30, 4),), 0)]
    assert gradients(llama, alone).abs().max() > 1e-4


def test_gradients_are_taken_even_where_they_are_switched_off(llama: PreTrainedModel) -> None:
    with torch.no_grad():
        switched_off = gradients(llama, ONE_TOKEN)
    torch.testing.assert_close(switched_off, gradients(llama, ONE_TOKEN))
    assert switched_off.abs().max() > 0
