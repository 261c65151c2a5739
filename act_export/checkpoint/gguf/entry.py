"""Converted checkpoints in the user's cache folder: whole or not there, and made again where they are damaged.

Each entry has a record of its own files, with their sizes and SHA-256. Both are checked before every use: reading the
weights once more costs a fraction of loading them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from act_export.errors import ActExportError
from act_export.files import flush, sha256_of
from act_export.json_file import look_up, read_json
from act_export.staging import beginning

CONVERTER = 3  # raised whenever the same file would be converted to something else
RECORD = "conversion.json"


def entry_name(paths: Sequence[Path]) -> str:
    """The folder of a GGUF file's conversion: by its content, and by what converts it.

    Args:
        paths: The file, or its shards in their order.

    Raises:
        OSError: If they can't be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(sha256_of(path)))
    from importlib import metadata  # slow, and only for what is converted

    readers = f"{CONVERTER}-{metadata.version('transformers')}-{metadata.version('gguf')}"
    return f"{beginning(paths[0].stem)}-{digest.hexdigest()[:16]}-{readers}"


def write_record(folder: Path, **facts: Any) -> None:
    """Records an entry's files, to be called when they are all there; then everything is brought to the disk.

    Raises:
        OSError: If something can't be written.
    """
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in sorted(folder.iterdir())}
    (folder / RECORD).write_text(json.dumps({**facts, "files": files}, indent=1) + "\n", encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        flush(path)


def is_whole(folder: Path) -> bool:
    """Whether an entry is there, with all of its files as they were written, and no others."""
    recorded = look_up(_record(folder), "files")
    if not isinstance(recorded, dict) or not recorded:
        return False
    try:
        if {file.name for file in folder.iterdir()} != {*recorded, RECORD}:
            return False
        sizes = all((folder / name).stat().st_size == look_up(facts, "bytes") for name, facts in recorded.items())
        return sizes and all(sha256_of(folder / name) == look_up(facts, "sha256") for name, facts in recorded.items())
    except OSError:
        return False


def remarks_in(folder: Path) -> tuple[str, ...]:
    """What was said when an entry was made; nothing of other folders."""
    remarks = look_up(_record(folder), "remarks")
    return tuple(each for each in remarks if isinstance(each, str)) if isinstance(remarks, list) else ()


def _record(folder: Path) -> Any:
    try:
        return read_json(folder / RECORD)
    except ActExportError:
        return None


def publish(made: Path, folder: Path, graveyard: Path) -> None:
    """Moves a recorded entry to its place, unless another process was faster; what is there and damaged goes.

    Args:
        made: The entry, on the same disk.
        folder: Its place.
        graveyard: A folder on the same disk that is about to be removed.

    Raises:
        OSError: If it can't be moved.
    """
    for attempt in range(3):
        if is_whole(folder):
            return
        if os.path.lexists(folder):
            folder.rename(graveyard / f"damaged-{attempt}")
        try:
            made.rename(folder)
        except OSError:
            if attempt == 2 or not os.path.lexists(folder):
                raise
            continue  # another process came between
        flush(folder.parent)
        return
