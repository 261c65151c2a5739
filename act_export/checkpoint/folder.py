"""What a checkpoint's files say before any weight is read: whether it is one, of what, and in which files it lies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from act_export.checkpoint.small_files import read_settings
from act_export.checkpoint.stored.index import WHOLE_WEIGHTS, weights_in
from act_export.errors import CheckpointError

_OTHER_TASKS = re.compile(
    r"For(MaskedLM|PreTraining|SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice"
    r"|NextSentencePrediction)$"
)
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # transformers prefers them to others
_MODEL_CLASSES = ("AutoConfig", "AutoModelForCausalLM")  # of a checkpoint's own code
_DEQUANTIZED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}  # transformers can undo these
_EXPORTED = "exported already: act-export graft calibrates it; other commands take the checkpoint it was made from"
_OTHER_FORMATS = {
    "gguf": "pass one .gguf file by its path",
    "onnx": f"it is {_EXPORTED}",
    "safetensors": "transformers looks for model.safetensors: rename it, or save it again with save_pretrained",
    "bin": "transformers looks for pytorch_model.bin: rename it, or save it again with save_pretrained",
    "pt": "load it in PyTorch and save it with save_pretrained",
    "pth": "load it in PyTorch and save it with save_pretrained",
    "ckpt": "load it in PyTorch and save it with save_pretrained",
    "h5": "convert it to PyTorch with an older transformers and save it with save_pretrained",
    "msgpack": "convert it to PyTorch with an older transformers and save it with save_pretrained",
}


def check_is_checkpoint(folder: Path, name: str) -> dict[str, Any]:
    """The settings of a folder's config.json, as they stand there.

    Raises:
        CheckpointError: If it is no checkpoint's folder, or the file can't be read.
    """
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(_adapter_message(folder, name))
    if not (folder / "config.json").is_file():
        raise CheckpointError(_missing_configuration_message(folder, name))
    return read_settings(folder / "config.json", name)


def check_configuration(folder: Path, name: str, *, trust_remote_code: bool = False) -> None:
    """Refuses a folder whose configuration can't be loaded as a causal language model.

    Args:
        folder: With the small files; weights need not be there yet.
        name: What the user calls it.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Raises:
        CheckpointError: With what is wrong and what to do.
    """
    config = check_is_checkpoint(folder, name)
    if not trust_remote_code:
        _refuse_code(config, name)
    _check_model_type(config, name)
    _refuse_quantized(config, name)
    architectures = config.get("architectures") or []
    if architectures and all(_OTHER_TASKS.search(str(architecture)) for architecture in architectures):
        raise CheckpointError(
            f"{name} is a {architectures[0]}, which is no causal language model: it doesn't generate text, so there is "
            f"nothing to calibrate"
        )


def weight_files(names: Iterable[str], folder: Path, name: str) -> tuple[str, ...]:
    """Those of a checkpoint's files that hold its weights, of one format: safetensors where there are both.

    Args:
        names: Of all its files.
        folder: Where the index of sharded weights is.
        name: What the user calls it.

    Raises:
        CheckpointError: If there are none that transformers reads, with what to do with what there is.
    """
    there = set(names)
    distributed = min((each for each in there if _DISTRIBUTED.fullmatch(each)), default=None)
    if distributed is not None:
        raise CheckpointError(
            f"{name} holds {distributed}, a part of a checkpoint of several processes, which would be loaded in place "
            f"of other weights; load it where it was trained and save it with save_pretrained"
        )
    found = weights_in(there, folder, name)
    if not found:
        raise CheckpointError(_missing_weights_message(there, name))
    return found


def code_files(config: Mapping[str, Any], classes: Iterable[str] = _MODEL_CLASSES) -> tuple[str, ...]:
    """Files of a checkpoint's own code, from `auto_map` of a configuration or of a tokenizer's configuration."""
    given = config.get("auto_map")
    entries = [given.get(each) for each in classes] if isinstance(given, dict) else [given]
    flat = [one for entry in entries for one in (entry if isinstance(entry, list | tuple) else [entry])]
    found = []
    for reference in flat:
        if isinstance(reference, str):
            repository, apart, place = reference.rpartition("--")
            file = place.rpartition(".")[0].replace(".", "/") + ".py"
            found.append(f"{file} of {repository}" if apart else file)
    return tuple(dict.fromkeys(found))


def code_message(name: str, files: Iterable[str], what: str = "config.json") -> str:
    """That a checkpoint can only be loaded with its own code."""
    return (
        f"{name} needs code of its own, which isn't run unless asked for: {', '.join(files)} (auto_map in {what}); "
        f"read it, and if you trust it pass --trust-remote-code (in Python trust_remote_code=True)"
    )


def _refuse_code(config: Mapping[str, Any], name: str) -> None:
    """Where transformers has the model itself, the checkpoint's code isn't needed, and isn't run."""
    from transformers.models.auto import modeling_auto

    files = code_files(config)
    known = (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    if files and not any(config.get("model_type") in names for names in known):
        raise CheckpointError(code_message(name, files))


def _check_model_type(config: Mapping[str, Any], name: str) -> None:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if code_files(config, ["AutoConfig"]):
        return  # its own code knows
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError(
            f"config.json of {name} has no model_type, so transformers can't tell what model it is; get the file that "
            f'belongs to the weights, or add e.g. "model_type": "llama"'
        )
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{name} has model_type {model_type!r}, which transformers {transformers.__version__} doesn't know; a "
            f"newer one may: pip install -U transformers"
        )


def _refuse_quantized(config: Mapping[str, Any], name: str) -> None:
    text = config.get("text_config")
    found = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if not isinstance(found, dict):
        return
    in_bits = [bits for bits in (4, 8) if found.get(f"load_in_{bits}bit")]
    method = str(found.get("quant_method") or ("bitsandbytes" if in_bits else "unknown"))
    bits = found.get("bits") or next(iter(in_bits), None)
    described = f"{method}, {bits} bits" if bits else method
    undone = _DEQUANTIZED.get(method)
    advice = (
        f"save a dequantized copy first: AutoModelForCausalLM.from_pretrained(MODEL, dtype='bfloat16', "
        f"quantization_config={undone}(dequantize=True)).save_pretrained(FOLDER)"
        if undone
        else "pass the model that it was made from"
    )
    raise CheckpointError(
        f"{name} is quantized ({described}); act-export needs weights in float32, bfloat16 or float16, and quantizes "
        f"with --dtype int4 or int8 itself: {advice}"
    )


def _adapter_message(folder: Path, name: str) -> str:
    adapter = read_settings(folder / "adapter_config.json", name)
    base = adapter.get("base_model_name_or_path") or "BASE"
    kind = adapter.get("peft_type") or "PEFT"
    return (
        f"{name} is an adapter ({kind}, adapter_config.json) for {base}; merge it into that model and pass the result: "
        f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), ADAPTER).merge_and_unload()"
        f".save_pretrained(FOLDER), and the tokenizer's save_pretrained(FOLDER)"
    )


def _missing_configuration_message(folder: Path, name: str) -> str:
    names = sorted(path.name for path in folder.iterdir())
    ggufs = [each for each in names if each.endswith(".gguf")]
    if ggufs:
        return f"{name} has no config.json, so it isn't a checkpoint folder; pass the file itself: {folder / ggufs[0]}"
    weights = [each for each in names if each.endswith((".safetensors", ".bin", ".pt", ".pth"))]
    if weights:
        return (
            f"{name} has weights ({weights[0]}) but no config.json, which says what model they are of; copy it, with "
            f"the tokenizer's files, from where the weights came from"
        )
    graphs = [each for each in names if each.endswith(".onnx")]
    hint = f"; {graphs[0]} is {_EXPORTED}" if graphs else ""
    return f"{name} has no config.json, so it isn't a checkpoint folder{hint}"


def _missing_weights_message(names: Iterable[str], name: str) -> str:
    kinds: dict[str, list[str]] = {}
    for each in sorted(names):
        kinds.setdefault(each.rpartition(".")[2], []).append(each)
    found = [f"{kinds[kind][0]}: {advice}" for kind, advice in _OTHER_FORMATS.items() if kind in kinds]
    hint = f"; there is {'; and '.join(found)}" if found else "; get model.safetensors from where it came from"
    return f"{name} has a config.json but no weights ({' or '.join(WHOLE_WEIGHTS)}, whole or in shards){hint}"
