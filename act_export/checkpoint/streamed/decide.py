"""Whether a checkpoint is loaded or streamed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from act_export.checkpoint.memory import available_bytes
from act_export.checkpoint.streamed.shards import is_streamable
from act_export.checkpoint.text_tower import has_text_tower
from act_export.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedConfig

    from act_export.checkpoint.streamed.stored_tensor import Stored

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
