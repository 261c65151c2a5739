"""The tensors of a checkpoint folder, which may lie in several files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from act_export.checkpoint.streamed.stored_tensor import StoredTensor, stored_tensors
from act_export.errors import CheckpointError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def is_streamable(folder: Path) -> bool:
    """Whether the folder's weights are in .safetensors files."""
    return (folder / WHOLE).is_file() or (folder / INDEX).is_file()


def tensors_of(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, from the headers of its files; no weight is read.

    Raises:
        CheckpointError: If a file is missing, broken or cut short, or the index and the files disagree.
    """
    if (folder / WHOLE).is_file():
        return stored_tensors(folder / WHOLE)
    places = _places(folder / INDEX)
    missing = sorted(file for file in set(places.values()) if not (folder / file).is_file())
    if missing:
        raise CheckpointError(
            f"{folder} lacks {missing[0]}, which {INDEX} names"
            + (f", and {len(missing) - 1} more files" if len(missing) > 1 else "")
            + "; get them from where the checkpoint came from"
        )
    files = {file: stored_tensors(folder / file) for file in sorted(set(places.values()))}
    for name, file in places.items():
        if name not in files[file]:
            raise CheckpointError(
                f"{file} doesn't hold {name}, though {INDEX} says so: they don't belong together; get the files of "
                f"{folder} again"
            )
    return {name: files[file][name] for name, file in places.items()}


def _places(index: Path) -> dict[str, str]:
    """Tensor -> file."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _once(index, pairs))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"can't read {index}: {error}; get the file again") from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index} has no weight_map of tensors to files; get the file again")
    outside = next((file for file in places.values() if Path(file).name != file), None)
    if outside is not None:
        raise CheckpointError(f"{index} names a file {outside!r} outside of its folder; get the file again")
    return places


def _once(index: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise CheckpointError(f"{index} names {twice} twice, so it can't be told where it is; get the file again")
    return found
