"""The table of `act-export eval --chat-file`: numbers whole, lines of 80 columns."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from act_export.commands.chat_table import print_chat_report
from act_export.commands.printing import PlainConsole
from act_export.verify.evaluate.chat.figures import FIGURES, Change, ChatComparison
from act_export.verify.evaluate.chat.job import ChatReport, ChatRequest


@pytest.mark.parametrize("name", ["heads", "llama-2-7b-chat-multiple-choice-of-" + "long" * 20, "\x1b[2J"])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_table_fits_80_columns(name, width):
    """With the widest numbers that are usual."""
    wide = {True: (1.0, 0.0, -1.0), False: (1024.0, -12.345, -1011.655)}
    changes = tuple(
        Change(figure, 1000, *wide[figure.share], (-1.0, 1.0) if figure.share else (-1024.0, 1024.0), 0.00012)
        for figure in FIGURES
    )
    comparisons = tuple(ChatComparison(name, 160, 120, changes) for _ in range(2))
    report = ChatReport(ChatRequest(Path("m.onnx"), Path("q.jsonl")), (), {}, comparisons, ())
    text = io.StringIO()
    print_chat_report(report, PlainConsole(file=text, width=width))
    table, _, rest = text.getvalue().partition("Below each")
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in table
    assert "\x1b" not in table
    assert table.count("-1011.7\n") + table.count("-1011.7 ") == 4
    assert table.count("-1024.0 to +1024.0") == 4
    assert table.count("-100.0 to +100.0") == 10
    assert all(word in table for figure in FIGURES for word in figure.title.split())
    assert "120 of 160 answers differ" in rest
