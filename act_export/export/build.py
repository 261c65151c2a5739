"""From a loaded checkpoint to an ONNX file, without verification."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ShapeInferencePass

from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.file import Calibration
from act_export.checkpoint.load import Checkpoint
from act_export.checkpoint.low_memory import low_memory_told
from act_export.checkpoint.stop_tokens import stop_tokens
from act_export.checkpoint.text_tower import check_takes_embeddings
from act_export.errors import ActExportError
from act_export.export.lazy_weights import forget_weights
from act_export.export.metadata import finish_model, metadata
from act_export.export.passes.calibration_input import CalibrationInputPass
from act_export.export.passes.convert_precision import ConvertPrecisionPass
from act_export.export.passes.quantize_weights import QuantizeWeightsPass
from act_export.export.slim import slim
from act_export.export.trace import EXPORTING, trace
from act_export.onnx_file.precision import element_type, quantization_of
from act_export.onnx_file.save import check_model, save_model
from act_export.progress import BytesWritten
from act_export.runtime.device import import_onnxruntime


def build_model(
    checkpoint: Checkpoint,
    calibrations: CalibrationSet | Calibration | None,
    path: Path,
    *,
    source: str = "",
    dtype: str = "float32",
    accuracy_level: int | None = None,
    block_size: int | None = None,
    inputs_embeds: bool = False,
    progress: BytesWritten | None = None,
) -> None:
    """Exports a checkpoint: graph at `path`, weights at `path` + ".data".

    Args:
        checkpoint: The model, in float32; its weights may be streamed.
        calibrations: What the attention nodes can be calibrated to; None or one without heads gives the plain baseline.
        path: The ONNX file; its folder must exist.
        source: Recorded in the file as what it was made from.
        dtype: How weights, activations and cache are stored: float32, float16 or bfloat16; or int8 or int4,
            which is of weights, with the rest in float32.
        accuracy_level: Of int8 and int4, see `act_export.onnx_file.precision.Quantization`; None for the default.
        block_size: Of int8 and int4, weights that share a scale; None for the default.
        inputs_embeds: The file takes embeddings instead of token ids; see `act_export.export.embedding`.
        progress: Called before each weight is written, with the bytes that are written and all bytes.

    Raises:
        ActExportError: If `dtype` isn't one of these, a weight is too large for it, or the model isn't float32; if the
            accuracy level or block size isn't one, or there is nothing to quantize; if int8 or int4 is asked for
            without ONNX Runtime, whose quantizer it takes; if the model's attention can't be replaced; if embeddings
            are asked for and images need more than that; if the disk is too full.
        CalibrationError: If the calibration doesn't fit the model.
        CheckpointError: If the model is streamed, and its files can't be read any more.
    """
    if not isinstance(calibrations, CalibrationSet):
        calibrations = CalibrationSet.of(calibrations)
    for calibration in calibrations.each.values():
        calibration.check_fits(checkpoint.identity)
    stored = element_type(dtype)
    quantization = quantization_of(dtype, accuracy_level, block_size)
    if quantization is not None:
        import_onnxruntime()  # its absence is told before the long work
    if checkpoint.model.dtype != torch.float32:
        loaded = str(checkpoint.model.dtype).removeprefix("torch.")
        raise ActExportError(
            f"{checkpoint.name} is loaded as {loaded}; an export starts from float32: load_checkpoint(..., "
            f"dtype='float32'), and name the file's type when exporting: dtype={loaded!r}"
        )
    if inputs_embeds:
        check_takes_embeddings(checkpoint.model)
    with low_memory_told(*EXPORTING):
        stop_tokens(checkpoint)  # what is wrong with them is told before the long work, too
        read_weight = checkpoint.streamed.read if checkpoint.streamed is not None else None
        traced = trace(checkpoint.model, calibrations.heads, inputs_embeds=inputs_embeds, read_weight=read_weight)
        model = slim(traced, weight_prefix="model.")
        if stored != ir.DataType.FLOAT:
            ir.passes.Sequential(ShapeInferencePass(), ConvertPrecisionPass(stored))(model)
        if quantization is not None:
            QuantizeWeightsPass(quantization)(model)
        CalibrationInputPass(calibrations.heads.strengths(calibrations.default_calibration))(model)
        finish_model(model, metadata(calibrations, checkpoint, source, dtype, quantization))
        try:
            save_model(model, path, progress)
        finally:
            forget_weights(model)
    check_model(path)
