"""Whether a checkpoint is loaded or streamed."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from act_export.checkpoint.stored.files import is_streamable
from act_export.checkpoint.text_tower import has_text_tower
from act_export.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig

    from act_export.checkpoint.stored.safetensors_file import Stored

_COPIES = 2.5  # in float32: the model, a session over its export, and what either takes besides
_FLOAT32_BYTES = 4


def is_to_be_streamed(
    folder: Path, config: PreTrainedConfig, name: str, asked: bool | None, tensors: Mapping[str, Stored]
) -> bool:
    """Whether to read weights one at a time.

    Args:
        folder: Of the checkpoint.
        config: Its configuration.
        name: What the user calls it.
        asked: None to decide by the memory that is free: a model that would fill it, once it is loaded and its export
            is compared with it, is streamed.
        tensors: Of its files.

    Raises:
        CheckpointError: If it is asked for, and the checkpoint can't be streamed.
    """
    if asked is False:
        return False
    if has_text_tower(config) or not is_streamable(folder):
        if asked:
            why = "it sees images" if has_text_tower(config) else "its weights aren't in .safetensors files"
            raise CheckpointError(f"{name} can't be read one weight at a time: {why}; load it whole: --no-stream")
        return False
    free = available_bytes()
    needed = sum(math.prod(tensor.shape) for tensor in tensors.values()) * _FLOAT32_BYTES * _COPIES
    return asked is True or (free is not None and needed > free)


_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Memory that a process can take without swapping, within the limit of a container; None where nobody tells."""
    known = [found for found in (_of_machine(), _of_container()) if found is not None]
    return min(known, default=None)


def _of_machine() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return _by_sysconf()
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kilobytes[0] * 1024 if kilobytes else _by_sysconf()


def _by_sysconf() -> int | None:
    """All memory of the machine, where what is free of it isn't known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _of_container() -> int | None:
    """What is left of a control group's limit."""
    try:
        limit = (_GROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_GROUP / "memory.current").read_text(encoding="ascii"))
        statistics = dict(line.split() for line in (_GROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    cached = int(statistics.get("inactive_file", 0))  # the system takes it back when memory is short
    return max(int(limit) - used + cached, 0)
