"""Where a graft goes: refusing what is in the way, copying what the model needs, moving it all into place."""

from __future__ import annotations

import filecmp
from collections.abc import Collection, Mapping
from pathlib import Path

import onnx

from act_export.errors import ActExportError
from act_export.files import check_replaceable, copy_content, copy_folder, path_inside
from act_export.graft.source import ModelSource
from act_export.onnx_file.names import GENAI_CONFIG
from act_export.onnx_file.publish import COMPANIONS, check_output, is_file_output, publish, staged
from act_export.onnx_file.save import check_free_space
from act_export.ops.library import NAMES
from act_export.progress import Notice
from act_export.runtime.adapter import FOLDER, SUFFIX, stale_adapters, write_adapters
from act_export.staging import is_staging

_SPARE_BYTES = 16 << 20


def check_target(source: ModelSource, out: Path) -> None:
    """Refuses outputs in the way of the input or of other files."""
    if source.folder is not None and is_file_output(out):
        raise ActExportError(f"{source.folder} is a folder, so --out must be one too; {out} is a name of a file")
    if source.folder is None and not is_file_output(out):
        raise ActExportError(f"{source.path} is a file, so --out must be a name ending in .onnx; {out} is none")
    place = out.parent if is_file_output(out) else out
    if out.resolve() in (source.path.resolve(), source.folder.resolve() if source.folder is not None else None):
        raise ActExportError(f"{out} is the input, which stays as it is; pass another --out")
    if source.folder is not None and place.resolve().is_relative_to(source.folder.resolve()):
        raise ActExportError(f"{out} lies inside the input; pass another --out")
    if source.folder is not None and source.folder.resolve().is_relative_to(place.resolve()):
        raise ActExportError(f"{out} contains the input; pass another --out")
    check_output(out)


def write(
    source: ModelSource,
    model: onnx.ModelProto,
    out: Path,
    config: str | None,
    library: Path | None,
    progress: Notice,
    adapters: Collection[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> Path:
    """Puts everything together beside the output, then moves it there; the graph comes last.

    Args:
        source: What was grafted, or is no longer.
        model: Its graph now.
        out: A file or folder, as `check_target` lets it pass.
        config: Text of genai_config.json; None where there is none, or it stays as it is.
        library: The native library that a folder is to have.
        progress: Called with what is being copied.
        adapters: Names of the input's calibrations, whose adapters stay behind.
        renamed: Files of weights that the new graph calls otherwise, and what it calls them.

    Returns:
        The ONNX file.

    Raises:
        ActExportError: If other weights, or a link out of the input's folder, are in the way; if it can't be written.
    """
    target = out.parent if is_file_output(out) else out
    name = out.name if is_file_output(out) else source.path.name
    data = _data_to_copy(source, target, renamed or {})
    others = _companions(source) if source.folder is not None else []
    weights = {source.path.parent / location for location in source.data}  # which are copied by themselves
    left = weights | {source.path.parent / FOLDER / f"{name}{SUFFIX}" for name in adapters}
    needed = sum(_size(path) for path in [*data.values(), *others]) + model.ByteSize() + _SPARE_BYTES
    check_free_space(target, needed)
    with staged(out) as folder:
        onnx.save(model, folder / name)
        for location, path in data.items():
            progress(f"copying {location} ({path.stat().st_size / 1e6:.0f} MB)")
            (folder / location).parent.mkdir(parents=True, exist_ok=True)
            copy_content(path, folder / location)
        for path in others:
            if path.is_dir():
                copy_folder(path, folder / path.name, skip=lambda inner: inner in left)
            else:
                copy_content(path, folder / path.name)
        if config is not None:
            (folder / GENAI_CONFIG).write_bytes(config.encode("utf-8"))
        if library is not None:
            copy_content(library, folder / library.name)
        if adapters and (folder / FOLDER).is_dir() and not any((folder / FOLDER).iterdir()):
            (folder / FOLDER).rmdir()
        if source.folder is not None:
            write_adapters(folder, {entry.key: entry.value for entry in model.metadata_props})
        stale = () if is_file_output(out) else (*COMPANIONS, GENAI_CONFIG, *stale_adapters(target))
        publish(folder, target, stale=stale)
    return target / name


def _data_to_copy(source: ModelSource, target: Path, renamed: Mapping[str, str]) -> dict[str, Path]:
    """Location -> file, of the weights that aren't where the new graph looks for them."""
    folder = source.path.parent
    if target.resolve() == folder.resolve() and not renamed:
        _refuse_links(source)
        return {}
    copies = {}
    for location in source.data:
        name = renamed.get(location, location)
        path, there = folder / location, target / name
        check_replaceable(there)
        if there.exists() and source.folder is None:
            if not filecmp.cmp(there, path, shallow=False):
                raise ActExportError(
                    f"{there} is in the way of the weights, which have that name too; pass another folder"
                )
            continue
        copies[name] = path
    return copies


def _refuse_links(source: ModelSource) -> None:
    """ONNX Runtime takes weights behind a link only beside the file that a model's own link leads to."""
    folder = source.path.parent
    for location in source.data:
        if not (folder / location).resolve().is_relative_to(folder.resolve()):
            raise ActExportError(
                f"{folder / location} is a link out of its folder, so that only {source.path.name} can use it; pass "
                f"--out in another folder, where the weights are copied to"
            )


def _companions(source: ModelSource) -> list[Path]:
    """What else is in the folder: tokenizer, configuration and the like."""
    assert source.folder is not None
    skipped = {source.path.name, *NAMES, *source.data}
    found = [path for path in sorted(source.folder.iterdir()) if path.name not in skipped and not is_staging(path)]
    for path in found:
        path_inside(source.folder, path.name, f"the copy of {source.folder}")
        if not path.is_file() and (path.is_symlink() or not path.is_dir()):
            raise ActExportError(f"{path} is no file, and can't be copied; remove it from {source.folder}")
    return found


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
