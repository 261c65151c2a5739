"""Conversations with the plain and the calibrated models of one file; one that was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from act_export.calibration.strengths import PLAIN
from act_export.checkpoint.stop_tokens import end_tokens
from act_export.errors import ActExportError, shown
from act_export.files import cache_folder, check_replaceable, check_writable, write_whole
from act_export.journal import own_journal
from act_export.onnx_file.external_data import data_files
from act_export.onnx_file.names import model_file
from act_export.progress import Progress
from act_export.runtime.adapter import SUFFIX
from act_export.runtime.device import Device, import_onnxruntime
from act_export.runtime.request import Choice, check_choice
from act_export.runtime.session import Session
from act_export.runtime.text import load_tokenizer
from act_export.verify.evaluate.chat.answers import Answer, answers_file
from act_export.verify.evaluate.chat.conversation import Chats
from act_export.verify.evaluate.chat.figures import ChatComparison, compare_chats
from act_export.verify.evaluate.chat.page import side_by_side
from act_export.verify.evaluate.chat.questions import ChatQuestion, read_questions
from act_export.version import __version__

NEW_TOKENS = 1024  # of FastChat
_TOGETHER = 8  # questions at the most
_CACHE_BYTES = 2 << 30  # of the questions that run together, where nobody says
_VERSION = 1  # of what a journal has
_SEEDS = 2**63


@dataclass(frozen=True)
class ChatRequest:
    """Which conversations to have, with which models.

    Attributes:
        file: The exported model, or its folder.
        questions: See `read_questions`.
        calibrations: Names of the file's calibrations, calibration files or adapters; none for the file's default.
        out: Folder for the answers and the page; None writes none.
        max_new_tokens: Of an answer at the most.
        limit: Questions at the most, the first ones; None for all.
        batch_tokens: Tokens that run together at the most; None leaves it to act-export.
        seed: Of the page's order of A and B.
        portable: Run the portable functions, not the native library.
        device: "cpu", "cuda" or "cuda:N".
        tokenizer: Where the tokenizer is; None looks beside the file, then where the model came from.
        trust_remote_code: Whether code that comes with the tokenizer may run.
    """

    file: Path
    questions: Path
    calibrations: tuple[str, ...] = ()
    out: Path | None = None
    max_new_tokens: int = NEW_TOKENS
    limit: int | None = None
    batch_tokens: int | None = None
    seed: int = 0
    portable: bool = False
    device: str = "cpu"
    tokenizer: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Raises ActExportError for a value out of range, SessionError for a device that isn't one."""
        Device.parse(self.device)
        numbers = {"max new tokens": self.max_new_tokens, "limit": self.limit, "batch tokens": self.batch_tokens}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ActExportError(f"{name} is {value}; give 1 or more")
        if not 0 <= self.seed < _SEEDS:
            raise ActExportError(f"the seed is {self.seed}; it must be from 0 to {_SEEDS - 1}")


@dataclass(frozen=True)
class ChatReport:
    """What was said.

    Attributes:
        request: What was asked for.
        questions: One or more.
        answers: By model, "plain" the first, in the order of the questions.
        comparisons: Of each calibration with plain.
        files: That were written.
    """

    request: ChatRequest
    questions: tuple[ChatQuestion, ...]
    answers: Mapping[str, tuple[Answer, ...]]
    comparisons: tuple[ChatComparison, ...]
    files: tuple[Path, ...]


@dataclass(frozen=True)
class _Model:
    """What answers: its name, what a request asks for, and what tells it from others in a journal."""

    name: str
    choice: Choice
    digest: str


def evaluate_chats(request: ChatRequest, *, progress: Progress = lambda _step, _done: None) -> ChatReport:
    """Has all models answer all questions, turn by turn, and compares the answers.

    Args:
        request: Which.
        progress: Called after every token.

    Raises:
        ActExportError: If the file can't be run or calibrated, has no tokenizer or chat template, a question is too
            long, or the results can't be written.
        TaskError: If the questions can't be read.
    """
    questions = read_questions(request.questions)[: request.limit]
    if request.out is not None:
        check_writable(request.out, advice="pass another folder with --chat-out")
    for text in request.calibrations:
        check_choice(model_file(request.file), text)
    with Session.open(request.file, native=not request.portable, device=request.device) as session:
        models = _models(session, request.calibrations)
        if request.out is not None:
            for files in _files(request.out, [model.name for model in models]):
                for path in files.values():
                    check_replaceable(path)
        tokenizer = load_tokenizer(session, request.tokenizer, trust_remote_code=request.trust_remote_code)
        ends = end_tokens(tokenizer.eos_token_id, "the tokenizer's end token", None)
        chats = Chats(session, tokenizer, request.max_new_tokens, frozenset({*session.limits.stop_tokens, *ends}))
        groups = list(_groups(chats, questions, request.batch_tokens))
        found = _answer(chats, models, groups, _description(chats, request), progress)
    plain = [answer.turns for answer in found[PLAIN]]
    others = {name: answers for name, answers in found.items() if name != PLAIN}
    comparisons = tuple(
        compare_chats(name, questions, plain, [answer.turns for answer in answers]) for name, answers in others.items()
    )
    return ChatReport(request, questions, found, comparisons, _write(request, questions, found))


def _models(session: Session, asked: Sequence[str]) -> list[_Model]:
    """The plain model, and those with the calibrations that were asked for."""
    own = session.requests.calibrations
    if own is None:
        raise ActExportError(
            f"no head of {session.path} can be calibrated, so there is nothing to compare; export the model with a "
            f"calibration, or with --switchable"
        )
    if not asked:
        if own.default == PLAIN:
            raise ActExportError(
                f"{session.path} is plain where a request doesn't say; name what to compare with that: --calibration "
                f"{' or '.join(own.each) or 'FILE'}"
            )
        asked = (own.default,)
    found = {PLAIN: _Model(PLAIN, None, "")}
    for text in asked:
        choice = session.requests.choose(text)
        name = text if text in session.calibrations else Path(text).name.removesuffix(SUFFIX).removesuffix(".json")
        strengths, plain = (session.requests.strengths(each, 1) for each in (choice, None))
        if strengths is None or plain is None or np.array_equal(strengths, plain):
            raise ActExportError(
                f"{shown(text)} leaves the heads of {session.path} as they are, and the plain model answers anyway; "
                f"name another calibration with --calibration"
            )
        if name in found:
            raise ActExportError(f"two models would be called {shown(name)}; name each once, or rename a file")
        found[name] = _Model(name, choice, hashlib.sha256(strengths.tobytes()).hexdigest()[:16])
    return list(found.values())


def _files(out: Path, models: Sequence[str]) -> tuple[dict[str, Path], dict[str, Path]]:
    """By model the file of its answers, and by calibration that of its page."""
    calibrations = [name for name in models if name != PLAIN]
    ends = {name: f"_{name}" if len(calibrations) > 1 else "" for name in calibrations}
    return {name: out / f"{name}.jsonl" for name in models}, {
        name: out / f"side_by_side{end}.html" for name, end in ends.items()
    }


def _groups(chats: Chats, questions: Sequence[ChatQuestion], batch_tokens: int | None) -> Iterator[list[ChatQuestion]]:
    """Questions that run together, in their order: as many as memory has room for, whatever was answered before.

    So an interrupted run gives what one without a stop gives, to the last bit.
    """
    session = chats.session
    tokens = batch_tokens or _CACHE_BYTES // sum(part.zeros(1, 1).nbytes for part in session.state_inputs)
    group: list[ChatQuestion] = []
    longest = 0
    for question, needed in [(question, chats.tokens_at_most(question)) for question in questions]:
        longest = max(longest, needed)
        size = _TOGETHER if session.pads_left else 1
        if group and (len(group) == size or (len(group) + 1) * longest > tokens):
            yield group
            group, longest = [], needed
        group.append(question)
    if group:
        yield group


def _description(chats: Chats, request: ChatRequest) -> dict[str, Any]:
    """What a journal is recognised by: all that answers depend on, but for the models and the questions."""
    file = chats.session.path
    places = {file.name: file, **{name: file.parent / name for name in data_files(file)}}
    stats = {name: place.stat() for name, place in places.items()}
    return {
        "chat": _VERSION,
        "file": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "max_new_tokens": request.max_new_tokens,
        "stop_tokens": sorted(chats.stop_tokens),
        "portable": request.portable,
        "device": request.device,
        "versions": {"act-export": __version__, "onnxruntime": import_onnxruntime().__version__},
    }


def _answer(
    chats: Chats,
    models: Sequence[_Model],
    groups: Sequence[Sequence[ChatQuestion]],
    description: Mapping[str, Any],
    progress: Progress,
) -> dict[str, tuple[Answer, ...]]:
    """Answers by model; what the journal has isn't answered again."""
    journal = own_journal(cache_folder() / "chats", description)
    kept = dict(journal.values) if journal is not None else {}
    all_turns = len(models) * sum(len(question.turns) for group in groups for question in group)
    done = 0
    found: dict[str, list[Answer]] = {model.name: [] for model in models}
    try:
        for model in models:
            for group in groups:
                turns = sum(len(question.turns) for question in group)
                key = _key(chats, model, group)
                if key not in kept:
                    stepped = partial(_step, progress, model.name, done / all_turns, turns / all_turns)
                    said = chats.answers(group, model.choice, stepped)
                    now = time.time()
                    kept[key] = [Answer(each, now).to_json() for each in said]
                    if journal is not None:
                        journal.record(key, kept[key])
                found[model.name] += map(Answer.of_json, kept[key])
                done += turns
                progress(model.name, done / all_turns)
    finally:
        if journal is not None:
            journal.close()
    return {name: tuple(answers) for name, answers in found.items()}


def _key(chats: Chats, model: _Model, group: Sequence[ChatQuestion]) -> str:
    """Names a unit of work: the model, and what the questions are to it, by their tokens."""
    asked = [[question.turns, chats.prompt(question, ["x"] * (len(question.turns) - 1))] for question in group]
    return f"{model.digest or PLAIN} {hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}"


def _step(progress: Progress, model: str, begin: float, part: float, share: float) -> None:
    """Says how far all is, when of a part of it, after what was done at its beginning, a share is."""
    progress(model, begin + part * share)


def _write(
    request: ChatRequest, questions: Sequence[ChatQuestion], found: Mapping[str, Sequence[Answer]]
) -> tuple[Path, ...]:
    if request.out is None:
        return ()
    files, pages = _files(request.out, list(found))
    said = {name: [answer.texts for answer in answers] for name, answers in found.items()}
    texts = {files[name]: answers_file(name, questions, answers) for name, answers in found.items()}
    texts |= {
        page: side_by_side(questions, said[PLAIN], name, said[name], request.seed) for name, page in pages.items()
    }
    for path, text in texts.items():
        try:
            write_whole(path, text)
        except OSError as error:
            raise ActExportError(
                f"can't write {path}: {error.strerror}; pass another folder with --chat-out, the answers are kept and "
                f"won't be given again"
            ) from error
    return tuple(texts)
