"""Sessions: native and portable alike, state carried over calls, refusals that say what to do."""

from __future__ import annotations

import importlib
from importlib import metadata

import numpy as np
import onnxruntime
import pytest
from close import assert_close, assert_logits_close
from tiny import CALIBRATION, VOCABULARY

from act_export.errors import ActExportError, SessionError
from act_export.ops import library
from act_export.runtime import Session, select
from act_export.runtime.device import import_onnxruntime


def prompt(length, batch=1, seed=0):
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, (batch, length))
    return ids, np.ones_like(ids)


def test_properties(tiny, tiny_session, tiny_plain_file):
    assert tiny_session.calibration == CALIBRATION
    assert tiny_session.record.model == tiny.identity
    with Session.open(tiny_plain_file) as plain:
        assert plain.calibration is None


def test_calibration_changes_the_answer(tiny_file, tiny_plain_file):
    ids, mask = prompt(30)
    with Session.open(tiny_file) as calibrated, Session.open(tiny_plain_file) as plain:
        difference = np.abs(calibrated.run(ids, mask).logits - plain.run(ids, mask).logits).max()
    assert difference > 1e-2


def test_native_and_portable_agree(tiny_file):
    ids, mask = prompt(40, batch=3)
    mask[1, :13] = 0
    with Session.open(tiny_file) as native, Session.open(tiny_file, native=False) as portable:
        ours, theirs = native.run(ids, mask), portable.run(ids, mask)
    assert_logits_close(ours.logits[mask == 1], theirs.logits[mask == 1], 1e-4)
    real_sums = ours.state["past_sink_scores.1"], theirs.state["past_sink_scores.1"]
    assert_close(*real_sums, 1e-5)


def test_state_of_selected_rows(tiny_session):
    ids, mask = prompt(9, batch=3)
    state = tiny_session.run(ids, mask).state
    step = np.array([[5], [7]])
    longer = np.ones((2, 10), np.int64)
    picked = tiny_session.run(step, longer, select(state, [2, 2])).logits
    alone = tiny_session.run(step[:1], longer[:1], tiny_session.run(ids[2:], mask[2:]).state).logits
    assert_logits_close(picked[:1], alone, 1e-5)


def test_a_mask_that_does_not_fit(tiny_session):
    ids, mask = prompt(9)
    with pytest.raises(SessionError, match=r"attention_mask has shape \(1, 8\).*need \(1, 9\)"):
        tiny_session.run(ids, mask[:, :8])


def test_a_closed_session(tiny_file):
    with Session.open(tiny_file) as session:
        pass
    with pytest.raises(SessionError, match="was closed"):
        session.run(*prompt(3))


def test_missing_file(tmp_path):
    with pytest.raises(SessionError, match="there is no model"):
        Session.open(tmp_path / "none.onnx")


def test_a_file_that_is_not_onnx(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"nothing")
    with pytest.raises(SessionError, match="ONNX Runtime can't load"):
        Session.open(path, native=False)


def test_a_folder_stands_for_its_model(tiny_file):
    with Session.open(tiny_file.parent) as session:
        assert session.path == tiny_file


def test_no_onnxruntime(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    def refuse(name, *_):
        raise ImportError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(ActExportError, match=r"pip install 'act-export\[cpu\]'"):
        import_onnxruntime()


def test_both_onnxruntimes(monkeypatch, tmp_path):
    """In one folder they are refused; one ahead of the other on the path is taken."""
    folders = {"onnxruntime": tmp_path, "onnxruntime-gpu": tmp_path}
    for name in folders:
        (tmp_path / f"{name.replace('-', '_')}-1.32.0.dist-info").mkdir()
    monkeypatch.setattr(
        metadata,
        "distribution",
        lambda name: metadata.PathDistribution(folders[name] / f"{name.replace('-', '_')}-1.32.0.dist-info"),
    )
    with pytest.raises(ActExportError, match="both installed and overwrite each other"):
        import_onnxruntime()
    folders["onnxruntime-gpu"] = tmp_path / "another"
    assert import_onnxruntime() is onnxruntime


def test_no_library(tiny_file, monkeypatch):
    def missing():
        raise library.LibraryNotFoundError("no library")

    monkeypatch.setattr("act_export.runtime.engine.library_path", missing)
    with pytest.raises(SessionError, match="--portable"):
        Session.open(tiny_file)
    with Session.open(tiny_file, native=False) as session:
        assert session.run(*prompt(3)).logits.shape == (1, 3, VOCABULARY)


def test_unusable_tokens(tiny_session):
    ids, mask = prompt(9)
    ids[0, 4] = VOCABULARY
    with pytest.raises(SessionError, match=f"token {VOCABULARY} is not in the vocabulary of {VOCABULARY}"):
        tiny_session.run(ids, mask)
    ids[0, 4] = -1
    with pytest.raises(SessionError, match="token -1 is not"):
        tiny_session.run(ids, mask)
    with pytest.raises(SessionError, match="at least one token"):
        tiny_session.run(ids[:, :0], mask[:, :0])


def test_a_prompt_beyond_the_context(tiny_session):
    ids, mask = prompt(257)
    with pytest.raises(SessionError, match="a sequence has 257 tokens; the model's context holds 256"):
        tiny_session.run(ids, mask)
    mask[0, 0] = 0  # padding doesn't count
    assert tiny_session.run(ids, mask).logits.shape[1] == 257


def test_a_failing_run_is_an_error_of_ours(tiny_session):
    ids, mask = prompt(5)
    state = {name: value[..., :1] for name, value in tiny_session.empty_state(1).items()}
    with pytest.raises(SessionError, match="ONNX Runtime can't run"):
        tiny_session.run(ids, mask, state)


def test_limits(tiny_session):
    assert (tiny_session.limits.vocabulary, tiny_session.limits.context) == (VOCABULARY, 256)
    assert tiny_session.limits.stop_tokens == (2,)


def test_an_old_onnxruntime_is_refused_for_the_native_library(tiny_file, monkeypatch):
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    with pytest.raises(SessionError, match=r"needs ONNX Runtime 1\.24 or newer; this is 1\.23\.2"):
        Session.open(tiny_file)
    Session.open(tiny_file, native=False).close()
