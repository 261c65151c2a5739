"""Tiny checkpoints in several files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny import tiny_model

INDEX = "model.safetensors.index.json"


def save_in_shards(folder: Path, architecture: str = "llama", *, max_shard_size: str = "20KB", **changes) -> Path:
    """A checkpoint of an architecture in bfloat16, in three files or more."""
    tiny_model(architecture, **changes).to(torch.bfloat16).save_pretrained(folder, max_shard_size=max_shard_size)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


def change_index(folder: Path, change) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text(encoding="utf-8"))
    change(index["weight_map"])
    path.write_text(json.dumps(index), encoding="utf-8")


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))
