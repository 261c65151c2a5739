"""The tensors of a checkpoint folder, which may lie in several files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from act_export.checkpoint.streamed.pickled_tensor import pickled_tensors
from act_export.checkpoint.streamed.stored_tensor import Stored, stored_tensors
from act_export.checkpoint.weight_index import WEIGHT_INDICES, check_no_other_shards, places_in, weights_in
from act_export.errors import CheckpointError, shown
from act_export.files import path_inside


def is_streamable(folder: Path) -> bool:
    """Whether the folder's weights are in .safetensors files."""
    found = weights_in([path.name for path in folder.iterdir()], folder, str(folder))
    return found[-1:] != () and found[-1].endswith(".safetensors")


def tensors_of(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint, from the headers of its files; no weight is read.

    Raises:
        CheckpointError: If a file is missing, broken or cut short, holds more than tensors, or is a link out of the
            folder; or if the index and the files disagree.
    """
    found = weights_in([path.name for path in folder.iterdir()], folder, str(folder))
    if not found:
        raise CheckpointError(f"{folder} has no weights")
    if found[0] not in WEIGHT_INDICES:
        return dict(_tensors_in(folder, found[0]))
    index = folder / found[0]
    places = places_in(index, to_load=True)
    missing = [file for file in found[1:] if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {missing[0]}, which {index.name} names"
            + (f", and {len(missing) - 1} more files" if len(missing) > 1 else "")
            + "; get them from where the checkpoint came from"
        )
    check_no_other_shards(folder, index, found)
    files = {file: _tensors_in(folder, file) for file in found[1:]}
    _check_places(folder, index, places, files)
    return {name: files[file][name] for name, file in places.items()}


def _tensors_in(folder: Path, file: str) -> Mapping[str, Stored]:
    path = path_inside(folder, file, f"the weights of {folder}", error=CheckpointError)
    return stored_tensors(path) if path.name.endswith(".safetensors") else pickled_tensors(path)


def _check_places(
    folder: Path, index: Path, places: Mapping[str, str], files: Mapping[str, Mapping[str, Stored]]
) -> None:
    """Refuses an index that says other things than the files do."""
    advice = f"they don't belong together; get the files of {folder} again"
    for name, file in places.items():
        if name not in files[file]:
            raise CheckpointError(f"{file} doesn't hold {shown(name)}, though {index.name} says so: {advice}")
    for file, tensors in files.items():
        for name in tensors:
            if name not in places:
                raise CheckpointError(f"{file} holds {shown(name)}, which {index.name} doesn't name: {advice}")
            if places[name] != file:
                raise CheckpointError(
                    f"{shown(name)} is in {file} and, by {index.name}, in {places[name]}, so it can't be told which "
                    f"counts; get the files of {folder} again"
                )
