"""Positions of tokens in time, height and width, for prompts with images: M-RoPE of Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from act_export.errors import SessionError
from act_export.runtime.token_input import checked_mask


def image_positions(
    input_ids: NDArray[np.int64],
    attention_mask: NDArray[np.int64],
    grids: Sequence[Sequence[int]] | NDArray[np.int64],
    *,
    image_token: int,
    merge: int = 2,
) -> NDArray[np.int64]:
    """Position ids (3, batch, sequence) of whole prompts.

    Text counts on, the same in all three. An image stands at one moment; its tokens are numbered by rows and columns
    from there on, and the text after it goes on behind the longer side. Padding gets 0. (Wang et al., Qwen2-VL,
    arXiv 2409.12191.)

    Args:
        input_ids: (batch, sequence), with the image token for each embedding of an image.
        attention_mask: (batch, sequence), 1 for real tokens.
        grids: Of each image, in the order of the prompts: 1, rows and columns of patches (`image_grid_thw`).
        image_token: `image_token_id` of the model's configuration.
        merge: Patches that become one token, in each direction (`vision_config.spatial_merge_size`).

    Raises:
        SessionError: If grids and image tokens don't fit together, or a grid is a video's.
    """
    positions = np.zeros((3, *input_ids.shape), np.int64)
    left = iter([tuple(int(side) for side in grid) for grid in grids])
    for row, (ids, mask) in enumerate(zip(input_ids, checked_mask(attention_mask, "attention_mask") != 0, strict=True)):
        parts = list(_parts(ids[mask] == image_token, left, merge))
        positions[:, row, mask] = np.concatenate(parts, 1) if parts else np.zeros((3, 0), np.int64)
    others = len(list(left))
    if others:
        raise SessionError(f"there are {len(grids)} grids, and no image tokens ({image_token}) for the last {others}")
    return positions


def _parts(is_image: NDArray[np.bool_], grids: Iterator[tuple[int, ...]], merge: int) -> Iterator[NDArray[np.int64]]:
    """The positions of a sequence without padding, a token of text or an image at a time, (3, tokens)."""
    start = place = 0
    while place < len(is_image):
        if not is_image[place]:
            yield np.full((3, 1), start)
            start, place = start + 1, place + 1
            continue
        rows, columns = _size(next(grids, ()), merge)
        tokens = is_image[place : place + rows * columns]
        if len(tokens) < rows * columns or not tokens.all():
            raise SessionError(
                f"an image of {rows} x {columns} tokens begins where the prompt has {int(tokens.sum())} image tokens; "
                f"the grids must be those of the images, in order"
            )
        yield start + np.stack([np.zeros((rows, columns), np.int64), *np.indices((rows, columns))]).reshape(3, -1)
        start, place = start + max(rows, columns), place + len(tokens)


def _size(grid: tuple[int, ...], merge: int) -> tuple[int, int]:
    """Rows and columns of an image in tokens."""
    if len(grid) != 3:
        raise SessionError(
            f"a grid is {grid}; give 1, rows and columns for each image" if grid else "there are more images than grids"
        )
    time, rows, columns = grid
    if time != 1:
        raise SessionError(
            f"a grid is {grid}, which is a video's; compute its positions with transformers' get_rope_index"
        )
    return rows // merge, columns // merge
