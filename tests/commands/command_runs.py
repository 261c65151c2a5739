"""Running commands in tests."""

from __future__ import annotations

from typer.testing import CliRunner

from act_export.commands.main import app

HEADS = '{"0": [1], "1": [0, 3]}'


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])
