"""What transformers and the tokenizers raise and print, as errors that name the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from act_export.checkpoint.low_memory import is_low_memory, low_memory_told
from act_export.errors import ActExportError, CheckpointError, first_line, shortened

MEMORY_ADVICE = (
    "close what else takes memory, load it in --dtype bfloat16 where that is offered, or export it with --stream, "
    "which reads one weight at a time"
)
"""What to do where a model doesn't fit in memory."""


@contextmanager
def readable_errors(name: str) -> Iterator[None]:
    """Turns what loaders raise about a bad file, or for want of memory, into one error that names the model."""
    with low_memory_told(f"load {name}", MEMORY_ADVICE):
        try:
            yield
        except (ActExportError, MemoryError):
            raise
        except Exception as error:
            if is_low_memory(error):
                raise
            raise CheckpointError(f"can't load {name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What an exception says, in a line; a heading isn't enough."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):
        return shortened(" ".join(lines[:2]), 300)
    return f"{type(error).__name__} {first_line(error)}" if isinstance(error, KeyError) else first_line(error)


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
