"""The keys of a GGUF file: each is used, known to be harmless, or the file is refused.

What has the architecture's own prefix says how the model computes. The ones that an architecture's settings take are
noted as they are taken; of the others, only values that change nothing are let through.
"""

from __future__ import annotations

import math
from typing import Any

from act_export.checkpoint.gguf.header import GgufFile
from act_export.errors import CheckpointError, shown

LARGEST_COUNT = 1 << 31
_TOKENIZER, _ID = "tokenizer.ggml.", "_token_id"
_IDS = {_TOKENIZER + name + _ID for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}

# Keys that settings needn't take, with the values that change nothing. None: any value.
_NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.sliding_window": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0.0, 1.0),
    "router_logit_softcapping": (0.0,),
    "rope.scaling.finetuned": None,  # says where the scaling comes from, not what it is
    "tensor_data_layout": ("Meta AI original pth", "reference"),  # how rows of q and k lie, as all such files have them
    "use_parallel_residual": (False,),
}

# Beside the tokenizer's keys, which gguf_tokenizer has, and those of the architecture.
_HARMLESS = (
    "general.",
    "split.",
    "quantize.",
    "imatrix.",
    "mradermacher.",
    "ollama.",
    "prunaai.",
    "unsloth.",
)


class Keys:
    """The keys of one architecture, and which of them were taken."""

    def __init__(self, gguf: GgufFile) -> None:
        """Takes note of nothing yet.

        Raises:
            CheckpointError: If the file doesn't say its architecture, or isn't of a model.
        """
        self.gguf = gguf
        architecture = gguf.keys.get("general.architecture")
        if not isinstance(architecture, str) or not architecture:
            raise self.refused("general.architecture", architecture, "it has to name the model's architecture")
        self.architecture: str = architecture
        if (kind := gguf.keys.get("general.type", "model")) != "model":
            raise self.refused("general.type", kind, "only files of a whole model can be loaded")
        self.taken: set[str] = set()

    def refused(self, key: str, value: object, why: str) -> CheckpointError:
        """An error that names a key and its value."""
        said = f"has no {key}" if value is None else f"has {key} = {shown(value)}"
        return CheckpointError(f"can't load {self.gguf.path}: it {said}; {why}")

    def full(self, name: str) -> str:
        """A key's whole name."""
        return f"{self.architecture}.{name}"

    def has(self, name: str) -> bool:
        """Whether there is such a key."""
        return self.full(name) in self.gguf.keys

    def take(self, name: str) -> Any:
        """A key's value, whatever it is, noted as used; None if there is none."""
        self.taken.add(name)
        return self.gguf.keys.get(self.full(name))

    def count(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number, the same for all layers.

        Args:
            name: Of the key, without the architecture.
            default: Where there is no such key; None if it is needed.
            least: That the number may be.

        Raises:
            CheckpointError: If it is something else, or beyond 2^31.
        """
        value = self.take(name)
        if value is None and default is not None:
            return default
        if isinstance(value, list):
            raise self.refused(
                self.full(name),
                value,
                "models are verified whose layers are all alike, with one number for all; convert "
                "the original checkpoint to safetensors and pass that",
            )
        if type(value) is not int or not least <= value <= LARGEST_COUNT:
            raise self.refused(self.full(name), value, f"a whole number from {least} to {LARGEST_COUNT} is needed")
        return value

    def number(self, name: str, default: float | None = None, *, positive: bool = True) -> float:
        """A finite number.

        Args:
            name: Of the key, without the architecture.
            default: Where there is no such key; None if it is needed.
            positive: Whether it has to be above 0.

        Raises:
            CheckpointError: If it is something else.
        """
        value = self.take(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refused(self.full(name), value, "a finite number is needed")
        if positive and value <= 0:
            raise self.refused(self.full(name), value, "a number above 0 is needed")
        return float(value)

    def must_be(self, name: str, expected: float, why: str) -> None:
        """Raises CheckpointError if there is such a key, and it has another value."""
        value = self.take(name)
        if value is not None and (isinstance(value, str | list) or not math.isclose(value, expected, rel_tol=1e-5)):
            raise self.refused(self.full(name), value, f"{why}, which needs {expected:g}")

    def check_all_taken(self) -> list[str]:
        """What is said of keys that nothing was made of.

        Returns:
            A sentence for each that may matter to somebody, though not to the logits.

        Raises:
            CheckpointError: If a key that may change what the model computes was taken by nothing.
        """
        remarks = []
        nobodys = ids_of_no_token(self.gguf)
        for key, value in self.gguf.keys.items():
            prefix = f"{self.architecture}."
            if key.startswith(prefix):
                name = key.removeprefix(prefix)
                if name in self.taken:
                    continue
                if name in _NEUTRAL and ((known := _NEUTRAL[name]) is None or value in known):
                    continue
                raise self.refused(
                    key,
                    value,
                    "it may change what the model computes, and isn't applied; convert the original "
                    "checkpoint to safetensors and pass that",
                )
            if key.startswith("general.sampling."):
                remarks.append(f"{key} = {shown(value)} isn't kept: sampling is up to who generates")
            elif key in nobodys:
                remarks.append(
                    f"{key} = {shown(value)} isn't one of the {_tokens(self.gguf)} tokens; it counts as none"
                )
            elif not key.startswith((*_HARMLESS, "tokenizer.")):
                remarks.append(f"the key {key} = {shown(value)} isn't known and was left out")
        return remarks


def token_id(gguf: GgufFile, name: str) -> int | None:
    """The id of a token with a part in the text, such as "eos"; None if the file has none.

    Files say -1, or the largest number of 32 bits, where they mean none.

    Raises:
        CheckpointError: If it is no whole number.
    """
    return _id_of(gguf, f"{_TOKENIZER}{name}{_ID}")


def ids_of_no_token(gguf: GgufFile) -> list[str]:
    """The keys of ids that are no token's."""
    return [key for key in gguf.keys if key in _IDS and _id_of(gguf, key) is None]


def special_tokens(gguf: GgufFile) -> dict[str, int | None]:
    """The ids of the tokens bos, eos, unk and pad, as llama.cpp has them where the file doesn't say.

    Raises:
        CheckpointError: If one is no whole number.
    """
    pieces = gguf.keys.get(f"{_TOKENIZER}model") == "llama"
    found = {}
    for name, stored, default in (
        ("bos", "bos", 1),
        ("eos", "eos", 2),
        ("unk", "unknown", 0),
        ("pad", "padding", None),
    ):
        token = token_id(gguf, stored)
        found[name] = default if token is None and pieces and (default or 0) < _tokens(gguf) else token
    return found


def _id_of(gguf: GgufFile, key: str) -> int | None:
    value = gguf.keys.get(key)
    if value is not None and type(value) is not int:
        raise CheckpointError(f"can't load {gguf.path}: it has {key} = {shown(value)}; a token's number is needed")
    return value if value is not None and 0 <= value < _tokens(gguf) else None


def _tokens(gguf: GgufFile) -> int:
    """How many tokens there are: the tokenizer's, or where there is none, the model's."""
    tokens, embedding = gguf.keys.get(f"{_TOKENIZER}tokens"), gguf.tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding is not None else LARGEST_COUNT
    return min(len(tokens), rows) if isinstance(tokens, list) else rows
