"""Converted GGUF files in the cache: used when whole, made again when not, and nothing is left by what was killed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gguf_files import logits_of, tiny_model, write

from act_export.checkpoint.gguf import convert as module
from act_export.checkpoint.gguf import entry as gguf_entry
from act_export.checkpoint.gguf.convert import converted
from act_export.checkpoint.load import load_checkpoint


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(module, "cache_folder", lambda: folder)
    return folder / "checkpoints"


@pytest.fixture
def path(tmp_path) -> Path:
    return write(tmp_path / "model.gguf", tiny_model())


def test_a_whole_entry_is_used(cache, path, monkeypatch):
    folder = converted(path)
    assert list(cache.iterdir()) == [folder]
    monkeypatch.setattr(module, "_convert", pytest.fail)
    assert converted(path) == folder


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "gone": Path.unlink,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "a bit": _flip,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", gguf_entry.RECORD])
def test_a_damaged_entry_is_made_again(cache, path, monkeypatch, damage, name):
    def convert(gguf, header, in_shards, own, made):
        for file in kept.iterdir():
            if file.name != gguf_entry.RECORD:
                (made / file.name).write_bytes(file.read_bytes())
        return []

    folder = converted(path)
    kept = cache.parent / "kept"
    kept.mkdir()
    for file in folder.iterdir():
        (kept / file.name).write_bytes(file.read_bytes())
    DAMAGES[damage](folder / name)
    record = (folder / name).read_bytes() if name == gguf_entry.RECORD and damage == "a bit" else b""
    if record and gguf_entry.is_whole(folder):
        pytest.skip("the bit is in what was said, not in what is checked")
    monkeypatch.setattr(module, "_convert", convert)
    assert converted(path) == folder
    assert gguf_entry.is_whole(folder)
    assert list(cache.iterdir()) == [folder]


def test_an_entry_of_another_converter_isnt_used(cache, path, monkeypatch):
    first = converted(path)
    monkeypatch.setattr(gguf_entry, "CONVERTER", gguf_entry.CONVERTER + 1)
    second = converted(path)
    assert first != second
    torch.testing.assert_close(logits_of(load_checkpoint(str(second)).model), logits_of(tiny_model()))


def test_an_entry_without_a_record_isnt_used(cache, path):
    """What earlier versions left, half written or not."""
    folder = converted(path)
    (folder / gguf_entry.RECORD).unlink()
    (folder / "model.safetensors").write_bytes(b"half")
    assert load_checkpoint(str(path)).identity.num_layers == 2
    assert json.loads((folder / gguf_entry.RECORD).read_text())["report"]["tensors"] == 21


def test_a_failed_conversion_leaves_nothing(cache, path, monkeypatch):
    monkeypatch.setattr(module, "compare", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        converted(path)
    assert list(cache.iterdir()) == []


@pytest.mark.slow  # a process of its own; what remains of one is in the test above
def test_a_killed_conversion_leaves_nothing(cache, path):
    program = (
        "import sys, time; from pathlib import Path; from act_export.checkpoint.gguf import convert as module\n"
        "module.cache_folder = lambda: Path(sys.argv[2])\n"
        "module.compare = lambda *_: (print('here', flush=True), time.sleep(600))\n"
        "module.converted(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, str(path), str(cache.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "here\n"
        process.kill()
    time.sleep(0.1)
    assert len(list(cache.iterdir())) == 1
    assert list(cache.iterdir()) != [folder := converted(path)]
    assert list(cache.iterdir()) == [folder]


def test_an_entrys_name_fits_a_file_system(tmp_path):
    path = tmp_path / f"{'模' * 83}.gguf"
    path.write_bytes(b"x")
    name = gguf_entry.entry_name([path])
    assert name.startswith("模" * 33 + "-")
    (tmp_path / name).mkdir()


def test_where_nothing_can_be_flushed_entries_are_kept_all_the_same(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    for name in ("made", "graveyard"):
        (tmp_path / name).mkdir()
    (tmp_path / "made" / "config.json").write_text("{}")
    gguf_entry.write_record(tmp_path / "made")
    gguf_entry.publish(tmp_path / "made", tmp_path / "entry", tmp_path / "graveyard")
    assert gguf_entry.is_whole(tmp_path / "entry")
