"""Text in, text out: the tokenizer of an exported model, and streaming generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from act_export.checkpoint.fetch import fetch_checkpoint
from act_export.checkpoint.gguf.built_in import BUILT_IN
from act_export.checkpoint.hub import HubId, is_on_hub
from act_export.checkpoint.stop_tokens import end_tokens
from act_export.checkpoint.tokenizer import load_tokenizer_of
from act_export.errors import ActExportError, CheckpointError, SessionError, needs_extras
from act_export.json_file import read_object
from act_export.runtime.generate import generate_steps
from act_export.runtime.generation_settings import USES, GenerationSettings, Use
from act_export.runtime.prompt import encode_prompt
from act_export.runtime.sampling import Sampling
from act_export.runtime.session import Session
from act_export.runtime.text_stream import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_NEW_TOKENS = 64
_CONFIGURATION = "generation_config.json"
_FILE_IN_FOLDER = "model.onnx"
_ADVICE = "correct it, or leave it out: --ignore-generation-config on the command line"


@needs_extras("a tokenizer", error=SessionError)
def load_tokenizer(
    session: Session, source: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of an exported model.

    Args:
        session: The model.
        source: A folder, hub id or built-in name; None looks beside the file, then at what the file was made from, at
            the same revision.
        trust_remote_code: Whether code that comes with the tokenizer may run.

    Raises:
        ActExportError: If there is none.
        SessionError: If transformers isn't installed.
    """
    if source is not None:
        return load_tokenizer_of(source, trust_remote_code=trust_remote_code)
    if (session.path.parent / "tokenizer.json").is_file():
        return load_tokenizer_of(str(session.path.parent), trust_remote_code=trust_remote_code)
    missing = f"there is no tokenizer beside {session.path}"
    advice = "name a folder or checkpoint that has it: --tokenizer MODEL; an export to a folder has its own"
    if (origin := _origin(session)) is None:
        raise ActExportError(f"{missing}; {advice}")
    try:
        return load_tokenizer_of(origin[0], revision=origin[1], trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        raise ActExportError(
            f"{missing}, and that of {origin[0]}, which the file was made from, can't be had; {advice} ({error})"
        ) from error


def load_generation_settings(
    session: Session,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    ignored: bool = False,
    note: Callable[[str], None] | None = None,
) -> GenerationSettings:
    """The generation configuration of an exported model.

    In a folder that was exported, generation_config.json counts, which may have been edited. Otherwise the file's own
    record does; where it has none, as in files of earlier versions, generation_config.json beside the file, and then
    that of what the file was made from.

    Args:
        session: The model.
        tokenizer: Its tokenizer, which stop strings need.
        ignored: Whether to look for none.
        note: Told where settings are from, if they may not be the expected ones, a sentence at a time.

    Raises:
        ActExportError: If it can't be read. A model that has none has no settings.
    """
    beside = session.path.parent / _CONFIGURATION
    note = note or (lambda _: None)
    if ignored:
        return GenerationSettings(tokenizer=tokenizer)
    recorded = session.record.generation
    if beside.is_file() and (recorded is None or _in_exported_folder(session.path)):
        found = _settings(beside, str(beside), tokenizer)
        if recorded is not None and _that_count(found.fields) != _that_count(recorded):
            note(f"{beside} isn't what {session.path} was exported with; what it says now is used")
        return found
    if recorded is not None:
        return GenerationSettings(recorded, f"the generation configuration in {session.path}", tokenizer)
    if (origin := _origin(session)) is not None:
        try:
            folder = fetch_checkpoint(origin[0], revision=origin[1], weights=False).folder
        except CheckpointError as cause:  # gone, or there is no connection
            note(f"no {_CONFIGURATION} is used, that of {origin[0]} can't be had: {cause}")
            return GenerationSettings(tokenizer=tokenizer)
        if (folder / _CONFIGURATION).is_file():
            return _settings(folder / _CONFIGURATION, f"{_CONFIGURATION} of {origin[0]}", tokenizer)
    return GenerationSettings(tokenizer=tokenizer)


def generation_of_options(
    sample: bool, temperature: float | None, top_k: int | None, top_p: float | None, seed: int
) -> tuple[Sampling, dict[str, float]]:
    """What options for drawing tokens mean: how to draw them, and fields to put in the place of the configuration's.

    Tokens are drawn with `sample`, or at a temperature above 0. What isn't given (None) is the configuration's affair,
    whose processors do it all; what is left is to draw by the logits as they are then.

    Raises:
        ActExportError: For a value out of range.
    """
    Sampling(temperature or 0.0, top_k or 0, 1.0 if top_p is None else top_p, seed)  # refuses what is out of range
    if sample and temperature == 0:
        raise ActExportError("temperature is 0, which is greedy, and --sample draws tokens; leave one of them out")
    given = {"temperature": temperature or None, "top_k": top_k, "top_p": top_p}
    return Sampling(float(sample or bool(temperature)), seed=seed), {
        name: value for name, value in given.items() if value is not None
    }


def stream_text(
    session: Session,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    chat: bool = False,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    settings: GenerationSettings | None = None,
    note: Callable[[str], None] | None = None,
) -> Iterator[str]:
    """Generates text piece by piece; the pieces joined are the tokenizer's text of all tokens.

    Args:
        session: The model.
        tokenizer: Its tokenizer.
        prompt: Text to continue, or with `chat` the user's message.
        chat: Put the prompt into the tokenizer's chat template.
        max_new_tokens: Tokens at the most; generation also ends after one of the model's stop tokens. None for 64, or
            what the context has room for.
        sampling: How tokens are drawn; None is greedy.
        settings: See `generate_steps`; None for none.
        note: Told what to know about the answer, a sentence at a time.

    Raises:
        ActExportError: As `encode_prompt` and `generate_steps`, and if the context has no room for so many tokens.
    """
    encoded = encode_prompt(session, tokenizer, prompt, chat=chat)
    max_new_tokens = _room(session, len(encoded.ids), max_new_tokens)
    stop = {
        *session.limits.stop_tokens,
        *end_tokens(tokenizer.eos_token_id, "the tokenizer's end token", None),
        *_configured_stop(settings, session),
    }
    if note is not None:
        if encoded.left_out:
            names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(encoded.left_out)))
            note(f"the tokenizer ends a text with {names}, which was left out: the model is to go on")
        for remark in settings.notes(drawing=sampling is not None and sampling.temperature > 0) if settings else ():
            note(remark)
    text = TextStream(tokenizer)
    steps = generate_steps(
        session,
        [encoded.ids],
        max_new_tokens=max_new_tokens,
        stop_tokens=stop,
        sampling=sampling,
        settings=settings,
    )
    for step in steps:
        token = step[0]
        if token is None or token in stop:
            break
        if piece := text.put(token):
            yield piece
    if piece := text.end():
        yield piece


def _origin(session: Session) -> tuple[str, str | None] | None:
    """What a file was made from, and its revision, if it can be had again by its name."""
    recorded = session.properties.get("source", "")
    if recorded not in BUILT_IN and HubId.parse(recorded) is None:
        return None
    return recorded, session.properties.get("revision") if is_on_hub(recorded) else None


def _settings(path: Path, what: str, tokenizer: PreTrainedTokenizerBase | None) -> GenerationSettings:
    return GenerationSettings(read_object(path, what, advice=_ADVICE), what, tokenizer)


def _in_exported_folder(path: Path) -> bool:
    """Whether a file lies as an export of a folder has it; another file may have a neighbour's configuration."""
    return path.name == _FILE_IN_FOLDER and (path.parent / "config.json").is_file()


def _that_count(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that may change an answer."""
    return {name: value for name, value in fields.items() if value is not None and USES.get(name) is not Use.NO_EFFECT}


def _configured_stop(settings: GenerationSettings | None, session: Session) -> tuple[int, ...]:
    if settings is None:
        return ()
    return end_tokens(
        settings.fields.get("eos_token_id"), f"eos_token_id of {settings.source}", session.limits.vocabulary
    )


def _room(session: Session, tokens: int, wanted: int | None) -> int:
    """How many tokens to generate after a prompt."""
    context = session.limits.context
    room = context - tokens + 1 if context is not None else None  # the last one isn't read any more
    if wanted is None:
        return DEFAULT_NEW_TOKENS if room is None else min(DEFAULT_NEW_TOKENS, room)
    if wanted < 1:
        raise ActExportError(f"max_new_tokens is {wanted}; it must be at least 1")
    if room is not None and wanted > room:
        raise ActExportError(
            f"{wanted} new tokens don't fit: the prompt has {tokens}, and the context of {session.path} holds "
            f"{context}; ask for at most {room} (--max-new-tokens)"
        )
    return wanted
