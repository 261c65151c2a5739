"""Sessions: native and portable alike, state carried over calls, refusals that say what to do."""

from __future__ import annotations

import builtins
import importlib
from importlib import metadata

import numpy as np
import pytest
from tiny import CALIBRATION, VOCABULARY

from act_export.ops import library
from act_export.runtime import Session
from act_export.runtime.providers import RuntimeNotInstalledError, import_onnxruntime
from act_export.runtime.session import SessionError, select


def prompt(length, batch=1, seed=0):
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, (batch, length))
    return ids, np.ones_like(ids)


def test_properties(tiny, tiny_session, tiny_plain_file):
    assert tiny_session.calibration == CALIBRATION
    assert tiny_session.model_identity == tiny.identity
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
    np.testing.assert_allclose(ours.logits[mask == 1], theirs.logits[mask == 1], atol=1e-4)
    real_sums = ours.state["past_sink_scores.1"], theirs.state["past_sink_scores.1"]
    np.testing.assert_allclose(*real_sums, atol=1e-5)


def test_state_of_selected_rows(tiny_session):
    ids, mask = prompt(9, batch=3)
    state = tiny_session.run(ids, mask).state
    step = np.array([[5], [7]])
    longer = np.ones((2, 10), np.int64)
    picked = tiny_session.run(step, longer, select(state, [2, 2])).logits
    alone = tiny_session.run(step[:1], longer[:1], tiny_session.run(ids[2:], mask[2:]).state).logits
    np.testing.assert_allclose(picked[:1], alone, atol=1e-5)


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

    monkeypatch.setattr(metadata, "version", missing)
    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(RuntimeNotInstalledError, match=r"pip install 'act-export\[cpu\]'"):
        import_onnxruntime()


def test_both_onnxruntimes(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda _: "1.32.0")
    with pytest.raises(RuntimeNotInstalledError, match="both installed and overwrite each other"):
        import_onnxruntime()


def test_no_library(tiny_file, monkeypatch):
    def missing():
        raise library.LibraryNotFoundError("no library")

    monkeypatch.setattr("act_export.runtime.session.library_path", missing)
    with pytest.raises(SessionError, match="--portable"):
        Session.open(tiny_file)
    with Session.open(tiny_file, native=False) as session:
        assert session.run(*prompt(3)).logits.shape == (1, 3, VOCABULARY)


def test_running_needs_no_torch(tiny_file, monkeypatch):
    """Production inference imports ONNX Runtime and numpy; this checks a session's own run."""
    real_import = builtins.__import__

    def without_torch(name, *arguments, **options):
        if name == "torch" or name.startswith("torch."):
            raise ImportError("torch isn't allowed here")
        return real_import(name, *arguments, **options)

    with Session.open(tiny_file) as session:
        monkeypatch.setattr(builtins, "__import__", without_torch)
        assert session.run(*prompt(4)).logits.shape == (1, 4, VOCABULARY)
