"""What tests compile is made again where anything that it was made from has changed, and only there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import compiled
import pytest

SOURCE = '#include "answer.h"\nextern "C" int answer() { return ANSWER + MORE; }\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / "compiled")
    return tmp_path / "compiled"


def maker(made: list[Path]):
    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "file").write_text(str(len(made)), encoding="utf-8")

    return make


def test_each_input_counts(tmp_path):
    made: list[Path] = []
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    file = source / "below" / "file.h"
    file.write_text("1")

    def number(*made_from, name="name") -> str:
        return (compiled.compiled(name, made_from, maker(made)) / "file").read_text()

    assert [number("a", source), number("a", source)] == ["1", "1"]
    assert number("b", source) == number(b"b", source) == "2"
    assert number("b", "", source) == "3"  # not the same text in other parts
    assert number("b", source, name="other") == "4"
    file.write_text("2")
    assert number("a", source) == "5"
    file.rename(source / "below" / "another.h")
    assert number("a", source) == "6"
    file.write_text("1")
    (source / "below" / "another.h").unlink()
    assert number("a", source) == "1"


def test_a_failure_leaves_nothing(folder):
    def fail(_: Path) -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        compiled.compiled("name", (), fail)
    assert [path.suffix for path in folder.iterdir()] == [".lock"]
    assert (compiled.compiled("name", (), maker([])) / "file").exists()


def test_many_at_once_make_it_once():
    made: list[Path] = []

    def make(folder: Path) -> None:
        time.sleep(0.05)
        maker(made)(folder)

    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: compiled.compiled("name", ("x",), make), range(8)))
    assert (len(folders), len(made)) == (1, 1)


def test_what_is_old_is_removed(folder):
    old, new = (compiled.compiled(name, (), maker([])) for name in ("old", "new"))
    for path in (old, old.with_name(f"{old.name}.lock")):
        os.utime(path, (0, 0))
    compiled.compiled("newer", (), maker([]))
    assert not [path for path in folder.iterdir() if path.name.startswith("old-")]
    assert new.is_dir()


def launch(folder: Path, build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Compiles as CMake would have it, in this process's folder of what is compiled."""
    code = f"import sys; from pathlib import Path; import compiled; compiled.FOLDER = Path({str(folder)!r})\n"
    code += "raise SystemExit(compiled._launch(sys.argv[1:]))"
    paths = ("-MD", "-MT", "source.o", "-MF", build / "source.d", "-o", build / "source.o", "-c", build / "source.cc")
    command = [sys.executable, "-S", "-c", code, *compiled.compiler(), f"-I{build}", *options, *paths]
    environment = {**os.environ, "PYTHONPATH": str(Path(compiled.__file__).parent)}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)


def test_objects_are_shared_between_builds(tmp_path, folder):
    builds = [tmp_path / "one", tmp_path / "two"]
    for build in builds:
        build.mkdir()
        (build / "source.cc").write_text(SOURCE, encoding="utf-8")
        (build / "answer.h").write_text("#define ANSWER 41\n", encoding="utf-8")

    def count(build: Path, *options: str) -> int:
        (build / "source.o").unlink(missing_ok=True)
        result = launch(folder, build, *options)
        assert result.returncode == 0, result.stderr
        assert (build / "source.o").stat().st_size > 0
        assert "answer.h" in (build / "source.d").read_text(encoding="utf-8")
        return len(list(folder.glob("object-*/object")))

    one, two = builds
    assert [count(one, "-DMORE=1"), count(one, "-DMORE=1"), count(two, "-DMORE=1")] == [1, 1, 1]
    assert (one / "source.o").read_bytes() == (two / "source.o").read_bytes()
    assert count(two, "-DMORE=2") == 2
    assert count(two, "-DMORE=2", "-O1") == 3
    (one / "answer.h").write_text("#define ANSWER 0\n", encoding="utf-8")
    assert count(one, "-DMORE=1") == 4
    (one / "source.cc").write_text(f'{SOURCE}asm(".incbin \\"{one}/answer.h\\"");', encoding="utf-8")
    assert count(one, "-DMORE=1") == 4  # whatever that file has: compiled each time


def test_what_does_not_compile_says_so(tmp_path, folder):
    (tmp_path / "source.cc").write_text("#include <nothing.h>\n", encoding="utf-8")
    result = launch(folder, tmp_path)
    assert result.returncode != 0
    assert "nothing.h" in result.stderr
    (tmp_path / "source.cc").write_text("int answer() { return answers; }\n", encoding="utf-8")
    result = launch(folder, tmp_path)
    assert result.returncode != 0
    assert result.stderr.count("answers") == 2  # the message, and the line that it is of
    assert not (tmp_path / "source.o").exists()


def test_one_file(tmp_path):
    import ctypes

    source = tmp_path / "answer.c"
    found = []
    for number in (41, 42):
        source.write_text(f"int answer() {{ return {number}; }}\n", encoding="utf-8")
        paths = {compiled.compile_file("answer.so", source, "-shared", "-fPIC") for _ in range(2)}
        assert len(paths) == 1
        found.append(ctypes.CDLL(str(paths.pop())).answer())
    assert found == [41, 42]
    source.write_text("int answer() { return answers; }\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="answers"):
        compiled.compile_file("answer.so", source, "-shared", "-fPIC")
