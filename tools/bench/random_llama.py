#!/usr/bin/env python3
"""Writes a checkpoint with random weights in the shape of Llama-2-7B, to measure speed where there are no real weights.

    tools/bench/random_llama.py --out FOLDER [--layers 32] [--heads 32] [--kv-heads 32] [--hidden 4096] ...

The folder is one of transformers: config.json and model-*.safetensors in bfloat16, without a tokenizer. Shards are
written one after the other, so that memory holds one of them. The shape fits the recipes llama-2-7b-chat-*.

Attention of random weights is nearly uniform and has no sinks, so calibration would have nothing to do. Some tokens of
the vocabulary are therefore sinks: their embeddings have a direction in common, all tokens' embeddings have another,
and of each head a few dimensions that rotary embedding hardly turns match the one with the other. What is left of the
weights adds little to the residual stream, so that this holds in all layers.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from act_export.commands.console import run_program

ROPE_THETA = 10_000.0
CONTEXT = 4096
DEVIATION = 0.02  # of random weights
SHARD_BYTES = 2**31
COMMON, SINK = 1.0, 3.0  # lengths of the two directions, in those of an embedding's random part
SINK_LOGIT = 9.0  # of a sink token's key with any query: a few of them draw most of the attention of thousands
MATCHED_PAIRS = 2  # of a head's dimensions, the slowest that rotary embedding turns


@dataclass(frozen=True)
class Shape:
    """Of a llama model; names as in its configuration."""

    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    hidden: int = 4096
    intermediate: int = 11008
    vocabulary: int = 32000
    sink_every: int = 512

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that don't fit."""
        if self.hidden % self.heads or self.hidden // self.heads % 2 or self.head_size < 2 * MATCHED_PAIRS:
            raise ValueError(
                f"--hidden {self.hidden} isn't --heads {self.heads} times an even head size of {2 * MATCHED_PAIRS} or "
                "more"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"--kv-heads {self.kv_heads} doesn't divide --heads {self.heads}")

    @property
    def head_size(self) -> int:
        """Of queries, keys and values."""
        return self.hidden // self.heads

    @property
    def config(self) -> dict[str, Any]:
        """For transformers."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": CONTEXT,
            "rope_theta": ROPE_THETA,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
        }


def main() -> int:
    arguments = parse_arguments()
    shape = Shape(**{name: getattr(arguments, name) for name in Shape.__dataclass_fields__})
    size = write_checkpoint(arguments.out, shape, arguments.seed)
    print(f"{arguments.out}: {size / 1e9:.2f} GB of random weights")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="which must not exist, or be empty")
    for name, field in Shape.__dataclass_fields__.items():
        help_text = "one token of so many is a sink (default: %(default)s)" if name == "sink_every" else None
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(
            option, type=positive, metavar="N", default=field.default, help=help_text or "(%(default)s)"
        )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    arguments = parser.parse_args()
    try:
        Shape(**{name: getattr(arguments, name) for name in Shape.__dataclass_fields__})
    except ValueError as error:
        parser.error(str(error))
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        parser.error(f"--out {arguments.out} exists and isn't an empty folder")
    return arguments


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def write_checkpoint(folder: Path, shape: Shape, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes a checkpoint into a folder; returns the size of its weights in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, torch.Tensor] = {}
    files: list[list[str]] = []
    written = 0

    def flush() -> None:
        save_file(shard, folder / partial_name(len(files)), metadata={"format": "pt"})
        files.append(list(shard))
        shard.clear()

    for name, tensor in weights(shape, seed):
        if shard and size_of(shard) + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor
        written += tensor.nbytes
    flush()
    index: dict[str, Any] = {"metadata": {"total_size": written}, "weight_map": {}}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        (folder / partial_name(number)).rename(folder / final)
        index["weight_map"] |= dict.fromkeys(names, final)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(shape.config, indent=2) + "\n", encoding="utf-8")
    return written


def partial_name(number: int) -> str:
    return f"part-{number}.safetensors"


def size_of(shard: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in shard.values())


def weights(shape: Shape, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights by name, in bfloat16, one at a time."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, deviation: float = DEVIATION) -> torch.Tensor:
        return torch.empty(rows, columns).normal_(std=deviation, generator=generator)

    def stored(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(torch.bfloat16).contiguous()

    hidden, size = shape.hidden, shape.head_size
    common, sink = torch.linalg.qr(normal(hidden, 2)).Q.T
    embeddings = normal(shape.vocabulary, hidden)
    unit = DEVIATION * math.sqrt(hidden)  # length of an embedding's random part
    embeddings += COMMON * unit * common
    embeddings[:: shape.sink_every] += SINK * unit * sink
    yield "model.embed_tokens.weight", stored(embeddings)
    del embeddings
    little = 1 / (2 * math.sqrt(shape.layers) * hidden)  # all layers together add no more than an embedding is long
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        yield f"{prefix}.input_layernorm.weight", stored(torch.ones(hidden))
        for name, heads, direction, share in (
            ("q_proj", shape.heads, common, query_share()),
            ("k_proj", shape.kv_heads, sink, key_share()),
        ):
            projection = normal(heads * size, hidden)
            match_direction(projection.view(heads, size, hidden), direction, share * math.sqrt(hidden), hidden)
            yield f"{attention}.{name}.weight", stored(projection)
        yield f"{attention}.v_proj.weight", stored(normal(shape.kv_heads * size, hidden))
        yield f"{attention}.o_proj.weight", stored(normal(hidden, hidden, little))
        yield f"{prefix}.post_attention_layernorm.weight", stored(torch.ones(hidden))
        yield f"{prefix}.mlp.gate_proj.weight", stored(normal(shape.intermediate, hidden))
        yield f"{prefix}.mlp.up_proj.weight", stored(normal(shape.intermediate, hidden))
        yield f"{prefix}.mlp.down_proj.weight", stored(normal(hidden, shape.intermediate, little))
    yield "model.norm.weight", stored(torch.ones(hidden))
    yield "lm_head.weight", stored(normal(shape.vocabulary, hidden))


def query_share() -> float:
    """Part of a normalized ordinary token that lies along the common direction."""
    return COMMON / math.sqrt(1 + COMMON**2)


def key_share() -> float:
    """Part of a normalized sink token that lies along the sinks' direction."""
    return SINK / math.sqrt(1 + COMMON**2 + SINK**2)


def match_direction(projection: torch.Tensor, direction: torch.Tensor, length: float, hidden: int) -> None:
    """Makes the slowest dimensions of each head (heads, size, hidden) read a direction, in place.

    A token whose part along the direction is `length` gets values whose product with another such token's, over all
    matched dimensions and divided by the root of the head size, is `SINK_LOGIT`.
    """
    size = projection.shape[1]
    value = math.sqrt(SINK_LOGIT * math.sqrt(size) / MATCHED_PAIRS)
    # Rotary embedding turns dimension i with i + size / 2; the last of each half are the slowest.
    for pair in range(MATCHED_PAIRS):
        projection[:, size // 2 - 1 - pair] = value / length * direction
        projection[:, size - 1 - pair] = 0.0


if __name__ == "__main__":
    run_program(main)
