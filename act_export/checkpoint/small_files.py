"""A checkpoint's small files, before transformers reads them: where they lie, and how much they may ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from act_export.errors import CheckpointError
from act_export.files import path_inside
from act_export.json_file import read_object

_MOST_SETTINGS = 5_000  # on the first level of any of them
_MOST_VALUES = {  # in all
    "adapter_config.json": 20_000,
    "added_tokens.json": 1_000_000,
    "chat_template.json": 20_000,
    "config.json": 20_000,
    "generation_config.json": 20_000,
    "preprocessor_config.json": 20_000,
    "processor_config.json": 20_000,
    "special_tokens_map.json": 100_000,
    "tokenizer_config.json": 500_000,  # Gemma 3 has 6,400 tokens of its own in there
    "video_preprocessor_config.json": 20_000,
}
_VOCABULARIES = {"added_tokens.json"}  # whose first level are tokens
_LARGEST_BYTES = 256 << 20  # of the vocabularies, which the tokenizers' own readers read
_SUFFIXES = (".bin", ".jinja", ".json", ".model", ".py", ".safetensors", ".tiktoken", ".txt")


def check_small_files(folder: Path, name: str) -> None:
    """Refuses configuration and tokenizer files that are links out of the folder, broken, or without measure.

    Args:
        folder: Of the checkpoint.
        name: What the user calls it.

    Raises:
        CheckpointError: With the file, and what to do.
    """
    for path in sorted((*folder.iterdir(), *folder.glob("additional_chat_templates/*"))):
        if path.suffix not in _SUFFIXES or not (path.is_symlink() or path.is_file()):
            continue
        place = path.relative_to(folder)
        path_inside(folder, str(place), f"a file of {name}", error=CheckpointError)
        if path.name in _MOST_VALUES and path.parent == folder:
            read_settings(path, name)
        elif path.suffix not in (".bin", ".safetensors") and path.is_file() and path.stat().st_size > _LARGEST_BYTES:
            raise CheckpointError(
                f"{place} of {name} has {path.stat().st_size} bytes; files of more than {_LARGEST_BYTES} that aren't "
                f"weights aren't read: {path}"
            )


def read_settings(path: Path, name: str) -> dict[str, Any]:
    """A JSON object of a checkpoint, of a configuration's size; what transformers allows in one is allowed.

    Raises:
        CheckpointError: If the file isn't one, with what to do.
    """
    what, advice = f"{path.name} of {name}", f"get the file anew: {path}"
    content = read_object(
        path,
        what,
        error=CheckpointError,
        advice=advice,
        most_values=_MOST_VALUES.get(path.name, 20_000),
        repeats=True,
        infinite=True,
    )
    if len(content) > _MOST_SETTINGS and path.name not in _VOCABULARIES:
        raise CheckpointError(f"{what} has {len(content)} settings; more than {_MOST_SETTINGS} aren't read; {advice}")
    return content
