"""How text is cut before byte pairs are merged, by the name that a GGUF file has for it (tokenizer.ggml.pre).

From https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp; a vocabulary's merges were learned on text
that was cut in one way, and another way gives other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_LETTERS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_REST_WITH_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Split:
    """One way of cutting.

    Attributes:
        patterns: Regular expressions, one after the other; every match is a piece, and what is between.
        whole_tokens: Whether a piece that is a token stays whole, whatever the merges are.
        begins: Whether texts begin with the first token where the file doesn't say.
    """

    patterns: tuple[str, ...]
    whole_tokens: bool = False
    begins: bool = False

    def steps(self) -> dict[str, Any]:
        """As the `pre_tokenizer` of a tokenizer.json."""
        cuts = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in self.patterns
        ]
        bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {"type": "Sequence", "pretokenizers": [*cuts, bytes_]}


_GPT2 = Split((_LETTERS,))
_DIGITS = Split((r"\p{N}", _LETTERS))
_LLAMA3 = Split((_WORDS + r"|\p{N}{1,3}" + _REST,), whole_tokens=True, begins=True)
_QWEN2 = Split((_WORDS + r"|\p{N}" + _REST,))
_TEKKEN = Split(("|".join(_CASED) + r"|\p{N}" + _REST_WITH_SLASH,), whole_tokens=True, begins=True)
_GPT4O = Split(("|".join(each + _ENDINGS for each in _CASED) + r"|\p{N}{1,3}" + _REST_WITH_SLASH,))

SPLITS: dict[str, Split] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "gigachat", "a.x-4.0", "mellum"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Split(_LLAMA3.patterns)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}
