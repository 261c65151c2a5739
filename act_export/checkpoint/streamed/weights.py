"""A model without its large weights, and where to read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from act_export.checkpoint.stored.origins import Origin, match
from act_export.checkpoint.streamed.hollow_tensors import hollow_tensors, is_large
from act_export.checkpoint.witness import check_loaded

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

    from act_export.checkpoint.completeness import Contents


@dataclass(frozen=True)
class StreamedWeights:
    """A checkpoint's weights, in its files.

    Attributes:
        folder: Of the checkpoint.
        origins: By every name that a parameter has.
    """

    folder: Path
    origins: Mapping[str, Origin]

    def read(self, name: str) -> Tensor:
        """A parameter in float32.

        Raises:
            CheckpointError: If its file can't be read any more, or it has NaN or infinities.
        """
        origin = self.origins[name]
        values = origin.read()
        check_loaded(name, values, origin, str(self.folder))
        return values

    def sample(self, name: str, picks: Tensor) -> Tensor:
        """Some numbers of a parameter, in float32, by their places in the flattened parameter.

        Raises:
            CheckpointError: As `read`.
        """
        return self.origins[name].sample(picks)


def hollow_model(
    folder: Path, config: PreTrainedConfig, name: str, contents: Contents, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, StreamedWeights]:
    """A checkpoint's model in float32 with zeros, which take no memory, for large weights; the rest is real.

    Args:
        folder: Of the checkpoint.
        config: Its configuration.
        name: What the user calls it.
        contents: Of its files, matched with the model.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Raises:
        CheckpointError: If the files are broken, or hold no numbers.
        RulesError: If transformers' rules can't be followed.
    """
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    model = model_without_values(
        lambda: auto.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=None,  # transformers' own choice, whatever the files say
            experts_implementation=None,
            trust_remote_code=trust_remote_code,
        )
    )
    set_generation(model, folder)
    origins = contents.origins
    if origins is None:  # says why
        origins = match(model, contents.tensors, name, config).origins
    weights = StreamedWeights(folder, _by_every_name(model, origins))
    large = [each for each, parameter in model.named_parameters() if is_large(parameter.shape)]
    zeros = hollow_tensors(weights.origins[each].shape for each in large)
    small = {each: weights.read(each) for each, _ in model.named_parameters() if each not in large}
    _set_values(model, dict(zip(large, zeros, strict=True)) | small, weights)
    model.requires_grad_(False)
    return model, weights


def model_without_values(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A model whose parameters have no values; its buffers, such as rotary frequencies, have theirs.

    Args:
        make: Makes it.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    with init_empty_weights(include_buffers=False):
        model = make()
    model.tie_weights()  # which doesn't last inside that block
    model.train(False)
    return model


def set_generation(model: PreTrainedModel, folder: Path) -> None:
    """What `from_pretrained` adds to a model: where it is from, and how it generates."""
    from transformers import GenerationConfig

    model.name_or_path = model.config.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))


def model_with_weights(config: PreTrainedConfig, weights: StreamedWeights, like: PreTrainedModel) -> PreTrainedModel:
    """A model of the same kind in another size, such as fewer layers, with all its weights in memory.

    Args:
        config: Of the model to make; each of its weights is called as one of `weights`, and has its shape.
        weights: Where they are.
        like: The model that the weights are of.
    """
    model = model_without_values(lambda: type(like)(config))
    model.generation_config = like.generation_config
    known = _parameters(like)
    for names in _tied(model):
        for each in names[1:]:
            if known[each] is not known[names[0]]:
                _untie(model, each)
    _set_values(model, {each: weights.read(each) for each, _ in model.named_parameters()}, weights)
    model.requires_grad_(False)
    return model


def _by_every_name(model: PreTrainedModel, origins: Mapping[str, Origin]) -> dict[str, Origin]:
    """Origins also by the other names of tied parameters; those that are stored twice, differently, are untied."""
    found = dict(origins)
    for names in _tied(model):
        there = [each for each in names if each in origins]
        if not there:
            continue
        first = origins[there[0]]
        for each in names:
            if each in there[1:] and not _are_equal(origins[each], first):
                _untie(model, each)
            else:
                found[each] = first
    return found


def _are_equal(one: Origin, other: Origin) -> bool:
    return one.shape == other.shape and torch.equal(one.read(), other.read())


def _parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """By every name."""
    return dict(model.named_parameters(remove_duplicate=False))


def _tied(model: PreTrainedModel) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in _parameters(model).items():
        names.setdefault(id(parameter), []).append(name)
    return [each for each in names.values() if len(each) > 1]


def _untie(model: PreTrainedModel, name: str) -> None:
    """Gives a tied parameter one of its own."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    module.register_parameter(leaf, nn.Parameter(torch.empty_like(getattr(module, leaf)), requires_grad=False))
    model.config.tie_word_embeddings = False


def _set_values(model: PreTrainedModel, values: Mapping[str, Tensor], weights: StreamedWeights) -> None:
    """Parameters by one of their names, and the buffers that are stored."""
    parameters = _parameters(model)
    made = {id(parameters[name]): nn.Parameter(tensor, requires_grad=False) for name, tensor in values.items()}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[leaf] = made[id(parameter)]
    for name, buffer in model.named_buffers():
        if name in weights.origins:
            buffer.copy_(weights.read(name))
