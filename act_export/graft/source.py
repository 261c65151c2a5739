"""Reading the model that should be calibrated: its graph, what lies beside it, and whether that is whole."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, external_data_helper, helper

from act_export.graft.errors import GraftError
from act_export.graft.graph import describe, reads
from act_export.onnx_file import load_without_weights

GENAI_CONFIG = "genai_config.json"
_CONFIGS = (GENAI_CONFIG, "config.json")
_HALF_BYTES = (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1)


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
    model = load_without_weights(file, GraftError)
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
        if not isinstance(name, str) or Path(name).name != name:
            raise GraftError(
                f"{folder / GENAI_CONFIG} has model.decoder.filename = {name!r}, which is no file of its folder; pass "
                f"the .onnx file itself"
            )
        return folder / name
    files = sorted(folder.glob("*.onnx"))
    named = [file for file in files if file.name == "model.onnx"]
    if named or len(files) == 1:
        return (named or files)[0]
    if not files and any(folder.glob("*.safetensors")):
        raise GraftError(f"{folder} is a checkpoint, not an exported model; export it: act-export {folder} --out OUT")
    if not files:
        raise GraftError(f"{folder} should have one ONNX model, and has none; pass the folder or file of a model")
    names = ", ".join(file.name for file in files)
    raise GraftError(f"{folder} should have one ONNX model, and has several: {names}; pass the .onnx file itself")


def _check_whole(file: Path, model: onnx.ModelProto) -> None:
    """Refuses what protobuf can read though it is no model, such as the first part of one."""
    graph = model.graph
    if not model.ir_version or not graph.node or not graph.output:
        raise GraftError(f"{file} isn't an ONNX model, or only part of one: it has no whole graph")
    known = {given.name for given in graph.input} | {tensor.name for tensor in graph.initializer} | {""}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    domains = {_domain(each.domain) for each in model.opset_import}
    for node in graph.node:
        for name in reads(node):
            if name not in known:
                raise GraftError(
                    f"{file} is damaged or not whole: {describe(node)} reads {name!r}, which nothing makes"
                )
        if _domain(node.domain) not in domains:
            raise GraftError(
                f"{file} is damaged or not whole: it doesn't say the version of {node.domain!r}, of which "
                f"{describe(node)} is"
            )
        known.update(node.output)
    for output in graph.output:
        if output.name not in known:
            raise GraftError(f"{file} is damaged: nothing makes its output {output.name!r}")


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _check_data(file: Path, model: onnx.ModelProto) -> tuple[str, ...]:
    """The files of the model's weights: all there, long enough, and inside its folder."""
    sizes: dict[str, int] = {}
    for tensor in _tensors([model.graph.node, *(each.node for each in model.functions)], model.graph.initializer):
        if not external_data_helper.uses_external_data(tensor):
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        if location not in sizes:
            sizes[location] = _size_of_data(file, location, tensor.name)
        try:
            begin, length = place_of_data(tensor)
        except ValueError as error:
            raise GraftError(f"{file}: where {tensor.name} lies in {location} can't be read: {error}") from error
        if begin + length > sizes[location]:
            raise GraftError(
                f"{file.parent / location} has {sizes[location]} bytes, and {tensor.name} ends at byte "
                f"{begin + length}; the file isn't whole"
            )
    return tuple(sizes)


def place_of_data(tensor: onnx.TensorProto) -> tuple[int, int]:
    """First byte and number of bytes of a tensor in the file that its numbers lie in.

    Raises:
        ValueError: If they are no numbers, or negative.
    """
    place = {entry.key: entry.value for entry in tensor.external_data}
    begin, length = int(place.get("offset", 0)), int(place.get("length", _bytes_of(tensor)))
    if begin < 0 or length < 0:
        raise ValueError(f"it has {length} bytes from byte {begin} on")
    return begin, length


def _bytes_of(tensor: onnx.TensorProto) -> int:
    elements = int(math.prod(tensor.dims))
    if tensor.data_type in _HALF_BYTES:
        return (elements + 1) // 2
    return elements * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _size_of_data(file: Path, location: str, tensor: str) -> int:
    place = Path(location)
    if not location or place.is_absolute() or ".." in place.parts:
        raise GraftError(
            f"{file} wants the weights of {tensor} from {location!r}; a model must not read files outside its folder"
        )
    target = file.parent / place
    if not target.is_file():
        raise GraftError(f"{file} needs its weights in {target}, which isn't there; put it beside the model")
    # As ONNX Runtime has it: where the model is a link, as in the hub's cache, beside what it links to.
    if not any(target.resolve().is_relative_to(each) for each in (file.parent.resolve(), file.resolve().parent)):
        raise GraftError(
            f"{target} is a link to {target.resolve()}; a model must not read files outside its folder: copy the file"
        )
    return target.stat().st_size


def _tensors(
    nodes: Iterable[Iterable[onnx.NodeProto]], initializers: Iterable[onnx.TensorProto]
) -> Iterator[onnx.TensorProto]:
    yield from initializers
    for node in itertools.chain.from_iterable(nodes):
        for given in node.attribute:
            if given.type == onnx.AttributeProto.TENSOR:
                yield given.t
            elif given.type == onnx.AttributeProto.GRAPH:
                yield from _tensors([given.g.node], given.g.initializer)
