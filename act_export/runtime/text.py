"""Text in, text out: the tokenizer of an exported model, and streaming generation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from act_export.checkpoint.built_in import BUILT_IN
from act_export.checkpoint.hub import HubId, is_on_hub
from act_export.checkpoint.tokenizer import load_tokenizer_of
from act_export.errors import ActExportError
from act_export.runtime.generate import Sampling, generate_steps
from act_export.runtime.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    """
    if source is not None:
        return load_tokenizer_of(source, trust_remote_code=trust_remote_code)
    if (session.path.parent / "tokenizer.json").is_file():
        return load_tokenizer_of(str(session.path.parent), trust_remote_code=trust_remote_code)
    recorded = session.properties.get("source", "")
    if recorded in BUILT_IN or HubId.parse(recorded) is not None:
        revision = session.properties.get("revision") if is_on_hub(recorded) else None
        return load_tokenizer_of(recorded, revision=revision, trust_remote_code=trust_remote_code)
    raise ActExportError(
        f"there is no tokenizer beside {session.path}; name the checkpoint that has it: --tokenizer MODEL"
    )


def stream_text(
    session: Session,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    chat: bool = False,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
) -> Iterator[str]:
    """Generates text piece by piece; the pieces joined are the whole text.

    Args:
        session: The model.
        tokenizer: Its tokenizer.
        prompt: Text to continue, or with `chat` the user's message.
        chat: Put the prompt into the tokenizer's chat template.
        max_new_tokens: Tokens at the most; generation also ends after one of the model's stop tokens.
        sampling: How tokens are drawn; None is greedy.

    Raises:
        ActExportError: If the prompt has no tokens, or there is no chat template.
    """
    if chat and not tokenizer.chat_template:
        raise ActExportError("the tokenizer has no chat template; leave out --chat")
    text = (
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        if chat
        else prompt
    )
    ids = tokenizer(text, add_special_tokens=not chat).input_ids
    stop = {*session.limits.stop_tokens, tokenizer.eos_token_id} - {None}
    tokens: list[int] = []
    shown = ""
    for step in generate_steps(session, [ids], max_new_tokens=max_new_tokens, stop_tokens=stop, sampling=sampling):
        token = step[0]
        if token is None or token in stop:
            break
        tokens.append(token)
        whole = _decode(tokenizer, tokens)
        if not whole.endswith("�"):  # else: half a character, the next token completes it
            yield whole[len(shown) :]
            shown = whole
    whole = _decode(tokenizer, tokens)
    if len(whole) > len(shown):
        yield whole[len(shown) :]


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
