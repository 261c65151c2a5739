"""JSON that somebody else wrote: what is read, and what is refused before it costs anything."""

from __future__ import annotations

import json
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.checkpoint.gguf.header import read_header
from act_export.errors import ActExportError, CheckpointError
from act_export.json_file import parse_json, parse_object, read_object

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON)
def test_what_python_writes_is_read(value):
    assert parse_json(json.dumps(value), "it") == value
    assert parse_json(b"\xef\xbb\xbf" + json.dumps(value).encode(), "it") == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "isn't JSON"),
        ("", "isn't JSON"),
        (b"\xff\xfe\x00", "isn't JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 100 + "]" * 100, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("9" * 5_000, "5000 digits"),
        ("1e999", "too large"),
        ("NaN", "no number"),
        ("-Infinity", "no number"),
        ('{"a": 1, "a": 2}', "names 'a' twice"),
        ("[" + "0," * 3_000_000 + "0]", "more than 2000000 commas"),
        ("{" + ",".join(f'"{n}":0' for n in range(40_000)) + ',"7":0}', "names '7' twice"),
    ],
    ids=range(13),
)
def test_what_is_refused_and_why(text, reason):
    started = time.monotonic()
    with pytest.raises(ActExportError, match=reason) as raised:
        parse_json(text, "config.json of x", advice="get it anew")
    assert time.monotonic() - started < 10
    assert str(raised.value).startswith("config.json of x")
    assert str(raised.value).endswith("; get it anew")


def test_what_is_no_object_is_refused(tmp_path):
    for text in ("[]", "1", "null", '"x"', "true"):
        with pytest.raises(ActExportError, match="no JSON object but a"):
            parse_object(text, "it")
    with pytest.raises(ActExportError, match=r"can't read"):
        read_object(tmp_path / "missing.json")
    with pytest.raises(ActExportError, match=r"can't read"):
        read_object(tmp_path)


def test_a_pipe_isnt_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ActExportError, match=r"can't read it: .*no plain file"):
        read_object(tmp_path / "pipe.json", "it")
    with pytest.raises(CheckpointError, match=r"can't read .*no plain file"):
        read_header(tmp_path / "pipe.json")


def test_leave_is_given_by_name():
    assert parse_json('{"a": 1, "a": Infinity}', "it", repeats=True, infinite=True) == {"a": float("inf")}
