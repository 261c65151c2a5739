"""MODEL -> its files on this machine: found, downloaded or converted, and what they are of."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from act_export.calibration.file import Calibration
from act_export.checkpoint.configuration import read_configuration
from act_export.checkpoint.folder import check_configuration, check_is_checkpoint, weight_files
from act_export.checkpoint.gguf.built_in import BUILT_IN, built_in_gguf, names_like, parts_of
from act_export.checkpoint.gguf.convert import converted
from act_export.checkpoint.gguf.convert import shape_of as shape_of_gguf
from act_export.checkpoint.gguf.header import has_magic
from act_export.checkpoint.gguf.shards import read_gguf
from act_export.checkpoint.hub import HubAccess, HubId, commit_of, fetch_small_files, fetch_weights, is_on_hub
from act_export.checkpoint.small_files import check_small_files, read_settings
from act_export.checkpoint.support import why_unsupported
from act_export.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Fetched:
    """A checkpoint's files on this machine.

    Attributes:
        name: What the user called it, without a revision.
        folder: Where they are.
        trust_remote_code: Whether code among them may run.
    """

    name: str
    folder: Path
    trust_remote_code: bool = False

    @property
    def revision(self) -> str:
        """Hash of the hub's commit; empty for what isn't from the hub."""
        return commit_of(self.folder)


def fetch_checkpoint(
    source: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
    fits: Sequence[Calibration] = (),
) -> Fetched:
    """Finds MODEL's files, downloads or converts them first where that is needed, and checks what they are.

    Args:
        source: As in `load_checkpoint`, and the next four.
        revision: Of a hub id.
        token: Of the hub.
        cache_dir: Where the hub's files are kept.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        weights: Whether they are needed: without them, a folder with nothing but a tokenizer will do.
        fits: Calibrations that must be for the model, by what is known of it without its weights.

    Raises:
        CheckpointError: If there is no such model, it can't be had, or it can't be loaded as a causal language model.
        CalibrationError: If one of the calibrations isn't for it.
    """
    check_source(source, revision=revision, trust_remote_code=trust_remote_code, weights=weights)
    path = Path(source).expanduser()
    hub_id = HubId.parse(source)
    if is_on_hub(source) and hub_id is not None:
        access = HubAccess(token, cache_dir)
        hub_id = hub_id.at(revision)
        fetched = Fetched(hub_id.name, fetch_small_files(hub_id, access, code=trust_remote_code), trust_remote_code)
        check_small_files(fetched.folder, str(hub_id), code=trust_remote_code)
        if weights:
            check_configuration(fetched.folder, str(hub_id), trust_remote_code=trust_remote_code)
            _check_fits(fits, configuration_of(fetched))
            fetch_weights(hub_id, fetched.folder, access)
        return fetched
    if is_gguf(source):
        gguf = built_in_gguf(source) if source in BUILT_IN else path
        if fits:
            shape = shape_of_gguf(read_gguf(gguf)[0])
            for calibration in fits:
                calibration.check_fits(shape)
        return Fetched(source, converted(gguf))
    fetched = Fetched(source, path, trust_remote_code)
    if weights:
        check_configuration(path, source, trust_remote_code=trust_remote_code)
        if fits:
            _check_fits(fits, configuration_of(fetched))
    return fetched


def check_source(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False, weights: bool = True
) -> None:
    """Refuses a MODEL that can't be one by what is here: without transformers, a download or a conversion.

    Args:
        source: As in `fetch_checkpoint`, and the others.
        revision: Of a hub id.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        weights: Whether they are needed.

    Raises:
        CheckpointError: If there is no such model, or its files aren't those of one.
    """
    path = Path(source).expanduser()
    if is_on_hub(source):
        return
    if revision is not None:
        raise CheckpointError(
            f"revision is {revision!r}, but {source} is no hub id (owner/name), and only these have revisions; leave "
            f"it out"
        )
    if source in BUILT_IN:
        parts_of(source)
    elif is_gguf(source):
        read_gguf(path)
    elif path.is_dir():
        check_small_files(path, source, code=trust_remote_code)
        if weights:
            check_is_checkpoint(path, source)
            weight_files([file.name for file in path.iterdir()], path, source)
    elif path.is_file() and path.suffix == ".onnx":
        raise CheckpointError(
            f"{source} is an ONNX file; MODEL is the checkpoint that it was exported from, which `act-export inspect "
            f"{source}` names"
        )
    elif path.is_file():
        raise CheckpointError(f"{source} is a file but not a .gguf file; pass the checkpoint's folder")
    else:
        near = names_like(source)
        raise CheckpointError(
            f"there is no model {source}: no such folder, .gguf file, hub id (owner/name) or built-in name "
            f"({', '.join(BUILT_IN)})" + (f"; did you mean {' or '.join(near)}?" if near else "")
        )


def is_gguf(source: str) -> bool:
    """Whether MODEL is a GGUF file, or a built-in name of one."""
    path = Path(source).expanduser()
    return source in BUILT_IN or (path.is_file() and (path.suffix.lower() == ".gguf" or has_magic(path)))


def public_name(name: str) -> str:
    """A model's name as it was asked for, without what only this machine knows."""
    return name if name in BUILT_IN or (not Path(name).exists() and name.count("/") == 1) else Path(name).resolve().name


def names_of(source: str, place: str) -> tuple[str, ...]:
    """What a model goes by, each once: by what the user called it, and by what its configuration recorded."""
    recorded: object = None
    config = Path(place) / "config.json"
    if config.is_file():  # the loaded configuration says where it was loaded from instead
        recorded = read_settings(config, source).get("_name_or_path")
    found = [source] if source in BUILT_IN else list(names_of_place(source))
    if isinstance(recorded, str) and recorded:
        found += names_of_place(recorded)
    return tuple(dict.fromkeys(found))


def names_of_place(place: str) -> Iterator[str]:
    """A hub id, or a folder's name and the hub id whose cache it is in."""
    path = Path(place).expanduser()
    if HubId.parse(place) is not None and not path.exists():
        yield place
        return
    for folder in dict.fromkeys((path.absolute(), path.resolve())):
        yield folder.name
        for part in folder.parts:
            if part.startswith("models--") and part.count("--") == 2:
                yield part.removeprefix("models--").replace("--", "/")


def _check_fits(fits: Sequence[Calibration], config: PreTrainedConfig) -> None:
    from act_export.checkpoint.identity import shape_of

    shape = shape_of(config)
    for calibration in fits:
        if shape is not None:
            calibration.check_fits(shape)


def configuration_of(fetched: Fetched) -> PreTrainedConfig:
    """The configuration, of a causal language model."""
    from act_export.checkpoint.text_tower import check_vision_configuration, has_text_tower, loader_of

    name = fetched.name
    config = read_configuration(fetched.folder, name, trust_remote_code=fetched.trust_remote_code)
    if (reason := why_unsupported(config)) is not None:
        raise CheckpointError(f"{name}: {reason}")
    has_own_code = fetched.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in loader_of(config)._model_mapping and not has_own_code:
        raise CheckpointError(
            f"{name} is a {config.model_type} model, which transformers doesn't know as a causal language model"
        )
    if has_text_tower(config):
        check_vision_configuration(read_settings(fetched.folder / "config.json", name), name)
    return config
