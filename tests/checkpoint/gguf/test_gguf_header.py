"""Headers of GGUF files: what is broken is refused, with the place, before anything is made of it."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.checkpoint.gguf.header import read_header
from act_export.checkpoint.load import load_checkpoint
from act_export.errors import CheckpointError

HUGE = 10**18


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


ARCHITECTURE = key("general.architecture", 8, text("llama"))


def tensor(name: str, shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def content(
    keys: tuple[bytes, ...] = (ARCHITECTURE,),
    tensors: tuple[bytes, ...] = (tensor("a.weight"),),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 128,
    alignment: int = 32,
) -> bytes:
    tensor_count, key_count = counts or (len(tensors), len(keys))
    header = magic + struct.pack("<IQQ", version, tensor_count, key_count) + b"".join((*keys, *tensors))
    return header + bytes(-len(header) % alignment) + bytes(data)


def test_a_header_is_read(tmp_path):
    path = tmp_path / "a.gguf"
    numbers = key("llama.list", 9, struct.pack("<IQ3f", 6, 3, 1, 2, 0.5))
    words = key("llama.words", 9, struct.pack("<IQ", 8, 2) + text("one") + text("zwei"))
    path.write_bytes(
        content((ARCHITECTURE, numbers, words), (tensor("a.weight", (8, 4)), tensor("b", (2,), 0, 128)), data=136)
    )
    found = read_header(path)
    assert found.keys == {
        "general.architecture": "llama",
        "llama.list": [1.0, 2.0, 0.5],
        "llama.words": ["one", "zwei"],
    }
    assert [(each.name, each.shape, each.size_bytes) for each in found.tensors.values()] == [
        ("a.weight", (4, 8), 128),
        ("b", (2,), 8),
    ]
    assert found.tensors["a.weight"].values().shape == (4, 8)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (b"", "cut short: it has 0 bytes"),
        (b"GGUF", "cut short: it has 4 bytes"),
        (content(magic=b"GGML"), "starts with b'GGML' and isn't a GGUF file"),
        (content(version=1), "it is GGUF version 1; versions 2 and 3 are read"),
        (content(version=4), "it is GGUF version 4"),
        (content(version=3 << 24), "its numbers are big-endian"),
        (content(counts=(HUGE, 1)), f"a header of {HUGE} tensors at byte"),
        (content(counts=(1, HUGE)), f"a header of {HUGE} keys at byte"),
        (content((struct.pack("<Q", HUGE) + b"general",)), f"a key of {HUGE} bytes at byte"),
        (content((text("a" * 70_000) + struct.pack("<IB", 0, 1),)), "a key at byte .* has 70000 bytes"),
        (content((key("a", 8, struct.pack("<Q", HUGE)),)), f"the value of 'a' of {HUGE} bytes"),
        (content((key("a", 9, struct.pack("<IQ", 8, HUGE)),)), f"the array 'a' of {HUGE} values"),
        (content((key("a", 9, struct.pack("<IQ", 0, HUGE)),)), f"the array 'a' of {HUGE} values"),
        (content((key("a", 9, struct.pack("<IQ", 9, 1)),)), "'a' is an array of type 9"),
        (content((key("a", 99, b""),)), "'a' has the type 99"),
        (content((ARCHITECTURE, ARCHITECTURE)), "the key 'general.architecture' twice"),
        (content((key("a", 8, text(b"\xff\xfe")),)), "isn't UTF-8"),
        (content((key("general.alignment", 4, struct.pack("<I", 24)),)), "general.alignment is 24, no power of two"),
        (content((key("general.alignment", 4, struct.pack("<I", 0)),)), "general.alignment is 0"),
        (content(tensors=(tensor("a"), tensor("a", offset=128)), data=256), "the tensor 'a' twice"),
        (content(tensors=(tensor("a"), tensor("b"))), "the tensors 'a' and 'b' overlap"),
        (content(tensors=(tensor("a", offset=4),)), "starts at 4, which isn't aligned to 32"),
        (content(tensors=(tensor("a", offset=HUGE * 2),)), "is cut short: it has .* bytes, and its 1 tensors need"),
        (content(tensors=(tensor("a", (1 << 40, 1 << 40)),)), "is cut short: it has .* bytes, and its 1 tensors need"),
        (content(tensors=(tensor("a", (32, 0)),)), r"tensor 'a' has shape \(0, 32\)"),
        (content(tensors=(tensor("a", (33,), 2),)), "Q4_0 comes in blocks of 32"),
        (content(tensors=(tensor("a", (1,) * 5),)), "has 5 dimensions"),
        (content(tensors=(tensor("a", ()),)), "has 0 dimensions"),
        (content(tensors=(tensor("a", kind=77),)), "is of type 77, which isn't known"),
        (content(data=127), "is cut short: it has .* bytes, and its 1 tensors need .* e.g. 'a.weight'"),
        (content()[:40], "is cut short, or its header is damaged: it has 40 bytes"),
        (content(()), "has no general.architecture"),
        (content((key("general.architecture", 4, struct.pack("<I", 5)),)), "has general.architecture = 5"),
    ],
)
def test_what_is_broken_is_said(tmp_path, broken, said):
    path = tmp_path / "broken.gguf"
    path.write_bytes(broken)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(str(path))


WHOLE = content(
    (
        ARCHITECTURE,
        key("a", 9, struct.pack("<IQ", 8, 2) + text("one") + text("two")),
        key("b", 6, struct.pack("<f", 2)),
    ),
    (tensor("a.weight", (8, 4)), tensor("b.weight", (32,), 2, 128)),
    data=160,
)


@given(st.integers(0, len(WHOLE)))
def test_cut_anywhere(tmp_path_factory, length):
    path = tmp_path_factory.mktemp("cut") / "a.gguf"
    path.write_bytes(WHOLE[:length])
    if length >= len(WHOLE) - 160 + 128 + 18:
        assert len(read_header(path).tensors) == 2
        return
    with pytest.raises(CheckpointError):
        read_header(path)


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_bytes_that_are_others(tmp_path_factory, changes):
    """Anything may come of it but another exception, or a tensor out of the file."""
    path = tmp_path_factory.mktemp("bytes") / "a.gguf"
    changed = bytearray(WHOLE)
    for place, value in changes:
        changed[place] = value
    path.write_bytes(bytes(changed))
    try:
        found = read_header(path)
    except CheckpointError:
        return
    assert all(each.start + each.size_bytes <= len(WHOLE) for each in found.tensors.values())
