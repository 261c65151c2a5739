"""An independent witness of a converted GGUF file: the model is compared with what the file itself holds.

Every stored tensor is dequantised by the package gguf and compared with the checkpoint's parameter, one at a time, by
tables of our own; every parameter has to be there, every key to be accounted for; the configuration has to say what the
keys say, and the model's rotary positions to be those of the file. No code of transformers' own GGUF loader takes part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from act_export.checkpoint.gguf.header import GgufFile
from act_export.checkpoint.gguf.keys import Keys
from act_export.checkpoint.gguf.plan import Pair, by_parameter, kinds_of, pairs_of, shapes_of
from act_export.checkpoint.gguf.rope import Rotary
from act_export.checkpoint.gguf.settings import Settings, is_close, read_settings
from act_export.checkpoint.gguf.shards import read_gguf
from act_export.checkpoint.loader_errors import quiet_transformers, readable_errors
from act_export.errors import CheckpointError, shown

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from act_export.checkpoint.stored.origins import Origin

TOLERANCE = 1e-6  # of the largest number of the tensor, or of 1; a conversion that is right differs by nothing
ROTARY_TOLERANCE = 1e-5  # relative; the model's frequencies are float32


@dataclass(frozen=True)
class Report:
    """What was compared, and how well it agrees.

    Attributes:
        architecture: As the file calls it.
        kinds: How many tensors there are of each quantisation.
        tensors: Of the file that parameters were compared with.
        parameters: Of the model, each once.
        tied: Whether the output's weights are those of the embedding, so that the file has none.
        keys: Of the file, each accounted for.
        settings: Of the configuration that were compared with the keys.
        largest_difference: Between a number of the file and the model's.
        where: The tensor that has it.
        rotary_difference: The largest relative difference of a rotary frequency.
    """

    architecture: str
    kinds: dict[str, int]
    tensors: int
    parameters: int
    tied: bool
    keys: int
    settings: int
    largest_difference: float
    where: str
    rotary_difference: float


def compare(gguf_path: Path, folder: Path) -> Report:
    """Compares a checkpoint folder with the GGUF file that it is of.

    Args:
        gguf_path: The file, or any of its shards.
        folder: The checkpoint.

    Raises:
        CheckpointError: If they aren't the same model, or that can't be told, with what differs.
    """
    gguf, _ = read_gguf(gguf_path)
    keys = Keys(gguf)
    settings = read_settings(keys)
    model, origins = _load(folder, gguf_path)
    _check_configuration(model, settings, gguf)
    shapes = shapes_of(model)
    pairs = pairs_of(gguf, keys.architecture, settings, shapes)
    largest, where = 0.0, ""
    for parameter, parts in by_parameter(pairs).items():
        found = origins[parameter].read().numpy()
        for pair in parts:
            difference = _difference(pair, found, settings, gguf)
            if difference > largest or not where:
                largest, where = difference, pair.tensor.name
    return Report(
        architecture=keys.architecture,
        kinds=dict(kinds_of(pairs)),
        tensors=len(pairs),
        parameters=len(shapes),
        tied=bool(settings.values["tie_word_embeddings"]),
        keys=len(gguf.keys),
        settings=len(settings.values),
        largest_difference=largest,
        where=where,
        rotary_difference=_check_rotary(model, settings, gguf),
    )


def _load(folder: Path, gguf_path: Path) -> tuple[PreTrainedModel, Mapping[str, Origin]]:
    """The checkpoint's model without weights, and where each of them is."""
    import torch
    from transformers import AutoModelForCausalLM

    from act_export.checkpoint.completeness import contents_of
    from act_export.checkpoint.configuration import read_configuration
    from act_export.checkpoint.stored.files import tensors_of
    from act_export.checkpoint.streamed.weights import model_without_values

    with readable_errors(str(gguf_path)), quiet_transformers():
        config = read_configuration(folder, str(folder))
        model = model_without_values(
            lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        )
        try:
            origins = contents_of(model, tensors_of(folder), str(folder), config).origins
        except CheckpointError as error:
            raise _differs(gguf_path, str(error)) from error
    if origins is None:
        raise _differs(gguf_path, "its weights can't be read one at a time")
    return model, origins


def _check_configuration(model: PreTrainedModel, settings: Settings, gguf: GgufFile) -> None:
    config: Any = model.config
    if config.model_type != settings.model_type:
        raise _differs(gguf.path, f"it was loaded as {config.model_type}, not {settings.model_type}")
    for name, expected in settings.values.items():
        if name == "rope_parameters":
            continue  # their effect is compared instead
        found = getattr(config, name, None)
        if not is_close(found, expected):
            raise _differs(
                gguf.path, f"{name} is {shown(found)} in the loaded model, and {shown(expected)} by the keys"
            )


def _difference(pair: Pair, parameter: np.ndarray, settings: Settings, gguf: GgufFile) -> float:
    expected = pair.values(settings)
    name = pair.tensor.name
    if not np.isfinite(expected).all():
        raise CheckpointError(
            f"can't load {gguf.path}: tensor {name} has weights that are infinite or no numbers; get the file again"
        )
    found = pair.target.slice_of(parameter)
    if found.shape != expected.shape:
        raise _differs(gguf.path, f"{pair.target.parameter} has shape {found.shape}, tensor {name} {expected.shape}")
    scale = max(1.0, _largest(expected))
    difference = _largest(np.subtract(found, expected, out=expected))
    if not difference <= TOLERANCE * scale:
        raise _differs(gguf.path, f"{pair.target.parameter} differs from tensor {name} by {difference:.3g}")
    return difference


def _largest(values: np.ndarray) -> float:
    """The largest magnitude, without a copy of the numbers."""
    return float(np.maximum(abs(values.max()), abs(values.min())))


def _check_rotary(model: PreTrainedModel, settings: Settings, gguf: GgufFile) -> float:
    modules = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    if bool(modules) != bool(settings.rotary):
        raise _differs(gguf.path, f"the loaded model has {len(modules)} modules of rotary positions")
    largest = 0.0
    for module in modules:
        for kind, rotary in settings.rotary.items():
            if kind and kind not in model.config.layer_types:
                continue
            for beyond in (False, True):
                difference = _rotary_difference(module, kind, rotary, beyond=beyond)
                if not difference <= ROTARY_TOLERANCE:
                    raise _differs(
                        gguf.path,
                        f"rotary frequencies {'beyond the original context ' if beyond else ''}differ by "
                        f"{difference:.3g} (relative) from those of the keys rope.*",
                    )
                largest = max(largest, difference)
    return largest


def _rotary_difference(module: nn.Module, kind: str, rotary: Rotary, *, beyond: bool) -> float:
    """How much a module's frequencies, and cosines and sines at position 1, differ from those of the keys."""
    import torch

    states = torch.zeros(1, 1, 1)
    layer = {"layer_type": kind} if kind else {}
    last = rotary.original if beyond and rotary.original else 1
    with torch.no_grad():
        cosines, sines = module(states, torch.tensor([[1, last]]), **layer)
    prefix = f"{kind}_" if kind else ""
    found = getattr(module, f"{prefix}inv_freq").double().numpy()
    expected = rotary.frequencies(beyond=beyond)
    if found.shape != expected.shape:
        return float("inf")
    half = len(expected)
    turned = [
        np.abs(values[0, 0, :half].double().numpy() - rotary.attention_factor * function(expected)).max()
        for values, function in ((cosines, np.cos), (sines, np.sin))
    ]
    return float(max(np.abs(found / expected - 1).max(), *turned))


def _differs(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"can't load {path}: the loaded model isn't what the file holds: {what}; convert the original checkpoint to "
        f"safetensors and pass that"
    )
