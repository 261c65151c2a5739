"""Reading the model that should be calibrated: its graph, what lies beside it, and whether that is whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from act_export.errors import ActExportError, shown
from act_export.files import path_inside
from act_export.graft.graph import describe, reads
from act_export.json_file import look_up, read_object
from act_export.onnx_file.external_data import data_files
from act_export.onnx_file.load import load_without_weights
from act_export.onnx_file.names import GENAI_CONFIG

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


def read_source(path: str | os.PathLike[str]) -> ModelSource:
    """Reads a file, or the model of a folder.

    Raises:
        ActExportError: If there is none or several, it isn't a whole ONNX model, its weights are missing or lie outside
            its folder, or a configuration can't be read.
    """
    given = Path(path)
    if not given.exists():
        raise ActExportError(f"there is no model {given}")
    folder = given if given.is_dir() else None
    config, config_name = _read_config(given if folder is not None else given.parent)
    file = _model_of(folder, config if config_name == GENAI_CONFIG else {}) if folder is not None else given
    model = load_without_weights(file, ActExportError)
    _check_whole(file, model)
    return ModelSource(file, folder, model, tuple(data_files(file, ActExportError)), config, config_name)


def _read_config(folder: Path) -> tuple[dict[str, Any], str]:
    for name in _CONFIGS:
        path = path_inside(folder, name, str(folder))
        if path.is_file():
            return read_object(path), name
    return {}, ""


def _model_of(folder: Path, genai: Mapping[str, Any]) -> Path:
    if genai:
        name = look_up(genai, "model", "decoder", "filename")
        if not isinstance(name, str) or Path(name).name != name:
            raise ActExportError(
                f"{folder / GENAI_CONFIG} has model.decoder.filename = {shown(name)}, which is no file of its folder; "
                f"pass the .onnx file itself"
            )
        return path_inside(folder, name, f"the model of {folder}")
    files = sorted(folder.glob("*.onnx"))
    named = [file for file in files if file.name == "model.onnx"]
    if named or len(files) == 1:
        return path_inside(folder, (named or files)[0].name, f"the model of {folder}")
    if not files and any(folder.glob("*.safetensors")):
        raise ActExportError(
            f"{folder} is a checkpoint, not an exported model; export it: act-export {folder} --out OUT"
        )
    if not files:
        raise ActExportError(f"{folder} should have one ONNX model, and has none; pass the folder or file of a model")
    names = ", ".join(file.name for file in files)
    raise ActExportError(f"{folder} should have one ONNX model, and has several: {names}; pass the .onnx file itself")


def _check_whole(file: Path, model: onnx.ModelProto) -> None:
    """Refuses what protobuf can read though it is no model, such as the first part of one."""
    graph = model.graph
    if not model.ir_version or not graph.node or not graph.output:
        raise ActExportError(f"{file} isn't an ONNX model, or only part of one: it has no whole graph")
    known = {given.name for given in graph.input} | {tensor.name for tensor in graph.initializer} | {""}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    domains = {_domain(each.domain) for each in model.opset_import}
    for node in graph.node:
        for name in reads(node):
            if name not in known:
                raise ActExportError(
                    f"{file} is damaged or not whole: {describe(node)} reads {name!r}, which nothing makes"
                )
        if _domain(node.domain) not in domains:
            raise ActExportError(
                f"{file} is damaged or not whole: it doesn't say the version of {node.domain!r}, of which "
                f"{describe(node)} is"
            )
        known.update(node.output)
    for output in graph.output:
        if output.name not in known:
            raise ActExportError(f"{file} is damaged: nothing makes its output {output.name!r}")


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name
