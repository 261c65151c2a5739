"""The profile's two files: what is written is what is read, and nothing else is taken for a profile."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import random_profile
from safetensors.numpy import load_file, save

from act_export.calibration.file import Calibration
from act_export.errors import ActExportError
from act_export.profile import ALL, SinkProfile


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Every field of nested dataclasses and mappings by its path."""
    if hasattr(value, "__dataclass_fields__"):
        parts = {field: getattr(value, field) for field in value.__dataclass_fields__}
    elif isinstance(value, dict):
        parts = value
    elif isinstance(value, tuple) and value and hasattr(value[0], "__dataclass_fields__"):
        parts = dict(enumerate(value))
    else:
        return {name: value}
    return {path: leaf for key, part in parts.items() for path, leaf in flat(part, f"{name}/{key}").items()}


def assert_same(one: SinkProfile, other: SinkProfile) -> None:
    left, right = flat(one), flat(other)
    assert list(left) == list(right)
    for path, value in left.items():
        if isinstance(value, np.ndarray):
            assert value.dtype == right[path].dtype, path
            np.testing.assert_array_equal(value, right[path], err_msg=path)
        else:
            assert value == right[path], path


@settings(max_examples=15)
@given(
    layers=st.integers(1, 4),
    heads=st.integers(1, 4),
    sources=st.lists(st.sampled_from(["sst2", "cb", "my rows.jsonl", "ü/x"]), min_size=1, max_size=3, unique=True),
    effects=st.booleans(),
    calibrated=st.booleans(),
    nothing=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_is_written_is_what_is_read(tmp_path_factory, layers, heads, sources, effects, calibrated, nothing, seed):
    profile = random_profile(
        layers,
        heads,
        sources,
        seed=seed,
        effects=effects,
        calibration=Calibration({0: (0,)}) if calibrated else None,
        no_later_sinks=nothing,
    )
    path = tmp_path_factory.mktemp("profile") / "new" / "p.safetensors"
    profile.save(path)
    for name in (path, path.with_suffix(".json")):
        assert_same(SinkProfile.load(name), profile)
    assert {file.name for file in path.parent.iterdir()} == {"p.safetensors", "p.json"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "profile.safetensors"
    random_profile(2, 3, ("sst2", "cb"), calibration=Calibration({1: (2,)})).save(path)
    return path


def rewrite(path: Path, change: Any) -> None:
    """Changes the tensors, and gives the JSON file their new hash."""
    tensors = load_file(path)
    change(tensors)
    content = save(tensors)
    path.write_bytes(content)
    document = json.loads(path.with_suffix(".json").read_text())
    document["tensors"]["sha256"] = hashlib.sha256(content).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("sources/sst2/entropy"), r"lacks the tensor 'sources/sst2/entropy'"),
        (lambda t: t.update(more=np.zeros(2)), r"a tensor 'more' that doesn't belong"),
        (lambda t: t.update({"sources/all/entropy": np.zeros((2, 2), np.float32)}), r"\(2, 2\); it must be .*\(2, 3\)"),
        (lambda t: t.update({"sources/all/entropy": np.zeros((2, 3))}), r"float64 .* must be float32"),
        (
            lambda t: t["sources/cb/relative/mass"].__setitem__((1, 1), 1.5),
            r"value 1.5 in .*relative/mass",
        ),
        (
            lambda t: t["sources/cb/absolute/rate"].__setitem__((0, 0), np.nan),
            r"value nan in .*absolute/rate",
        ),
        (
            lambda t: t["sources/cb/absolute/count"].__setitem__((0, 0), -1),
            r"value -1.0 in .*count; .* 0 to inf",
        ),
        (lambda t: t["sources/cb/effects"].__setitem__((0, 0), np.inf), r"has the value inf in sources/cb/effects"),
        (lambda t: t.pop("examples/1/scores"), r"lacks the tensor 'examples/1/scores'"),
    ],
)
def test_a_tensor_that_is_not_as_it_must_be_is_named(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(ActExportError, match=message):
        SinkProfile.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="another"), "is not a sink profile's"),
        (lambda d: d.update(version=1), r"version 1; this act-export reads version 2"),
        (lambda d: d.update(grid=16), r"has grid = 16; this version has 32"),
        (lambda d: d.pop("sources"), "has no field 'sources'; make the profile again"),
        (lambda d: d["sources"].pop(0), "has the sources .*'sst2', 'cb'"),
        (lambda d: d["sources"][1].update(prompts="many"), "has prompts = 'many'; it must be a whole number"),
        (lambda d: d["model"].update(num_heads=4), r"\(2, 4\)"),
        (lambda d: d["calibration"].update(threshold=-1), "threshold is -1"),
        (lambda d: d["tensors"].update(sha256="0"), "aren't of the same run"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(saved, change, message):
    description = saved.with_suffix(".json")
    document = json.loads(description.read_text())
    change(document)
    description.write_text(json.dumps(document))
    with pytest.raises(ActExportError, match=message):
        SinkProfile.load(saved)


def test_files_that_are_missing_or_no_profile(tmp_path, saved):
    with pytest.raises(ActExportError, match=r"a profile has two files, nowhere.safetensors and nowhere.json"):
        SinkProfile.load(tmp_path / "nowhere.safetensors")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "list.safetensors").write_text("")
    with pytest.raises(ActExportError, match="is no JSON object but a list"):
        SinkProfile.load(tmp_path / "list.json")
    saved.write_bytes(b"no tensors")
    document = json.loads(saved.with_suffix(".json").read_text())
    document["tensors"]["sha256"] = hashlib.sha256(b"no tensors").hexdigest()
    saved.with_suffix(".json").write_text(json.dumps(document))
    with pytest.raises(ActExportError, match="is not a safetensors file"):
        SinkProfile.load(saved)


def test_where_it_can_not_be_written(tmp_path):
    profile = random_profile()
    with pytest.raises(ActExportError, match=r"pass e\.g\. profile\.safetensors"):
        profile.save(tmp_path / "profile.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(ActExportError, match="pass another place with --out"):
        profile.save(tmp_path / "file" / "profile.safetensors")


def test_a_source_by_its_name():
    profile = random_profile(sources=("sst2", "cb"))
    assert profile["cb"] is profile.sources["cb"]
    assert profile[ALL] is profile.overall
    with pytest.raises(ActExportError, match="no source 'rte'; it has sst2, cb, all"):
        profile["rte"]
