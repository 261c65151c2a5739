"""MODEL -> a loaded transformers model and tokenizer.

MODEL is a checkpoint folder, a hub id, a GGUF file or a built-in name. GGUF files are converted once; the result stays
in the user's cache folder, by the content of the file. What comes from the hub lies in the hub's own cache folder; from
there it is loaded like any folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from act_export.calibration.file import Calibration, ModelIdentity
from act_export.checkpoint.fetch import Fetched, configuration_of, fetch_checkpoint, is_gguf, names_of
from act_export.checkpoint.identity import identify
from act_export.checkpoint.loader_errors import MEMORY_ADVICE, quiet_transformers, readable_errors
from act_export.checkpoint.low_memory import low_memory_told, return_freed
from act_export.checkpoint.placement import Placement
from act_export.checkpoint.stored.safetensors_file import FLOATS, Stored, StoredTensor
from act_export.checkpoint.tokenizer import tokenizer_of
from act_export.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from act_export.checkpoint.completeness import Contents
    from act_export.checkpoint.streamed.weights import StreamedWeights


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
    fits: Sequence[Calibration] = (),
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
        fits: Calibrations that must be for the model: refused before its weights are loaded.

    Raises:
        CalibrationError: If one of the calibrations isn't for it.
        CheckpointError: If there is no such model, or it can't be read, or it isn't a causal language model.
        ActExportError: If the precision isn't known, the device isn't there, or the model doesn't fit on the devices.
    """
    placement = Placement(dtype, device, device_map)
    if device_map is not None and is_gguf(source):
        raise CheckpointError(
            f"device_map is {device_map!r}, but {source} is a GGUF file, whose weights are converted in this machine's "
            f"memory first; leave out device_map and pass a device"
        )
    fetched = fetch_checkpoint(
        source, revision=revision, token=token, cache_dir=cache_dir, trust_remote_code=trust_remote_code, fits=fits
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
        ActExportError: The same.
    """
    return _load(fetched, Placement(dtype, device, device_map), stream)


def _load(fetched: Fetched, placement: Placement, stream: bool | None = False) -> Checkpoint:
    from act_export.checkpoint.completeness import contents_of
    from act_export.checkpoint.dry_run import empty_model
    from act_export.checkpoint.stored.files import tensors_of
    from act_export.checkpoint.streamed.decide import is_to_be_streamed
    from act_export.checkpoint.text_tower import has_text_tower, loader_of, text_tower

    name = fetched.name
    config = configuration_of(fetched)
    with low_memory_told(f"load {name}", MEMORY_ADVICE):
        try:
            tensors = tensors_of(fetched.folder)
        except CheckpointError as error:
            raise CheckpointError(f"can't load {name}: {error}") from error
    has_tokenizer = any(
        (fetched.folder / file).is_file()
        for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    )
    tokenizer = tokenizer_of(fetched) if has_tokenizer else None
    empty = empty_model(config, loader_of(config), tensors, name, trust_remote_code=fetched.trust_remote_code)
    contents = contents_of(empty, tensors, name, config)
    if is_to_be_streamed(fetched.folder, config, name, stream, tensors):
        return _load_streamed(fetched, config, contents, tokenizer)
    model = _load_whole(fetched, config, type(empty), contents, placement)
    if has_text_tower(config):
        with low_memory_told(f"run {name}", MEMORY_ADVICE):
            model = text_tower(model, name)
    identity = identify(model)
    placement.apply(model, name)
    names = names_of(name, str(fetched.folder))
    return Checkpoint(name, model, tokenizer, identity, names, revision=fetched.revision)


def _load_whole(
    fetched: Fetched,
    config: PreTrainedConfig,
    kind: type[PreTrainedModel],
    contents: Contents,
    placement: Placement,
) -> PreTrainedModel:
    """The model, of that class, with all its weights, which are compared with those of the files."""
    from act_export.checkpoint.completeness import check_report
    from act_export.checkpoint.streamed.weights import set_generation
    from act_export.checkpoint.text_tower import loader_of
    from act_export.checkpoint.witness import check_against_files

    name, folder = fetched.name, str(fetched.folder)
    handed = _handed_over(contents, placement)
    loader: Any = loader_of(config) if handed is None else kind
    with readable_errors(name), quiet_transformers():
        loaded: Any = loader.from_pretrained(
            folder if handed is None else None,
            config=config,
            attn_implementation=None,  # transformers' own choice, whatever the files say
            experts_implementation=None,
            state_dict=handed,
            dtype=placement.stored_dtype,
            device_map=placement.device_map,
            output_loading_info=True,
            trust_remote_code=fetched.trust_remote_code,
        )
    model, report = loaded
    if handed is not None:
        set_generation(model, fetched.folder)
        return_freed()
    check_report(report, model, contents, name)
    placement.check_complete(model, name)
    model.eval().requires_grad_(False)
    with low_memory_told(f"compare {name} with its files", MEMORY_ADVICE):
        check_against_files(model, contents, name)
    loaded_model: PreTrainedModel = model
    return loaded_model


@dataclass(frozen=True)
class _Unread:
    """A tensor in its file, for transformers, which asks for its numbers when it needs them."""

    tensor: Stored

    def __getitem__(self, _: object) -> torch.Tensor:
        return self.tensor.read()


def _handed_over(contents: Contents, placement: Placement) -> dict[str, Any] | None:
    """Weights that transformers gets from here instead of from the files; None where it reads the files itself.

    Those are weights whose names have wrappers, and those of a type other than the model's: it maps files into memory,
    where what it has read of them would stay beside the model.
    """
    tensors, wanted = contents.tensors, placement.stored_dtype
    if isinstance(wanted, str):
        return {name: tensor.read() for name, tensor in tensors.items()} if contents.wrapped else None
    of_other_type = placement.device_map is None and any(
        isinstance(tensor, StoredTensor) and FLOATS.get(tensor.kind, wanted) != wanted for tensor in tensors.values()
    )
    return {name: _Unread(tensor) for name, tensor in tensors.items()} if contents.wrapped or of_other_type else None


def _load_streamed(
    fetched: Fetched, config: PreTrainedConfig, contents: Contents, tokenizer: PreTrainedTokenizerBase | None
) -> Checkpoint:
    from act_export.checkpoint.streamed.weights import hollow_model

    name, folder = fetched.name, fetched.folder
    with readable_errors(name), quiet_transformers():
        model, streamed = hollow_model(folder, config, name, contents, trust_remote_code=fetched.trust_remote_code)
    identity = identify(model, streamed)
    names = names_of(name, str(folder))
    return Checkpoint(name, model, tokenizer, identity, names, revision=fetched.revision, streamed=streamed)
