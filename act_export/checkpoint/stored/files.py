"""The tensors of a checkpoint folder, which may lie in several files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from act_export.checkpoint.small_files import own_file
from act_export.checkpoint.stored.index import WEIGHT_INDICES, check_no_other_shards, places_in, weights_in
from act_export.checkpoint.stored.pickle_file import pickled_tensors
from act_export.checkpoint.stored.safetensors_file import Stored, stored_tensors
from act_export.errors import CheckpointError, shown


def is_streamable(folder: Path) -> bool:
    """Whether the folder's weights are in .safetensors files."""
    found = weights_in([path.name for path in folder.iterdir()], folder, str(folder))
    return found[-1:] != () and found[-1].endswith(".safetensors")


def tensors_of(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint, from the headers of its files; no weight is read.

    Raises:
        CheckpointError: If a file is missing, broken or cut short, holds more than tensors, or is a link out of the
            folder; or if two files hold tensors of one name.
    """
    found = weights_in([path.name for path in folder.iterdir()], folder, str(folder))
    if not found:
        raise CheckpointError(f"{folder} has no weights")
    if found[0] not in WEIGHT_INDICES:
        return dict(_tensors_in(folder, found[0]))
    index = folder / found[0]
    places_in(index, to_load=True)
    missing = [file for file in found[1:] if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {missing[0]}, which {index.name} names"
            + (f", and {len(missing) - 1} more files" if len(missing) > 1 else "")
            + "; get them from where the checkpoint came from"
        )
    check_no_other_shards(folder, index, found)
    files = {file: _tensors_in(folder, file) for file in found[1:]}
    return _joined(folder, files)


def _tensors_in(folder: Path, file: str) -> Mapping[str, Stored]:
    path = own_file(folder, file, f"the weights of {folder}")
    return stored_tensors(path) if path.name.endswith(".safetensors") else pickled_tensors(path)


def _joined(folder: Path, files: Mapping[str, Mapping[str, Stored]]) -> dict[str, Stored]:
    """The tensors of all files, as transformers has them: an index says which files there are, and no more."""
    found: dict[str, Stored] = {}
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            if name in found:
                raise CheckpointError(
                    f"{shown(name)} is in {found[name].file.name} and in {file}, so it can't be told which counts; get "
                    f"the files of {folder} again"
                )
            found[name] = tensor
    return found
