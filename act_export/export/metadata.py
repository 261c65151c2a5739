"""What a graph gets at the end: its record, and the portable functions of its operators."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from act_export.calibration.calibration_set import CalibrationSet
from act_export.checkpoint.load import Checkpoint
from act_export.checkpoint.stop_tokens import stop_tokens
from act_export.checkpoint.text_tower import family_of, placeholders_of
from act_export.export.rope import context_of, recomputed_beyond
from act_export.onnx_file.precision import Quantization
from act_export.onnx_file.record import FileRecord, Limits
from act_export.ops import functions, schema
from act_export.runtime.generation_settings import fields_of
from act_export.version import __version__


def metadata(
    calibrations: CalibrationSet,
    checkpoint: Checkpoint,
    source: str,
    dtype: str = "float32",
    quantization: Quantization | None = None,
) -> dict[str, str]:
    """What travels inside the ONNX file: version, calibrations, the model that it was made from, type, and limits."""
    config = checkpoint.model.config
    return FileRecord(
        version=__version__,
        source=source,
        model=checkpoint.identity,
        limits=Limits(
            config.vocab_size,
            context_of(config),
            tuple(stop_tokens(checkpoint)),
            tuple(placeholders_of(checkpoint.model)),
        ),
        dtype=dtype,
        family=family_of(checkpoint.model),
        revision=checkpoint.revision,
        accuracy_level=quantization.accuracy_level if quantization is not None else None,
        block_size=quantization.block_size if quantization is not None else None,
        generation=fields_of(checkpoint.model.generation_config),
        recompute_beyond=recomputed_beyond(checkpoint.model),
        calibrations=calibrations if calibrations.each or len(calibrations.heads) else None,
    ).write()


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
