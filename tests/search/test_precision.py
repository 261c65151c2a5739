"""A search in bfloat16: only where that is fast, and the model is itself again afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from planted import PLANTED, planted_task, words_checkpoint
from tiny import tiny_model

from act_export.search import SearchOptions, precision, search_heads
from act_export.search.precision import bfloat16_is_fast, precision_for_search

OPTIONS = SearchOptions(methods=("act",), betas=(0.0,), head_counts=(1,))


def test_a_small_model_keeps_its_own() -> None:
    assert not bfloat16_is_fast(tiny_model())


@pytest.mark.parametrize(
    ("capabilities", "fast"), [({}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)]
)
def test_where_the_processor_has_products_of_bfloat16(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], fast: bool
) -> None:
    monkeypatch.setattr(precision, "_WORTH_IT", 1)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert bfloat16_is_fast(tiny_model()) == fast
    assert not bfloat16_is_fast(tiny_model().to(torch.float16))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda model: model.dtype == torch.float32)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_oss"])
def test_weights_are_rounded_and_come_back(architecture: str) -> None:
    model = tiny_model(architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=False).items()}
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        own = model(input_ids=ids).logits
        with precision_for_search(model, "auto"):
            assert model.dtype == torch.bfloat16
            rounded = model(input_ids=ids).logits
            assert all(buffer.dtype != torch.bfloat16 for buffer in model.buffers())
    with pytest.raises(ZeroDivisionError), precision_for_search(model, "auto"):
        raise ZeroDivisionError
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded.float() - own).abs().max() < 0.1 * own.abs().max()
    after = model.state_dict()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name])
    with precision_for_search(model, "own"):
        assert model.dtype == torch.float32


@pytest.mark.usefixtures("fast")
def test_a_search_says_in_which_precision_it_was() -> None:
    checkpoint = words_checkpoint()
    task = planted_task(checkpoint, PLANTED)
    found = search_heads(checkpoint, [task], OPTIONS).calibrations["planted"]
    own = search_heads(checkpoint, [task], replace(OPTIONS, precision="own")).calibrations["planted"]
    assert (found.provenance.notes["dtype"], own.provenance.notes["dtype"]) == ("bfloat16", "float32")
    assert found.heads == own.heads == PLANTED.heads
    assert checkpoint.model.dtype == torch.float32
