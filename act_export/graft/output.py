"""Where a graft goes: refusing what is in the way, copying what the model needs, moving it all into place."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx

from act_export.export.write import COMPANIONS, check_free_space, check_output, is_file_output, staged
from act_export.graft.errors import GraftError
from act_export.graft.source import GENAI_CONFIG, ModelSource
from act_export.ops.library import NAMES

Progress = Callable[[str], None]
_SPARE_BYTES = 16 << 20


def check_target(source: ModelSource, out: Path) -> None:
    """Refuses outputs in the way of the input or of other files."""
    if source.folder is not None and is_file_output(out):
        raise GraftError(f"{source.folder} is a folder, so --out must be one too; {out} is a name of a file")
    if source.folder is None and not is_file_output(out):
        raise GraftError(f"{source.path} is a file, so --out must be a name ending in .onnx; {out} is none")
    place = out.parent if is_file_output(out) else out
    if out.resolve() in (source.path.resolve(), source.folder.resolve() if source.folder is not None else None):
        raise GraftError(f"{out} is the input, which stays as it is; pass another --out")
    if source.folder is not None and place.resolve().is_relative_to(source.folder.resolve()):
        raise GraftError(f"{out} lies inside the input; pass another --out")
    if source.folder is not None and source.folder.resolve().is_relative_to(place.resolve()):
        raise GraftError(f"{out} contains the input; pass another --out")
    check_output(out)


def write(
    source: ModelSource,
    model: onnx.ModelProto,
    out: Path,
    config: str | None,
    library: Path | None,
    progress: Progress,
) -> Path:
    """Puts everything together beside the output, then moves it there; the graph comes last.

    Args:
        source: What was grafted, or is no longer.
        model: Its graph now.
        out: A file or folder, as `check_target` lets it pass.
        config: Text of genai_config.json; None where there is none, or it stays as it is.
        library: The native library that a folder is to have.
        progress: Called with what is being copied.

    Returns:
        The ONNX file.

    Raises:
        GraftError: If other weights, or a link out of the input's folder, are in the way.
        OutputError: If it can't be written.
    """
    target = out.parent if is_file_output(out) else out
    name = out.name if is_file_output(out) else source.path.name
    data = _data_to_copy(source, target)
    others = _companions(source) if source.folder is not None else []
    needed = sum(_size(path) for path in [*data.values(), *others]) + model.ByteSize() + _SPARE_BYTES
    check_free_space(target if target.is_dir() else target.parent, needed)
    with staged(out) as folder:
        onnx.save(model, folder / name)
        for location, path in data.items():
            progress(f"copying {location} ({path.stat().st_size / 1e6:.0f} MB)")
            (folder / location).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / location)
        for path in others:
            if path.is_dir():
                shutil.copytree(path, folder / path.name, symlinks=True, ignore=_weights_of(source), dirs_exist_ok=True)
            else:
                shutil.copy2(path, folder / path.name)
        if config is not None:
            (folder / GENAI_CONFIG).write_bytes(config.encode("utf-8"))
        if library is not None:
            shutil.copy2(library, folder / library.name)
        _publish(folder, target, name, whole=not is_file_output(out))
    return target / name


def _data_to_copy(source: ModelSource, target: Path) -> dict[str, Path]:
    """Location -> file, of the weights that aren't where the new graph looks for them."""
    folder = source.path.parent
    if target.resolve() == folder.resolve():
        _refuse_links(source)
        return {}
    copies = {}
    for location in source.data:
        path, there = folder / location, target / location
        if there.exists() and source.folder is None:
            if not filecmp.cmp(there, path, shallow=False):
                raise GraftError(f"{there} is in the way of the weights, which have that name too; pass another folder")
            continue
        copies[location] = path
    return copies


def _refuse_links(source: ModelSource) -> None:
    """ONNX Runtime takes weights behind a link only beside the file that a model's own link leads to."""
    folder = source.path.parent
    for location in source.data:
        if not (folder / location).resolve().is_relative_to(folder.resolve()):
            raise GraftError(
                f"{folder / location} is a link out of its folder, so that only {source.path.name} can use it; pass "
                f"--out in another folder, where the weights are copied to"
            )


def _companions(source: ModelSource) -> list[Path]:
    """What else is in the folder: tokenizer, configuration and the like."""
    assert source.folder is not None
    skipped = {source.path.name, *NAMES, *source.data}
    found = [path for path in sorted(source.folder.iterdir()) if path.name not in skipped]
    places = (source.folder.resolve(), source.path.resolve().parent)  # of the hub's cache the model is a link, too
    for path in found:
        real = path.resolve()
        if not any(real.is_relative_to(place) for place in places):
            raise GraftError(f"{path} is a link to {real}, out of the folder; copy the file, or remove the link")
    return found


def _weights_of(source: ModelSource) -> Callable[[str, list[str]], set[str]]:
    """What `shutil.copytree` leaves out: the files of weights, which are copied by themselves."""
    weights = {source.path.parent / location for location in source.data}
    return lambda folder, names: {name for name in names if Path(folder) / name in weights}


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _publish(folder: Path, target: Path, name: str, *, whole: bool) -> None:
    """Moves what was put together to its place; in a folder of its own, what an earlier output left there goes."""
    target.mkdir(exist_ok=True)
    (target / name).unlink(missing_ok=True)
    if whole:
        for stale in (COMPANIONS | {GENAI_CONFIG}) - {path.name for path in folder.iterdir()}:
            (target / stale).unlink(missing_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == name):
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
        path.replace(target / path.name)
