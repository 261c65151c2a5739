"""Names of a graph's inputs and outputs, and of the files beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from act_export.errors import SessionError
from act_export.files import path_inside
from act_export.json_file import look_up, read_json

IDS, EMBEDDINGS = "input_ids", "inputs_embeds"  # what new tokens are given as: one of them
MASK, POSITIONS = "attention_mask", "position_ids"
LOGITS, LOGITS_TO_KEEP = "logits", "logits_to_keep"
CALIBRATION = "calibration"  # strengths of the heads that can be calibrated; the default's where it isn't given
PAST, PRESENT = "past_key_values.", "present."  # cache: before "LAYER.key" or "LAYER.value", going in and coming out
PAST_SINKS, PRESENT_SINKS = "past_sink_scores.", "present_sink_scores."  # sink state: before the number of a layer
BATCH, SEQUENCE = "batch_size", "sequence_length"  # dimensions: rows, and new tokens of each
PAST_LENGTH, TOTAL_LENGTH = "past_sequence_length", "total_sequence_length"  # tokens before a call, and after it
EMBEDDING_FILE = "embedding.onnx"
GENAI_CONFIG = "genai_config.json"  # of onnxruntime-genai, beside a model


@dataclass(frozen=True)
class GraphNames:
    """Names of the graph's inputs and outputs, as optimum calls them, in order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, num_layers: int, sinks: Sequence[int], tokens: str = IDS) -> GraphNames:
        """Names for a model with this many layers, of which some carry sink state too."""
        cache = [f"{layer}.{part}" for layer in range(num_layers) for part in ("key", "value")]
        return cls(
            inputs=(
                tokens,
                MASK,
                POSITIONS,
                *(PAST + name for name in cache),
                *(f"{PAST_SINKS}{layer}" for layer in sinks),
            ),
            outputs=(
                LOGITS,
                *(PRESENT + name for name in cache),
                *(f"{PRESENT_SINKS}{layer}" for layer in sinks),
            ),
        )


def model_file(path: str | os.PathLike[str]) -> Path:
    """The ONNX file of a path: itself, or of a folder the one that genai_config.json names, else `model.onnx`."""
    file = Path(path)
    if not file.is_dir():
        return file
    genai = file / GENAI_CONFIG
    name = look_up(read_json(genai, error=SessionError), "model", "decoder", "filename") if genai.is_file() else None
    return path_inside(file, "model.onnx" if name is None else name, f"the model of {file}", error=SessionError)
