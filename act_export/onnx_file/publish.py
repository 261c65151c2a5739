"""Where an export goes: refused before any work if it can't, and put there whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from act_export.errors import ActExportError
from act_export.files import check_replaceable, check_writable, flush, folders_made, path_inside
from act_export.onnx_file.load import load_without_weights, properties_of
from act_export.onnx_file.record import FileRecord
from act_export.ops.library import NAMES
from act_export.staging import is_staging, locked, staging_folder, sweep

COMPANIONS = {
    "added_tokens.json",
    "calibration.json",
    "chat_template.jinja",
    "config.json",
    "embedding.onnx",
    "embedding.onnx.data",
    "generation_config.json",
    "libact_ops.dll",
    "libact_ops.dylib",
    "libact_ops.so",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
}
_SUFFIXES_OF_FILES = {".bin", ".data", ".gguf", ".json", ".ort", ".pb", ".pt", ".pth", ".safetensors", ".txt", ".zip"}


def check_output(out: Path) -> None:
    """Refuses early what can't become an output: a file `*.onnx`, or a folder, in folders there or to be made.

    Raises:
        ActExportError: With what to do.
    """
    place = _staging_place(out)
    if is_file_output(out):
        if out.is_dir():
            raise ActExportError(f"{out} is a folder; pass --out {out / 'model.onnx'}, or a name without .onnx")
        if ".." in out.name:  # onnx and ONNX Runtime read no weights from a file called so
            raise ActExportError(
                f"{out} has '..' in its name, which ONNX takes for a way out of the folder; pass another"
            )
        for file in (out, out.with_name(f"{out.name}.data")):
            check_replaceable(file)
    elif out.is_dir():
        _check_folder(out)
    else:
        check_replaceable(out)
        if out.exists() or out.suffix in _SUFFIXES_OF_FILES:
            raise ActExportError(
                f"{out} looks like a file but doesn't end in .onnx; pass a name ending in .onnx, or a folder"
            )
    check_writable(place)


def _check_folder(out: Path) -> None:
    """Refuses a folder with files that no export, finished or killed, left there, or with no files in their places."""
    there = sorted(out.iterdir())
    others = [path.name for path in there if not path.name.startswith(".")]
    if "model.onnx" in others:
        check_replaceable(out / "model.onnx")
        if not _is_ours(out / "model.onnx"):
            raise ActExportError(
                f"{out} holds a model.onnx that act-export didn't write, or that can't be read; pass a new or empty "
                f"folder"
            )
    elif others and not set(NAMES) & set(others) and not any(is_staging(path) for path in there):
        raise ActExportError(
            f"{out} holds other files, e.g. {others[0]}; pass a new or empty folder, or one that act-export wrote"
        )
    for path in there:
        if path.name in COMPANIONS or path.name.startswith("model.onnx"):
            check_replaceable(path)


def _is_ours(graph: Path) -> bool:
    try:
        return FileRecord.read(properties_of(load_without_weights(graph), graph), str(graph)).ours
    except ActExportError:
        return False


def is_file_output(out: Path) -> bool:
    """Whether `--out` means a file rather than a folder."""
    return out.suffix == ".onnx"


def _staging_place(out: Path) -> Path:
    """The folder in which an output is put together: on the output's own disk, so that moving files is instant."""
    return out if out.is_dir() else out.parent


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, or in it, for files that `publish` moves to their final names.

    Whatever ends the block, the temporary folder is gone afterwards; if the process is killed, with the next one. The
    folders that `out` is in are made; where nothing was put there, they are gone afterwards too.

    Raises:
        ActExportError: If the files can't be written, for instance because the disk ran full.
    """
    place = _staging_place(out)
    try:
        sweep(out.parent)  # where one lies that was killed before there was the folder `out`
        with folders_made(place), staging_folder(place, out.name) as folder:
            yield folder
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise ActExportError(
            f"can't write to {place}: {reason}; no partial output was left, and an older one is as it was"
        ) from error


def publish(folder: Path, target: Path, *, stale: Collection[str] = ()) -> list[Path]:
    """Moves every file of a staging folder into `target`, or where there is no `target` makes the folder it.

    Older files are moved into the staging folder, and back if something fails. Older graphs go first and new ones come
    last, so that a graph never lies beside weights that aren't its own, not even where the process is killed. Of
    several processes that publish to the same place the last one wins, with all of its files.

    Args:
        folder: As `staged` gives it; its files may be in folders.
        target: Its folders must not be links out of it.
        stale: Names of files that go if they are there and the new output doesn't have them.

    Returns:
        The final paths.

    Raises:
        ActExportError: If something other than a file is where one goes, or what was there can't be put back.
        OSError: If the files can't be moved; what was there before is as it was.
    """
    new = [*folder.rglob("*")]
    for path in (*new, folder):
        flush(path)
    names = sorted(
        (path.relative_to(folder) for path in new if not path.is_dir()),
        key=lambda name: (name.suffix == ".onnx", name),
    )
    if not os.path.lexists(target) and _becomes(folder, target):
        return [target / name for name in names]
    with locked(target.resolve()):
        finals = [path_inside(target, str(name), f"the output in {target}") for name in names]
        replaced = [*finals, *(target / name for name in stale if Path(name) not in names)]
        for path in replaced:
            check_replaceable(path)
        for final in finals:
            final.parent.mkdir(parents=True, exist_ok=True)
        older = Path(tempfile.mkdtemp(dir=folder))
        there = sorted((path for path in replaced if os.path.lexists(path)), key=lambda path: path.suffix != ".onnx")
        moves = [(path, older / str(number)) for number, path in enumerate(there)]
        moves += [(folder / name, final) for name, final in zip(names, finals, strict=True)]
        _move_all(moves, target)
    return finals


def _becomes(folder: Path, target: Path) -> bool:
    """Renames a folder, unless another process made the target meanwhile."""
    try:
        folder.rename(target)
    except OSError:
        if not os.path.lexists(target):
            raise
        return False
    flush(target.parent)
    return True


def _move_all(moves: Iterable[tuple[Path, Path]], target: Path) -> None:
    """Renames files, all or none of them, in this order; the folders that they come from or go to are flushed.

    Raises:
        ActExportError: If something failed and they can't be moved back.
        OSError: If they can't be moved, and are where they were.
    """
    begun: list[tuple[Path, Path]] = []
    try:
        for source, final in moves:
            begun.append((source, final))
            source.rename(final)
            for place in {source.parent, final.parent}:
                flush(place)
    except BaseException as cause:
        try:
            for source, final in reversed(begun):
                if not os.path.lexists(source):  # else it wasn't moved yet
                    final.rename(source)
        except OSError as error:  # the rest stays where it is: older graphs would come last
            raise ActExportError(
                f"can't put the output in {target}: {cause}; and what was there before can't be put back: {error}. "
                f"Write it again, when {target} can be written to"
            ) from cause
        raise
