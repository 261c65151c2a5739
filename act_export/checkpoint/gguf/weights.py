"""A GGUF file's weights as those of a checkpoint, by transformers' own loader, in pieces: never are all in memory.

That loader dequantises every tensor of a file before it gives the first. So it is handed files with some of them each.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from act_export.checkpoint.gguf.header import GgufFile
from act_export.checkpoint.gguf.plan import Pair, by_parameter
from act_export.checkpoint.gguf.shards import write_joined
from act_export.checkpoint.low_memory import return_freed
from act_export.checkpoint.stored.index import WEIGHT_INDICES, WHOLE_WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PIECE_BYTES = 1 << 30  # of weights in float32; a parameter with more is a piece by itself
_FLOAT32_BYTES = 4
_LOCK = threading.RLock()  # a conversion in another thread waits for this one's piece


def save_weights(gguf: GgufFile, pairs: Sequence[Pair], model: PreTrainedModel, own: Path, made: Path) -> None:
    """Writes weights in float32, as a safetensors file, or several and their index.

    Args:
        gguf: The file, or its shards together.
        pairs: What each of its tensors is in the model.
        model: Its parameters may be without values.
        own: A folder for what is needed meanwhile.
        made: The checkpoint's folder.

    Raises:
        OSError: If something can't be written.
    """
    from safetensors.torch import save_file

    pieces = list(pieces_of(pairs))
    places: dict[str, str] = {}
    for number, piece in enumerate(pieces, 1):
        with _one_table_of_names():
            weights = _converted(gguf, piece, model, own / f"piece-{number}.gguf")
        name = WHOLE_WEIGHTS[0] if len(pieces) == 1 else f"model-{number:05d}-of-{len(pieces):05d}.safetensors"
        save_file(weights, made / name, {"format": "pt"})
        places |= dict.fromkeys(weights, name)
        del weights
        return_freed()
    if len(pieces) > 1:
        index = {"metadata": {"total_size": sum(map(_size_bytes, pairs))}, "weight_map": places}
        (made / WEIGHT_INDICES[0]).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _one_table_of_names() -> Iterator[None]:
    """Has gguf make a table of an architecture's names once, where transformers asks for it at each of the modules."""
    import gguf

    with _LOCK:
        make = gguf.get_tensor_name_map
        gguf.get_tensor_name_map = cache(make)
        try:
            yield
        finally:
            gguf.get_tensor_name_map = make


def pieces_of(pairs: Sequence[Pair], most_bytes: int | None = None) -> Iterator[list[Pair]]:
    """Tensors in groups, all tensors of a parameter in one.

    Args:
        pairs: The tensors.
        most_bytes: Of their parameters in float32, in a group of several parameters; None for `PIECE_BYTES`.
    """
    most_bytes = PIECE_BYTES if most_bytes is None else most_bytes
    piece: list[Pair] = []
    size = 0
    for parts in by_parameter(pairs).values():
        added = sum(map(_size_bytes, parts))
        if piece and size + added > most_bytes:
            yield piece
            piece, size = [], 0
        piece += parts
        size += added
    if piece:
        yield piece


def _size_bytes(pair: Pair) -> int:
    return prod(pair.tensor.shape) * _FLOAT32_BYTES


def _converted(gguf: GgufFile, piece: Sequence[Pair], model: PreTrainedModel, path: Path) -> dict[str, Tensor]:
    """Parameters by name. The file at `path` is gone afterwards."""
    from transformers import modeling_gguf_pytorch_utils

    load: Any = modeling_gguf_pytorch_utils.load_gguf_checkpoint
    write_joined(
        replace(
            gguf,
            keys={key: value for key, value in gguf.keys.items() if not key.startswith("tokenizer.")},
            tensors={pair.tensor.name: pair.tensor for pair in piece},
        ),
        path,
    )
    with redirect_stderr(io.StringIO()):  # a bar for each piece
        found = load(str(path), return_tensors=True, model_to_load=model)["tensors"]
    path.unlink()
    return {name: tensor.float().contiguous() for name, tensor in found.items()}
