"""Checkpoint and calibration -> files, compared with PyTorch before they are put in place."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.file import Calibration
from act_export.checkpoint.fetch import public_name
from act_export.checkpoint.load import Checkpoint
from act_export.checkpoint.text_tower import config_of
from act_export.errors import ActExportError, VerificationError
from act_export.export import build_model
from act_export.export.cut import LAYERS, cut_calibrations, cut_checkpoint, describe_cut
from act_export.export.embedding import write_embedding
from act_export.files import copy_content
from act_export.onnx_file.load import load_without_weights, properties_of
from act_export.onnx_file.names import EMBEDDING_FILE
from act_export.onnx_file.pack_sink_state import pack_file
from act_export.onnx_file.precision import BITS
from act_export.onnx_file.publish import COMPANIONS, check_output, is_file_output, publish, staged
from act_export.ops.library import library_path
from act_export.progress import Notice
from act_export.runtime.adapter import stale_adapters, write_adapters
from act_export.search.resolve import refuse_search
from act_export.staging import scratch_folder, staging_folder
from act_export.verify.parity.dequantized import dequantized
from act_export.verify.parity.job import describe_failures, verify_file
from act_export.verify.parity.parity_report import ParityReport


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote.

    Attributes:
        files: Final paths.
        calibrations: That requests can ask for.
        parity: The verification's report; None if it was switched off.
    """

    files: tuple[Path, ...]
    calibrations: CalibrationSet
    parity: ParityReport | None


def with_quantized_weights(checkpoint: Checkpoint, dtype: str, *, block_size: int | None = None) -> Checkpoint:
    """The model with the weights that its int4 or int8 export has, to search heads on.

    Raises:
        ActExportError: If `dtype` isn't int4 or int8, or the model can't be exported.
    """
    if dtype not in BITS:
        raise ActExportError(f"dtype is {dtype!r}, which quantizes no weights; pass --dtype {' or '.join(BITS)}")
    refuse_search(checkpoint)
    with scratch_folder() as folder:
        path = folder / f"{dtype}.onnx"
        build_model(checkpoint, None, path, dtype=dtype, block_size=block_size)
        return replace(dequantized(path, checkpoint).checkpoint, weights=dtype)


def export_model(
    checkpoint: Checkpoint,
    calibrations: Mapping[str, Calibration] | Calibration | None,
    out: str | os.PathLike[str],
    *,
    default: str | None = None,
    switchable: bool = False,
    dtype: str = "float32",
    accuracy_level: int | None = None,
    block_size: int | None = None,
    state_in_cache: bool = False,
    inputs_embeds: bool = False,
    verify: bool = True,
    device: str = "cpu",
    progress: Notice = lambda _: None,
) -> Converted:
    """Exports, verifies, and only then puts the files at their final names.

    Args:
        checkpoint: The model, in float32.
        calibrations: One, or several by name, which requests can ask for; None for a plain export.
        out: A file `*.onnx`, or a folder, which also gets tokenizer, configuration, calibration, native library, and
            the calibrations as adapters.
        default: Name of the calibration that holds where a request doesn't say, or "plain"; None for the first.
        switchable: Every head can be calibrated, so that calibrations found later fit too.
        dtype: How weights, activations and cache are stored, and the next two: see `act_export.export.build_model`.
        accuracy_level: Of int8 and int4; None for the default.
        block_size: Of int8 and int4; None for the default.
        state_in_cache: Keep the sink state in tensors named and shaped as a cache; see `pack_sink_state`.
        inputs_embeds: The model takes embeddings instead of token ids; in a folder, `embedding.onnx` looks them up.
        verify: Compare with PyTorch running the reference; of a streamed model a cut to its first layers.
        device: Where to compare: "cpu", "cuda" or "cuda:N". The files are the same.
        progress: Called with what is being done.

    Raises:
        VerificationError: If parity fails; nothing is written then.
        ActExportError: If the calibration doesn't fit, the model isn't supported, or the output can't be written.
    """
    out = Path(out)
    check_output(out)
    shape = checkpoint.identity
    every = {layer: tuple(range(shape.num_heads)) for layer in range(shape.num_layers)} if switchable else None
    chosen = CalibrationSet.of(calibrations, default=default, every=every)
    name = out.name if is_file_output(out) else "model.onnx"
    if inputs_embeds and checkpoint.streamed is not None:
        raise ActExportError(
            f"{checkpoint.name} is read one weight at a time, which an export that takes embeddings can't be; load it "
            f"whole: --no-stream"
        )

    def build(made_from: Checkpoint, baked: CalibrationSet, path: Path, step: str) -> None:
        progress(step)
        build_model(
            made_from,
            baked,
            path,
            source=public_name(checkpoint.name),
            dtype=dtype,
            accuracy_level=accuracy_level,
            block_size=block_size,
            inputs_embeds=inputs_embeds,
            progress=lambda done, of: progress(f"{step}: {done / 1e9:.1f} of {of / 1e9:.1f} GB written"),
        )
        if state_in_cache:
            pack_file(path)

    with staged(out) as folder:
        report = None
        if verify and checkpoint.streamed is not None:
            report = _verify_cut(checkpoint, chosen, folder, build, device=device, progress=progress)
            _refuse_failure(report)
            gc.collect()  # what is left of the cut is in cycles of the exporter's
        build(checkpoint, chosen, folder / name, "exporting")
        if inputs_embeds and not is_file_output(out):
            write_embedding(checkpoint, folder / EMBEDDING_FILE, dtype=dtype)
        if not is_file_output(out):
            _add_companions(folder, name, checkpoint, chosen)
        if verify and checkpoint.streamed is None:
            report = verify_file(folder / name, checkpoint, chosen, device=device, progress=progress)
            _refuse_failure(report)
        if is_file_output(out):
            files = publish(folder, out.parent)
        else:
            files = publish(folder, out, stale={*COMPANIONS, *stale_adapters(out)})
    return Converted(tuple(files), chosen, report)


def _refuse_failure(report: ParityReport) -> None:
    if not report.passed:
        raise VerificationError(
            "the exported model disagrees with PyTorch by more than its precision allows; nothing was written\n"
            + describe_failures(report)
        )


def _verify_cut(
    checkpoint: Checkpoint,
    calibrations: CalibrationSet,
    folder: Path,
    build: Callable[[Checkpoint, CalibrationSet, Path, str], None],
    *,
    device: str,
    progress: Notice,
) -> ParityReport:
    """Parity of the first layers of a model that is too large to be compared whole, exported like the whole."""
    progress(f"reading {LAYERS} layers")
    cut, baked = cut_checkpoint(checkpoint), cut_calibrations(calibrations)
    with staging_folder(folder, "cut") as place:
        path = place / "cut.onnx"
        build(cut, baked, path, f"exporting {LAYERS} layers")
        report = verify_file(path, cut, baked, device=device, progress=progress)
    remarks = (describe_cut(checkpoint, calibrations.heads), report.remark)
    return replace(report, remark="; ".join(filter(None, remarks)))


def _add_companions(folder: Path, name: str, checkpoint: Checkpoint, calibrations: CalibrationSet) -> None:
    takes_embeddings = (folder / EMBEDDING_FILE).is_file()
    config_of(checkpoint.model, with_vision=takes_embeddings).save_pretrained(folder)
    if checkpoint.model.generation_config is not None:
        checkpoint.model.generation_config.save_pretrained(folder)
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.save_pretrained(folder)
    if calibrations.default_calibration is not None:
        calibrations.default_calibration.save(folder / "calibration.json")
    write_adapters(folder, properties_of(load_without_weights(folder / name), folder / name))
    library = library_path()
    copy_content(library, folder / library.name)
