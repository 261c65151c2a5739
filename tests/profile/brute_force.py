"""Every statistic of a profile from whole attention maps, in the plainest way, float64."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from act_export.profile import GRID, POSITION_EDGES, RELATIVE_BINS, SinkStatistics

THRESHOLDS = {"absolute": 0.1, "relative": 5.0}


def attention_maps(model: PreTrainedModel, ids: tuple[int, ...]) -> np.ndarray:
    """The model's own maps (layers, heads, tokens, tokens), from its eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = model(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    return torch.stack([layer[0] for layer in maps]).double().numpy()


def window_of(model: PreTrainedModel, layer: int) -> int:
    types = getattr(model.config, "layer_types", None)
    window = getattr(model.config, "sliding_window", None)
    if not window or (types is not None and types[layer] != "sliding_attention"):
        return -1
    return window


def brute_force(model: PreTrainedModel, prompts: list[tuple[int, ...]]) -> dict[str, Any]:
    """By the fields' names in SinkStatistics; of LaterSinks and SinkTokens as "mode/field" and "mode/tokens/field"."""
    scalars: dict[str, list[np.ndarray]] = defaultdict(list)
    exposure = np.zeros(len(POSITION_EDGES)), np.zeros(RELATIVE_BINS)
    occurrences: Counter[int] = Counter()
    token_sinks: dict[str, Counter[tuple[int, int]]] = {mode: Counter() for mode in THRESHOLDS}
    token_mass: dict[str, Counter[int]] = {mode: Counter() for mode in THRESHOLDS}
    outside: dict[str, Counter[int]] = {mode: Counter() for mode in THRESHOLDS}
    shared = 0
    while len(prompts) > 1 and len({ids[shared : shared + 1] for ids in prompts}) == 1 and prompts[0][shared:]:
        shared += 1
    for ids in prompts:
        maps = attention_maps(model, ids)
        layers, heads, tokens, _ = maps.shape
        scores = np.zeros((layers, heads, tokens))
        for layer in range(layers):
            window = window_of(model, layer)
            for j in range(tokens):
                last = tokens if window < 0 else min(tokens, j + window)
                scores[layer, :, j] = maps[layer, :, :, j].sum(-1) / (last - j)
        scalars["initial_score"].append(scores[..., 0])
        with np.errstate(divide="ignore", invalid="ignore"):
            scalars["entropy"].append(-np.where(maps > 0, maps * np.log(maps), 0).sum(-1).mean(-1))
        scalars["mean_map"].append(resampled(maps))
        bins = [bins_of(j, tokens) for j in range(tokens)]
        for j in range(1, tokens):
            exposure[0][bins[j][0]] += 1
            exposure[1][bins[j][1]] += 1
            occurrences[ids[j]] += 1
        for mode, threshold in THRESHOLDS.items():
            tau = threshold if mode == "absolute" else threshold / tokens
            absolute = np.zeros((layers, heads, len(POSITION_EDGES)))
            relative = np.zeros((layers, heads, RELATIVE_BINS))
            mass = np.zeros((layers, heads))
            for layer in range(layers):
                for head in range(heads):
                    for j in range(1, tokens):
                        if scores[layer, head, j] > tau:
                            absolute[layer, head, bins[j][0]] += 1
                            relative[layer, head, bins[j][1]] += 1
                            share = maps[layer, head, :, j].sum() / tokens
                            mass[layer, head] += share
                            token_sinks[mode][ids[j], layer] += 1
                            token_mass[mode][ids[j]] += share / (layers * heads * len(prompts))
                            if j >= shared:
                                outside[mode][ids[j]] += share / (layers * heads * len(prompts))
            count = absolute.sum(-1)
            scalars[f"{mode}/initial_rate"].append(scores[..., 0] > tau)
            scalars[f"{mode}/rate"].append(count > 0)
            scalars[f"{mode}/count"].append(count)
            scalars[f"{mode}/mass"].append(mass)
            scalars[f"{mode}/absolute_positions"].append(absolute)
            scalars[f"{mode}/relative_positions"].append(relative)
    means: dict[str, Any] = {name: np.mean(values, 0) for name, values in scalars.items()}
    means["initial_score_std"] = np.std(scalars["initial_score"], 0)
    means["mass_std"] = np.std(scalars["absolute/mass"], 0)
    means["absolute_exposure"], means["relative_exposure"] = exposure
    for mode in THRESHOLDS:
        means[f"{mode}/tokens/occurrences"] = {token: occurrences[token] for token in token_mass[mode]}
        means[f"{mode}/tokens/sinks"] = dict(token_sinks[mode])
        means[f"{mode}/tokens/mass"] = dict(token_mass[mode])
        means[f"{mode}/tokens/mass_outside"] = {token: outside[mode][token] for token in token_mass[mode]}
    return means


def bins_of(position: int, tokens: int) -> tuple[int, int]:
    absolute = max((b for b, edge in enumerate(POSITION_EDGES) if edge <= position), default=0)
    relative = 0 if tokens == 1 else min(int(position / (tokens - 1) * RELATIVE_BINS + 1e-9), RELATIVE_BINS - 1)
    return absolute, relative


def resampled(maps: np.ndarray) -> np.ndarray:
    """By integrals: the map is constant on the square of each pair of tokens."""
    tokens = maps.shape[-1]
    borders = np.linspace(0, tokens, GRID + 1)

    def cells(array: np.ndarray) -> np.ndarray:
        """Integral over each cell along the last axis."""
        integral = np.concatenate([np.zeros((*array.shape[:-1], 1)), np.cumsum(array, -1)], -1)
        low = np.minimum(np.floor(borders).astype(int), tokens - 1)
        at_borders = integral[..., low] + (borders - low) * array[..., low]
        return np.diff(at_borders, axis=-1)

    over_keys = cells(maps)
    over_rows = cells(np.swapaxes(over_keys, -1, -2))
    return np.swapaxes(over_rows, -1, -2) * GRID / tokens


_FIELDS = (
    "initial_score",
    "initial_score_std",
    "mass_std",
    "entropy",
    "mean_map",
    "absolute_exposure",
    "relative_exposure",
)
_BY_MODE = ("initial_rate", "rate", "count", "mass", "absolute_positions", "relative_positions")


def differences(found: SinkStatistics, model: PreTrainedModel, prompts: list[tuple[int, ...]]) -> dict[str, float]:
    """Largest difference of each statistic of a profile from brute force, by name: of numbers above 1 by the number."""
    wanted = brute_force(model, prompts)
    largest = {field: _largest(getattr(found, field), wanted[field]) for field in _FIELDS}
    for mode in THRESHOLDS:
        later = found.by[mode]
        for field in _BY_MODE:
            largest[f"{mode}/{field}"] = _largest(getattr(later, field), wanted[f"{mode}/{field}"])
        ids = later.tokens.ids.tolist()
        layers = later.tokens.sinks.shape[1]
        wanted_tokens = {
            field: wanted[f"{mode}/tokens/{field}"] for field in ("occurrences", "mass", "mass_outside", "sinks")
        }
        assert set(ids) == set(wanted_tokens["mass"])
        for field in ("occurrences", "mass", "mass_outside"):
            largest[f"{mode}/tokens/{field}"] = _largest(
                getattr(later.tokens, field), [wanted_tokens[field][token] for token in ids]
            )
        sinks = [[wanted_tokens["sinks"].get((token, layer), 0) for layer in range(layers)] for token in ids]
        largest[f"{mode}/tokens/sinks"] = _largest(later.tokens.sinks, np.array(sinks).reshape(len(ids), layers))
    return largest


def _largest(found: np.ndarray, wanted: object) -> float:
    wanted = np.asarray(wanted)
    assert found.shape == wanted.shape
    return float((np.abs(found - wanted) / np.maximum(np.abs(wanted), 1)).max(initial=0))
