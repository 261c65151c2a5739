"""A checkpoint's small files, before transformers reads them: where they lie, and how much they may ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from act_export.errors import CheckpointError
from act_export.files import path_inside
from act_export.json_file import MOST_VALUES, read_object

_MOST_SETTINGS = 5_000  # on the first level of any of them
_MOST_VALUES = {  # in all
    "adapter_config.json": 20_000,
    "added_tokens.json": MOST_VALUES,
    "chat_template.json": 20_000,
    "config.json": 20_000,
    "generation_config.json": 20_000,
    "preprocessor_config.json": 20_000,
    "processor_config.json": 20_000,
    "special_tokens_map.json": MOST_VALUES,
    "tokenizer_config.json": MOST_VALUES,  # which may list every token, with six values each
}
_VOCABULARIES = {"added_tokens.json"}  # whose first level are tokens
_LARGEST_BYTES = 256 << 20  # of the vocabularies, which the tokenizers' own readers read
SMALL_FILES = (
    "adapter_config.json",
    "added_tokens.json",
    "additional_chat_templates/*.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Configuration and tokenizer, by name or pattern; other small files aren't read."""


def check_small_files(folder: Path, name: str, *, code: bool = False) -> None:
    """Refuses configuration and tokenizer files that are links out of the folder, no files, or without measure.

    Args:
        folder: Of the checkpoint. What nobody reads may lie there too.
        name: What the user calls it.
        code: Also check files of Python code, which are to run.

    Raises:
        CheckpointError: With the file, and what to do.
    """
    for path in sorted(path for pattern in (*SMALL_FILES, *["*.py"] * code) for path in folder.glob(pattern)):
        place = str(path.relative_to(folder))
        own_file(folder, place, f"a file of {name}")
        if place in _MOST_VALUES:
            read_settings(path, name)
        elif path.exists() and not path.is_file():
            raise CheckpointError(f"{place} of {name} is no file; get it anew: {path}")
        elif path.is_file() and path.stat().st_size > _LARGEST_BYTES:
            raise CheckpointError(
                f"{place} of {name} has {path.stat().st_size} bytes; files of more than {_LARGEST_BYTES} that aren't "
                f"weights aren't read: {path}"
            )


def own_file(folder: Path, file: str, what: str) -> Path:
    """The path of a checkpoint's file, which must lie in its folder.

    Args:
        folder: Of the checkpoint.
        file: As it is named.
        what: Who names it, for errors.

    Raises:
        CheckpointError: If it doesn't, with what to do.
    """
    try:
        return path_inside(folder, file, what, error=CheckpointError)
    except CheckpointError as error:
        if (folder / file).is_symlink():
            raise CheckpointError(f"{error}, or all files into one folder, e.g. cp -rL {folder} COPY") from error
        raise


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
