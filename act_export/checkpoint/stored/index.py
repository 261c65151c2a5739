"""The index of weights in several files, and which of a folder's files hold weights; no weight is read, nor torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from act_export.checkpoint.small_files import own_file
from act_export.errors import CheckpointError, shown
from act_export.json_file import read_object

WHOLE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
WEIGHT_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SUFFIXES = {WEIGHT_INDICES[0]: ".safetensors", WEIGHT_INDICES[1]: ".bin"}
_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+(\.safetensors|\.bin)")


def weights_in(names: Iterable[str], folder: Path, name: str) -> tuple[str, ...]:
    """Those of a checkpoint's files that hold its weights, of one format, the index first; none where there are none.

    Whole weights are preferred to shards, and safetensors to pickles, as transformers has it.

    Args:
        names: Of all its files.
        folder: Where the index is.
        name: What the user calls it.

    Raises:
        CheckpointError: If the index can't be read, or names what it may not.
    """
    there = set(names)
    for whole, index in zip(WHOLE_WEIGHTS, WEIGHT_INDICES, strict=True):
        if whole in there:
            return (whole,)
        if index in there:
            return (index, *sorted(set(places_in(folder / index, f"{index} of {name}").values())))
    return ()


def places_in(index: Path, what: str = "", *, to_load: bool = False) -> dict[str, str]:
    """Tensor -> file, of an index; each file lies in the index's folder, whether it is there or not.

    Args:
        index: The file.
        what: It is called so in errors; its path where this is empty.
        to_load: It must also have what transformers needs of it.

    Raises:
        CheckpointError: If it is no index, or it or a file that it names isn't in its folder, or of another format.
    """
    what, advice = what or str(index), f"get the file anew: {index}"
    own_file(index.parent, index.name, what)
    content = read_object(index, what, error=CheckpointError, advice=advice)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{what} has no weight_map of tensors to files; {advice}")
    if to_load and not isinstance(content.get("metadata"), dict):
        raise CheckpointError(f'{what} has no metadata, without which transformers loads nothing; add "metadata": {{}}')
    suffix = _SUFFIXES.get(index.name, "")
    for file in sorted(set(places.values())):
        own_file(index.parent, file, what)
        if not file.endswith(suffix):
            raise CheckpointError(f"{what} names {shown(file)}, which is no {suffix} file; {advice}")
    return places


def check_no_other_shards(folder: Path, index: Path, files: Iterable[str]) -> None:
    """Refuses a folder with shards that its index doesn't name: of an older save, or of an index that is older.

    Raises:
        CheckpointError: With one of them.
    """
    named = set(files)
    for path in sorted(folder.iterdir()):
        shard = _SHARD.fullmatch(path.name)
        if shard and shard[2] == _SUFFIXES[index.name] and path.name not in named:
            raise CheckpointError(
                f"{folder} holds {path.name}, which {index.name} doesn't name: the index and the weights don't belong "
                f"together; get them anew, or move {path.name} away if it is left from something else"
            )
