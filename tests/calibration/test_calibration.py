"""The calibration file: round trips, and refusals that name what is wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.calibration.file import Calibration, CalibrationError, ModelIdentity, Provenance

IDENTITY = ModelIdentity("llama", 4, 8, "sha256:ab")
BY_NAME = ModelIdentity("llama", 4, 8, name="owner/model")
HEADS = st.dictionaries(
    st.integers(0, 30), st.lists(st.integers(0, 40), min_size=1, max_size=8, unique=True).map(sorted)
)


@st.composite
def calibrations(draw):
    heads = {layer: tuple(values) for layer, values in draw(HEADS).items()}
    betas = st.floats(0, 2)
    beta = draw(
        betas
        | st.fixed_dictionaries(
            {k: st.lists(betas, min_size=len(v), max_size=len(v)).map(tuple) for k, v in heads.items()}
        )
    )
    searched = Provenance("gates", ("sst2",), {"rank": 96}, 0, 0.5, 0.75, {"torch": "2"}, {"p": 0.01})
    published = Provenance("published", ("sst2", "cb"), source={"paper": "a paper", "commit": "abc"})
    return Calibration(
        heads,
        beta,
        draw(st.floats(0, 10)),
        draw(st.sampled_from(["absolute", "relative"])),
        draw(st.sampled_from([None, IDENTITY, BY_NAME, ModelIdentity("llama", 4, 8)])),
        draw(st.sampled_from([None, searched, published])),
    )


@given(calibrations())
def test_json_round_trip(calibration):
    text = calibration.to_json()
    assert Calibration.from_json(text) == calibration
    assert Calibration.from_json(text).to_json() == text
    assert json.loads(text)["version"] == 1


def test_file_round_trip(tmp_path):
    calibration = Calibration({3: (1, 2)}, model=IDENTITY)
    calibration.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == calibration
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_bare_mapping():
    calibration = Calibration.from_json('{"3": [2, 0], "1": [5], "2": []}')
    assert calibration.heads == {1: (5,), 3: (0, 2)}
    assert (calibration.beta, calibration.threshold, calibration.threshold_mode) == (0.4, 0.1, "absolute")


def test_relative_mode_takes_the_papers_alpha_by_default():
    calibration = Calibration.from_json('{"heads": {"0": [1]}, "threshold_mode": "relative"}')
    assert calibration.threshold == 5.0


def test_layer_share():
    calibration = Calibration({0: (1,), 2: (0, 3)}, beta={0: (0.1,), 2: (0.2, 0.3)}, threshold=0.2)
    share = calibration.layer(2)
    assert share is not None
    assert (share.heads, share.beta, share.threshold, share.threshold_mode) == ((0, 3), (0.2, 0.3), 0.2, "absolute")
    assert calibration.layer(1) is None
    assert calibration.num_calibrated_heads == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "isn't JSON"),
        ("[1]", "must be an object"),
        ('{"a": [1]}', "'a', which is no layer"),
        ('{"1": 2}', "has 1 = 2; it must be a list"),
        ('{"1": [0.5]}', "it must be a list of whole numbers"),
        ('{"1": [true]}', "it must be a list of whole numbers"),
        ('{"1": [2, 2]}', "list each once"),
        ('{"1": [-1]}', "whole numbers from 0"),
        ('{"-1": [1]}', "'-1', which is no layer"),
        ('{"0": [0], "00": [1]}', "'00', which is no layer"),
        ('{"0": [0], "0": [1]}', "names '0' twice"),
        ('{"heads": {"0": [1]}, "betta": 0.1}', "unknown field 'betta'"),
        ('{"heads": {"0": [3, 1]}, "beta": {"0": [0.1, 1.9]}}', "ascending order"),
        ('{"format": "other", "heads": {}}', "has format = 'other'"),
        ('{"version": 9, "heads": {}}', "has version = 9"),
        ('{"heads": {"0": [1]}, "beta": 3}', "beta is 3.0"),
        ('{"heads": {"0": [1]}, "beta": {"0": [0.1, 0.2]}}', "one value for each"),
        ('{"heads": {"0": [1]}, "threshold": -1}', "threshold is -1.0"),
        ('{"heads": {"0": [1]}, "threshold_mode": "x", "threshold": 1}', "threshold_mode is 'x'"),
        ('{"format": "act-export calibration", "version": 1}', "heads"),
        ('{"heads": {}, "model": {"layers": 1}}', "architecture"),
        (
            '{"heads": {}, "model": {"architecture": "a", "layers": 1, "heads": 1, "fingerprnt": "x"}}',
            "unknown field 'fingerprnt'",
        ),
    ],
)
def test_malformed_files_are_refused(text, message, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(CalibrationError, match=message) as caught:
        Calibration.load(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(CalibrationError, match="can't read"):
        Calibration.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (Calibration({}, model=ModelIdentity("gpt2", 4, 8, "sha256:ab")), "architecture is gpt2"),
        (Calibration({}, model=ModelIdentity("llama", 5, 8, "sha256:ab")), "number of layers is 5"),
        (Calibration({}, model=ModelIdentity("llama", 4, 9, "sha256:ab")), "number of heads is 9"),
        (Calibration({}, model=ModelIdentity("llama", 4, 8, "sha256:cd")), "fingerprint of the weights is sha256:cd"),
        (Calibration({}, model=ModelIdentity("llama", 4, 9, name="owner/model")), "number of heads is 9"),
        (Calibration({4: (0,)}), "layer 4 is out of range; the model has layers 0 to 3"),
        (Calibration({3: (0, 8)}), "head 8 of layer 3 is out of range; the model has heads 0 to 7"),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused(calibration, message):
    with pytest.raises(CalibrationError, match=message):
        calibration.check_fits(IDENTITY)


@pytest.mark.parametrize("model", [None, IDENTITY, BY_NAME, ModelIdentity("llama", 4, 8)])
def test_a_fitting_calibration_is_accepted(model):
    Calibration({3: (0, 7)}, model=model).check_fits(IDENTITY)


def test_what_is_not_known_is_not_written():
    model = json.loads(Calibration({}, model=BY_NAME).to_json())["model"]
    assert model == {"name": "owner/model", "architecture": "llama", "layers": 4, "heads": 8}
    assert "name" not in json.loads(Calibration({}, model=IDENTITY).to_json())["model"]


def test_a_file_of_an_earlier_release_keeps_its_meaning():
    text = """{"format": "act-export calibration", "version": 1,
        "model": {"architecture": "llama", "layers": 4, "heads": 8, "fingerprint": "sha256:ab"},
        "heads": {"1": [0]}, "beta": 0.4, "threshold": 0.1, "threshold_mode": "absolute",
        "provenance": {"method": "gates", "tasks": ["sst2"]}}"""
    calibration = Calibration.from_json(text)
    assert calibration.model == IDENTITY
    assert calibration.provenance == Provenance("gates", ("sst2",))


def test_overrides_drop_accuracies_that_no_longer_hold():
    provenance = Provenance("gates", plain_accuracy=0.5, calibrated_accuracy=0.7)
    calibration = Calibration({0: (1,)}, provenance=provenance)
    assert calibration.with_overrides() == calibration
    changed = calibration.with_overrides(beta=0.2)
    assert changed.beta == 0.2
    assert changed.provenance == Provenance("gates")
    assert calibration.with_overrides(threshold_mode="relative").threshold == 5.0
    assert calibration.with_overrides(threshold_mode="relative", threshold=2.0).threshold == 2.0
