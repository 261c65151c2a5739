"""Which stored tensors a model's parameters are made of, by the rules that transformers loads checkpoints with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from act_export.checkpoint.configuration import sizes_of
from act_export.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from act_export.checkpoint.stored.safetensors_file import Stored


class Origin(Protocol):
    """Where a parameter comes from."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        ...

    def read(self) -> Tensor:
        """The parameter in float32."""
        ...

    def sample(self, picks: Tensor) -> Tensor:
        """Some of its numbers, by their places in the flattened parameter."""
        ...


@dataclass(frozen=True)
class AsStored:
    """A parameter that is one stored tensor as it is."""

    tensor: Stored

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.tensor.shape

    def read(self) -> Tensor:
        """The tensor in float32."""
        return self.tensor.read().float()

    def sample(self, picks: Tensor) -> Tensor:
        """Some of its numbers."""
        return self.tensor.sample(picks).float()


@dataclass
class _Conversion:
    """A conversion of transformers' with the stored tensors that it takes, by the pattern that they were found with."""

    rule: Any
    name: str
    model: PreTrainedModel
    sources: dict[str, list[tuple[str, Stored]]] = field(default_factory=dict)

    @property
    def first(self) -> Stored:
        """One of the tensors that it takes."""
        return next(iter(self.sources.values()))[0][1]

    def run(self, read: Callable[[Stored], Tensor]) -> dict[str, Tensor]:
        """What it makes, by the parameters' names."""
        rule = copy.deepcopy(self.rule)
        for pattern, tensors in self.sources.items():
            for key, tensor in tensors:
                rule.add_tensor(self.name, key, pattern, _Later(read, tensor))
        with torch.no_grad():
            made: dict[str, Any] = rule.convert(self.name, model=self.model, config=self.model.config)
        return {name: made[name][0] if isinstance(made[name], list) else made[name] for name in made}


@dataclass(frozen=True)
class _Later:
    """Reads a tensor when it is called, as transformers' own loader has it."""

    read: Callable[[Stored], Tensor]
    tensor: Stored

    def __call__(self) -> Tensor:
        return self.read(self.tensor)


@dataclass(frozen=True)
class Converted:
    """A parameter that is made of stored tensors, such as the experts' weights, which are joined."""

    conversion: _Conversion
    name: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The parameter in float32."""
        return self.conversion.run(lambda tensor: tensor.read().float())[self.name].float()

    def sample(self, picks: Tensor) -> Tensor:
        """Some of its numbers, of all that are read."""
        return self.read().flatten()[picks]


class RulesError(CheckpointError):
    """transformers' rules for a model can't be followed outside of its own loader."""


@dataclass(frozen=True)
class Matched:
    """Stored tensors and a model's parameters.

    Attributes:
        origins: Where parameters and stored buffers come from, by their names; tied parameters may be there under one
            of their names alone.
        unused: Stored tensors that the model has no place for, and what they would be called in it.
    """

    origins: dict[str, Origin]
    unused: dict[str, str]


def match(model: PreTrainedModel, tensors: Mapping[str, Stored], name: str, config: PreTrainedConfig) -> Matched:
    """Finds where a model's parameters come from.

    Args:
        model: Its parameters may be without values.
        tensors: Of the checkpoint.
        name: What the user calls the checkpoint.
        config: Its configuration.

    Raises:
        CheckpointError: If a stored tensor hasn't the shape of the model's, or two are for one parameter.
        RulesError: If transformers' rules can't be followed.
    """
    state = model.state_dict()
    found: dict[str, Origin] = {}
    unused: dict[str, str] = {}
    conversions: dict[str, _Conversion] = {}
    with _followed(name):
        rules = Rules(model)
        for key in sorted(tensors, key=rules.order):
            target, pattern = rules.target_of(key)
            if target not in state:
                unused[key] = target
            elif pattern is not None:
                conversion = conversions.setdefault(target, _Conversion(rules.rule_of(pattern), target, model))
                conversion.sources.setdefault(pattern, []).append((key, tensors[key]))
            elif target in found:
                raise CheckpointError(_twice_message(target, found[target], tensors[key], name))
            else:
                found[target] = AsStored(tensors[key])
        for conversion in conversions.values():
            made = _outcome(conversion)
            twice = next((each for each in made if each in found), None)
            if twice is not None:
                raise CheckpointError(_twice_message(twice, found[twice], conversion.first, name))
            found |= made
    parameters = {each for each, _ in model.named_parameters(remove_duplicate=False)}
    for target, origin in found.items():
        if isinstance(origin, AsStored) and target in parameters:
            _ = origin.tensor.dtype  # refuses what isn't a float
        if target in state and origin.shape != tuple(state[target].shape):
            raise CheckpointError(_shape_message(target, origin, tuple(state[target].shape), name, config))
    return Matched({target: origin for target, origin in found.items() if target in state}, unused)


@contextmanager
def _followed(name: str) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # of transformers' rules, which are not its public interface
        import transformers

        raise RulesError(
            f"transformers {transformers.__version__} loads {name} by rules that act-export can't follow one weight at "
            f"a time ({type(error).__name__}: {error}); load it whole, on a machine with enough memory: --no-stream"
        ) from error


class Rules:
    """transformers' renamings and conversions for a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Takes a model, whose parameters may be without values."""
        from transformers import conversion_mapping, core_model_loading

        self._loading: Any = core_model_loading
        rules = conversion_mapping.get_model_conversion_mapping(model)
        conversions = [rule for rule in rules if isinstance(rule, core_model_loading.WeightConverter)]
        self._renamings = [rule for rule in rules if isinstance(rule, core_model_loading.WeightRenaming)]
        self._conversions = conversions
        self._by_pattern = {pattern: rule for rule in conversions for pattern in rule.source_patterns}
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()
        self.order: Callable[[str], Any] = core_model_loading.dot_natural_key

    def target_of(self, key: str) -> tuple[str, str | None]:
        """What a stored tensor is called in the model, and the pattern of the conversion that takes it, if one does."""
        target, pattern = self._rename(key, self._renamings, self._conversions)
        if target not in self._state and key in self._state:
            target, pattern = self._rename(key, [], [])
        return target, pattern

    def knows(self, key: str) -> bool:
        """Whether the model has a place for a stored tensor of this name."""
        return self.target_of(key)[0] in self._state

    def rule_of(self, pattern: str) -> Any:
        """The conversion that a pattern is of."""
        return self._by_pattern[pattern]

    def _rename(self, key: str, renamings: list[Any], conversions: list[Any]) -> tuple[str, str | None]:
        renamed: tuple[str, str | None] = self._loading.rename_source_key(
            key, renamings, conversions, self._prefix, self._state
        )
        return renamed


def _outcome(conversion: _Conversion) -> dict[str, Origin]:
    """What a conversion makes, found out without the numbers."""
    made = conversion.run(lambda tensor: torch.empty(tensor.shape, dtype=torch.float32, device="meta"))
    for tensors in conversion.sources.values():
        for _, tensor in tensors:
            _ = tensor.dtype  # refuses what isn't a float
    return {name: Converted(conversion, name, tuple(tensor.shape)) for name, tensor in made.items()}


def _shape_message(target: str, origin: Origin, expected: tuple[int, ...], name: str, config: PreTrainedConfig) -> str:
    where = f"{origin.tensor.name} in {origin.tensor.file}" if isinstance(origin, AsStored) else f"{target} of {name}"
    differing = {size for size in expected if size not in origin.shape}
    return (
        f"{where} has shape {list(origin.shape)}, but by config.json {target} has {list(expected)}"
        f"{sizes_of(config, differing)}; the configuration and the weights don't belong together: get the config.json "
        f"that came with the weights"
    )


def _twice_message(target: str, origin: Origin, other: Stored, name: str) -> str:
    first = f"{origin.tensor.name} in {origin.tensor.file}" if isinstance(origin, AsStored) else "what is joined for it"
    return (
        f"{name} holds {target} twice, as {first} and as {other.name} in {other.file}, so it can't be told which "
        f"counts; get the files anew"
    )
