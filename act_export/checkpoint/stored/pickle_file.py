"""Tensors in pytorch_model.bin: read by PyTorch's restricted reader, which runs no code that a file names."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from act_export.checkpoint.low_memory import is_low_memory
from act_export.checkpoint.stored.safetensors_file import FLOATS
from act_export.errors import CheckpointError, first_line, shown
from act_export.plain_file import open_plain

_ADVICE = "get the checkpoint as .safetensors files, or save it again with save_pretrained"


@dataclass(frozen=True)
class PickledTensor:
    """A tensor of a pickle, which stays in its file until its numbers are read.

    Attributes:
        file: The file.
        name: What the file calls it.
        tensor: Over the file's own pages, where the file is a zip archive, as PyTorch has written for years.
    """

    file: Path
    name: str
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.tensor.shape)

    @property
    def kind(self) -> str:
        """Its type as PyTorch calls it, e.g. "bfloat16"."""
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def dtype(self) -> torch.dtype:
        """Its type.

        Raises:
            CheckpointError: If that is no float type of 16 bits or more.
        """
        if self.tensor.dtype not in FLOATS.values():
            raise CheckpointError(
                f"{self.name} in {self.file} is stored as {self.kind}; weights must be float32, bfloat16 or float16"
            )
        return self.tensor.dtype

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        return self.tensor.clone()

    def sample(self, picks: Tensor) -> Tensor:
        """Some of its numbers, by their places in the flattened tensor."""
        if self.tensor.is_contiguous():
            return self.tensor.view(-1)[picks]
        return self.tensor[torch.unravel_index(picks, self.tensor.shape)]


def pickled_tensors(file: Path) -> dict[str, PickledTensor]:
    """What a file of weights holds that was written by torch.save.

    Raises:
        CheckpointError: If it can't be read without running code, or holds anything but named tensors.
    """
    try:
        open_plain(file).close()
    except OSError as error:
        raise CheckpointError(f"can't read {file}: {error.strerror}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f": it asks for {named[1]}, which could run code" if named else ""
        raise CheckpointError(
            f"{file} holds something else than weights, or more, so it isn't loaded{reason}; {_ADVICE}"
        ) from error
    except Exception as error:  # of zip archives, pickles and storages, of many types
        if is_low_memory(error):
            raise
        raise CheckpointError(
            f"can't read {file}: {first_line(error)}; the download may have broken off: get the file again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__} instead of named weights; {_ADVICE}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise CheckpointError(
                f"{file} holds {shown(name)}, a {type(value).__name__}, instead of named weights; {_ADVICE}"
            )
        if value.untyped_storage().nbytes() < value.numel() * value.itemsize:
            raise CheckpointError(
                f"{file} holds {shown(name)} of shape {list(value.shape)} in {value.untyped_storage().nbytes()} bytes, "
                f"so its numbers aren't all there; {_ADVICE}"
            )
    return {name: PickledTensor(file, name, tensor) for name, tensor in content.items()}
