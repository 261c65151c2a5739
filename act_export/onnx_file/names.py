"""Names of a graph's inputs and outputs, and of the files beside it."""

from __future__ import annotations

from dataclasses import dataclass

from act_export.calibration.file import Calibration

IDS, EMBEDDINGS = "input_ids", "inputs_embeds"  # what new tokens are given as: one of them
MASK, POSITIONS = "attention_mask", "position_ids"
LOGITS, LOGITS_TO_KEEP = "logits", "logits_to_keep"
PAST, PRESENT = "past_key_values.", "present."  # cache: before "LAYER.key" or "LAYER.value", going in and coming out
PAST_SINKS, PRESENT_SINKS = "past_sink_scores.", "present_sink_scores."  # sink state: before the number of a layer
EMBEDDING_FILE = "embedding.onnx"
GENAI_CONFIG = "genai_config.json"  # of onnxruntime-genai, beside a model


@dataclass(frozen=True)
class GraphNames:
    """Names of the graph's inputs and outputs, as optimum calls them, in order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, num_layers: int, calibration: Calibration | None, tokens: str = IDS) -> GraphNames:
        """Names for a model with this many layers; calibrated layers carry sink state too."""
        sinks = tuple(calibration.heads) if calibration is not None else ()
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
