"""Reading the model that should be calibrated: its graph, what lies beside it, and whether that is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from onnx import external_data_helper

from act_export.graft.errors import GraftError
from act_export.graft.graph import describe, reads

GENAI_CONFIG = "genai_config.json"
_CONFIGS = (GENAI_CONFIG, "config.json")


@dataclass(frozen=True)
class ModelSource:
    """A model as it was found.

    Attributes:
        path: The ONNX file.
        folder: The folder that was given; None where a file was.
        model: The graph; weights that lie in other files aren't loaded.
        data: The files that weights lie in, relative to the model's folder.
        config: genai_config.json of the folder, or else config.json beside the file; empty if there is none.
        config_name: Which of them it is; empty if there is none.
    """

    path: Path
    folder: Path | None
    model: onnx.ModelProto
    data: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    config_name: str = ""

    @property
    def is_genai_folder(self) -> bool:
        """Whether a folder for onnxruntime-genai was given."""
        return self.folder is not None and self.config_name == GENAI_CONFIG

    @property
    def properties(self) -> dict[str, str]:
        """The file's metadata."""
        return {entry.key: entry.value for entry in self.model.metadata_props}


def look_up(config: Mapping[str, Any], *names: str) -> Any:
    """A field of JSON objects within each other; None where there is none."""
    found: Any = config
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def read_source(path: str | os.PathLike[str]) -> ModelSource:
    """Reads a file, or the model of a folder.

    Raises:
        GraftError: If there is none or several, it isn't a whole ONNX model, its weights are missing or lie outside its
            folder, or a configuration can't be read.
    """
    given = Path(path)
    if not given.exists():
        raise GraftError(f"there is no model {given}")
    folder = given if given.is_dir() else None
    config, config_name = _read_config(given if folder is not None else given.parent)
    file = _model_of(folder, config if config_name == GENAI_CONFIG else {}) if folder is not None else given
    model = _load(file)
    _check_whole(file, model)
    return ModelSource(file, folder, model, _check_data(file, model), config, config_name)


def _read_config(folder: Path) -> tuple[dict[str, Any], str]:
    for name in _CONFIGS:
        if (folder / name).is_file():
            try:
                found = json.loads((folder / name).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise GraftError(f"can't read {folder / name}: {error}") from error
            if not isinstance(found, dict):
                raise GraftError(f"{folder / name} holds a {type(found).__name__}; expected a JSON object")
            return found, name
    return {}, ""


def _model_of(folder: Path, genai: Mapping[str, Any]) -> Path:
    if genai:
        name = look_up(genai, "model", "decoder", "filename")
        if not isinstance(name, str):
            raise GraftError(f"{folder / GENAI_CONFIG} has no model.decoder.filename; pass the .onnx file itself")
        return folder / name
    files = sorted(folder.glob("*.onnx"))
    named = [file for file in files if file.name == "model.onnx"]
    if named or len(files) == 1:
        return (named or files)[0]
    found = f"several: {', '.join(file.name for file in files)}" if files else "none"
    raise GraftError(f"{folder} should have one ONNX model, and has {found}; pass the .onnx file itself")


def _load(file: Path) -> onnx.ModelProto:
    try:
        return onnx.load(file, load_external_data=False)
    except Exception as error:  # protobuf's and the system's errors have no common base
        raise GraftError(f"can't read {file} as an ONNX file: {error}") from error


def _check_whole(file: Path, model: onnx.ModelProto) -> None:
    """Refuses what protobuf can read though it is no model, such as the first part of one."""
    graph = model.graph
    if not model.ir_version or not graph.node or not graph.output:
        raise GraftError(f"{file} isn't an ONNX model, or only part of one: it has no whole graph")
    known = {given.name for given in graph.input} | {tensor.name for tensor in graph.initializer} | {""}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    for node in graph.node:
        for name in reads(node):
            if name not in known:
                raise GraftError(
                    f"{file} is damaged or not whole: {describe(node)} reads {name!r}, which nothing makes"
                )
        known.update(node.output)
    for output in graph.output:
        if output.name not in known:
            raise GraftError(f"{file} is damaged: nothing makes its output {output.name!r}")


def _check_data(file: Path, model: onnx.ModelProto) -> tuple[str, ...]:
    """The files of the model's weights: all there, long enough, and inside its folder."""
    folder = file.parent.resolve()
    sizes: dict[str, int] = {}
    for tensor in _tensors(model.graph):
        if not external_data_helper.uses_external_data(tensor):
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        location = place.get("location", "")
        if location not in sizes:
            sizes[location] = _size_of_data(file, folder, location, tensor.name)
        try:
            needed = int(place.get("offset", 0)) + int(place.get("length", 0))
        except ValueError as error:
            raise GraftError(f"{file}: where {tensor.name} lies in {location} can't be read: {error}") from error
        if needed > sizes[location]:
            raise GraftError(
                f"{file.parent / location} has {sizes[location]} bytes, and {tensor.name} ends at byte {needed}; the "
                f"file isn't whole"
            )
    return tuple(sizes)


def _size_of_data(file: Path, folder: Path, location: str, tensor: str) -> int:
    place = Path(location)
    if not location or place.is_absolute() or ".." in place.parts:
        raise GraftError(
            f"{file} wants the weights of {tensor} from {location!r}; a model must not read files outside its folder"
        )
    target = file.parent / place
    if not target.is_file():
        raise GraftError(f"{file} needs its weights in {target}, which isn't there; put it beside the model")
    if not target.resolve().is_relative_to(folder):
        raise GraftError(
            f"{target} is a link to {target.resolve()}; a model must not read files outside its folder: copy the file"
        )
    return target.stat().st_size


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for given in node.attribute:
            if given.type == onnx.AttributeProto.TENSOR:
                yield given.t
            elif given.type == onnx.AttributeProto.GRAPH:
                yield from _tensors(given.g)
