"""A model repository for NVIDIA's Triton Inference Server, whose ONNX Runtime backend runs the model.

    REPOSITORY/NAME/config.pbtxt
    REPOSITORY/NAME/1/model.onnx, its weights, libact_ops.so

The backend hands the library's path to ONNX Runtime as it stands, so it must be absolute as the server sees it.
https://github.com/triton-inference-server/onnxruntime_backend
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from act_export.errors import ActExportError
from act_export.files import check_replaceable, check_writable, copy_content
from act_export.onnx_file.external_data import data_files
from act_export.onnx_file.load import load_without_weights
from act_export.onnx_file.names import CALIBRATION, model_file
from act_export.onnx_file.publish import publish, staged
from act_export.onnx_file.save import check_free_space
from act_export.ops import schema
from act_export.ops.library import LibraryNotFoundError, library_info, library_path
from act_export.runtime.device import Device

_CONFIG, _VERSION, _MODEL, _LIBRARY = "config.pbtxt", "1", "model.onnx", "libact_ops.so"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SPARE_BYTES = 1 << 20
_TYPES: dict[int, str] = {
    TensorProto.BOOL: "TYPE_BOOL",
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.UINT16: "TYPE_UINT16",
    TensorProto.UINT32: "TYPE_UINT32",
    TensorProto.UINT64: "TYPE_UINT64",
    TensorProto.INT8: "TYPE_INT8",
    TensorProto.INT16: "TYPE_INT16",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.DOUBLE: "TYPE_FP64",
    TensorProto.BFLOAT16: "TYPE_BF16",
    TensorProto.STRING: "TYPE_STRING",
}


def write_repository(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    name: str | None = None,
    device: str = "cpu",
    native: bool = True,
    served_from: str | None = None,
) -> list[Path]:
    """Writes a model into a repository, creating that if need be; other models there stay as they are.

    A model of that name is replaced where this function wrote it and nothing else lies in its folder.

    Args:
        file: An ONNX model, whoever wrote it, or the folder with it as `model.onnx`.
        out: The repository.
        name: Of the model in the server; None takes the file's, or of a `model.onnx` its folder's.
        device: "cpu", "cuda" (all GPUs, an instance on each) or "cuda:N".
        native: Copy the native library beside the model and have the server register it, if the model can use it.
        served_from: Absolute path of the repository as the server sees it; None if it sees it where it is written.

    Returns:
        The files.

    Raises:
        ActExportError: If the model can't be served (see `read_signature`), has a type that Triton doesn't know, the
            name or the library doesn't do, or the model's folder holds other files; if the repository can't be written.
        SessionError: For a malformed device.
    """
    place = Device.parse(device)
    signature = read_signature(file)
    repository = Path(out)
    name = _checked_name(signature.path, name)
    library = _library(place) if native and signature.uses_library else None
    seen = PurePosixPath(served_from) if served_from is not None else PurePosixPath(repository.resolve())
    if not seen.is_absolute():
        raise ActExportError(f"the server's path of the repository is {str(seen)!r}; it must be absolute, e.g. /models")
    registered = str(seen / name / _VERSION / _LIBRARY) if library is not None else None
    config = model_config(name, signature, device=device, library=registered)
    sources = {f"{_VERSION}/{_MODEL}": signature.path}
    sources |= {f"{_VERSION}/{entry}": signature.path.parent / entry for entry in signature.data}
    sources |= {f"{_VERSION}/{_LIBRARY}": library} if library is not None else {}
    before = _check_target(repository, name, {_CONFIG, f"{_VERSION}/{_LIBRARY}", *sources})
    _make_folder(repository)
    check_free_space(repository, sum(source.stat().st_size for source in sources.values()) + _SPARE_BYTES)
    with staged(repository) as staging:
        new = staging / "new"
        for entry, source in sources.items():
            (new / entry).parent.mkdir(parents=True, exist_ok=True)
            copy_content(source, new / entry)
        (new / _CONFIG).write_text(config, encoding="utf-8")
        publish(new, repository / name, stale=before)
    return [repository / name / entry for entry in (_CONFIG, *sources)]


def model_config(name: str, signature: Signature, *, device: str = "cpu", library: str | None = None) -> str:
    """The text of `config.pbtxt`, with the batch among the dimensions: ids, mask and state must agree on it.

    Args:
        name: Of the model.
        signature: Of its graph.
        device: As `write_repository` takes it.
        library: Of custom operators, as the server finds it; None for none.

    Raises:
        ActExportError: If Triton has no word for a tensor's type.
        SessionError: For a malformed device.
    """
    place = Device.parse(device)
    instance = "kind: KIND_GPU" if place.is_cuda else "kind: KIND_CPU"
    if ":" in device:  # without an index Triton makes an instance on each GPU
        instance += f"  gpus: [ {place.index} ]"
    lines = [f"name: {_quote(name)}", 'backend: "onnxruntime"', "max_batch_size: 0"]
    lines += [_io("input", tensor) for tensor in signature.inputs]
    lines += [_io("output", tensor) for tensor in signature.outputs]
    lines.append(f"instance_group {{ count: 1  {instance} }}")
    if library is not None:
        lines.append(f"model_operations {{ op_library_filename: {_quote(library)} }}")
    return "\n".join(lines) + "\n"


def _io(field: str, tensor: Tensor) -> str:
    known = _TYPES.get(tensor.element_type)
    if known is None:
        names = TensorProto.DataType
        named = names.Name(tensor.element_type) if tensor.element_type in names.values() else tensor.element_type
        raise ActExportError(
            f"{tensor.name} is of type {named}, which Triton doesn't have; export the model without it"
        )
    # Triton has no scalars and takes one element for them.
    dims = ", ".join("-1" if dim is None else str(dim) for dim in tensor.shape) or "1"
    optional = "  optional: true" if tensor.optional else ""
    return f"{field} {{ name: {_quote(tensor.name)}  data_type: {known}  dims: [ {dims} ]{optional} }}"


def _quote(text: str) -> str:
    """A string of protobuf's text format."""
    plain = "".join(sign if sign.isprintable() and sign not in '"\\' else _octal(sign) for sign in text)
    return f'"{plain}"'


def _octal(sign: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in sign.encode("utf-8", "replace"))


def _checked_name(file: Path, name: str | None) -> str:
    if name is None:
        name = file.stem if file.name != _MODEL else file.resolve().parent.name
    if not _NAME.fullmatch(name):
        raise ActExportError(
            f"{name!r} can't be the model's name in the server: pass a --name of letters, digits, '_', '-' and '.'"
        )
    return name


def _library(device: Device) -> Path:
    try:
        path = library_path()
    except LibraryNotFoundError as error:
        raise ActExportError(f"{error} Or have the server run the portable functions: --portable") from error
    if device.is_cuda and not library_info(path).cuda:
        raise ActExportError(
            f"{path} has no CUDA kernels, and ONNX Runtime would move every layer to the CPU: install act-export with "
            f"them, or have the server run the portable functions: --portable"
        )
    return path


def _check_target(repository: Path, name: str, files: set[str]) -> set[str]:
    """Refuses to replace what isn't a model that was written here; the files of one that is."""
    target = repository / name
    check_writable(repository)
    if not os.path.lexists(target):
        return set()
    if target.is_symlink() or not target.is_dir():
        raise ActExportError(f"{target} is no folder; pass another --name, or remove it")
    there = {
        path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    others = sorted(there - files)
    if others or (there and _CONFIG not in there):
        raise ActExportError(
            f"{target} holds other files, e.g. {(others or sorted(there))[0]}; pass another --name, or remove it"
        )
    for entry in there:
        check_replaceable(target / entry)
    return there


def _make_folder(repository: Path) -> None:
    try:
        repository.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ActExportError(f"can't make the folder {repository}: {error.strerror}; pass another --out") from error


_INITIALIZERS_ARE_NO_DEFAULTS = 3  # IR versions up to this one list every weight among the inputs


@dataclass(frozen=True)
class Tensor:
    """An input or output.

    Attributes:
        name: In the graph.
        element_type: A value of `onnx.TensorProto.DataType`.
        shape: Dimensions, None for those that vary; () for a scalar.
        optional: Whether the graph has a default for it.
    """

    name: str
    element_type: int
    shape: tuple[int | None, ...]
    optional: bool = False


@dataclass(frozen=True)
class Signature:
    """What a host has to know of a model.

    Attributes:
        path: The ONNX file.
        inputs: In the graph's order; of those with a default only the ones that hold a single number, which are
            settings and no weights.
        outputs: In the graph's order.
        data: Files beside it that hold its weights, by their names in the graph.
        uses_library: Whether it has operators that the native library can run.
    """

    path: Path
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    data: tuple[str, ...]
    uses_library: bool


def read_signature(path: str | os.PathLike[str]) -> Signature:
    """Reads the graph of a file, or of `model.onnx` of a folder; weights beside it are looked for and not read.

    Raises:
        ActExportError: If it isn't an ONNX file, an input or output is no tensor of known rank, or weights are missing.
    """
    file = model_file(path)
    if not file.is_file():
        raise ActExportError(f"there is no model {file}")
    model = load_without_weights(file, ActExportError)
    graph = model.graph
    if not graph.output:
        raise ActExportError(f"can't read {file} as an ONNX file: its graph has no outputs")
    defaults = {tensor.name: tensor for tensor in graph.initializer}
    inputs = [given for given in graph.input if given.name not in defaults or _is_setting(model, defaults[given.name])]
    return Signature(
        path=file,
        inputs=tuple(_tensor(file, given, optional=given.name in defaults) for given in inputs),
        outputs=tuple(_tensor(file, output) for output in graph.output),
        data=tuple(sorted(data_files(file, ActExportError))),
        uses_library=any(node.domain == schema.DOMAIN for node in _nodes(model)),
    )


def _is_setting(model: ModelProto, default: TensorProto) -> bool:
    """Whether an input's default is something that a caller may override, rather than a weight."""
    elements = 1
    for dim in default.dims:
        elements *= dim
    return model.ir_version > _INITIALIZERS_ARE_NO_DEFAULTS and (elements == 1 or default.name == CALIBRATION)


def _tensor(file: Path, value: ValueInfoProto, *, optional: bool = False) -> Tensor:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type" or not value.type.tensor_type.HasField("shape"):
        what = "a tensor without a shape" if kind == "tensor_type" else f"no tensor ({kind or 'no type'})"
        raise ActExportError(
            f"{file}: {value.name} is {what}; a server has to be told the rank of every input and output: export the "
            f"model with shapes"
        )
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
    return Tensor(value.name, tensor.elem_type, shape, optional)


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and those within its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                yield from _graphs(inner)


def _nodes(model: ModelProto) -> Iterator[NodeProto]:
    """The nodes of the graph and its subgraphs; those of functions are what stands in for the library."""
    for graph in _graphs(model.graph):
        yield from graph.node
