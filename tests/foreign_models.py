"""Tiny models with random weights in the form that onnxruntime-genai's builder writes, and what they should compute."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from foreign_graph import CONTEXT, DATA, HIDDEN, INNER, PAD, STOP, VOCABULARY, Arrays, Graph, rms, turn
from numpy.typing import NDArray
from onnx import TensorProto, helper

from act_export.calibration.file import Calibration
from act_export.calibration.reference import sink_margins
from act_export.calibration.reference_operator import calibrated_attention

CALIBRATION = Calibration({0: (1,), 1: (0, 3)}, beta={0: (0.4,), 1: (0.2, 1.7)}, threshold=0.1)
NOTHING = replace(CALIBRATION, beta=1.0)


@dataclass(frozen=True)
class Decoder:
    """A decoder of GroupQueryAttention.

    Attributes:
        layers: Their number.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_size: Of each.
        rotary_size: How much of a head the rotary embedding turns; 0 for all.
        element_type: Of weights, cache and logits.
        packed: Query, key and value come from one projection.
        rotary: The attention embeds positions.
        interleaved: How.
        norms: The attention norms query and key.
        windows: Keys that a row sees, by layer, over and over; -1 for all.
        short_caches: Layers with a window keep no more of their cache.
        softcap: Of the logits of the attention; 0 for none.
        scale: Of these; 0 leaves it out of the node.
        says_head_size: In the shapes of the cache.
        seed: Of the weights.
    """

    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 16
    rotary_size: int = 0
    element_type: int = TensorProto.FLOAT
    packed: bool = True
    rotary: bool = True
    interleaved: bool = False
    norms: bool = False
    windows: tuple[int, ...] = (-1,)
    short_caches: bool = False
    softcap: float = 0.0
    scale: float = 0.25
    says_head_size: bool = False
    seed: int = 0
    attention_attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(helper.tensor_dtype_to_np_dtype(self.element_type))

    def window(self, layer: int) -> int:
        return self.windows[layer % len(self.windows)]

    def weights(self) -> Arrays:
        """By name, in the type that is stored."""
        random = np.random.default_rng(self.seed)

        def matrix(rows: int, columns: int, gain: float = 1.0) -> NDArray[Any]:
            return random.normal(0, gain * rows**-0.5, (rows, columns))

        def norm(size: int) -> NDArray[Any]:
            return random.uniform(0.6, 1.4, size)

        widths = {"q": self.heads * self.head_size, "k": self.kv_heads * self.head_size}
        found = {"embed": random.normal(0, 1, (VOCABULARY, HIDDEN)), "lm_head": matrix(HIDDEN, VOCABULARY, 2.0)}
        for layer in range(self.layers):
            at = f"layers.{layer}."
            found |= {
                at + "norm": norm(HIDDEN),
                at + "q": matrix(HIDDEN, widths["q"], 1.2),
                at + "k": matrix(HIDDEN, widths["k"], 1.2),
                at + "v": matrix(HIDDEN, widths["k"]),
                at + "o": matrix(widths["q"], HIDDEN, 1.5),
                at + "q_norm": norm(self.head_size),
                at + "k_norm": norm(self.head_size),
                at + "mlp_norm": norm(HIDDEN),
                at + "gate": matrix(HIDDEN, INNER),
                at + "up": matrix(HIDDEN, INNER),
                at + "down": matrix(INNER, HIDDEN),
            }
        found["norm"] = norm(HIDDEN)
        found["lm_head"][:, [PAD, STOP]] = 0  # which nobody chooses then
        pairs = (self.rotary_size or self.head_size) // 2
        angles = np.outer(np.arange(CONTEXT), 100.0 ** (-np.arange(pairs) / pairs))
        found |= {"cos_cache": np.cos(angles), "sin_cache": np.sin(angles)}
        return {name: values.astype(self.dtype) for name, values in found.items()}

    def model(self) -> onnx.ModelProto:
        """The graph with its weights."""
        return Graph(self).model()

    def save(self, path: Path, *, external: bool = False) -> Path:
        """Writes the graph; its weights in a file beside it if they should lie there."""
        model = self.model()
        if external:
            onnx.save(model, path, save_as_external_data=True, location=DATA, size_threshold=256)
        else:
            onnx.save(model, path)
        return path

    def save_folder(self, folder: Path, *, external: bool = True, **changes: Any) -> Path:
        """A folder for onnxruntime-genai; `changes` are of genai_config.json's decoder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder / "model.onnx", external=external)
        (folder / "genai_config.json").write_text(json.dumps(self.genai_config(**changes), indent=4))
        (folder / "tokenizer_config.json").write_text('{"model_max_length": 192}')
        return folder

    def genai_config(self, **changes: Any) -> dict[str, Any]:
        """As onnxruntime-genai's builder writes it."""
        decoder = {
            "session_options": {"log_id": "onnxruntime-genai", "intra_op_num_threads": 1, "provider_options": []},
            "filename": "model.onnx",
            "head_size": self.head_size,
            "hidden_size": HIDDEN,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
        }
        return {
            "model": {
                "bos_token_id": STOP,
                "context_length": CONTEXT,
                "decoder": {**decoder, **changes},
                "eos_token_id": STOP,
                "pad_token_id": PAD,
                "type": "llama",
                "vocab_size": VOCABULARY,
            },
            "search": {
                "do_sample": False,
                "early_stopping": True,
                "max_length": CONTEXT,
                "num_beams": 1,
                "num_return_sequences": 1,
                "past_present_share_buffer": True,
                "repetition_penalty": 1.0,
                "temperature": 1.0,
                "top_k": 50,
                "top_p": 1.0,
            },
        }


class Reference:
    """What a decoder should compute, in PyTorch with the operator's reference; a call after another.

    Attributes:
        smallest_margin: Least distance of a sink score from the threshold so far: below it rounding decides.
        sums: Column sums by calibrated layer, (batch, heads, total, 1).
    """

    def __init__(self, decoder: Decoder, calibration: Calibration | None = None) -> None:
        self._decoder, self._calibration = decoder, calibration
        weights = {name: values.astype(np.float32) for name, values in decoder.weights().items()}
        self._weights = {name: torch.from_numpy(values) for name, values in weights.items()}
        self._cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.sums: dict[int, torch.Tensor] = {}
        self.smallest_margin = float("inf")

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits (batch, sequence, vocabulary) of new tokens; the mask has the old ones too."""
        weights, real = self._weights, torch.from_numpy(mask)
        positions = (real.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        hidden = weights["embed"][torch.from_numpy(ids)]
        for layer in range(self._decoder.layers):
            at = f"layers.{layer}."
            mixed = self._attention(rms(hidden, weights[at + "norm"]), layer, real, positions)
            hidden = hidden + mixed @ weights[at + "o"]
            normed = rms(hidden, weights[at + "mlp_norm"])
            gated = torch.nn.functional.silu(normed @ weights[at + "gate"]) * (normed @ weights[at + "up"])
            hidden = hidden + gated @ weights[at + "down"]
        return (rms(hidden, weights["norm"]) @ weights["lm_head"]).numpy()

    def _attention(self, normed: torch.Tensor, layer: int, real: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        decoder, at = self._decoder, f"layers.{layer}."
        query, key, value = (normed @ self._weights[at + name] for name in "qkv")
        query = self._embed(query, decoder.heads, at + "q_norm", positions)
        key = self._embed(key, decoder.kv_heads, at + "k_norm", positions)
        share = self._calibration.layer(layer) if self._calibration is not None else None
        heads = share.heads if share is not None else ()
        batch = normed.shape[0]
        empty = torch.zeros(batch, decoder.kv_heads, 0, decoder.head_size)
        past_key, past_value = self._cache.get(layer, (empty, empty))
        terms = {
            "scale": decoder.scale or decoder.head_size**-0.5,
            "softcap": decoder.softcap,
            "sliding_window": decoder.window(layer),
        }
        found = calibrated_attention(
            query,
            key,
            value,
            past_key,
            past_value,
            self.sums.get(layer, torch.zeros(batch, len(heads), 0, 1)),
            real,
            torch.tensor([share.strengths]) if share is not None else None,
            num_heads=decoder.heads,
            kv_num_heads=decoder.kv_heads,
            calibrated_heads=heads,
            threshold_mode=share.threshold_mode if share is not None else "absolute",
            **terms,
        )
        self._cache[layer] = found.present_key, found.present_value
        if share is not None:
            self.sums[layer] = found.present_sink_scores
            margins = sink_margins(
                found.present_sink_scores.squeeze(-1),
                real[:, None] != 0,
                threshold=share.threshold,
                threshold_mode=share.threshold_mode,
                sliding_window=terms["sliding_window"],
            )
            self.smallest_margin = min(self.smallest_margin, float(margins.abs().min()))
        return found.output

    def _embed(self, flat: torch.Tensor, heads: int, norm: str, positions: torch.Tensor) -> torch.Tensor:
        rows = flat.view(*flat.shape[:2], heads, -1)
        if self._decoder.norms:
            rows = rms(rows, self._weights[norm], 1e-6)
        if self._decoder.rotary:
            cos, sin = (self._weights[name][positions].unsqueeze(2) for name in ("cos_cache", "sin_cache"))
            turned, rest = rows.split([2 * cos.shape[-1], rows.shape[-1] - 2 * cos.shape[-1]], -1)
            rows = torch.cat([turn(turned, cos, sin, self._decoder.interleaved), rest], -1)
        return rows.reshape(flat.shape)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Tokens that are neither padding nor the end."""
    return [int(token) for token in np.random.default_rng(seed).integers(2, VOCABULARY, length)]


def hashes(place: Path) -> dict[str, str]:
    """Digest of each file of a folder, by its path there."""
    files = sorted(path for path in place.rglob("*") if path.is_file())
    return {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
