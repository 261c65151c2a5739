"""A checkpoint's configuration as transformers has it, of which no setting says what code runs or what is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from act_export.checkpoint.loader_errors import quiet_transformers, readable_errors
from act_export.checkpoint.small_files import read_settings
from act_export.errors import CheckpointError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")
_LOADERS = ("transformers_weights", "fusion_config")  # which file is loaded, and what is put in a module's place
_MOST_OF_A_KIND = 100_000  # layers, experts, heads and what else a configuration makes lists of as it is read
_COUNTS = re.compile(r"(layer|expert|head|block|depth|label)s?$|(_types|dense_replace)$", re.IGNORECASE)


def read_configuration(folder: Path, name: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a folder.

    How attention and experts are computed is left to transformers' own choice, whatever the file says: a name there may
    be that of code on a hub.

    Args:
        folder: Of the checkpoint.
        name: What the user calls it.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Raises:
        CheckpointError: If it can't be read, or asks for more than any model has.
    """
    from transformers import AutoConfig

    settings = read_settings(folder / "config.json", name)
    for key, value in _integers(settings):
        setting = key.rpartition(".")[2]
        if abs(value) > _MOST_OF_A_KIND and _COUNTS.search(setting):
            raise CheckpointError(
                f"config.json of {name} has {key} {shown(value)}; more than {_MOST_OF_A_KIND} aren't read; get the "
                f"file that belongs to the weights: {folder / 'config.json'}"
            )
    with readable_errors(name), quiet_transformers():
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    for part in _parts(config):
        for given in (*_IMPLEMENTATIONS, *_LOADERS):
            if getattr(part, given, None) is not None:
                setattr(part, given, None)
    return config


def sizes_of(config: PreTrainedConfig, wanted: set[int]) -> str:
    """Settings of a configuration with one of these values, e.g. " (vocab_size: 300)"; empty where there are none."""
    found = dict.fromkeys(
        f"{key}: {value}" for key, value in _integers(config.to_dict()) if value in wanted and value > 1
    )
    return f" ({', '.join(list(found)[:4])})" if found else ""


def _integers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """All whole numbers within settings, with the names on the way to each."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _integers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _integers(inner, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those within it."""
    from transformers import PreTrainedConfig

    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def rope_message(config: PreTrainedConfig, name: str, unknown: object) -> str | None:
    """That a model has no rotary embedding of a kind that its configuration asks for; None where it doesn't ask for it.

    Args:
        config: Whole, or a part.
        name: What the user calls the checkpoint.
        unknown: What was looked up in vain.
    """
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for part in _parts(config):
        given = getattr(part, "rope_parameters", None)
        asked = [given, *given.values()] if isinstance(given, Mapping) else []
        if any(isinstance(each, Mapping) and each.get("rope_type") == unknown for each in asked):
            return (
                f"config.json of {name} asks for rotary embeddings of rope_type {shown(unknown)}, which transformers "
                f"{transformers.__version__} doesn't know in {part.model_type} models; it knows default, "
                f"{', '.join(ROPE_INIT_FUNCTIONS)}: correct config.json (su of older files is longrope), or get a "
                f"newer transformers: pip install -U transformers"
            )
    return None
