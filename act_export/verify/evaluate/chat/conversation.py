"""A model's answers to the turns of conversations, greedily, and how likely they are to the plain model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from act_export.errors import ActExportError, shown
from act_export.runtime.generate import generate_steps
from act_export.runtime.prompt import encode_chat
from act_export.runtime.request import Choice
from act_export.runtime.session import Session
from act_export.verify.evaluate.chat.questions import ChatQuestion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_POSITIONS = 256  # whose logits are computed at a time: memory, not the result


@dataclass(frozen=True)
class Turn:
    """What a model said in one turn.

    Attributes:
        text: Without special tokens, and spaces around it.
        tokens: Ids, without the one that ended it.
        ended: Whether the model ended it, rather than the limit.
        log_likelihood: Under the plain model, mean over the tokens and the one that ended it.
    """

    text: str
    tokens: tuple[int, ...]
    ended: bool
    log_likelihood: float


@dataclass(frozen=True)
class Chats:
    """A model to talk to.

    Attributes:
        session: The file.
        tokenizer: Has a chat template.
        max_new_tokens: Of an answer at the most.
        stop_tokens: Each ends an answer.
    """

    session: Session
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    stop_tokens: Collection[int]

    def prompt(self, question: ChatQuestion, answers: Sequence[str]) -> list[int]:
        """Tokens up to where the answer after these answers begins.

        Raises:
            ActExportError: Naming the question, as `act_export.runtime.prompt.encode_chat`.
        """
        messages = [{"role": "user", "content": question.turns[0]}]
        for answer, turn in zip(answers, question.turns[1:], strict=False):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
        try:
            return encode_chat(self.session, self.tokenizer, messages)
        except ActExportError as error:
            raise type(error)(f"question {shown(question.id)}: {error}") from error

    def tokens_at_most(self, question: ChatQuestion) -> int:
        """Tokens of a conversation whose answers are as long as they may be.

        Raises:
            ActExportError: If the context doesn't hold as many, naming the question.
        """
        turns, context = len(question.turns), self.session.limits.context
        asked = len(self.prompt(question, ["x"] * (turns - 1)))
        total = asked + turns * self.max_new_tokens
        if context is not None and total > context:
            possible = (context - asked) // turns
            advice = f"give --max-new-tokens {possible} or less" if possible > 0 else "shorten it, or leave it out"
            raise ActExportError(
                f"question {shown(question.id)} is too long: what is asked has {asked} tokens, {turns} answers may "
                f"have {self.max_new_tokens} each, and the context of {self.session.path} holds {context}; {advice}"
            )
        return total

    def answers(
        self,
        questions: Sequence[ChatQuestion],
        calibration: Choice,
        stepped: Callable[[float], None] = lambda _: None,
    ) -> list[tuple[Turn, ...]]:
        """Answers to all turns of some questions, which run together; every turn sees the answers before it.

        Args:
            questions: One or more, with any numbers of turns.
            calibration: Of the model that answers; None for plain.
            stepped: Called after every token with the share that is done, as if no answer ended before its limit.

        Raises:
            ActExportError: If an answer leaves no room for the next turn, naming the question, or the model's logits
                aren't numbers.
        """
        said: list[list[Turn]] = [[] for _ in questions]
        turns = max(len(question.turns) for question in questions)
        for number in range(turns):
            rows = [row for row, question in enumerate(questions) if number < len(question.turns)]
            prompts = [self.prompt(questions[row], [turn.text for turn in said[row]]) for row in rows]
            found: list[list[int]] = [[] for _ in rows]
            steps = generate_steps(
                self.session,
                prompts,
                max_new_tokens=self.max_new_tokens,
                stop_tokens=self.stop_tokens,
                calibration=calibration,
            )
            for count, step in enumerate(steps, 1):
                for tokens, token in zip(found, step, strict=True):
                    tokens += [token] if token is not None else []
                stepped((number + count / self.max_new_tokens) / turns)
            for row, prompt, tokens in zip(rows, prompts, found, strict=True):
                said[row].append(self._turn(prompt, tokens))
        return [tuple(turns) for turns in said]

    def _turn(self, prompt: list[int], tokens: list[int]) -> Turn:
        ended = tokens[-1] in self.stop_tokens
        answer = tokens[:-1] if ended else tokens
        text = str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip()
        return Turn(text, tuple(answer), ended, log_likelihood(self.session, prompt, tokens))


def log_likelihood(session: Session, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """Mean log-likelihood of tokens after a prompt, under the plain model.

    Args:
        session: The file.
        prompt: Token ids, at least one.
        tokens: Token ids, at least one.
    """
    read = np.array([[*prompt, *tokens[:-1]]], np.int64)
    following = np.array(tokens)
    cache = session.allocate(1, read.shape[1], calibration=None)
    switch = session.record.recompute_beyond or 0
    at_a_time = len(tokens) if 0 < switch < read.shape[1] else _POSITIONS  # rotary frequencies are those of the whole
    total, begin = 0.0, 0
    for end in [*range(len(prompt) + at_a_time - 1, read.shape[1], at_a_time), read.shape[1]]:
        count = end - max(begin, len(prompt) - 1)
        logits = cache.step(read[:, begin:end], logits_to_keep=count)[0]
        total += float(_log_probabilities(logits, following[:count]).sum())
        following, begin = following[count:], end
    return total / len(tokens)


def _log_probabilities(logits: NDArray[Any], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """(positions,), of one token at each position, from logits (positions, vocabulary)."""
    scores = logits.astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    chosen = scores[np.arange(len(tokens)), tokens]
    return np.asarray(chosen - np.log(np.exp(scores).sum(-1)), np.float64)
