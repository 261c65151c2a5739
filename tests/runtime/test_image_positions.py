"""Positions of prompts with images against transformers' own, for any images and words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_vision import IMAGE_TOKEN, MERGE, tiny_whole

from act_export.errors import SessionError
from act_export.runtime.image_positions import image_positions

sizes = st.tuples(st.integers(1, 4), st.integers(1, 5))
parts = st.one_of(st.integers(1, 6), sizes)  # words, or rows and columns of an image


@pytest.fixture(scope="module")
def model():
    return tiny_whole().model


def prompt(given_parts) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Token ids, an image always between words, and the grids of patches."""
    ids, grids = [5], []
    for part in given_parts:
        if isinstance(part, int):
            ids += [6] * part
        else:
            rows, columns = part
            ids += [IMAGE_TOKEN] * (rows * columns) + [7]
            grids.append((1, rows * MERGE, columns * MERGE))
    return ids, grids


@given(batch=st.lists(st.lists(parts, min_size=1, max_size=6), min_size=1, max_size=3), left=st.booleans())
def test_they_are_those_of_transformers(model, batch, left):
    rows = [prompt(each) for each in batch]
    longest = max(len(ids) for ids, _ in rows)
    ids = np.zeros((len(rows), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, (own, _) in enumerate(rows):
        place = slice(longest - len(own), None) if left else slice(0, len(own))
        ids[row, place], mask[row, place] = own, 1
    grids = [grid for _, own in rows for grid in own]
    expected, _ = model.get_rope_index(
        torch.from_numpy(ids),
        mm_token_type_ids=torch.from_numpy((ids == IMAGE_TOKEN).astype(np.int32)),
        image_grid_thw=torch.tensor(grids).reshape(-1, 3),
        attention_mask=torch.from_numpy(mask),
    )
    found = image_positions(ids, mask, grids, image_token=IMAGE_TOKEN, merge=MERGE)
    np.testing.assert_array_equal(found, expected.numpy())


def test_images_side_by_side():
    ids = np.array([[5, *[IMAGE_TOKEN] * 3, 6]])
    grids = [(1, 2, 2), (1, 2, 4)]
    found = image_positions(ids, np.ones_like(ids), grids, image_token=IMAGE_TOKEN)
    np.testing.assert_array_equal(found[1], [[0, 1, 2, 2, 4]])
    np.testing.assert_array_equal(found[2], [[0, 1, 2, 3, 4]])


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([], "more images than grids"),
        ([(1, 4, 4)], r"an image of 2 x 2 tokens begins where the prompt has 2 image tokens"),
        ([(1, 2, 4), (1, 2, 2)], "there are 2 grids, and no image tokens .250. for the last 1"),
        ([(2, 2, 2)], r"\(2, 2, 2\), which is a video's"),
        ([(2, 4)], r"a grid is \(2, 4\); give 1, rows and columns"),
    ],
)
def test_grids_that_do_not_fit(grids, message):
    ids = np.array([[5, IMAGE_TOKEN, IMAGE_TOKEN, 6, 6]])
    with pytest.raises(SessionError, match=message):
        image_positions(ids, np.ones_like(ids), grids, image_token=IMAGE_TOKEN)
