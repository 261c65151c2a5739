"""What models say, turn by turn, against PyTorch and against each conversation alone."""

from __future__ import annotations

import pytest
import torch
from chats import QUESTIONS, chat_tokenizer, write_questions
from tiny import tiny_checkpoint, tiny_tokenizer

from act_export.errors import ActExportError
from act_export.export import build_model
from act_export.runtime import Session, generate
from act_export.verify.evaluate.chat import conversation
from act_export.verify.evaluate.chat.conversation import Chats, log_likelihood
from act_export.verify.evaluate.chat.questions import ChatQuestion, read_questions

TOKENIZER = chat_tokenizer()
END, NEW = 2, 6


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return read_questions(write_questions(tmp_path_factory.mktemp("q") / "q.jsonl"))


@pytest.fixture
def chats(chat_file):
    with Session.open(chat_file) as session:
        yield Chats(session, TOKENIZER, NEW, {END})


def talk(turns, answer):
    """A conversation by hand: the text of each answer."""
    text, said = "", []
    for turn in turns:
        text += f"<u>{turn}<a>"
        tokens = answer(TOKENIZER(text).input_ids)
        said.append(TOKENIZER.decode([token for token in tokens if token != END]).strip())
        text += said[-1]
    return said


def test_plain_answers_are_pytorchs(tiny, chats, questions):
    def greedily(ids):
        begin = len(ids)
        with torch.no_grad():
            while len(ids) < begin + NEW and ids[-1] != END:
                ids = [*ids, int(tiny.model(torch.tensor([ids])).logits[0, -1].argmax())]
        return ids[begin:]

    for question, turns in zip(QUESTIONS, chats.answers(questions, None), strict=True):
        assert [turn.text for turn in turns] == talk(question["turns"], greedily)


@pytest.mark.parametrize("name", ["weak", "strong"])
def test_answers_are_those_of_each_conversation_alone(chats, questions, name):
    def alone(ids):
        return generate(chats.session, [ids], max_new_tokens=NEW, stop_tokens=[END], calibration=name)[0]

    together, plain = (chats.answers(questions, calibration) for calibration in (name, None))
    for question, turns in zip(QUESTIONS, together, strict=True):
        assert [turn.text for turn in turns] == talk(question["turns"], alone)
    assert together != plain


def test_an_answer_that_ends_by_itself(chats, questions):
    first = chats.answers(questions[1:2], None)[0][0]
    assert not first.ended
    assert len(first.tokens) == NEW
    place = next(at for at, token in enumerate(first.tokens) if at and token not in first.tokens[:at])
    ending = Chats(chats.session, TOKENIZER, NEW, {END, first.tokens[place]})
    (turn,) = ending.answers(questions[1:2], None)[0]
    assert turn.ended
    assert turn.tokens == first.tokens[:place]
    prompt = ending.prompt(questions[1], [])
    assert turn.log_likelihood == log_likelihood(chats.session, prompt, first.tokens[: place + 1])


@pytest.mark.parametrize("positions", [1, 3, 256])
@pytest.mark.parametrize("prompt", [[5], [9, 8, 7, 200, 31]])
@pytest.mark.parametrize("tokens", [[7], [40, 41, 42, 43, 44, 45, 2]])
def test_log_likelihood_is_pytorchs_plain(tiny, chats, monkeypatch, positions, prompt, tokens):
    monkeypatch.setattr(conversation, "_POSITIONS", positions)
    with torch.no_grad():
        logits = tiny.model(torch.tensor([prompt + tokens])).logits[0].double().log_softmax(-1)
    expected = sum(float(logits[len(prompt) - 1 + at, token]) for at, token in enumerate(tokens)) / len(tokens)
    assert log_likelihood(chats.session, prompt, tokens) == pytest.approx(expected, abs=1e-4)


@pytest.mark.in_turn(2)
def test_rotary_frequencies_of_long_sequences_are_those_of_the_whole(tmp_path):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    checkpoint = tiny_checkpoint("phi3", rope_parameters=rope, original_max_position_embeddings=8)
    build_model(checkpoint, None, tmp_path / "long.onnx", source="tiny")
    prompt, tokens = [5, 6, 7], list(range(20, 32))
    with torch.no_grad():
        logits = checkpoint.model(torch.tensor([prompt + tokens[:-1]])).logits[0].double().log_softmax(-1)
    expected = sum(float(logits[2 + at, token]) for at, token in enumerate(tokens)) / len(tokens)
    with Session.open(tmp_path / "long.onnx") as session, pytest.MonkeyPatch.context() as patch:
        assert session.record.recompute_beyond == 8
        patch.setattr(conversation, "_POSITIONS", 4)
        assert log_likelihood(session, prompt, tokens) == pytest.approx(expected, abs=1e-4)


def test_what_is_done_only_grows(chats, questions):
    shares = []
    chats.answers(questions, None, shares.append)
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1


@pytest.mark.parametrize(
    ("letters", "new", "message"),
    [
        (100, 22, r"question 17 is too long: .* 213 tokens, 2 answers .* 22 each, .* 256; give --max-new-tokens 21 or"),
        (121, 1, r"question 17 is too long: what is asked has 255 tokens, .* 256; shorten it, or leave it out"),
        (130, 1, r"question 17: the prompt has 273 tokens, and the context of .* holds 256; shorten it"),
    ],
)
def test_a_question_that_is_too_long_is_refused_with_what_would_fit(chats, letters, new, message):
    question = ChatQuestion(17, "", ("a" * letters, "b" * letters), ("", ""))
    with pytest.raises(ActExportError, match=message):
        Chats(chats.session, TOKENIZER, new, {END}).tokens_at_most(question)


def test_a_question_that_just_fits(chats):
    question = ChatQuestion(17, "", ("a" * 100, "b" * 100), ("", ""))
    assert Chats(chats.session, TOKENIZER, 21, {END}).tokens_at_most(question) == 213 + 2 * 21


def test_an_answer_that_is_longer_as_a_text_may_leave_no_room(chats, monkeypatch):
    """Half characters become signs of three bytes."""
    question = ChatQuestion("long", "", ("a" * 150, "b"), ("", ""))
    monkeypatch.setattr(type(TOKENIZER), "decode", lambda *_, **__: "\ufffd" * 40)
    with pytest.raises(ActExportError, match=r"question 'long': the prompt has 2\d\d tokens"):
        Chats(chats.session, TOKENIZER, 40, {END}).answers([question], None)


def test_a_tokenizer_without_a_template(chats):
    with pytest.raises(ActExportError, match="question 1: the model's tokenizer has no chat template"):
        Chats(chats.session, tiny_tokenizer(), 2, {END}).prompt(ChatQuestion(1, "", ("a",), ("",)), [])
