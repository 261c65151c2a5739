"""The first layers of a model that is too large to be compared whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from act_export.checkpoint.identity import identify, layers_and_heads
from act_export.checkpoint.load import Checkpoint
from act_export.checkpoint.streamed.weights import model_with_weights
from act_export.errors import ActExportError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from act_export.calibration.file import Calibration

LAYERS = 2


def cut_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of the first layers of a streamed one, with their weights, embeddings and output matrix in memory.

    Raises:
        ActExportError: If the architecture has no number of layers to change.
    """
    assert checkpoint.streamed is not None
    config = _cut_configuration(checkpoint.model.config)
    model = model_with_weights(config, checkpoint.streamed, checkpoint.model)
    return replace(checkpoint, model=model, identity=identify(model), names=(), streamed=None)


def cut_calibration(calibration: Calibration | None) -> Calibration | None:
    """What a calibration does in the first layers; None for none.

    One that calibrates none of them does there what it does in the first layers that it calibrates: so that calibrated
    attention is compared too.
    """
    if calibration is None:
        return None
    places = _places(calibration)
    heads = {place: calibration.heads[layer] for layer, place in places.items()}
    beta = calibration.beta
    if isinstance(beta, Mapping):
        beta = {place: beta[layer] for layer, place in places.items()}
    return replace(calibration, heads=heads, beta=beta, model=None, provenance=None)


def describe_cut(checkpoint: Checkpoint, calibration: Calibration | None) -> str:
    """What of a checkpoint and its calibration is compared when its cut is."""
    layers = checkpoint.identity.num_layers
    calibrated = ""
    if calibration is not None and calibration.heads:
        places = _places(calibration)
        count = sum(len(calibration.heads[layer]) for layer in places)
        calibrated = f" with {count} of {calibration.num_calibrated_heads} calibrated heads"
        if any(layer != place for layer, place in places.items()):
            layer_or_layers = "layer" if len(places) == 1 else "layers"
            calibrated += f", those of {layer_or_layers} {' and '.join(map(str, places))},"
    return (
        f"only a cut of the model to its first {min(LAYERS, layers)} of {layers} layers{calibrated} was compared, "
        f"exported by the same steps: weights are read one at a time because the whole takes too much memory"
    )


def _places(calibration: Calibration) -> dict[int, int]:
    """Calibrated layer -> the layer of the cut that gets its heads."""
    first = {layer: layer for layer in calibration.heads if layer < LAYERS}
    return first or {layer: place for place, layer in enumerate(list(calibration.heads)[:LAYERS])}


def _cut_configuration(config: PreTrainedConfig) -> PreTrainedConfig:
    num_layers, _ = layers_and_heads(config)
    cut = copy.deepcopy(config)
    if num_layers <= LAYERS:
        return cut
    cut.num_hidden_layers = LAYERS
    for name, value in vars(cut).items():
        if isinstance(value, list | tuple) and len(value) == num_layers:  # such as the layers' types
            setattr(cut, name, value[:LAYERS])
    if layers_and_heads(cut)[0] != LAYERS:
        raise ActExportError(
            f"{config.model_type} models can't be cut to {LAYERS} layers, and this one is too large to be compared "
            f"whole; pass --no-verify"
        )
    return cut
