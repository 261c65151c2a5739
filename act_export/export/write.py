"""Writing an export so that what lies at the final name is whole and verified, or isn't there."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import onnx
import onnx_ir as ir

from act_export import __version__
from act_export.calibration import Calibration
from act_export.checkpoint.load import Checkpoint
from act_export.checkpoint.text_tower import family_of, placeholders_of
from act_export.errors import ActExportError
from act_export.export.quantize import Quantization
from act_export.ops import functions, schema

METADATA_PREFIX = "act_export."
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
_FILES_OF_A_SINGLE_EXPORT = 2  # graph and weights
_SUFFIXES_OF_FILES = {".bin", ".data", ".gguf", ".json", ".ort", ".pb", ".pt", ".pth", ".safetensors", ".txt", ".zip"}
_SPARE_BYTES = 16 << 20
_INLINE_BYTES = 256  # shapes and other small constants stay in the graph: shape inference reads them


WriteProgress = Callable[[int, int], None]


class OutputError(ActExportError):
    """The output can't be written where it was asked for."""


def metadata(
    calibration: Calibration | None,
    checkpoint: Checkpoint,
    source: str,
    dtype: str = "float32",
    quantization: Quantization | None = None,
) -> dict[str, str]:
    """What travels inside the ONNX file: version, calibration, the model that it was made from, type, and limits."""
    config = checkpoint.model.config
    family, placeholders = family_of(checkpoint.model), placeholders_of(checkpoint.model)
    properties = {
        "version": __version__,
        "model": json.dumps(asdict(checkpoint.identity)),
        "source": source,
        "dtype": dtype,
        "limits": json.dumps(
            {
                "vocabulary": config.vocab_size,
                "context": getattr(config, "max_position_embeddings", None),
                "stop_tokens": stop_tokens(checkpoint),
                **({"placeholders": placeholders} if placeholders else {}),
            }
        ),
    }
    if family:
        properties["family"] = family
    if checkpoint.revision:
        properties["revision"] = checkpoint.revision
    if quantization is not None:
        properties["accuracy_level"] = str(quantization.accuracy_level)
        properties["block_size"] = str(quantization.block_size)
    if calibration is not None:
        properties["calibration"] = calibration.to_json()
    return {METADATA_PREFIX + key: value for key, value in properties.items()}


def stop_tokens(checkpoint: Checkpoint) -> list[int]:
    """Tokens after which generation ends, by tokenizer, generation configuration and configuration."""
    generation = checkpoint.model.generation_config
    given = [
        checkpoint.tokenizer.eos_token_id if checkpoint.tokenizer is not None else None,
        generation.eos_token_id if generation is not None else None,
        checkpoint.model.config.eos_token_id,
    ]
    lists = [tokens if isinstance(tokens, list) else [tokens] for tokens in given]
    return sorted({int(token) for tokens in lists for token in tokens if token is not None})


def finish_model(model: ir.Model, properties: Mapping[str, str]) -> None:
    """Adds the portable functions of the operators in use, and the metadata."""
    used = {node.op_type for node in model.graph if node.domain == schema.DOMAIN}
    for operator in sorted(used):
        function = ir.serde.deserialize_function(functions.function_body(operator))
        model.functions[function.identifier()] = function
    model.opset_imports[schema.DOMAIN] = schema.VERSION
    model.producer_name = "act-export"
    model.producer_version = __version__
    model.metadata_props.update(properties)


def save_model(model: ir.Model, path: Path, progress: WriteProgress | None = None) -> None:
    """Writes graph and weights: `path`, and beside it `path` + ".data".

    Weights are read one at a time, in the order of the graph's initializers, and not kept.

    Args:
        model: Its weights may be lazy.
        path: The ONNX file.
        progress: Called before each weight is written, with the bytes that are written and all bytes.

    Raises:
        OutputError: If the disk is too full.
    """
    weights_bytes = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
    )
    check_free_space(path.parent, weights_bytes + _SPARE_BYTES)

    def report(_: ir.TensorProtocol, place: ir.external_data.CallbackInfo) -> None:
        if progress is not None:
            progress(place.offset, weights_bytes)

    ir.save(model, path, external_data=path.name + ".data", size_threshold_bytes=_INLINE_BYTES, callback=report)


def check_model(path: Path) -> None:
    """Full check with strict shape inference, as `onnx.checker` does it for a file with external data.

    Raises:
        onnx.checker.ValidationError: If the file isn't a valid model.
    """
    onnx.checker.check_model(str(path), full_check=True)


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Raises OutputError unless the folder's disk has room."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise OutputError(f"{folder} has {free_bytes / 1e6:.0f} MB free; the export needs {needed_bytes / 1e6:.0f} MB")


def check_output(out: Path) -> None:
    """Refuses early what can't become an output: a file `*.onnx`, or a folder, in a folder that can be written to.

    Raises:
        OutputError: With what to do.
    """
    if is_file_output(out):
        if out.is_dir():
            raise OutputError(f"{out} is a folder; pass --out {out / 'model.onnx'}, or a name without .onnx")
    elif out.is_dir():
        others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
        if others and "model.onnx" not in others:
            raise OutputError(
                f"{out} holds other files, e.g. {others[0]}; pass a new or empty folder, or one that act-export wrote"
            )
    elif out.exists() or out.suffix in _SUFFIXES_OF_FILES:
        raise OutputError(f"{out} looks like a file but doesn't end in .onnx; pass a name ending in .onnx, or a folder")
    check_writable(_staging_place(out))


def check_writable(folder: Path) -> None:
    """Raises OutputError unless the folder exists and files can be made in it."""
    if not folder.is_dir():
        raise OutputError(f"there is no folder {folder}; create it, or pass another --out")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"can't write to {folder}: {error.strerror}") from error


def is_file_output(out: Path) -> bool:
    """Whether `--out` means a file rather than a folder."""
    return out.suffix == ".onnx"


def _staging_place(out: Path) -> Path:
    """The folder in which an output is put together: on the output's own disk, so that moving files is instant."""
    return out if out.is_dir() else out.parent


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, or in it, for files that `publish` moves to their final names.

    Whatever ends the block, the temporary folder is gone afterwards.

    Raises:
        OutputError: If the files can't be written, for instance because the disk ran full.
    """
    place = _staging_place(out)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=place))
    except OSError as error:
        raise OutputError(f"can't write to {place}: {error.strerror}") from error
    try:
        yield folder
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise OutputError(f"can't write to {place}: {reason}; no partial output was left") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, target: Path) -> list[Path]:
    """Moves every file of a staging folder into `target`.

    An older graph goes first and the new one comes last, so that a graph never lies beside weights that aren't its own.
    In a folder of its own an export also removes what an older one left there: a tokenizer or calibration that the new
    one doesn't have.

    Returns:
        The final paths.
    """
    target.mkdir(exist_ok=True)
    files = sorted(folder.iterdir(), key=lambda path: path.suffix == ".onnx")
    for path in files:
        if path.suffix == ".onnx":
            (target / path.name).unlink(missing_ok=True)
    if len(files) > _FILES_OF_A_SINGLE_EXPORT:
        for name in COMPANIONS - {path.name for path in files}:
            (target / name).unlink(missing_ok=True)
    published = []
    for path in files:
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
        published.append(path.replace(target / path.name))
    return published
