"""MODEL -> a loaded transformers model and tokenizer.

MODEL is a checkpoint folder, a hub id, a GGUF file or a built-in name. GGUF files are converted once; the result stays
in the user's cache folder, by the content of the file. What comes from the hub lies in the hub's own cache folder; from
there it is loaded like any folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from optimum.utils import NormalizedConfigManager, NormalizedTextConfig

from act_export.built_in import BUILT_IN, built_in_gguf
from act_export.cache import cache_folder
from act_export.calibration import ModelIdentity
from act_export.checkpoint_files import check_configuration, code_files, code_message, read_json, weight_files
from act_export.errors import ActExportError, CheckpointError
from act_export.hub import HubAccess, HubId, commit_of, fetch_small_files, fetch_weights, is_on_hub
from act_export.placement import Placement
from act_export.support import why_unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from act_export.streamed.weights import StreamedWeights

_FINGERPRINT_VALUES = 64  # of each parameter, evenly spaced


__all__ = [
    "BUILT_IN",
    "Checkpoint",
    "CheckpointError",
    "Fetched",
    "fetch_checkpoint",
    "fingerprint",
    "identify",
    "layers_and_heads",
    "load_checkpoint",
    "load_fetched",
    "load_tokenizer_of",
    "public_name",
]


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


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model.

    Attributes:
        name: What the user called it.
        model: In evaluation mode; no parameter requires a gradient.
        tokenizer: Pads on the left; None where the checkpoint has none.
        identity: What a calibration is checked against; the same in every precision.
        names: What the model goes by: hub ids, and names of folders.
        weights: What its weights are, where they aren't the ones that `identity` is of, e.g. "int4 of model.onnx".
        revision: Hash of the hub's commit that it is of; empty for what isn't from the hub.
        streamed: Where its large weights are, if they aren't in memory: zeros stand for them in the model. None if all
            are.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    identity: ModelIdentity
    names: tuple[str, ...] = ()
    weights: str = ""
    revision: str = ""
    streamed: StreamedWeights | None = None


def load_checkpoint(
    source: str,
    *,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    stream: bool | None = False,
) -> Checkpoint:
    """Loads MODEL.

    Args:
        source: A checkpoint folder, a hub id ("owner/name" or "owner/name@revision"), a GGUF file, or a built-in name.
        dtype: "float32", which exports need, "bfloat16", "float16", or "auto" for what the checkpoint is stored in.
        device: Where to put the model; None for the CPU.
        device_map: Instead of `device`: how to spread the model over several, as accelerate takes it, e.g. "auto".
        revision: Of a hub id: a branch, a tag or a commit; None for the main branch.
        token: Of the hub; None for the one in HF_TOKEN or from `hf auth login`, False for none.
        cache_dir: Where the hub's files are kept; None for the hub's own cache folder (HF_HUB_CACHE, HF_HOME).
        trust_remote_code: Whether code that comes with the checkpoint may run.
        stream: Leave large weights in their files, which is enough to export the model (in float32, on the CPU), and
            for nothing else. None to do so where the model and its export don't fit in memory together.

    Raises:
        CheckpointError: If there is no such model, or it can't be read, or it isn't a causal language model.
        PlacementError: If the precision isn't known, the device isn't there, or the model doesn't fit on the devices.
    """
    placement = Placement(dtype, device, device_map)
    if device_map is not None and _is_gguf(source):
        raise CheckpointError(
            f"device_map is {device_map!r}, but {source} is a GGUF file, whose weights are converted in this machine's "
            f"memory first; leave out device_map and pass a device"
        )
    fetched = fetch_checkpoint(
        source, revision=revision, token=token, cache_dir=cache_dir, trust_remote_code=trust_remote_code
    )
    return _load(fetched, placement, stream)


def load_fetched(
    fetched: Fetched,
    *,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    stream: bool | None = False,
) -> Checkpoint:
    """Loads what `fetch_checkpoint` found; the arguments are those of `load_checkpoint`.

    Raises:
        CheckpointError: As `load_checkpoint`.
        PlacementError: The same.
    """
    return _load(fetched, Placement(dtype, device, device_map), stream)


def fetch_checkpoint(
    source: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> Fetched:
    """Finds MODEL's files, downloads or converts them first where that is needed, and checks what they are.

    Args:
        source: As in `load_checkpoint`, and the next four.
        revision: Of a hub id.
        token: Of the hub.
        cache_dir: Where the hub's files are kept.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        weights: Whether they are needed: without them, a folder with nothing but a tokenizer will do.

    Raises:
        CheckpointError: If there is no such model, it can't be had, or it can't be loaded as a causal language model.
    """
    path = Path(source).expanduser()
    hub_id = HubId.parse(source)
    if is_on_hub(source) and hub_id is not None:
        access = HubAccess(token, cache_dir)
        hub_id = hub_id.at(revision)
        fetched = Fetched(hub_id.name, fetch_small_files(hub_id, access, code=trust_remote_code), trust_remote_code)
        if weights:
            check_configuration(fetched.folder, str(hub_id), trust_remote_code=trust_remote_code)
            _configuration(fetched)
            fetch_weights(hub_id, fetched.folder, access)
        return fetched
    if revision is not None:
        raise CheckpointError(
            f"revision is {revision!r}, but {source} is no hub id (owner/name), and only these have revisions; leave "
            f"it out"
        )
    if _is_gguf(source):
        return Fetched(source, _converted(built_in_gguf(source) if source in BUILT_IN else path))
    if path.is_dir():
        if weights:
            check_configuration(path, source, trust_remote_code=trust_remote_code)
            weight_files([file.name for file in path.iterdir()], path, source)
        return Fetched(source, path, trust_remote_code)
    if path.is_file():
        raise CheckpointError(f"{source} is a file but not a .gguf file; pass the checkpoint's folder")
    raise CheckpointError(
        f"there is no model {source}: no such folder, .gguf file, hub id (owner/name) or built-in name "
        f"({', '.join(BUILT_IN)})"
    )


def load_tokenizer_of(
    source: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer of MODEL, padding on the left, without its weights.

    Args:
        source: As in `load_checkpoint`, or a folder with nothing but a tokenizer.
        revision: Of a hub id, and the next three: as in `load_checkpoint`.
        token: Of the hub.
        cache_dir: Where the hub's files are kept.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Raises:
        CheckpointError: If there is none.
    """
    fetched = fetch_checkpoint(
        source,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
        weights=False,
    )
    return _tokenizer(fetched)


def _tokenizer(fetched: Fetched) -> PreTrainedTokenizerBase:
    from transformers import AutoConfig, AutoTokenizer

    place, settings = str(fetched.folder), fetched.folder / "tokenizer_config.json"
    with _readable_errors(fetched.name), _quiet_transformers():
        config = None
        if fetched.revision:  # transformers knows some tokenizers by the hub id alone
            with suppress(ValueError, OSError):
                config = AutoConfig.from_pretrained(place, trust_remote_code=fetched.trust_remote_code)
                config.name_or_path = next(name for name in _names_of_place(place) if "/" in name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                place, config=config, padding_side="left", trust_remote_code=fetched.trust_remote_code
            )
        except ValueError as error:
            needed = code_files(read_json(settings, fetched.name), ["AutoTokenizer"]) if settings.is_file() else ()
            if fetched.trust_remote_code or not needed:
                raise
            raise CheckpointError(code_message(fetched.name, needed, settings.name)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _is_gguf(source: str) -> bool:
    path = Path(source).expanduser()
    return source in BUILT_IN or (path.is_file() and path.suffix == ".gguf")


def public_name(name: str) -> str:
    """A model's name as it was asked for, without what only this machine knows."""
    return name if name in BUILT_IN or (not Path(name).exists() and name.count("/") == 1) else Path(name).resolve().name


def identify(model: PreTrainedModel, streamed: StreamedWeights | None = None) -> ModelIdentity:
    """What a calibration of this model must agree with, whether its weights are in memory or streamed."""
    num_layers, num_heads = layers_and_heads(model.config)
    return ModelIdentity(model.config.model_type, num_layers, num_heads, fingerprint(model, streamed))


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


def _converted(gguf: Path) -> Path:
    """Folder with the GGUF file's weights as safetensors, converted now unless that was done before."""
    with gguf.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    reader = metadata.version("transformers")
    folder = cache_folder() / "checkpoints" / f"{gguf.stem}-{key}-{reader}"
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"can't write the converted checkpoint to {folder.parent}: {error.strerror}") from error
    with _readable_errors(str(gguf)), _quiet_transformers():
        try:
            place: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
            tokenizer = AutoTokenizer.from_pretrained(**place)
            model = AutoModelForCausalLM.from_pretrained(
                **place, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
            tokenizer.save_pretrained(partial)
            model.save_pretrained(partial)
            if not (folder / "config.json").is_file():  # another process may have been faster
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _configuration(fetched: Fetched) -> PreTrainedConfig:
    """The configuration, of a causal language model."""
    from transformers import AutoConfig

    from act_export.vision import check_vision_configuration, has_text_tower, loader_of

    name = fetched.name
    with _readable_errors(name), _quiet_transformers():
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(fetched.folder), trust_remote_code=fetched.trust_remote_code
        )
    if (reason := why_unsupported(config)) is not None:
        raise CheckpointError(f"{name}: {reason}")
    has_own_code = fetched.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in loader_of(config)._model_mapping and not has_own_code:
        raise CheckpointError(
            f"{name} is a {config.model_type} model, which transformers doesn't know as a causal language model"
        )
    if has_text_tower(config):
        check_vision_configuration(read_json(fetched.folder / "config.json", name), name)
    return config


def _load(fetched: Fetched, placement: Placement, stream: bool | None = False) -> Checkpoint:
    from act_export.streamed.decide import is_to_be_streamed
    from act_export.vision import has_text_tower, loader_of, text_tower

    name = fetched.name
    config = _configuration(fetched)
    _check_files(fetched)
    has_tokenizer = any(
        (fetched.folder / file).is_file()
        for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    )
    tokenizer = _tokenizer(fetched) if has_tokenizer else None
    if is_to_be_streamed(fetched.folder, config, name, stream):
        return _load_streamed(fetched, config, tokenizer)
    with _readable_errors(name), _quiet_transformers():
        loaded: Any = loader_of(config).from_pretrained(
            str(fetched.folder),
            dtype=placement.stored_dtype,
            device_map=placement.device_map,
            output_loading_info=True,
            trust_remote_code=fetched.trust_remote_code,
        )
    model, loading = loaded
    missing = sorted(loading["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{name} lacks {len(missing)} of the model's weights, e.g. {missing[0]}; is it a causal language model?"
        )
    placement.check_complete(model, name)
    model.eval().requires_grad_(False)
    if has_text_tower(config):
        model = text_tower(model, name)
    identity = identify(model)
    placement.apply(model, name)
    names = _names(name, str(fetched.folder))
    return Checkpoint(name, model, tokenizer, identity, names, revision=fetched.revision)


def _check_files(fetched: Fetched) -> None:
    """Raises CheckpointError if weights in .safetensors files are missing or broken, by the files' headers."""
    from act_export.streamed.shards import is_streamable, tensors_of

    if is_streamable(fetched.folder):
        try:
            tensors_of(fetched.folder)
        except CheckpointError as error:
            raise CheckpointError(f"can't load {fetched.name}: {error}") from error


def _load_streamed(fetched: Fetched, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> Checkpoint:
    from act_export.streamed.weights import hollow_model

    name, folder = fetched.name, fetched.folder
    with _readable_errors(name), _quiet_transformers():
        model, streamed = hollow_model(folder, config, name, trust_remote_code=fetched.trust_remote_code)
    identity = identify(model, streamed)
    names = _names(name, str(folder))
    return Checkpoint(name, model, tokenizer, identity, names, revision=fetched.revision, streamed=streamed)


def _names(source: str, place: str) -> tuple[str, ...]:
    """What a model goes by, each once: by what the user called it, and by what its configuration recorded."""
    recorded: object = None
    config = Path(place) / "config.json"
    if config.is_file():  # the loaded configuration says where it was loaded from instead
        recorded = json.loads(config.read_text(encoding="utf-8")).get("_name_or_path")
    found = [source] if source in BUILT_IN else list(_names_of_place(source))
    if isinstance(recorded, str) and recorded:
        found += _names_of_place(recorded)
    return tuple(dict.fromkeys(found))


def _names_of_place(place: str) -> Iterator[str]:
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


@contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    """Turns what loaders raise about a bad file into one error that names the model."""
    try:
        yield
    except (ActExportError, MemoryError):
        raise
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"can't load {name}: {first_line}") from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    level = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
