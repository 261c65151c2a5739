"""What transformers and the tokenizers raise and print, as errors that name the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from act_export.errors import ActExportError, CheckpointError


@contextmanager
def readable_errors(name: str) -> Iterator[None]:
    """Turns what loaders raise about a bad file into one error that names the model."""
    try:
        yield
    except (ActExportError, MemoryError):
        raise
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"can't load {name}: {first_line}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Has transformers print nothing but errors for the duration of the block."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    level = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
