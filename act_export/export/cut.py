"""The first layers of a model that is too large to be compared whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.file import Strength
from act_export.calibration.strengths import CalibratedHeads
from act_export.checkpoint.identity import identify, layers_and_heads
from act_export.checkpoint.load import Checkpoint
from act_export.checkpoint.streamed.weights import model_with_weights
from act_export.errors import ActExportError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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


def cut_calibrations(calibrations: CalibrationSet) -> CalibrationSet:
    """What calibrations do in the first layers.

    Where no head of these can be calibrated, they do there what they do in the first layers of which some can: so that
    calibrated attention is compared too.
    """
    places = _places(calibrations.heads)

    def moved(strength: Strength) -> Strength:
        if not isinstance(strength, Mapping):
            return strength
        return {place: strength[layer] for layer, place in places.items() if layer in strength}

    each = {
        name: replace(
            calibration,
            heads={place: calibration.heads[layer] for layer, place in places.items() if layer in calibration.heads},
            beta=moved(calibration.beta),
            gamma=moved(calibration.gamma),
            model=None,
            provenance=None,
        )
        for name, calibration in calibrations.each.items()
    }
    heads = {place: calibrations.heads.heads[layer] for layer, place in places.items()}
    return CalibrationSet(each, calibrations.default, CalibratedHeads(heads, calibrations.heads.threshold_mode))


def describe_cut(checkpoint: Checkpoint, heads: CalibratedHeads) -> str:
    """What of a checkpoint and its calibrated heads is compared when its cut is."""
    layers = checkpoint.identity.num_layers
    calibrated = ""
    if len(heads):
        places = _places(heads)
        count = sum(len(heads.heads[layer]) for layer in places)
        calibrated = f" with {count} of {len(heads)} calibrated heads"
        if any(layer != place for layer, place in places.items()):
            layer_or_layers = "layer" if len(places) == 1 else "layers"
            calibrated += f", those of {layer_or_layers} {' and '.join(map(str, places))},"
    return (
        f"only a cut of the model to its first {min(LAYERS, layers)} of {layers} layers{calibrated} was compared, "
        f"exported by the same steps: weights are read one at a time because the whole takes too much memory"
    )


def _places(heads: CalibratedHeads) -> dict[int, int]:
    """Calibrated layer -> the layer of the cut that gets its heads."""
    first = {layer: layer for layer in heads.heads if layer < LAYERS}
    return first or {layer: place for place, layer in enumerate(list(heads.heads)[:LAYERS])}


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
