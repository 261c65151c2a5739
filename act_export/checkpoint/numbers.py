"""Weights whose numbers make no model: NaN, infinities, and what a smaller type can't hold."""

from __future__ import annotations

import torch
from torch import Tensor

from act_export.errors import CheckpointError

_PIECE = 1 << 22  # numbers


def check_numbers(weight: str, values: Tensor, where: str) -> None:
    """Refuses a weight with NaN, or with an infinity in any place but that of a bias that rules something out (-inf).

    One pass over the numbers, which takes little memory unless something is wrong.

    Args:
        weight: Its name in the model.
        values: Its numbers, in any float type; others pass.
        where: Whose it is, for errors, e.g. "of smollm2".

    Raises:
        CheckpointError: With the weight, and how many numbers of it are wrong.
    """
    if not values.is_floating_point() or is_finite(values):
        return
    nans = int(values.isnan().sum())
    if nans:
        raise CheckpointError(
            f"{weight} {where} has NaN in {nans} of its {values.numel()} numbers, so the model computes nothing; get "
            f"weights from before it was damaged"
        )
    infinite = values.isinf()
    rules_out = values.ndim == 1 and weight.rpartition(".")[2] != "weight"  # a bias, or a sink's logit
    wrong = infinite & (values > 0) if rules_out else infinite
    if bool(wrong.any()):
        raise CheckpointError(
            f"{weight} {where} has infinity in {int(wrong.sum())} of its {values.numel()} numbers, so the model "
            f"computes no numbers; get weights from before they grew too large for their type"
        )


def is_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor infinity.

    Some numbers at a time: on a CPU, PyTorch makes a copy in float32 of the half-precision numbers that it adds up.
    """
    return all(
        bool(piece.sum(dtype=torch.float32).isfinite())
        or bool(piece.isfinite().all())  # a sum of large numbers is infinite too
        for piece in torch.split(values.flatten(), _PIECE)
    )


def check_fits(weight: str, values: Tensor, rounded: Tensor, where: str) -> None:
    """Refuses a weight that is too large for the type that it is rounded to.

    Args:
        weight: Its name in the model.
        values: As it is stored.
        rounded: In the other type.
        where: Whose it is, for errors.

    Raises:
        CheckpointError: With the weight, the number, and the types that hold it.
    """
    if is_finite(rounded):
        return
    lost = rounded.isinf() & values.isfinite()
    if bool(lost.any()):
        dtype = str(rounded.dtype).removeprefix("torch.")
        others = "--dtype bfloat16 or float32" if rounded.dtype == torch.float16 else "a type with room for it"
        raise CheckpointError(
            f"{weight} {where} has the number {float(values[lost][0]):g}; {dtype} goes up to "
            f"{torch.finfo(rounded.dtype).max:g}, so it can't hold this model: take {others}"
        )
