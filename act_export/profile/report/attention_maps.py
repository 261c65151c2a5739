"""Mean attention maps: which of them a page carries and how, and as pictures."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from act_export.profile.sink_profile import SinkProfile
from act_export.profile.sink_statistics import ABSOLUTE, Floats

STEPS = 10_000
"""Shares of attention are carried in ten-thousandths: what a page shows, 12.34%, is exactly what it carries."""

BUDGET_BYTES = 1_600_000
"""Of the page for maps of single heads."""

_PIXELS = 4  # of a picture, for each cell of a map


@dataclass(frozen=True)
class HeadMaps:
    """Maps of single heads that a page carries.

    Attributes:
        heads: Which, as (layer, head); the maps of a source are in this order.
        by_source: Encoded maps (heads, GRID, GRID), by source; see `encode_shares`.
    """

    heads: tuple[tuple[int, int], ...]
    by_source: Mapping[str, str]


def encode_shares(shares: Floats) -> str:
    """Shares in ten-thousandths: 16-bit unsigned integers, little-endian, compressed by zlib, in base64."""
    steps = np.clip(np.rint(shares.astype(np.float64) * STEPS), 0, 65535).astype("<u2")
    return base64.b64encode(zlib.compress(steps.tobytes(), 9)).decode("ascii")


def layer_maps(mean_map: Floats) -> Floats:
    """Mean over the heads of each layer: (layers, heads, GRID, GRID) to (layers, GRID, GRID)."""
    means: Floats = mean_map.mean(1, dtype=np.float64).astype(np.float32)
    return means


def head_maps(
    profile: SinkProfile, calibrated: Mapping[tuple[int, int], float], budget_bytes: int = BUDGET_BYTES
) -> HeadMaps:
    """As many maps of single heads as fit.

    All heads of every source if they fit, else all heads over all sources together, else of these the calibrated
    heads and those with most later-sink mass.

    Args:
        profile: Whose maps.
        calibrated: The calibrated heads.
        budget_bytes: Of their encoding.
    """
    layers, heads = profile.model.num_layers, profile.model.num_heads
    places = tuple((layer, head) for layer in range(layers) for head in range(heads))
    overall = profile.overall
    encoded = {overall.name: encode_shares(overall.mean_map)}
    size = len(encoded[overall.name])
    if size <= budget_bytes:
        if size * (1 + len(profile.sources)) <= budget_bytes:
            encoded |= {name: encode_shares(source.mean_map) for name, source in profile.sources.items()}
        return HeadMaps(places, encoded)
    mass = overall.by[ABSOLUTE].mass
    order = sorted(places, key=lambda place: (place not in calibrated, -float(mass[place])))
    kept = tuple(sorted(order[: len(places) * budget_bytes // size]))
    chosen = [layer * heads + head for layer, head in kept]
    maps = overall.mean_map.reshape(-1, *overall.mean_map.shape[2:])[chosen]
    return HeadMaps(kept, {overall.name: encode_shares(maps)})


def map_picture(shares: Floats, ramp: Sequence[str]) -> str:
    """A map as a data: address of a PNG, coloured by the square root of the share.

    Args:
        shares: (GRID, GRID).
        ramp: Colours from none to all of the attention, "#rrggbb".
    """
    stops = np.array([[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in ramp], np.float64)
    place = np.sqrt(np.clip(shares.astype(np.float64), 0, 1)) * (len(stops) - 1)
    colours = np.stack([np.interp(place, np.arange(len(stops)), stops[:, channel]) for channel in range(3)], -1)
    pixels = np.rint(colours).astype(np.uint8).repeat(_PIXELS, 0).repeat(_PIXELS, 1)
    return "data:image/png;base64," + base64.b64encode(_png(pixels)).decode("ascii")


def _png(pixels: NDArray[np.uint8]) -> bytes:
    height, width, _ = pixels.shape
    scanlines = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits a channel, RGB
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(scanlines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
