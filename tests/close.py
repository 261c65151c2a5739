"""Whether numbers agree to rounding: by bounds that know how large the numbers are.

An absolute bound means something for numbers up to about 1 only: float32 has 7 digits, so a logit of 200 is known to
1e-5 and a sum of 200 probabilities to less.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Numbers: TypeAlias = ArrayLike | Tensor


def float64(numbers: Numbers) -> NDArray[np.float64]:
    """As an array in float64."""
    if isinstance(numbers, Tensor):
        numbers = numbers.detach().double().numpy()
    return np.asarray(numbers, np.float64)


def assert_close(
    found: Numbers, expected: Numbers, tolerance: float, *, magnitude: Numbers | None = None, what: str = ""
) -> None:
    """|found - expected| <= tolerance * max(1, magnitude), everywhere; NaN and infinities have to be the same.

    Args:
        found: Any shape.
        expected: The same shape.
        tolerance: Of numbers up to 1.
        magnitude: Of what was added up to give each number, which a sum near 0 doesn't show; |expected| if not given.
            Broadcasts.
        what: Says in the message what differs.
    """
    found, expected = float64(found), float64(expected)
    size = np.abs(expected) if magnitude is None else float64(magnitude)
    assert_within(found, expected, tolerance * np.maximum(size, 1), what=what)


def assert_logits_close(found: Numbers, expected: Numbers, tolerance: float, *, what: str = "") -> None:
    """As `assert_close`, by the largest logit of each row: all of them are sums of a row's hidden state.

    Args:
        found: (..., vocabulary).
        expected: The same shape.
        tolerance: Of logits up to 1.
        what: Says in the message what differs.
    """
    largest = np.abs(float64(expected)).max(-1, keepdims=True, initial=0)
    assert_close(found, expected, tolerance, magnitude=largest, what=what)


def assert_within(found: Numbers, expected: Numbers, allowed: Numbers, *, what: str = "") -> None:
    """|found - expected| <= allowed, which broadcasts, everywhere; NaN and infinities have to be the same."""
    found, expected = float64(found), float64(expected)
    assert found.shape == expected.shape, f"{what or 'shapes'}: {found.shape}, not {expected.shape}"
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite], err_msg=what)
    if not finite.any():
        return
    bounds = np.broadcast_to(float64(allowed), expected.shape)[finite]
    found, expected = found[finite], expected[finite]
    errors = np.where(np.isfinite(found), np.abs(found - expected), np.inf)
    worst = np.argmax(errors - bounds)
    assert (errors <= bounds).all(), (
        f"{what + ': ' if what else ''}{(errors > bounds).sum()} of {errors.size} differ; the worst is {found[worst]}, "
        f"not {expected[worst]}: by {errors[worst]:.3g}, where {bounds[worst]:.3g} is allowed"
    )


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to a type."""
    return torch.finfo(dtype).eps / 2


def smallest_number(dtype: torch.dtype) -> float:
    """The distance between a type's numbers next to 0."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def spacing(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between a type's numbers at the magnitude of each of `numbers`, in float64."""
    exponents = torch.frexp(numbers.double()).exponent - 1
    steps = torch.finfo(dtype).eps * torch.exp2(exponents.double())
    return steps.masked_fill(numbers == 0, 0).clamp(min=smallest_number(dtype))
