"""Too little memory is said to be that, wherever it shows."""

from __future__ import annotations

import ctypes
import errno
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from act_export.checkpoint.low_memory import is_low_memory, low_memory_told, return_freed
from act_export.commands.main import app
from act_export.errors import ActExportError
from act_export.export import build_model


def of_torch() -> Exception:
    """What PyTorch raises where it can't have memory."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60)
    return raised.value


ERRORS = [
    of_torch(),
    MemoryError("no"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    torch.OutOfMemoryError("CUDA"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_about_memory(error):
    assert is_low_memory(error)
    other = ValueError("about something else")
    assert not is_low_memory(other)
    other.__cause__ = error
    assert is_low_memory(other)
    with (
        pytest.raises(ActExportError, match=r"isn't enough memory to try: .*; do something"),
        low_memory_told("try", "do something"),
    ):
        raise error


def test_other_errors_pass():
    with pytest.raises(KeyError), low_memory_told("try", "do something"):
        raise KeyError("a")


@pytest.mark.parametrize("error", ERRORS[:2], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "where", ["transformers.AutoModelForCausalLM.from_pretrained", "torch.load", "act_export.export.build.trace"]
)
def test_the_command_says_so(checkpoint_folder, tmp_path, monkeypatch, where, error):
    def fail(*_, **__):
        raise error

    if where == "torch.load":
        (tmp_path / "pytorch_model.bin").touch()
        (tmp_path / "config.json").write_text((checkpoint_folder / "config.json").read_text())
        checkpoint_folder = tmp_path
    monkeypatch.setattr(where, fail)
    result = CliRunner().invoke(app, [str(checkpoint_folder), "--out", str(tmp_path / "a.onnx"), "--plain"])
    assert result.exit_code == 2
    assert "there isn't enough memory to" in result.output
    assert "--stream" in result.output
    assert not (tmp_path / "a.onnx").exists()


def test_while_the_graph_is_traced(tiny, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ERRORS[0]

    monkeypatch.setattr("act_export.export.operator.calibrated_attention", fail)
    monkeypatch.setattr("act_export.attention.reference_attention.calibrated_attention", fail)
    with pytest.raises(ActExportError, match="isn't enough memory to export the model"):
        build_model(tiny, None, tmp_path / "a.onnx")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library isn't glibc")
def test_freed_memory_is_given_back():
    """Small blocks, freed but for every thousandth, stay with a process that uses glibc until it is asked for them."""
    program = """
from act_export.checkpoint.low_memory import return_freed
def resident_kb():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
blocks = [bytes(20_000) for _ in range(10_000)]
full = resident_kb()
blocks = blocks[::1000]
kept = resident_kb()
return_freed()
print(full - kept, full - resident_kb())
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    by_itself, given_back = map(int, done.stdout.split())
    assert by_itself < 20_000 < 150_000 < given_back


def test_where_the_c_library_keeps_nothing(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    return_freed()
