"""GGUF files as checkpoint folders: converted once, and kept in the user's cache folder by their content."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from act_export.checkpoint.loader_errors import quiet_transformers, readable_errors
from act_export.errors import CheckpointError
from act_export.files import cache_folder


def converted(gguf: Path) -> Path:
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
    with readable_errors(str(gguf)), quiet_transformers():
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
