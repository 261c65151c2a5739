"""Every tensor of a GGUF file is for a parameter of the model, and every parameter has its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from act_export.checkpoint.gguf.header import GgufFile, StoredTensor
from act_export.checkpoint.gguf.names import Target, target_of, tensors_of
from act_export.checkpoint.gguf.rope import LONG_FACTORS, SHARED_FACTORS, SHORT_FACTORS
from act_export.checkpoint.gguf.settings import Settings
from act_export.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_OF_ROTARY = {"": (), "llama3": (SHARED_FACTORS,), "longrope": (SHARED_FACTORS, LONG_FACTORS, SHORT_FACTORS)}
_ADVICE = "get the file again, or convert the original checkpoint to safetensors and pass that"


@dataclass(frozen=True)
class Pair:
    """A tensor of the file, and what it is in the model."""

    tensor: StoredTensor
    target: Target

    def values(self, settings: Settings) -> np.ndarray:
        """The parameter's part that the tensor is, by the file: float32."""
        return self.target.change(self.tensor.values(), settings.heads)


def configuration(settings: Settings) -> PreTrainedConfig:
    """The transformers configuration of a file's settings."""
    from transformers import AutoConfig

    return AutoConfig.for_model(settings.model_type, **settings.values)


def shapes_of(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """A model's parameters, each once, and their shapes."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def by_parameter(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """The tensors that each parameter is made of."""
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(pair.target.parameter, []).append(pair)
    return found


def pairs_of(gguf: GgufFile, architecture: str, settings: Settings, shapes: Mapping[str, Sequence[int]]) -> list[Pair]:
    """What each tensor is in the model; all are accounted for, and all of the model's parameters.

    Args:
        gguf: The file.
        architecture: As it calls it.
        settings: The file's.
        shapes: Of the model's parameters, tied ones once.

    Raises:
        CheckpointError: If a tensor isn't known, is of no parameter or has another shape than it, or if tensors are
            missing, by name.
    """
    pairs, unknown = [], []
    used_by_rotary = _used_by_rotary(settings)
    for tensor in gguf.tensors.values():
        target = target_of(architecture, tensor.name)
        if target is not None and target.parameter in shapes:
            pairs.append(Pair(tensor, target))
        elif tensor.name not in used_by_rotary:
            unknown.append(tensor.name)
    found = Counter(pair.target.parameter for pair in pairs)
    parts = {pair.target.parameter: pair.target.parts for pair in pairs}
    missing = [
        name
        for parameter in shapes
        if found[parameter] < parts.get(parameter, 1)
        for name in tensors_of(architecture, parameter) or [parameter]
        if name not in gguf.tensors
    ]
    if missing:
        raise CheckpointError(
            f"can't load {gguf.path}: it lacks {len(missing)} of the model's tensors: {_some(missing)}; {_ADVICE}"
        )
    if unknown:
        raise CheckpointError(
            f"can't load {gguf.path}: it has {len(unknown)} tensors that {architecture} models aren't known to have: "
            f"{_some(unknown)}; {_ADVICE}"
        )
    for pair in pairs:
        _check_shape(pair, tuple(shapes[pair.target.parameter]), gguf, settings)
    return pairs


def _used_by_rotary(settings: Settings) -> set[str]:
    """Tensors of rotary factors that were read; factors of 1 have no effect and leave the kind as it is."""
    names = {SHARED_FACTORS} if settings.model_type == "llama" else set()
    for rotary in settings.rotary.values():
        names.update(_OF_ROTARY.get(rotary.kind, ()))
    return names


def _check_shape(pair: Pair, shape: tuple[int, ...], gguf: GgufFile, settings: Settings) -> None:
    probe = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), pair.tensor.shape, (0,) * len(pair.tensor.shape))
    try:
        found = _changed_shape(pair, probe, settings)
    except (ValueError, IndexError, ZeroDivisionError):
        found = pair.tensor.shape
    expected = shape
    if pair.target.parts > 1:
        expected = (shape[0], shape[1] // pair.target.parts, *shape[2:])
    if found != expected:
        raise CheckpointError(
            f"can't load {gguf.path}: tensor {pair.tensor.name} has shape {list(pair.tensor.shape)}, and its keys say "
            f"{list(expected)} for {pair.target.parameter}; {_ADVICE}"
        )


def _changed_shape(pair: Pair, probe: np.ndarray, settings: Settings) -> tuple[int, ...]:
    from act_export.checkpoint.gguf.names import as_row, transposed

    if pair.target.change is transposed:
        return probe.shape[::-1]
    if pair.target.change is as_row:
        return (1, int(np.prod(probe.shape)))
    return probe.shape


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def kinds_of(pairs: Sequence[Pair]) -> Iterator[tuple[str, int]]:
    """How many tensors there are of each quantisation."""
    yield from Counter(pair.tensor.kind.name for pair in pairs).most_common()
