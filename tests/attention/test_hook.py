"""The attention hook: the same model as without it, for every architecture that passes through the interface."""

from __future__ import annotations

import pytest
import torch
from close import assert_logits_close
from hooked import assert_same_model, padded_batch
from tiny import CALIBRATION, ROUTED, tiny_checkpoint, tiny_model

from act_export.attention.call import positions
from act_export.attention.hook import attention_hook, check_supported
from act_export.attention.reference_attention import ReferenceAttention
from act_export.calibration.file import Calibration
from act_export.errors import ActExportError


@pytest.mark.parametrize("architecture", ROUTED)
def test_without_calibration_it_is_the_same_model(architecture):
    model = tiny_model(architecture)
    if architecture != "gemma2":  # which gives no numbers in float64; how float32 rounds depends on the processor
        model = model.double()
    assert_same_model(model, tolerance=2e-5)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_a_padded_row_is_calibrated_as_if_alone(architecture):
    model = tiny_model(architecture)
    ids, mask = padded_batch()
    with torch.no_grad(), attention_hook(model, ReferenceAttention(CALIBRATION)) as hooked:
        together = hooked(ids, mask)
        alone = hooked(ids[:1, 9:], mask[:1, 9:])
    assert_logits_close(together.logits[0, 9:], alone.logits[0], 2e-5)
    with torch.no_grad(), attention_hook(model, ReferenceAttention(None)) as hooked:
        plain = hooked(ids, mask)
    assert (plain.logits - together.logits).abs().max() > 1e-2  # the calibration does something here


def test_the_model_is_itself_again_afterwards():
    model = tiny_model()
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), attention_hook(model, ReferenceAttention(None)):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before
    ids, mask = padded_batch()
    assert torch.isfinite(model(input_ids=ids, attention_mask=mask).logits).all()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("prompts", [1, 2])  # a single row counts as contiguous whatever its strides
def test_the_output_layer_gets_rows_with_the_strides_of_a_new_tensor(architecture, prompts):
    model = tiny_model(architecture)
    ids, mask = (of[-prompts:] for of in padded_batch())
    seen = []
    with torch.no_grad(), attention_hook(model, ReferenceAttention(None)) as hooked:
        handle = model.get_output_embeddings().register_forward_pre_hook(
            lambda _, rows: seen.append(rows[0].stride() == torch.empty(rows[0].shape).stride())
        )
        kept = hooked(ids, mask, logits_to_keep=1).logits
        handle.remove()
    assert seen == [True]
    assert not model.get_output_embeddings()._forward_pre_hooks  # as before
    assert kept.shape[1] == 1


def test_state_has_sums_for_calibrated_layers_only():
    checkpoint = tiny_checkpoint()
    ids, mask = padded_batch()
    with torch.no_grad(), attention_hook(checkpoint.model, ReferenceAttention(Calibration({1: (0, 3)}))) as hooked:
        state = hooked(ids, mask).state
    assert [tuple(layer.sink_scores.shape) for layer in state] == [(2, 0, 25, 1), (2, 2, 25, 1)]
    assert all(layer.sink_scores.dtype == torch.float32 for layer in state)


@pytest.mark.parametrize("architecture", ["codegen", "gptj"])
def test_an_architecture_is_either_refused_or_the_same_model(architecture):
    """Which of these pass through the attention interface changes with the version of transformers."""
    ids, mask = padded_batch()
    model = tiny_model(architecture)
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask).logits
        with attention_hook(model, ReferenceAttention(None)) as hooked:
            try:
                ours = hooked(ids, mask).logits
            except ActExportError as error:
                refusal = str(error)
            else:
                refusal = ""
                assert_logits_close(ours[1], own[1], 2e-5)
    assert refusal == "" or f"attention of {architecture}" in refusal


def test_attention_outside_the_interface_is_refused():
    """A layer that computes its attention by itself."""
    ids, mask = padded_batch()
    model = tiny_model("llama")
    model.model.layers[1].self_attn.forward = lambda hidden_states, **others: (hidden_states, None)
    with (
        torch.no_grad(),
        attention_hook(model, ReferenceAttention(None)) as hooked,
        pytest.raises(ActExportError, match=r"attention of llama.*\[1, 0\]"),
    ):
        hooked(ids, mask)


SINK_MODELS = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7},
    "granite_swa": {"sliding_window": 7},
}


def model_with_sinks(architecture):
    """Learned sinks that draw a good part of every row."""
    model = tiny_model(architecture, **SINK_MODELS[architecture])
    if architecture == "gpt_oss":  # the other rounds to float32 on its way
        model.double().set_experts_implementation("eager")
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.sinks.copy_(torch.tensor([2.0, -1.0, 0.5, 3.0]) - number)
    return model


@pytest.mark.parametrize("architecture", SINK_MODELS)
def test_learned_sinks_are_kept(architecture):
    model = model_with_sinks(architecture)
    ids, mask = padded_batch()
    tolerance = 2e-5 if model.dtype == torch.float64 else 1e-4
    reference = ReferenceAttention(None)
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
        with attention_hook(model, reference) as hooked:
            first = hooked(ids[:, :12], mask[:, :12])
            second = hooked(ids[:, 12:13], mask[:, :13], first.state)
            third = hooked(ids[:, 13:], mask, second.state)
            at_once = hooked(ids[:, 13:], mask, second.state, one_at_a_time=True)
        recorded = {layer: logits.tolist() for layer, logits in reference.sink_logits.items()}
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(-1e9)
        without = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
    assert_logits_close(third.logits, own[:, 13:], tolerance)
    assert_logits_close(at_once.logits, own[:, 13:], tolerance)
    assert (without - own)[:, 13:].abs().max() > 0.1
    assert recorded == {0: [2.0, -1.0, 0.5, 3.0], 1: [1.0, -2.0, -0.5, 2.0]}


@pytest.mark.parametrize("shape", [(1,), (1, 4), (8,)])
def test_sink_logits_that_are_not_one_for_each_head_are_refused(shape):
    model = model_with_sinks("gpt_oss")
    model.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(shape).double())
    ids, mask = padded_batch()
    with (
        torch.no_grad(),
        attention_hook(model, ReferenceAttention(None)) as hooked,
        pytest.raises(ActExportError, match=r"sink logits of shape .*one for each of its 4 heads"),
    ):
        hooked(ids, mask)


def test_a_mask_with_an_overlay_is_refused():
    from transformers.masking_utils import create_causal_mask

    model = tiny_model()
    with attention_hook(model, ReferenceAttention(None)), pytest.raises(ActExportError, match="overlays"):
        create_causal_mask(
            model.config,
            torch.zeros(1, 4, 32),
            torch.ones(1, 4),
            None,
            or_mask_function=lambda batch, head, row, column: column == 0,
        )


def test_chunked_attention_is_refused():
    model = tiny_model()
    model.config.layer_types = ["chunked_attention", "full_attention"]
    with (
        pytest.raises(ActExportError, match="layers of type chunked_attention"),
        attention_hook(model, ReferenceAttention(None)),
    ):
        pass


def own_and_hooked(model):
    ids, mask = padded_batch()
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
        with attention_hook(model, ReferenceAttention(None)) as hooked:
            ours = hooked(ids, mask).logits
    return own[mask.bool()], ours[mask.bool()]


def test_a_window_that_only_the_mask_has_is_kept(monkeypatch):
    """A model whose masks have a window that its attention layers don't pass on."""
    from transformers.models.mistral import modeling_mistral

    real_interface = modeling_mistral.ALL_ATTENTION_FUNCTIONS.get_interface

    def get_interface(*arguments):
        inner = real_interface(*arguments)
        return lambda *a, sliding_window=None, **k: inner(*a, **k)

    monkeypatch.setattr(modeling_mistral.ALL_ATTENTION_FUNCTIONS, "get_interface", get_interface)
    assert_logits_close(*own_and_hooked(tiny_model("mistral")), 2e-5)


def test_a_window_that_only_the_layers_ask_for_is_ignored():
    """OLMoE's layers ask for one; its masks, which decide, are full."""
    model = tiny_model("olmoe", sliding_window=7, num_experts=4, num_experts_per_tok=2)
    assert_logits_close(*own_and_hooked(model), 2e-5)


def test_a_mask_made_anew_is_refused_where_there_is_a_window(monkeypatch):
    from transformers.models.mistral import modeling_mistral

    real_interface = modeling_mistral.ALL_ATTENTION_FUNCTIONS.get_interface

    def get_interface(*arguments):
        inner = real_interface(*arguments)
        return lambda module, q, k, v, mask, **options: inner(module, q, k, v, mask.clone(), **options)

    model = tiny_model("mistral")
    ids, mask = padded_batch()
    with torch.no_grad(), attention_hook(model, ReferenceAttention(None)) as hooked:
        monkeypatch.setattr(modeling_mistral.ALL_ATTENTION_FUNCTIONS, "get_interface", get_interface)
        with pytest.raises(ActExportError, match="sliding window can't be told"):
            hooked(ids, mask)


def test_an_unknown_keyword_with_data_is_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    real_interface = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface

    def get_interface(*arguments):
        inner = real_interface(*arguments)
        return lambda *a, **options: inner(*a, indices=torch.zeros(1), **options)

    model = tiny_model()
    ids, mask = padded_batch()
    with torch.no_grad(), attention_hook(model, ReferenceAttention(None)) as hooked:
        monkeypatch.setattr(modeling_llama.ALL_ATTENTION_FUNCTIONS, "get_interface", get_interface)
        with pytest.raises(ActExportError, match="passes 'indices'"):
            hooked(ids, mask)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [("diffllama", "once per layer"), ("jamba", "can't be exported yet|layers of type")],
)
def test_unsupported_models_are_refused_whatever_they_raise(architecture, message):
    with pytest.raises(ActExportError, match=message):
        check_supported(tiny_model(architecture))
