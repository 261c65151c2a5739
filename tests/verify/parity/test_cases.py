"""What a verification runs: beginnings of sequences, and prompts beyond a sliding window."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CALIBRATION, tiny_checkpoint, tiny_model, tiny_tokenizer
from tokenizers import processors

from act_export.attention.reference_attention import ReferenceAttention
from act_export.export import build_model
from act_export.runtime import Session
from act_export.tasks.encoding import sequence_beginning
from act_export.verify.parity import recording
from act_export.verify.parity.cases import Case, parity_cases, sliding_windows
from act_export.verify.parity.metrics import compare_logits, compare_parts
from act_export.verify.parity.recording import SinkRule, record
from act_export.verify.parity.sessions import verify_sessions

WINDOW = 200  # more than the longest prompt of the other cases


def beyond_window(architecture="gemma3_text", **changes) -> list[Case]:
    model = tiny_model(architecture, **{"max_position_embeddings": 8192, **changes})
    return [case for case in parity_cases(model, None) if "window" in case.name]


@pytest.mark.parametrize(("window", "length"), [(25, 50), (200, 400), (1024, 2048)])
def test_a_prompt_of_twice_the_window(window, length):
    (case,) = beyond_window(sliding_window=window)
    assert case.name == f"prompt of {length} and 32 decode steps, window of {window}"
    assert case.calls[0].shape == case.attention_mask.shape == (1, length)
    assert case.attention_mask.all()
    assert case.decode_steps == 32


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("gemma3_text", {"sliding_window": 24}),  # the other cases go beyond it
        ("gemma3_text", {"sliding_window": 1025}),  # too long a prompt
        ("gemma3_text", {"sliding_window": 100, "max_position_embeddings": 132}),  # the model ends before the window
    ],
)
def test_no_prompt_beyond_a_window(architecture, changes):
    assert beyond_window(architecture, **changes) == []


def test_a_prompt_beyond_the_window_within_the_models_limit():
    (case,) = beyond_window(sliding_window=200, max_position_embeddings=256)
    assert case.calls[0].shape[1] + case.decode_steps == 256


def test_windows_are_those_that_layers_ask_for():
    assert sliding_windows(tiny_model()) == []
    mixed = tiny_model("gemma3_text", sliding_window=9, layer_types=["full_attention", "sliding_attention"])
    assert sliding_windows(mixed) == [9]


def test_sequences_begin_as_the_tokenizer_begins_them():
    tokenizer = tiny_tokenizer()
    assert sequence_beginning(tokenizer) == ()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert sequence_beginning(tokenizer) == (1,)
    cases = parity_cases(tiny_model(), tokenizer)
    assert {case.name: case.calls[0].shape[1] for case in cases}["prompt of 17"] == 17
    for case in cases:
        first = case.attention_mask.argmax(1)
        whole = np.concatenate(case.calls, 1)
        for row, start in enumerate(first):
            assert whole[row, start] == 1
            assert (whole[row, start + 1 :] != 1).all()


@pytest.fixture(scope="module")
def windowed():
    return tiny_checkpoint("gemma3_text", sliding_window=WINDOW, max_position_embeddings=512)


@pytest.fixture(scope="module")
def windowed_file(windowed, tmp_path_factory):
    path = tmp_path_factory.mktemp("windowed") / "model.onnx"
    build_model(windowed, CALIBRATION, path)
    return path


def verify(checkpoint, path):
    return verify_sessions(checkpoint, CALIBRATION, {"native": lambda: Session.open(path)})


@pytest.mark.in_turn(2)
def test_a_window_is_verified(windowed, windowed_file):
    report = verify(windowed, windowed_file)
    assert report.passed
    result = next(result for result in report.engines[0].results if "window" in result.case)
    assert result.metrics.positions == 2 * WINDOW + 32
    assert result.greedy_identical is True


def test_a_wrong_window_is_caught_where_only_long_prompts_show_it(windowed, windowed_file):
    model = onnx.load(windowed_file, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "sliding_window":
                attribute.i = WINDOW + 20
    wrong = windowed_file.with_name("wrong.onnx")
    onnx.save(model, wrong)
    report = verify(windowed, wrong)
    assert [result.case for result in report.engines[0].results if not result.passed] == [
        f"prompt of {2 * WINDOW} and 32 decode steps, window of {WINDOW}"
    ]


def test_a_hook_with_another_window_than_the_models_own_is_caught(windowed, windowed_file, monkeypatch):
    monkeypatch.setattr("act_export.attention.transformers_interface._window_of", lambda *_: WINDOW - 20)
    assert not verify(windowed, windowed_file).hook_passed


@given(st.lists(st.integers(0, 150), max_size=4), st.integers(1, 30), st.integers(0, 1000))
def test_parts_are_compared_as_a_whole(lengths, vocabulary, seed):
    random = np.random.default_rng(seed)
    parts = [random.standard_normal((2, length, vocabulary)).astype(np.float32) for length in lengths]
    whole = np.concatenate(parts, 1) if parts else np.zeros((2, 0, vocabulary), np.float32)
    together, apart = compare_logits(*whole), compare_parts((part[0], part[1]) for part in parts)
    assert dataclasses.replace(apart, mean_difference=0.0, top10_agreement=0.0) == dataclasses.replace(
        together, mean_difference=0.0, top10_agreement=0.0
    )
    assert apart.mean_difference == pytest.approx(together.mean_difference)
    assert apart.top10_agreement == pytest.approx(together.top10_agreement)


def test_large_logits_wait_in_a_file(monkeypatch):
    logits = np.random.default_rng(0).standard_normal((1, 3, 11)).astype(np.float32)
    case = Case("", (np.zeros((1, 3), np.int64),), np.ones((1, 3), np.int64), decode_steps=2)
    rule = SinkRule(ReferenceAttention(None))

    def engine(tokens, _mask, **_):
        return logits[:, : tokens.shape[1]], {}

    assert not any(isinstance(step.logits, np.memmap) for step in record(case, engine, rule, follow=None))
    monkeypatch.setattr(recording, "_SHELVED_BYTES", logits.nbytes)
    first, *steps = record(case, engine, rule, follow=None)
    assert isinstance(first.logits, np.memmap)
    assert np.array_equal(first.logits, logits)
    assert not any(isinstance(step.logits, np.memmap) for step in steps)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    (first, *_) = record(case, engine, rule, follow=None)
    assert np.array_equal(first.logits, logits)


def test_cases_of_a_model_with_a_short_context():
    cases = parity_cases(tiny_checkpoint(max_position_embeddings=24).model, None)
    assert all(case.attention_mask.shape[1] + case.decode_steps <= 24 for case in cases)
    assert any(case.decode_steps for case in cases)
