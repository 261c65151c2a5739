"""What tests compile, kept by what it was made from: made once for all processes of a run, and for the runs after it.

As a program this stands before a compiler, as CMake's CMAKE_CXX_COMPILER_LAUNCHER: an object of the same compiler,
options and preprocessed source as one that is there isn't compiled again, whichever build it is for. Only the standard
library is imported, so that it starts in no time.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "build" / "compiled-by-tests"
DAYS_KEPT = 7  # since it was last asked for
# For CMake, also of a build that another program starts: neither its path nor other packages take time to be found.
LAUNCHER = {"CMAKE_CXX_COMPILER_LAUNCHER": ";".join((sys.executable, "-I", "-S", str(Path(__file__).resolve())))}

# Options that say nothing of the object, as it is known what was included and defined; and those with a word behind.
_LEFT_OUT = ("-I", "-D", "-M")
_LEFT_OUT_WITH_NEXT = ("-MF", "-MT", "-MQ", "-isystem", "-I", "-D")


def compiled(name: str, made_from: Iterable[bytes | str | Path], make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, the first time that one of this name is to be made from this.

    Args:
        name: Begins the folder's name.
        made_from: All that decides what is in it; of a file what it has, of a folder all that is below it.
        make: Gets an empty folder, whose name isn't yet the one that it will have.
    """
    digest = sha256(name.encode())
    for part in made_from:
        for piece in _pieces(part):
            digest.update(len(piece).to_bytes(8, "little") + piece)
    folder = FOLDER / f"{name}-{digest.hexdigest()[:32]}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            _remove_old()
            with tempfile.TemporaryDirectory(prefix="making-", dir=FOLDER) as making:
                content = Path(making, "content")
                content.mkdir()
                make(content)
                content.rename(folder)
        os.utime(folder)
    return folder


def compiler(language: str = "c++") -> tuple[str, ...]:
    """The command of the compiler that CMake takes too."""
    variable, usual = {"c++": ("CXX", "c++"), "c": ("CC", "cc")}[language]
    return tuple(os.environ.get(variable, usual).split())


def identity(command: Sequence[str]) -> str:
    """Which compiler a command is, with what the environment adds: another version has another size or another time."""
    program = shutil.which(command[0])
    if program is None:
        return command[0]
    status = os.stat(program)
    flags = [os.environ.get(name, "") for name in ("CFLAGS", "CXXFLAGS", "LDFLAGS", "CPATH")]
    return f"{os.path.realpath(program)} {status.st_size} {status.st_mtime_ns} {command[1:]} {flags}"


def compile_file(name: str, source: Path, *options: str) -> Path:
    """What one source compiles to with these options; it includes none of this project.

    Raises:
        AssertionError: It doesn't compile; with the compiler's output.
    """
    command = compiler("c" if source.suffix == ".c" else "c++")

    def make(folder: Path) -> None:
        run(*command, source, "-o", folder / name, *options)

    return compiled(source.stem, (identity(command), *options, name, source), make) / name


def cmake(source: Path, made_from: Iterable[Path | str], prepare: Callable[[Path], dict[str, object]]) -> Path:
    """A folder in which CMake and Ninja built what `source` describes.

    Args:
        source: Has the CMakeLists.txt.
        made_from: All that is compiled, and what `prepare` depends on.
        prepare: Gets the folder, and returns CMake's variables.

    Raises:
        AssertionError: It doesn't build; with the last lines of the output.
    """
    import ninja

    program = (sys.executable, "-m", "cmake")

    def make(folder: Path) -> None:
        variables = {"CMAKE_MAKE_PROGRAM": f"{ninja.BIN_DIR}/ninja", **LAUNCHER, **prepare(folder)}
        definitions = (f"-D{name}={value}" for name, value in variables.items())
        run(*program, "-S", source, "-B", folder, "-G", "Ninja", *definitions)
        run(*program, "--build", folder)

    return compiled(source.name, (identity(compiler()), *made_from), make)


def run(*command: str | Path, **options: object) -> str:
    """The output of a program that succeeds.

    Raises:
        AssertionError: It doesn't; with the last lines of its output.
    """
    result = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    last_lines = "\n".join(result.stdout.splitlines()[-100:])
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{last_lines}"
    return result.stdout


def _pieces(part: bytes | str | Path) -> Iterator[bytes]:
    if isinstance(part, bytes):
        yield part
    elif isinstance(part, str):
        yield part.encode()
    elif part.is_dir():
        for path in sorted(part.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(part).as_posix().encode()
                yield path.read_bytes()
    else:
        yield part.read_bytes()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among processes; the system lets go where one ends. The file may be removed by another, or made anew."""
    while True:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                yield
                return


def _remove_old() -> None:
    """What nobody asked for lately. Not what is being looked at: that was asked for a moment ago."""
    oldest = time.time() - DAYS_KEPT * 86400
    for path in FOLDER.iterdir():
        try:
            if path.stat().st_mtime < oldest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except FileNotFoundError:  # another process removes it
            continue


def _launch(command: list[str]) -> int:
    """Compiles as `command` says, or copies the object that is there."""
    if "-c" not in command or "-o" not in command:
        return subprocess.call(command)
    at = command.index("-o") + 1
    output = Path(command[at])
    has_lines = any(word.startswith("-g") for word in command)  # are in the object
    preprocess = [*command[:at], "-", *command[at + 1 :], *([] if has_lines else ["-P"])]
    preprocess[preprocess.index("-c")] = "-E"
    source = subprocess.run(preprocess, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # writes -MF's file as well
    if source.returncode != 0 or b".incbin" in source.stdout:  # says what is wrong; or takes what no preprocessor sees
        return subprocess.call(command)
    status = 0

    def make(folder: Path) -> None:
        nonlocal status
        status = subprocess.call([*command[:at], str(folder / "object"), *command[at + 1 :]])
        if status != 0:
            raise OSError(f"{output} isn't compiled")

    try:
        found = compiled("object", (identity(command[:1]), *_telling(command[1:]), source.stdout), make)
    except OSError:
        return status or subprocess.call(command)
    shutil.copyfile(found / "object", output)
    return 0


def _telling(options: list[str]) -> list[str]:
    """Those that decide about an object of preprocessed source."""
    kept: list[str] = []
    words = iter(options)
    for word in words:
        if word in _LEFT_OUT_WITH_NEXT or word == "-o":
            next(words)
        elif not word.startswith(_LEFT_OUT) and word != "-c":
            kept.append(word)
    if kept and not kept[-1].startswith("-"):
        kept[-1] = Path(kept[-1]).suffix  # the source, last of what CMake says
    return sorted(kept, key=lambda word: not word.startswith("-std="))  # of which CMake's versions differ in the place


if __name__ == "__main__":
    raise SystemExit(_launch(sys.argv[1:]))
