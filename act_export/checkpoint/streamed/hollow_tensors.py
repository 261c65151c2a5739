"""Tensors that stand for large weights where only their shapes are asked for, and take no memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

_SMALL = 1024  # numbers; torch's optimizer looks at the values of constants up to this size


def is_large(shape: Sequence[int]) -> bool:
    """Whether a parameter is a matrix of some size; norms, biases and other small ones keep their values."""
    return len(shape) > 1 and math.prod(shape) > _SMALL


def hollow_tensors(shapes: Iterable[Sequence[int]]) -> list[Tensor]:
    """Zeros in float32 of these shapes, in one memory that the system needn't provide as long as nothing is written.

    They are for looking at, never to be changed: all of them are views of the same numbers.
    """
    shapes = list(shapes)
    numbers = torch.from_numpy(np.zeros(max(map(math.prod, shapes), default=0), np.float32))
    return [numbers[: math.prod(shape)].view(tuple(shape)) for shape in shapes]
