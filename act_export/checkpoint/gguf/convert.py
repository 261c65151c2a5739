"""GGUF files as checkpoint folders: converted once, compared with the file, and kept in the user's cache folder.

transformers converts the weights; the configuration comes from the file's keys, and `witness` compares the result
with the file before anybody uses it. What can't be verified is refused.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from act_export.calibration.file import ModelIdentity
from act_export.checkpoint.gguf import entry as gguf_entry
from act_export.checkpoint.gguf.header import GgufFile
from act_export.checkpoint.gguf.keys import Keys
from act_export.checkpoint.gguf.plan import configuration, pairs_of, shapes_of
from act_export.checkpoint.gguf.settings import Settings, read_settings
from act_export.checkpoint.gguf.shards import read_gguf, write_joined
from act_export.checkpoint.gguf.tokenizer import stop_tokens, tokenizer_by
from act_export.checkpoint.gguf.weights import save_weights
from act_export.checkpoint.gguf.witness import compare
from act_export.checkpoint.loader_errors import quiet_transformers, readable_errors
from act_export.checkpoint.low_memory import return_freed
from act_export.errors import CheckpointError
from act_export.files import cache_folder
from act_export.staging import staging_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def converted(gguf: Path) -> Path:
    """Folder with a GGUF file's model as a checkpoint, converted now unless that was done before.

    Args:
        gguf: The file, or any of its shards.

    Raises:
        CheckpointError: If the file is damaged, can't be converted to the same model, or can't be written.
    """
    header, paths = read_gguf(gguf)
    place = cache_folder() / "checkpoints"
    try:
        folder = place / gguf_entry.entry_name(paths)
    except OSError as error:
        raise CheckpointError(f"can't read {gguf}: {error.strerror or error}") from error
    try:
        if gguf_entry.is_whole(folder):
            return folder
        place.mkdir(parents=True, exist_ok=True)
        with staging_folder(place, folder.name) as own:
            made = own / "entry"
            made.mkdir()
            remarks = _convert(gguf, header, len(paths) > 1, own, made)
            report = compare(gguf, made)
            gguf_entry.write_record(made, remarks=remarks, report=asdict(report))
            gguf_entry.publish(made, folder, own)
            return_freed()
    except OSError as error:
        raise CheckpointError(
            f"can't write the converted checkpoint to {place}: {error.strerror or error}; set XDG_CACHE_HOME to "
            f"another place"
        ) from error
    return folder


def shape_of(header: GgufFile) -> ModelIdentity:
    """The identity of a file's model by its keys: without a fingerprint.

    Raises:
        CheckpointError: If the file can't be converted.
    """
    settings = read_settings(Keys(header))
    return ModelIdentity(settings.model_type, settings.values["num_hidden_layers"], settings.heads.queries)


def remarks_of(folder: Path) -> tuple[str, ...]:
    """What a user should know of a conversion, in sentences: what the file says that was left out or replaced.

    Args:
        folder: As `converted` gives it; of other folders there is nothing to say.
    """
    return gguf_entry.remarks_in(folder)


def _convert(gguf: Path, header: GgufFile, in_shards: bool, own: Path, made: Path) -> list[str]:
    """Writes the checkpoint to the folder `made`, with `own` for what is needed meanwhile; returns remarks."""
    keys = Keys(header)
    settings = read_settings(keys)
    with readable_errors(str(gguf)), quiet_transformers():
        model = _model_of(settings)
        pairs = pairs_of(header, keys.architecture, settings, shapes_of(model))
    whole = own / "model.gguf"  # transformers knows such files by this ending
    if in_shards:
        write_joined(header, whole)
    else:
        whole.symlink_to(gguf.resolve())
    with readable_errors(str(gguf)), quiet_transformers():
        tokenizer, remarks = tokenizer_by(header, whole)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        save_weights(header, pairs, model, own, made)
        _save_settings(model, settings, stop_tokens(header), made)
    return [*settings.remarks, *remarks]


def _model_of(settings: Settings) -> PreTrainedModel:
    """The model of a file's settings, without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from act_export.checkpoint.streamed.weights import model_without_values

    config = configuration(settings)
    return model_without_values(
        lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    )


def _save_settings(model: PreTrainedModel, settings: Settings, stops: list[int], made: Path) -> None:
    """What else `save_pretrained` writes of a model."""
    from transformers import GenerationConfig

    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(made)
    ends = stops[0] if len(stops) == 1 else stops
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=settings.values["bos_token_id"],
        eos_token_id=ends or None,
        pad_token_id=settings.values["pad_token_id"],
    )
    generation.save_pretrained(made)
