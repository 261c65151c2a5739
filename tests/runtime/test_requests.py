"""A calibration for each request: by name, by value, by adapter; one for a batch, one for each row, changed midway."""

from __future__ import annotations

import contextlib

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CALIBRATION, tiny_checkpoint

from act_export.attention.hook import attention_hook
from act_export.attention.reference_attention import ReferenceAttention
from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.file import Calibration, CalibrationError
from act_export.calibration.strengths import CalibratedHeads
from act_export.errors import ActExportError, SessionError
from act_export.export import build_model
from act_export.export.job import export_model
from act_export.runtime import Session, generate
from act_export.runtime.adapter import read_adapter, write_adapter, write_adapters
from act_export.runtime.sampling import left_pad

WEAK = CALIBRATION
STRONG = Calibration({0: (0, 3), 1: (1,)}, beta=1.7, threshold=0.05, gamma={0: (2.0, 0.3), 1: (5.0,)})
NAMES = ["weak", "strong", "plain", "strong"]
PROMPTS = [[5, 6, 7, 8, 9, 10, 3], [9, 8, 7], [4, 4, 4, 4], [11, 2, 3, 4, 5]]


@pytest.fixture(scope="module")
def file(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("two") / "two.onnx"
    build_model(tiny, CalibrationSet.of({"weak": WEAK, "strong": STRONG}), path, source="tiny")
    return path


@pytest.fixture(scope="module")
def switchable(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("every") / "every.onnx"
    every = dict.fromkeys(range(2), (0, 1, 2, 3))
    build_model(tiny, CalibrationSet.of(None, every=every), path, source="tiny")
    return path


@pytest.fixture(params=[True, False], ids=["native", "portable"])
def session(file, request):
    with Session.open(file, native=request.param) as opened:
        yield opened


def steps(session, prompts, calibration, count=33):
    """Logits of the last position of a prompt and greedy tokens after it, and the tokens, by row."""
    ids, mask = left_pad(prompts, 0)
    cache = session.allocate(len(prompts), calibration=calibration)
    logits = [cache.step(ids, mask)[:, -1]]
    for _ in range(count - 1):
        logits.append(cache.step(logits[-1].argmax(-1)[:, None])[:, -1])
    return np.stack(logits, 1)


def test_a_batch_of_mixed_requests_is_each_alone(session):
    together = steps(session, PROMPTS, NAMES)
    for row, (prompt, name) in enumerate(zip(PROMPTS, NAMES, strict=True)):
        alone = steps(session, [prompt], name)[0]
        np.testing.assert_allclose(together[row], alone, atol=1e-5)
        assert (together[row].argmax(-1) == alone.argmax(-1)).all()
    assert abs(together - steps(session, PROMPTS, "weak")).max() > 1e-2


def test_what_a_request_may_ask_for(session):
    ids, mask = left_pad(PROMPTS, 0)

    def run(**asked):
        return session.run(ids, mask, **asked).logits

    assert list(session.calibrations) == ["weak", "strong", "plain"]
    assert session.calibrations["strong"] == STRONG
    assert np.array_equal(run(), run(calibration="weak"))
    assert np.array_equal(run(calibration="strong"), run(calibration=STRONG))
    assert np.array_equal(run(calibration=None), run(calibration=["plain", None, "plain", None]))
    with Session.open(session.path, native=session.native, calibration="strong") as other:
        assert np.array_equal(other.run(ids, mask).logits, run(calibration="strong"))
        assert generate(other, PROMPTS, max_new_tokens=4) == generate(
            session, PROMPTS, max_new_tokens=4, calibration=STRONG
        )


def test_changed_within_a_sequence(tiny, file, session):
    ids, mask = np.array([PROMPTS[0]]), np.ones((1, 7), np.int64)
    reference = ReferenceAttention.of_heads(CalibratedHeads.of([WEAK, STRONG]))
    cache = session.allocate(1, calibration="strong")
    state = None
    with torch.no_grad(), attention_hook(tiny.model, reference) as hooked:
        for token, calibration in ((None, STRONG), (3, None), (4, WEAK), (5, WEAK), (6, STRONG)):
            new = ids if token is None else np.array([[token]])
            mask = np.ones((1, cache.length + new.shape[1]), np.int64)
            cache.calibrate(calibration)
            reference.calibrate(calibration)
            ours = cache.step(new)[:, -1]
            theirs = hooked(torch.from_numpy(new), torch.from_numpy(mask), state)
            state = theirs.state
            np.testing.assert_allclose(ours, theirs.logits[:, -1].numpy(), atol=3e-5)


def test_back_to_the_default(session):
    cache = session.allocate(4)
    ids, mask = left_pad(PROMPTS, 0)
    default = cache.step(ids, mask)
    cache.reset()
    cache.calibrate("strong")
    assert abs(cache.step(ids, mask) - default).max() > 1e-2
    cache.reset()
    from act_export.runtime.request import DEFAULT

    cache.calibrate(DEFAULT)
    assert np.array_equal(cache.step(ids, mask), default)


def test_every_head_can_be_calibrated_later(tiny, file, switchable):
    ids, mask = left_pad(PROMPTS, 0)
    with Session.open(file) as two, Session.open(switchable) as every:
        for name, calibration in (("strong", STRONG), ("weak", WEAK), ("plain", None)):
            ours, theirs = every.run(ids, mask, calibration=calibration), two.run(ids, mask, calibration=name)
            np.testing.assert_allclose(ours.logits[mask == 1], theirs.logits[mask == 1], atol=1e-5)
        assert list(every.calibrations) == ["plain"]


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ("stronger", SessionError, "has no calibration 'stronger'; there are weak, strong, plain"),
        (["weak"], SessionError, "there are 1 calibrations for 4 sequences"),
        (Calibration({0: (0,), 1: (2, 3)}), CalibrationError, r"needs 1 heads .* \(layer.head\): 1.2; export"),
        (Calibration({0: (0,)}, threshold_mode="relative"), CalibrationError, "threshold_mode is 'relative'"),
        (Calibration({7: (0,)}), CalibrationError, "layer 7 is out of range"),
    ],
)
def test_what_is_refused(file, asked, error, message):
    with Session.open(file) as session, pytest.raises(error, match=message):
        generate(session, PROMPTS, max_new_tokens=1, calibration=asked)


def test_a_plain_file_has_only_plain(tiny_plain_file):
    with Session.open(tiny_plain_file) as session:
        assert list(session.calibrations) == ["plain"]
        plain = generate(session, PROMPTS, max_new_tokens=3)
        assert generate(session, PROMPTS, max_new_tokens=3, calibration=["plain", None, "plain", None]) == plain
        with pytest.raises(SessionError, match=r"no head of .* can be calibrated; export"):
            generate(session, PROMPTS, max_new_tokens=3, calibration=STRONG)


def test_a_changed_file_is_refused(file, tmp_path):
    model = onnx.load(file)
    tensor = next(each for each in model.graph.initializer if each.name == "calibration")
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)[:, 1:], "calibration"))
    given_shape = next(each for each in model.graph.input if each.name == "calibration").type.tensor_type.shape
    given_shape.dim[1].dim_value -= 1
    for node in model.graph.node:
        if node.op_type == "Split" and node.input[0] == "calibration":
            node.input[0] = "calibration"
    sizes = next(each for each in model.graph.initializer if each.name == "calibration_heads")
    sizes.CopyFrom(onnx.numpy_helper.from_array(np.array([2, 3]), "calibration_heads"))
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(SessionError):
        Session.open(tmp_path / "changed.onnx", native=False)


def test_a_file_of_an_earlier_version_says_so(tiny_file, tmp_path):
    model = onnx.load(tiny_file)
    model.metadata_props.add(key="act_export.calibration", value=WEAK.to_json())
    onnx.save(model, tmp_path / "old.onnx")
    with pytest.raises(SessionError, match="kept its calibration where this one can't change it: write it again"):
        Session.open(tmp_path / "old.onnx")


class TestAdapters:
    @pytest.fixture
    def folder(self, file, tmp_path):
        write_adapters(tmp_path, dict(_metadata(file)))
        return tmp_path / "adapters"

    def test_one_of_each_calibration(self, file, folder):
        assert sorted(path.name for path in folder.iterdir()) == [
            f"{name}.onnx_adapter" for name in ("plain", "strong", "weak")
        ]
        assert max(path.stat().st_size for path in folder.iterdir()) < 1000
        with Session.open(file) as session:
            assert session.add_adapter(folder / "strong.onnx_adapter", "mine") == "mine"
            expected = generate(session, PROMPTS, max_new_tokens=6, calibration="strong")
            assert generate(session, PROMPTS, max_new_tokens=6, calibration="mine") == expected
            with pytest.raises(SessionError, match="has a calibration 'weak' already"):
                session.add_adapter(folder / "weak.onnx_adapter")

    def test_onnxruntime_applies_them(self, file, folder):
        inner = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        with Session.open(file, native=False) as session:
            ids, mask = left_pad(PROMPTS, 0)
            feeds = {"input_ids": ids, "attention_mask": mask, **session.empty_state(4)}
            feeds["position_ids"] = np.maximum(mask.cumsum(-1) - 1, 0)
            for name in ("strong", "plain", "weak"):
                adapter = onnxruntime.LoraAdapter()
                adapter.Load(str(folder / f"{name}.onnx_adapter"))
                options = onnxruntime.RunOptions()
                options.add_active_adapter(adapter)
                (found,) = inner.run(["logits"], feeds, options)
                expected = session.run(ids, mask, calibration=name).logits
                np.testing.assert_allclose(found[mask == 1], expected[mask == 1], atol=1e-6)

    def test_another_model_of_the_same_shape(self, folder, tmp_path):
        other = tmp_path / "other.onnx"
        build_model(tiny_checkpoint(seed=1), CalibrationSet.of({"weak": WEAK, "strong": STRONG}), other)
        with Session.open(other) as session, pytest.raises(SessionError, match="is of another model"):
            session.add_adapter(folder / "weak.onnx_adapter", "x")

    def test_other_heads(self, switchable, folder):
        with Session.open(switchable) as session, pytest.raises(SessionError, match=r"can calibrate 8 heads and needs"):
            session.add_adapter(folder / "weak.onnx_adapter")

    def test_values_out_of_range(self, file, tmp_path):
        with Session.open(file) as session:
            strengths = session.requests.strengths("weak", 1).copy()
        for knob, value in ((0, 2.5), (0, -1), (1, 0.01), (1, 17), (2, -0.1), (0, np.nan), (2, np.inf)):
            wrong = strengths.copy()
            wrong[0, 0, knob] = value
            write_adapter(tmp_path / "x.onnx_adapter", wrong, 7)
            with pytest.raises(CalibrationError, match="it must be"):
                read_adapter(tmp_path / "x.onnx_adapter", 6, 7, file)

    @settings(max_examples=60)
    @given(st.data())
    def test_damaged(self, file, tmp_path_factory, data):
        """Whatever the bytes, an adapter is read as it was, or refused by a message."""
        path = tmp_path_factory.mktemp("damaged") / "x.onnx_adapter"
        write_adapter(path, np.full((1, 6, 3), 0.5, np.float32), 7)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        with contextlib.suppress(ActExportError):
            assert read_adapter(path, 6, 7, file).shape == (1, 6, 3)

    def test_those_of_an_earlier_export_go(self, tiny, tmp_path):
        for calibrations in ({"weak": WEAK, "strong": STRONG}, {"other": STRONG}):
            export_model(tiny, calibrations, tmp_path / "out", verify=False)
            others = tmp_path / "out" / "adapters" / "lora.onnx_adapter"
            others.write_bytes(b"somebody else's")
        names = sorted(path.name.partition(".")[0] for path in others.parent.iterdir())
        assert names == ["lora", "other", "plain"]

    def test_no_adapter(self, file, tmp_path):
        with Session.open(file) as session:
            with pytest.raises(SessionError, match="there is no adapter"):
                session.add_adapter(tmp_path / "nothing.onnx_adapter")
            (tmp_path / "text.onnx_adapter").write_text("no adapter")
            with pytest.raises(SessionError, match="is no adapter that ONNX Runtime can read"):
                session.add_adapter(tmp_path / "text.onnx_adapter")


def _metadata(path):
    model = onnx.load(path, load_external_data=False)
    return [(entry.key, entry.value) for entry in model.metadata_props]
