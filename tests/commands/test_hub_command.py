"""The command line with a model from a hub on this machine: revision, token, remote code, and Ctrl-C in a download."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from fake_hub import TOKEN, Repository, in_place_of_the_hub, serving
from test_remote_code import MARKER, with_own_model, with_own_tokenizer
from tiny import tiny_model
from typer.testing import CliRunner

from act_export.commands.main import app
from act_export.onnx_file.inspect import inspect_file
from act_export.runtime import Session

IN_SMALL_PIECES = "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 1000"


class Terminal:
    """The other side of a terminal that a command writes to."""

    def __init__(self) -> None:
        self.ours, self.theirs = os.openpty()
        termios.tcsetwinsize(self.theirs, (24, 120))
        self.text = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while piece := os.read(self.ours, 4096):
                self.text += piece.decode(errors="replace")
        except OSError:  # the last writer is gone
            pass

    def close(self) -> str:
        os.close(self.theirs)
        self._reader.join(10)
        os.close(self.ours)
        return self.text


def start(hub, base: Path, terminal: Terminal, *arguments: object) -> subprocess.Popen:
    """The command line as somebody runs it who has logged in, and whose cache is empty."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(base / "home"), "HF_TOKEN": TOKEN}
    environment |= {"XDG_CACHE_HOME": str(base / "cache"), MARKER: str(base / "marker")}
    code = f"{IN_SMALL_PIECES}\nfrom act_export.commands.main import main\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=terminal.theirs,
    )


@pytest.fixture
def hub(tmp_path):
    with serving() as running:
        own = with_own_model(tmp_path / "own")
        (own / "model.safetensors").unlink()
        tiny_model().save_pretrained(tmp_path / "shards", max_shard_size="60KB")
        for file in (tmp_path / "shards").glob("model*"):
            shutil.copy(file, own)
        running.repositories["owner/name"] = Repository({"v1": own}, access="gated")
        yield running


@pytest.mark.slow
def test_a_download_is_interrupted_then_goes_on_and_its_code_runs_where_asked_for(hub, tmp_path):
    first, second = sorted(file.name for file in (tmp_path / "own").glob("*.safetensors"))
    hub.breaks_in, hub.breaks_after, hub.stalls = second, 10_000, True
    out = tmp_path / "out.onnx"
    arguments = ["owner/name", "--revision", "v1", "--trust-remote-code", "--plain", "--out", out]

    terminal = Terminal()
    process = start(hub, tmp_path, terminal, *arguments)
    deadline = time.monotonic() + 120
    while hub.breaks_after and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    shown = terminal.close()
    assert process.returncode == 2, shown
    assert "interrupted; no partial output was left" in shown
    assert first in shown  # the bars
    assert second in shown
    assert not list((tmp_path / "home").rglob("*.incomplete"))
    assert not out.exists()

    terminal = Terminal()
    process = start(hub, tmp_path, terminal, *arguments)
    printed, _ = process.communicate(timeout=300)
    shown = terminal.close()
    assert process.returncode == 0, shown
    assert printed.strip() == str(out)
    assert (hub.downloaded().count(first), hub.downloaded().count(second)) == (1, 2)
    assert (tmp_path / "marker").exists()
    assert "parity: native library within" in shown
    assert hub.tokens == {TOKEN}
    assert TOKEN not in shown + printed
    found = inspect_file(out)
    assert (found.source, found.revision) == ("owner/name", hub.repositories["owner/name"].commit("v1"))
    assert found.architecture == "own_llama"
    assert TOKEN.encode() not in out.read_bytes()
    with Session.open(out) as session:
        assert session.properties["revision"] == found.revision


def commands(base: Path, file: Path) -> dict[str, list[object]]:
    """Every command that takes MODEL, with all it needs but the options for the hub."""
    rows, text = base / "rows.jsonl", base / "text.txt"
    rows.write_text("".join(f'{{"prompt": "{i}", "choices": ["b", "c"], "answer": 0}}\n' for i in range(480)))
    text.write_text("Some text.")
    return {
        "export": ["owner/name", "--plain", "--out", base / "new.onnx"],
        "search": ["search", "owner/name", "--data", rows, "--out", base / "new.json"],
        "profile": ["profile", "owner/name", "--text", text, "--out", base / "new.safetensors"],
        "verify": ["verify", file, "--against", "owner/name"],
        "bench": ["bench", file, "--pytorch", "owner/name"],
        "generate": ["generate", file, "a", "--tokenizer", "owner/name"],
        "eval": ["eval", file, "--data", rows, "--split", "all", "--tokenizer", "owner/name"],
    }


OF_TOKENIZERS = ("generate", "eval")
COMMANDS = ("export", "search", "profile", "verify", "bench", *OF_TOKENIZERS)


@pytest.fixture
def run(monkeypatch, tmp_path, tiny_file):
    """Runs a command with an own model, or own tokenizer, whose code fails; what it says."""
    for with_own, code in ((with_own_model, "modeling_own.py"), (with_own_tokenizer, "tokenization_own.py")):
        (with_own(tmp_path / code) / code).write_text("raise RuntimeError('its code ran')")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with in_place_of_the_hub(monkeypatch, tmp_path) as hub:

        def run_command(name: str, *options: str) -> str:
            code = "tokenization_own.py" if name in OF_TOKENIZERS else "modeling_own.py"
            hub.repositories["owner/name"] = Repository({"main": tmp_path / code})
            arguments = [*commands(tmp_path, tiny_file)[name], *options]
            result = CliRunner().invoke(app, [str(argument) for argument in arguments])
            assert result.exit_code == 2, result.output
            assert not list(tmp_path.glob("new.*"))
            return result.output

        yield run_command


@pytest.mark.parametrize("name", COMMANDS)
def test_code_is_run_where_it_is_asked_for(run, name):
    assert "owner/name needs code of its own" in run(name)
    assert "its code ran" in run(name, "--trust-remote-code")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_revision_reaches_the_hub(run, name):
    options = ["--tokenizer", "owner/name@v9"] if name in OF_TOKENIZERS else ["--revision", "v9"]
    assert "owner/name has no revision 'v9'" in run(name, *options)


def test_a_revision_of_nothing(tiny_file):
    result = CliRunner().invoke(app, ["bench", str(tiny_file), "--revision", "v1"])
    assert result.exit_code == 2
    assert "--revision v1 is of --pytorch MODEL, which isn't given" in result.output
