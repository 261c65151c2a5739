"""The tokenizer of MODEL."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from act_export.checkpoint.fetch import Fetched, fetch_checkpoint, names_of_place
from act_export.checkpoint.folder import code_files, code_message
from act_export.checkpoint.loader_errors import quiet_transformers, readable_errors
from act_export.checkpoint.small_files import read_settings
from act_export.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer_of(
    source: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer of MODEL, padding on the left, without its weights.

    Args:
        source: As in `load_checkpoint`, or a folder with nothing but a tokenizer.
        revision: Of a hub id, and the next three: as in `load_checkpoint`.
        token: Of the hub.
        cache_dir: Where the hub's files are kept.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Raises:
        CheckpointError: If there is none.
    """
    fetched = fetch_checkpoint(
        source,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
        weights=False,
    )
    return tokenizer_of(fetched)


def tokenizer_of(fetched: Fetched) -> PreTrainedTokenizerBase:
    """The tokenizer among a checkpoint's files, padding on the left.

    Raises:
        CheckpointError: If there is none, or it needs code that may not run.
    """
    from transformers import AutoConfig, AutoTokenizer

    place, settings = str(fetched.folder), fetched.folder / "tokenizer_config.json"
    with readable_errors(fetched.name), quiet_transformers():
        config = None
        if fetched.revision:  # transformers knows some tokenizers by the hub id alone
            with suppress(ValueError, OSError):
                config = AutoConfig.from_pretrained(place, trust_remote_code=fetched.trust_remote_code)
                config.name_or_path = next(name for name in names_of_place(place) if "/" in name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                place, config=config, padding_side="left", trust_remote_code=fetched.trust_remote_code
            )
        except ValueError as error:
            needed = code_files(read_settings(settings, fetched.name), ["AutoTokenizer"]) if settings.is_file() else ()
            if fetched.trust_remote_code or not needed:
                raise
            raise CheckpointError(code_message(fetched.name, needed, settings.name)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
