"""A file with two calibrations, and a tokenizer that can chat."""

from __future__ import annotations

from pathlib import Path

import pytest
from chats import save_tokenizer, write_questions
from tiny import CALIBRATION

from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.file import Calibration
from act_export.export import build_model

STRONG = Calibration({0: (0, 3), 1: (1,)}, beta=1.7, threshold=0.05, gamma={0: (2.0, 0.3), 1: (5.0,)})


@pytest.fixture(scope="session")
def chat_file(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "two.onnx"
    build_model(tiny, CalibrationSet.of({"weak": CALIBRATION, "strong": STRONG}), path, source="tiny")
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def questions_file(tmp_path) -> Path:
    return write_questions(tmp_path / "questions.jsonl")
