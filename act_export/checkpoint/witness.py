"""A loaded model against the files: each parameter has the numbers that are stored, by a reader of our own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from act_export.checkpoint.completeness import Contents
from act_export.checkpoint.numbers import check_fits, check_numbers, is_finite
from act_export.checkpoint.stored.origins import AsStored, Converted
from act_export.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from act_export.checkpoint.stored.origins import Origin

_SAMPLE = 64  # numbers of each parameter, evenly spaced
_PIECE_SAMPLE = 4
_LARGEST_JOINED = 1 << 22  # numbers of a parameter that is made of several tensors, and made again to compare it
_ROUNDING = {torch.float16: 2**-10, torch.bfloat16: 2**-7}


def check_against_files(model: PreTrainedModel, contents: Contents, name: str) -> None:
    """Refuses a loaded model whose parameters aren't what the files hold, or aren't numbers.

    Every parameter's numbers are looked at once for NaN and infinities, and some are compared with the stored ones.

    Args:
        model: With all its weights, on whatever devices.
        contents: Of the files.
        name: What the user calls the checkpoint.

    Raises:
        CheckpointError: With the weight.
    """
    origins = contents.origins or {}
    seen: set[int] = set()
    for weight, value in model.named_parameters(remove_duplicate=False):
        origin = origins.get(weight)
        if id(value) not in seen:
            seen.add(id(value))
            check_loaded(weight, value.detach(), origin, name)
        if origin is not None:
            _compare(weight, value.detach(), origin, name)


def check_loaded(weight: str, value: Tensor, origin: Origin | None, name: str) -> None:
    """Refuses a weight that isn't numbers: as it is stored, or in the type that it was loaded in.

    Raises:
        CheckpointError: With the weight, and where it is stored.
    """
    if value.is_floating_point() and not is_finite(value):
        where = f"of {name}"
        if isinstance(origin, AsStored):
            where = f"({origin.tensor.name} in {origin.tensor.file})"
            check_fits(weight, origin.tensor.read(), value.cpu(), where)
        check_numbers(weight, value, where)


def _compare(weight: str, value: Tensor, origin: Origin, name: str) -> None:
    if isinstance(origin, Converted) and value.numel() > _LARGEST_JOINED:
        _compare_piece(weight, value, origin, name)
        return
    if isinstance(origin, AsStored) and origin.shape != tuple(value.shape):
        raise CheckpointError(
            f"{weight} of {name} was loaded with shape {list(value.shape)}, and its files have {list(origin.shape)}"
        )
    count = value.numel()
    picks = torch.linspace(0, count - 1, min(count, _SAMPLE), dtype=torch.float64).long()
    loaded = value.flatten()[picks.to(value.device)].cpu().float()
    stored = origin.sample(picks).to(value.dtype).float()
    if not torch.allclose(loaded, stored, rtol=_ROUNDING.get(value.dtype, 1e-6), atol=0, equal_nan=True):
        raise CheckpointError(_message(weight, name))


def _compare_piece(weight: str, value: Tensor, origin: Converted, name: str) -> None:
    """Of a parameter that is too large to be made again: numbers of the first tensor that it is made of are in it."""
    first = origin.conversion.first
    count = math.prod(first.shape)
    picks = torch.linspace(0, count - 1, min(count, _PIECE_SAMPLE), dtype=torch.float64).long()
    joined = len(next(iter(origin.conversion.sources.values())))
    part = value[0] if joined == value.shape[0] > 1 else value
    if not all(bool((part == number).any()) for number in first.sample(picks).to(value.dtype)):
        raise CheckpointError(_message(weight, name))


def _message(weight: str, name: str) -> str:
    import transformers

    return (
        f"{weight} of {name} was loaded with other numbers than its files hold, by transformers "
        f"{transformers.__version__}; load it with another version of transformers, and report it"
    )
