"""A bias in key dimensions of its own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from act_export.attention.adapters.key_bias import with_key_bias


def problem(batch, heads, sequence, size, largest, seed=0):
    """Query and key of small integers, whose products are exact in every type, and a bias of any numbers."""
    random = torch.Generator().manual_seed(seed)
    query, key = (torch.randint(-3, 4, (batch, heads, sequence, size), generator=random).double() for _ in range(2))
    return query, key, largest * torch.rand(batch, sequence, heads, generator=random, dtype=torch.float64)


def products(query, key):
    return query.double() @ key.double().transpose(2, 3)


@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    sequence=st.integers(1, 5),
    size=st.integers(1, 130),
    scale=st.floats(0.02, 1),
    largest=st.floats(0, 1e5),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_products_are_those_of_query_and_key_plus_the_bias(batch, heads, sequence, size, scale, largest, dtype):
    query, key, bias = problem(batch, heads, sequence, size, largest)
    longer = with_key_bias(query.to(dtype), key.to(dtype), bias.to(dtype), scale=scale)
    expected = products(query, key) + bias.to(dtype).double().transpose(1, 2)[:, :, None]
    torch.testing.assert_close(products(*longer), expected, atol=1e-9, rtol=1e-12 if dtype == torch.float64 else 1e-7)
    for part, given_part in zip(longer, (query, key), strict=True):
        assert part.dtype == dtype
        assert part.shape[:3] == given_part.shape[:3]
        assert part.shape[3] % 16 == 0
        assert size + 2 <= part.shape[3] < size + 18
        assert torch.equal(part[..., :size].double(), given_part)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(scale=st.floats(0.05, 1), largest=st.floats(10, 5e4), seed=st.integers(0, 99))
def test_half_types_keep_sixteen_bits_of_it(dtype, scale, largest, seed):
    query, key, bias = problem(1, 2, 5, 64, largest, seed)
    bias = (bias / scale).float()
    longer = with_key_bias(query.to(dtype), key.to(dtype), bias, scale=scale)
    found = products(*longer) - products(query, key)
    expected = bias.double().transpose(1, 2)[:, :, None].expand_as(found)
    assert (found - expected).abs().max() <= 2.0**-16 * expected.abs().max()
    assert longer[1].isfinite().all()


def test_it_is_stored_about_as_large_as_after_the_scale():
    """For float16, which ends at 65504."""
    query, key, bias = problem(1, 1, 3, 128, 6e4)
    _, longer = with_key_bias(query.half(), key.half(), bias / math.sqrt(1 / 128), scale=math.sqrt(1 / 128))
    assert (longer[..., 128].double() - bias.transpose(1, 2)).abs().max() <= 0.5 * bias.max()
