"""What a calibration is checked against: architecture, numbers of layers and heads, and a hash of the weights."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from optimum.utils import NormalizedConfigManager, NormalizedTextConfig

from act_export.calibration.file import ModelIdentity
from act_export.checkpoint.text_tower import has_text_tower
from act_export.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from act_export.checkpoint.streamed.weights import StreamedWeights

_FINGERPRINT_VALUES = 64  # of each parameter, evenly spaced


def identify(model: PreTrainedModel, streamed: StreamedWeights | None = None) -> ModelIdentity:
    """What a calibration of this model must agree with, whether its weights are in memory or streamed."""
    num_layers, num_heads = layers_and_heads(model.config)
    return ModelIdentity(model.config.model_type, num_layers, num_heads, fingerprint(model, streamed))


def shape_of(config: PreTrainedConfig) -> ModelIdentity | None:
    """The identity of a configuration's model before its weights are there: without a fingerprint.

    None where only the loaded model says what it is: of several parts, but for images and text.
    """
    text = config.text_config if has_text_tower(config) else config
    if text.get_text_config(decoder=True) is not text:
        return None
    return ModelIdentity(text.model_type, *layers_and_heads(text))


def layers_and_heads(config: PreTrainedConfig) -> tuple[int, int]:
    """Number of attention layers and of query heads per layer, by optimum's normalized configurations."""
    try:
        normalized = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    except KeyError:
        normalized = NormalizedTextConfig(config)
    try:
        return int(normalized.num_layers), int(normalized.num_attention_heads)
    except (AttributeError, TypeError) as error:
        raise CheckpointError(
            f"can't tell the number of layers and heads of a {config.model_type} model: {error}"
        ) from error


def fingerprint(model: torch.nn.Module, streamed: StreamedWeights | None = None) -> str:
    """Hash of names, shapes and a sample of the weights.

    The sample is rounded to bfloat16 first, so a bfloat16 or float32 copy of the same weights has the same fingerprint.
    A float16 copy need not: float16 has no room for the smallest weights.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        count = parameter.numel()
        picks = torch.linspace(0, count - 1, min(count, _FINGERPRINT_VALUES), dtype=torch.float64).long()
        if streamed is not None:
            values = streamed.sample(name, picks)
        else:
            values = parameter.detach().flatten()[picks.to(parameter.device)]
        sample = values.to(torch.bfloat16).float().cpu().numpy()
        digest.update(sample.astype(np.dtype("<f4")).tobytes())
    return f"sha256:{digest.hexdigest()}"
