"""Whether a checkpoint's files hold a model, the whole of it, and nothing of another one.

What transformers' loader says of missing, unexpected and mismatched names is asked for, and the files are read beside
it: both must agree that each stored tensor is a parameter of the model, and each parameter a stored tensor.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from act_export.checkpoint.stored.origins import Matched, Rules, RulesError, match
from act_export.checkpoint.wrappers import unwrapped
from act_export.errors import CheckpointError, shown

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from act_export.checkpoint.stored.origins import Origin
    from act_export.checkpoint.stored.safetensors_file import Stored

_FREQUENCIES = re.compile(r"inv_freq$")
_ANGLES = re.compile(r"(^|\.)(cos|sin)_cached$")
_COMPUTED = re.compile(r"(^|\.)(inv_freq|original_inv_freq|cos_cached|sin_cached|masked_bias)$")
_LAYER = re.compile(r"(^|.*\.)(layers|h|blocks)\.(\d+)\.")
_OF_NEXT_TOKENS = ("eh_proj", "enorm", "hnorm", "shared_head", "mtp", "nextn")  # in layers that predict further tokens
_MOST_NAMED = 3
_MOST_ZEROS = 1 << 24  # numbers of a bias that is looked at

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contents:
    """What a checkpoint's files hold of a model.

    Attributes:
        tensors: By their names without wrappers.
        origins: Where the model's parameters and stored buffers come from, by one of their names at least; None where
            transformers' rules can't be followed, and its loader alone knows.
        ignored: Names, as the model would have them, of stored tensors that it doesn't need.
        wrapped: Whether the stored names have wrappers, which transformers wouldn't take off.
    """

    tensors: Mapping[str, Stored]
    origins: Mapping[str, Origin] | None
    ignored: frozenset[str] = frozenset()
    wrapped: bool = False


def contents_of(model: PreTrainedModel, tensors: Mapping[str, Stored], name: str, config: PreTrainedConfig) -> Contents:
    """Matches a checkpoint's tensors with its model, before any of them is read.

    Args:
        model: Of the configuration, without values.
        tensors: Of the files.
        name: What the user calls the checkpoint.
        config: Its configuration.

    Raises:
        CheckpointError: If tensors are missing, superfluous, or of other shapes than the configuration has; with their
            names, and what to do; or if rotary frequencies in the files aren't those of the configuration.
    """
    names, wrappers = _unwrapped(model, tensors)
    tensors = {names[each]: tensor for each, tensor in tensors.items()}
    if wrappers:
        _log.warning(
            "the names of the weights of %s are within %s, which are taken off", name, ", ".join(map(shown, wrappers))
        )
    try:
        matched = match(model, tensors, name, config)
    except RulesError:
        loaded = model.state_dict()
        _check_rotary(model, {each: tensor for each, tensor in tensors.items() if each not in loaded}, name)
        return Contents(tensors, None, wrapped=bool(wrappers))
    superfluous = _superfluous(model, matched.unused, tensors)
    missing = _missing(model, matched)
    if missing:
        raise CheckpointError(missing_message(name, missing, superfluous))
    if superfluous:
        raise CheckpointError(_superfluous_message(name, superfluous, tensors, config))
    _check_rotary(model, {each: tensors[each] for each in matched.unused}, name)
    return Contents(tensors, matched.origins, frozenset(matched.unused.values()), bool(wrappers))


def check_report(report: Mapping[str, Any], model: PreTrainedModel, contents: Contents, name: str) -> None:
    """Refuses a model that transformers' loader didn't fill, or didn't fill with all that there is.

    Args:
        report: As `from_pretrained(..., output_loading_info=True)` gives it.
        model: The loaded model.
        contents: Of the files.
        name: What the user calls the checkpoint.

    Raises:
        CheckpointError: With the first names.
    """
    unexpected = {each: each for each in report["unexpected_keys"] if each not in contents.ignored}
    superfluous = _superfluous(model, unexpected, {})
    if report["missing_keys"]:
        raise CheckpointError(missing_message(name, report["missing_keys"], superfluous))
    if superfluous:
        raise CheckpointError(_superfluous_message(name, superfluous, {}, model.config))
    other = [*(each[0] for each in report["mismatched_keys"]), *report["error_msgs"]]
    if other:
        raise CheckpointError(
            f"{name} has weights of other shapes than its config.json says, or that can't be converted: "
            f"{_named(other)}; get the config.json that belongs to the weights"
        )


def missing_message(name: str, missing: Iterable[str], superfluous: Collection[str] = ()) -> str:
    """That a model's weights aren't all there."""
    names = sorted(missing)
    beside = f", and holds {len(superfluous)} that the model has no place for: {_named(superfluous)}" * bool(
        superfluous
    )
    return (
        f"{name} lacks {len(names)} of the model's weights, e.g. {names[0]}{beside}; is it a causal language model, "
        f"and the config.json that belongs to the weights?"
    )


def _unwrapped(model: PreTrainedModel, tensors: Mapping[str, Stored]) -> tuple[dict[str, str], tuple[str, ...]]:
    def fits(names: list[str]) -> bool:
        rules = Rules(model)
        unknown = {each: rules.target_of(each)[0] for each in sorted(names, key=rules.order) if not rules.knows(each)}
        return len(unknown) < len(names) and not _superfluous(model, unknown, {})

    try:
        return unwrapped(tensors, fits)
    except Exception:  # of transformers' rules; what they can't do is told where they are followed
        return {each: each for each in tensors}, ()


def _missing(model: PreTrainedModel, matched: Matched) -> list[str]:
    """Parameters and stored buffers without an origin under any of their names."""
    ids = {each: id(tensor) for each, tensor in model.state_dict(keep_vars=True).items()}
    there = {ids[each] for each in matched.origins}
    allowed = list(model._keys_to_ignore_on_load_missing or ())
    return [
        each for each, place in ids.items() if place not in there and not any(re.search(one, each) for one in allowed)
    ]


def _superfluous(model: PreTrainedModel, unused: Mapping[str, str], tensors: Mapping[str, Stored]) -> list[str]:
    """Those of unused tensors without which the model would be another one.

    Not needed are those that transformers leaves out of this architecture, tables that a model computes itself, and
    biases of zeros.
    """
    # transformers adds the angles and positions of old checkpoints to its patterns when it reports.
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ())]
    computed = {each for each, _ in model.named_buffers()} | {"position_ids"}
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    layers = int(getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0) or 0)
    beyond: dict[str, list[str]] = {}
    found = []
    for key, target in unused.items():
        if _COMPUTED.search(target) or target in computed or prefix + target in computed:
            continue
        if target.endswith(".position_ids") and any(each.endswith("position_ids") for each in computed):
            continue
        if any(re.search(pattern, target) for pattern in patterns):
            layer = _LAYER.match(target)
            if layer is not None and int(layer[3]) >= layers > 0:
                beyond.setdefault(layer[0], []).append(key)
            continue
        if key in tensors and _is_zero_bias(target, tensors[key], modules, prefix):
            continue
        found.append(key)
    for keys in beyond.values():  # a layer too many isn't one that predicts further tokens by its number alone
        if not any(word in key for key in keys for word in _OF_NEXT_TOKENS):
            found += keys
    return sorted(found)


def _check_rotary(model: PreTrainedModel, unused: Mapping[str, Stored], name: str) -> None:
    """Refuses rotary frequencies, and tables of their angles, that aren't what the model computes.

    The model does with its own, so stored ones tell what a configuration forgot, such as a scaled base.
    """
    stored = {each: tensor for each, tensor in unused.items() if _FREQUENCIES.search(each) or _ANGLES.search(each)}
    computed = _frequencies_of(model) if stored else []
    if not computed:
        return
    for each, tensor in stored.items():
        size = tensor.shape[-1] if tensor.shape else 0
        angles = _ANGLES.search(each)
        if angles is None:
            same = len(tensor.shape) == 1 and any(
                size == len(own) and _is_close(tensor.read(), own) for own, _ in computed
            )
        else:
            alike = [(own, scale) for own, scale in computed if 2 * len(own) == size]
            if not alike or math.prod(tensor.shape) < 2 * size:
                continue
            row = tensor.sample(torch.arange(size, 2 * size))  # of position 1, whose angles are the frequencies
            function = torch.cos if angles[2] == "cos" else torch.sin
            same = any(
                _is_close(part, function(own) * scale, halved=True)
                for own, scale in alike
                for part in (row[: len(own)], row[::2])  # each angle is there twice, in one of two orders
            )
        if not same:
            raise CheckpointError(
                f"{name} holds rotary frequencies that its config.json doesn't give: {each}; the model would compute "
                f"with those of config.json: correct rope_parameters there (rope_theta and rope_scaling of older "
                f"files), or get the config.json that belongs to the weights"
            )


def _frequencies_of(model: PreTrainedModel) -> list[tuple[Tensor, float]]:
    """Rotary frequencies that a model without values computes as it is loaded, and what its angles are scaled by.

    Nothing where some of them can't be had: what is stored may be those.
    """
    parts = [each for each in model.modules() if hasattr(each, "_init_weights")]  # of which each knows its own modules
    owners: dict[nn.Module, Any] = {module: part for part in parts for module in part.modules()}
    found = []
    for module, owner in owners.items():
        names = [each for each, _ in module.named_buffers(recurse=False) if _FREQUENCIES.search(each)]
        if not names:
            continue
        if next(module.parameters(), None) is not None:
            return []
        own = copy.deepcopy(module).to_empty(device="cpu")
        for buffer in own.buffers():
            buffer.fill_(torch.nan)
        try:
            owner._init_weights(own)
        except Exception:  # of code that computes them in another way
            return []
        values = [own.get_buffer(each).float() for each in names]
        if not all(each.dim() == 1 and bool(each.isfinite().all()) for each in values):
            return []
        found += [(each, float(getattr(own, "attention_scaling", 1.0))) for each in values]
    return found


def _is_close(stored: Tensor, computed: Tensor, *, halved: bool = False) -> bool:
    """Whether numbers are the same but for rounding, also where they were halves once, as may be seen or is given."""
    stored = stored.float()
    halved = halved or any(torch.equal(stored.to(half).float(), stored) for half in (torch.bfloat16, torch.float16))
    relative, absolute = (1e-2, 1e-7) if halved else (1e-4, 1e-9)
    return torch.allclose(stored, computed, rtol=relative, atol=absolute)


def _is_zero_bias(target: str, tensor: Stored, modules: Mapping[str, nn.Module], prefix: str) -> bool:
    """Whether a tensor is the bias of a module without one, and adds nothing."""
    owner, _, leaf = target.rpartition(".")
    if leaf != "bias" or not (owner in modules or prefix + owner in modules) or len(tensor.shape) != 1:
        return False
    return tensor.shape[0] <= _MOST_ZEROS and not bool(tensor.read().any())


def _superfluous_message(
    name: str, superfluous: Collection[str], tensors: Mapping[str, Stored], config: PreTrainedConfig
) -> str:
    names = [f"{each} {list(tensors[each].shape)}" if each in tensors else each for each in superfluous]
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    numbers = [int(match[3]) for match in map(_LAYER.match, superfluous) if match is not None]
    if all(each.endswith(".bias") for each in superfluous):
        hint = " (does it say attention_bias or mlp_bias: false?)"
    elif isinstance(layers, int) and max(numbers, default=0) >= layers:
        hint = f" (it says num_hidden_layers: {layers}, and the files have layer {max(numbers)})"
    else:
        hint = ""
    many = f"{len(names)} weight{'s' if len(names) > 1 else ''}"
    return (
        f"{name} holds {many} that the model of its config.json has no place for: {_named(names)}; without them it "
        f"would be another model: get the config.json that belongs to the weights{hint}, or save the weights without "
        f"them if they are none of the language model's"
    )


def _named(names: Collection[str]) -> str:
    """The first names, and how many more there are."""
    first = [name if len(name) <= 100 else f"{name[:100]}..." for name in list(names)[:_MOST_NAMED]]
    more = len(names) - len(first)
    return ", ".join(first) + (f", and {more} more" if more else "")
