"""The whole files that cases damage."""

from __future__ import annotations

import json
import sys
from pathlib import Path

GRAFT = ("graft", "{}/plain.onnx", "--calibration", "{}/heads.json", "--out", "{}/new.onnx")
UNCHECKED = (*GRAFT, "--no-check")
SEARCH = ("search", "{}", "--data", "{}/rows.jsonl", "--journal", "{}/journal", "--out", "{}/new.json")


def prepare(folder: Path) -> None:
    """Writes the set of whole files, once: a checkpoint, exports of it, a graft, a profile, a task and its rows."""
    from act_export.calibration.file import Calibration

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from profiles import random_profile
    from tiny import save_checkpoint

    save_checkpoint(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}>")
    (folder / "heads.json").write_text('{"0": [1], "1": [0, 3]}')
    rows = [{"prompt": f"Row {i}: {i % 2}. It is", "choices": [" n", " y"], "answer": i % 2} for i in range(30)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [{"text": f"row {i}", "mood": i % 2} for i in range(30)]
    (folder / "task-rows.jsonl").write_text("\n".join(map(json.dumps, asked)))
    task = {
        "name": "mood",
        "labels": [" bad", " good"],
        "answer": "mood",
        "template": "{text} is",
        "path": {"file": "task-rows.jsonl", "fields": {"text": "t", "mood": "mood"}, "pattern": _PATTERN},
    }
    (folder / "task.json").write_text(json.dumps(task))
    measured = {"sizes": {"report": 20}, "plain_accuracy": 0.5, "joint": None}
    own = {"accuracy": 0.6, "interval": [0.0, 0.2]}
    (folder / "search.json").write_text(json.dumps({"tasks": {"mood": {**measured, "own": own}}}))
    calibration = Calibration({0: (1,), 1: (0, 3)}, threshold=0.06)
    (folder / "calibration.json").write_text(calibration.to_json())
    random_profile().save(folder / "profile.safetensors")
    _must(
        ("export", str(folder), "--out", f"{folder}/model.onnx", "--calibration", f"{folder}/heads.json", "--no-verify")
    )
    _must(("export", str(folder), "--out", f"{folder}/plain.onnx", "--plain", "--no-verify"))
    _must(tuple(word.format(folder) for word in (*UNCHECKED[:-2], "{}/grafted.onnx", "--no-check")))
    _must(tuple(word.format(folder) for word in (*SEARCH[:-1], "{}/found.json")))
    genai = {
        "model": {
            "type": "llama",
            "vocab_size": 259,
            "context_length": 256,
            "eos_token_id": [2],
            "decoder": {
                "filename": "model.onnx",
                "head_size": 8,
                "num_key_value_heads": 2,
                "session_options": {},
                "inputs": {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
                "outputs": {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
            },
        }
    }
    (folder / "genai_config.json").write_text(json.dumps(genai))
    (folder / "model.gguf").write_bytes(_gguf())


_PATTERN = {"field": "text", "regex": "(?P<t>(\\w+ ?)+)"}


def _gguf() -> bytes:
    """The beginning of a GGUF file, with a few keys and a tensor."""
    import struct

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
    keys = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    keys += text("llama.block_count") + struct.pack("<II", 4, 2)
    tensor = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 32, 259, 0, 0)
    return (head + keys + tensor).ljust(1024, b"\0") + bytes(4 * 32 * 259)


def _must(words: tuple[str, ...]) -> None:
    code, said = invoke(list(words))
    if code:
        raise RuntimeError(f"act-export {' '.join(words)} ends with {code}: {said}")


def invoke(words: list[str]) -> tuple[int, str]:
    from typer.testing import CliRunner

    from act_export.commands.main import app

    result = CliRunner().invoke(app, words)
    error = result.exception
    told = f"{type(error).__name__}: {error}" if error is not None and not isinstance(error, SystemExit) else ""
    return result.exit_code if not told else 3, told + result.stderr[-600:]
