"""The tokenizer of a GGUF file: made by transformers, set to what the file says, and compared with it.

What can be set is set; what then still differs is said in a sentence each.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from act_export.checkpoint.gguf.header import GgufFile, read_header
from act_export.checkpoint.gguf.keys import ids_of_no_token, special_tokens, token_id
from act_export.checkpoint.gguf.split import SPLITS, Split
from act_export.errors import CheckpointError, shown
from act_export.staging import scratch_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PREFIX = "tokenizer.ggml."
_CONTROL, _USER_DEFINED = 3, 4
_USED = {
    "model", "pre", "tokens", "token_type", "merges", "scores", "bos_token_id", "eos_token_id", "eot_token_id",
    "eom_token_id", "unknown_token_id", "padding_token_id", "add_bos_token", "add_eos_token", "add_space_prefix",
}  # fmt: skip
_HARMLESS = {
    "cls_token_id", "fim_mid_token_id", "fim_pad_token_id", "fim_pre_token_id", "fim_rep_token_id", "fim_sep_token_id",
    "fim_suf_token_id", "mask_token_id", "middle_token_id", "prefix_token_id", "separator_token_id",
    "seperator_token_id", "suffix_token_id", "token_type_count",
}  # fmt: skip
_OFF = {"add_sep_token", "remove_extra_whitespaces"}  # no remark where they are false
_TEMPLATE = "tokenizer.chat_template"
_SPACE = "\u2581"


@dataclass(frozen=True)
class _Said:
    """What a file says of its tokenizer."""

    pieces: bool  # SentencePiece's kind, or byte level
    tokens: list[str]
    kinds: list[int]
    special: dict[str, int]  # name, as transformers has it -> id
    begins: bool
    ends: bool
    space_first: bool | None  # None where it makes no difference
    template: str | None
    split: Split | None


def stop_tokens(gguf: GgufFile) -> list[int]:
    """The tokens after which generation ends: of the text, of a turn and of a message.

    Raises:
        CheckpointError: If one is no whole number.
    """
    found = [token_id(gguf, name) for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(token for token in found if token is not None))


def tokenizer_by(gguf: GgufFile, whole: Path) -> tuple[PreTrainedTokenizerBase | None, list[str]]:
    """The tokenizer of a GGUF file.

    Args:
        gguf: What the file says.
        whole: The file, for transformers.

    Returns:
        The tokenizer, None where the file has none, and what differs from what the file says, a sentence each.

    Raises:
        CheckpointError: If the file's keys contradict each other.
    """
    if gguf.keys.get(_PREFIX + "model") in (None, "none", "no_vocab") or _PREFIX + "tokens" not in gguf.keys:
        return None, ["the file has no tokenizer; pass prompts as token ids"]
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    said = _said(gguf)
    with scratch_folder() as own:
        named = _without(whole, ids_of_no_token(gguf), own / "model.gguf")
        made: Any = AutoTokenizer.from_pretrained(str(named.parent), gguf_file=named.name)
    description = json.loads(made.backend_tokenizer.to_str())
    _set(description, said)
    names = {name: said.tokens[token] for name, token in said.special.items()}
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(json.dumps(description)), clean_up_tokenization_spaces=False, **names
    )
    tokenizer.chat_template = said.template
    return tokenizer, [*_of_keys(gguf, said), *_of_tokenizer(tokenizer, said)]


def _without(whole: Path, keys: list[str], path: Path) -> Path:
    """The file, or where keys are to be left out, which transformers can't read, one at `path` without weights."""
    if not keys:
        return whole
    start = min(tensor.start for tensor in read_header(whole).tensors.values())
    with whole.open("rb") as file:
        header = file.read(start)
    for key in keys:
        size = len(key).to_bytes(8, "little")
        header = header.replace(size + key.encode(), size + key[:-1].encode() + b"x", 1)
    path.write_bytes(header)
    os.truncate(path, whole.stat().st_size)  # tensors of nothing, which take no room on the disk
    return path


def _said(gguf: GgufFile) -> _Said:
    def key(name: str) -> Any:
        return gguf.keys.get(_PREFIX + name)

    def refused(name: str, why: str) -> CheckpointError:
        return CheckpointError(f"can't load {gguf.path}: {_PREFIX}{name} is {shown(key(name))}; {why}")

    if key("model") not in ("gpt2", "llama"):
        raise refused("model", "tokenizers of the kinds gpt2 (byte level) and llama (SentencePiece) are verified")
    tokens, kinds = key("tokens"), key("token_type")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"can't load {gguf.path}: {_PREFIX}tokens is no list of tokens")
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        kinds = [1] * len(tokens)
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is not None and len(tokens) > embedding.shape[0]:
        raise CheckpointError(
            f"can't load {gguf.path}: it has {len(tokens)} tokens, and token_embd.weight has {embedding.shape[0]} rows"
        )
    pieces = key("model") == "llama"
    special = {f"{name}_token": token for name, token in special_tokens(gguf).items() if token is not None}
    split = SPLITS.get(key("pre")) if not pieces and isinstance(key("pre"), str) else None
    begins, ends, first = key("add_bos_token"), key("add_eos_token"), key("add_space_prefix")
    begins = bool(begins) if begins is not None else pieces or (split is not None and split.begins)
    if begins and key("bos_token_id") is not None and token_id(gguf, "bos") is None:
        raise refused("bos_token_id", f"every text begins with it, and there are {len(tokens)} tokens")
    template = gguf.keys.get(_TEMPLATE)
    return _Said(
        pieces=pieces,
        tokens=tokens,
        kinds=kinds,
        special=special,
        begins=begins,
        ends=bool(ends),
        space_first=(bool(first) if first is not None else None) if pieces else None,
        template=template if isinstance(template, str) else None,
        split=split,
    )


def _set(description: dict[str, Any], said: _Said) -> None:
    """Changes a tokenizer.json to what the file says."""
    description["added_tokens"] = _added_tokens(description, said)
    if said.split is not None:
        description["pre_tokenizer"] = said.split.steps()
        description["model"]["ignore_merges"] = said.split.whole_tokens
    if said.space_first is not None:
        _set_first_space(description, said.space_first)
    first = [_special("bos_token", said)] if said.begins and "bos_token" in said.special else []
    last = [_special("eos_token", said)] if said.ends and "eos_token" in said.special else []
    text = [[*first, {"Sequence": {"id": name, "type_id": 0}}, *last] for name in ("A", "B")]
    used = {each["SpecialToken"]["id"]: said.special for each in (*first, *last)}
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": text[0],
        "pair": [*text[0], *text[1]],
        "special_tokens": {name: {"id": name, "ids": [said.tokens.index(name)], "tokens": [name]} for name in used},
    }


def _special(name: str, said: _Said) -> dict[str, Any]:
    return {"SpecialToken": {"id": said.tokens[said.special[name]], "type_id": 0}}


def _added_tokens(description: dict[str, Any], said: _Said) -> list[dict[str, Any]]:
    """Tokens that are found in the text as they are: the file's, and nobody else's.

    transformers' classes bring some of their own, which the model doesn't have, and leave out those whose names have
    other letters than the byte alphabet.
    """
    vocabulary: dict[str, int] = description["model"]["vocab"]
    added = {each["id"]: each for each in description["added_tokens"] if each["id"] < len(said.tokens)}
    by_id = {token: name for name, token in vocabulary.items()}
    marked = [token for token, kind in enumerate(said.kinds) if kind in (_CONTROL, _USER_DEFINED)]
    for token in (*marked, *said.special.values()):
        name, spelled = said.tokens[token], by_id.get(token)
        if not name.strip(" " + _SPACE) or vocabulary.get(name, token) != token:
            continue  # runs of spaces are merged from single ones
        if spelled is not None and spelled != name:
            del vocabulary[spelled]
        vocabulary[name] = token
        special = said.kinds[token] == _CONTROL or token in said.special.values()
        added[token] = {
            **{"single_word": False, "lstrip": False, "rstrip": False, "normalized": False},
            **added.get(token, {}),
            **{"id": token, "content": name, "special": special},
        }
    return [added[token] for token in sorted(added)]


def _set_first_space(description: dict[str, Any], wanted: bool) -> None:
    """Whether a text without a space before its first word is read as with one."""
    normal, before = description.get("normalizer"), description.get("pre_tokenizer")
    prepends = [each for each in _steps(normal, "normalizers") if each.get("type") != "Prepend"]
    if before is not None and before.get("type") == "Metaspace":
        before["prepend_scheme"] = (
            (before["prepend_scheme"] if before["prepend_scheme"] != "never" else "first") if wanted else "never"
        )
    elif wanted and len(prepends) == len(_steps(normal, "normalizers")):
        description["normalizer"] = {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": _SPACE}, *prepends],
        }
    elif not wanted and normal is not None:
        description["normalizer"] = {"type": "Sequence", "normalizers": prepends} if prepends else None
    decoder = description.get("decoder")
    if not wanted and decoder is not None and decoder.get("type") == "Sequence":
        decoder["decoders"] = [each for each in decoder["decoders"] if each.get("type") != "Strip"]


def _steps(sequence: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if sequence is None:
        return []
    return list(sequence[name]) if sequence.get("type") == "Sequence" else [sequence]


def _of_keys(gguf: GgufFile, said: _Said) -> list[str]:
    """What is to be said of the file's own keys."""
    remarks = []
    pre = gguf.keys.get(_PREFIX + "pre")
    if not said.pieces and said.split is None:
        how = "doesn't say how text is cut into words" if pre is None else f"cuts text into words as {shown(pre)} does"
        remarks.append(
            f"the file {how} ({_PREFIX}pre), which isn't known; text may give other tokens, so compare them with the "
            f"original tokenizer's"
        )
    for key, value in gguf.keys.items():
        if not key.startswith("tokenizer.") or key in (_TEMPLATE, "tokenizer.huggingface.json"):
            continue
        name = key.removeprefix(_PREFIX)
        if key.startswith("tokenizer.chat_template"):
            remarks.append(f"{key} was left out; the one template in {_TEMPLATE} is kept")
        elif name in _USED | _HARMLESS or (name in _OFF and not value):
            continue
        else:
            remarks.append(f"{key} = {shown(value)} isn't applied to the tokenizer")
    return remarks


def _of_tokenizer(tokenizer: Any, said: _Said) -> list[str]:
    """What differs between a tokenizer and what the file says, by what it does."""
    remarks = []
    by_id = {token: name for name, token in tokenizer.get_vocab().items()}
    twice = {name for name, times in Counter(said.tokens).items() if times > 1}
    if twice:  # which of its ids a text gets is chance
        remarks.append(f"{len(twice)} of the file's {len(said.tokens)} tokens are listed twice: {shown(sorted(twice))}")
    other = [
        token
        for token, name in enumerate(said.tokens)
        if name not in twice and (found := by_id.get(token)) != name and (found is None or not _same_token(found, name))
    ]
    if other:
        remarks.append(
            f"{len(other)} of the file's {len(said.tokens)} tokens aren't the tokenizer's, e.g. {other[0]}: "
            f"{shown(said.tokens[other[0]])}, there {shown(by_id.get(other[0]))}"
        )
    if len(by_id) > len(said.tokens):
        remarks.append(f"the tokenizer has {len(by_id)} tokens, the file {len(said.tokens)}")
    for name, token in said.special.items():
        if getattr(tokenizer, f"{name}_id") != token:
            remarks.append(f"the tokenizer's {name} is {getattr(tokenizer, f'{name}_id')}, and {token} in the file")
    ids = tokenizer("a").input_ids
    begins, ends = said.special.get("bos_token"), said.special.get("eos_token")
    for wanted, found, what in (
        (said.begins and begins is not None, bool(ids) and ids[0] == begins, "begin with the bos token"),
        (said.ends and ends is not None, bool(ids) and ids[-1] == ends, "end with the eos token"),
    ):
        if wanted != found:
            remarks.append(f"the tokenizer's texts {'' if found else 'do not '}{what}, unlike what the file says")
    if said.space_first is not None:
        first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids)[:1]
        if first and first[0].startswith(_SPACE) != said.space_first:
            remarks.append(f"{_PREFIX}add_space_prefix is {said.space_first}, and the tokenizer does otherwise")
    return remarks


def _same_token(found: str, name: str) -> bool:
    """Whether two spellings are of one token: with spaces as such or marked, or in the byte alphabet of GPT-2."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    alphabet = {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    in_bytes = "".join(alphabet[byte] for byte in name.encode())
    return found in (in_bytes, name.replace(" ", _SPACE)) or found.replace(_SPACE, " ") == name
