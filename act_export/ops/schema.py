"""The operators' schemas: names, inputs, outputs and attributes, as tools that read ONNX expect them."""

from __future__ import annotations

import onnx
from onnx.defs import OpSchema

DOMAIN = "act"
VERSION = 1
CALIBRATED = "CalibratedAttention"
PLAIN = "Attention"
NO_SINK_LOGIT = -(2.0**127)  # of a head without a learned sink: draws nothing in float32

AttributeDefault = int | float | str | list[float]

_CACHE_TYPES = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_INPUTS = {
    "query": ("T", "(batch, sequence, num_heads * head_size), rotary already applied"),
    "key": ("T", "(batch, sequence, kv_num_heads * head_size)"),
    "value": ("T", "(batch, sequence, kv_num_heads * head_size)"),
    "past_key": ("T", "(batch, kv_num_heads, past, head_size); longer than past if preallocated"),
    "past_value": ("T", "as past_key"),
    "past_sink_scores": ("F", "(batch, calibrated heads, past, 1), running column sums"),
    "attention_mask": ("M", "(batch, past + sequence), 0 for padding, 1 or any other number for real tokens"),
    "calibration": ("F", "(1 or batch, calibrated heads, 3): beta in [0, 2], gamma in [1/16, 16], threshold of each"),
}
_OUTPUTS = {
    "output": ("T", "(batch, sequence, num_heads * head_size)"),
    "present_key": ("T", "(batch, kv_num_heads, past + sequence, head_size), or past_key's length if that is longer"),
    "present_value": ("T", "as present_key"),
    "present_sink_scores": ("F", "(batch, calibrated heads, past + sequence, 1)"),
}
_INT, _INTS = OpSchema.AttrType.INT, OpSchema.AttrType.INTS
_FLOAT, _FLOATS = OpSchema.AttrType.FLOAT, OpSchema.AttrType.FLOATS
_PLAIN_ATTRIBUTES: dict[str, tuple[OpSchema.AttrType, AttributeDefault | None, str]] = {
    "num_heads": (_INT, None, "query heads"),
    "kv_num_heads": (_INT, None, "key and value heads; divides num_heads"),
    "scale": (_FLOAT, None, "multiplies the logits"),
    "softcap": (_FLOAT, 0.0, "c in c * tanh(logits / c); 0 for none"),
    "sliding_window": (_INT, -1, "number of keys a row sees, itself included; -1 for all"),
    "sink_logits": (
        _FLOATS,
        [NO_SINK_LOGIT],
        "learned sink logits, one for all query heads or one each: of one more key without a value, which every row "
        f"sees, not scaled or soft-capped; {NO_SINK_LOGIT} for none",
    ),
}
_CALIBRATION_ATTRIBUTES: dict[str, tuple[OpSchema.AttrType, AttributeDefault | None, str]] = {
    "calibrated_heads": (_INTS, None, "query heads that can be calibrated"),
    "threshold_mode": (
        OpSchema.AttrType.STRING,
        "absolute",
        "what thresholds are: absolute, tau itself; relative, alpha in alpha / number of real tokens",
    ),
}
_OF_CALIBRATED = ("past_sink_scores", "calibration", "present_sink_scores")


def attribute_defaults(operator: str) -> dict[str, AttributeDefault]:
    """The optional attributes of an operator and their defaults."""
    return {name: default for name, (_, default, _) in _attributes(operator).items() if default is not None}


def attribute_names(operator: str) -> list[str]:
    """All attributes of an operator, required ones included."""
    return list(_attributes(operator))


def schema(operator: str) -> OpSchema:
    """The ONNX schema of `CALIBRATED` or `PLAIN`."""
    carries_state = operator == CALIBRATED
    constraints = [("T", _CACHE_TYPES, "Activations and cache."), ("M", ["tensor(int64)"], "Mask.")]
    if carries_state:
        constraints.append(("F", ["tensor(float)"], "Sink state and calibration."))

    def parameters(table: dict[str, tuple[str, str]]) -> list[OpSchema.FormalParameter]:
        return [
            OpSchema.FormalParameter(name, kind, description)
            for name, (kind, description) in table.items()
            if carries_state or name not in _OF_CALIBRATED
        ]

    return OpSchema(
        operator,
        DOMAIN,
        VERSION,
        doc="Attention with its cache; calibrated heads have later sinks scaled by beta, the initial token by gamma."
        if carries_state
        else "Attention with its cache: a layer without calibrated heads.",
        inputs=parameters(_INPUTS),
        outputs=parameters(_OUTPUTS),
        type_constraints=constraints,
        attributes=[
            OpSchema.Attribute(name, kind, description)
            if default is None
            else OpSchema.Attribute(name, onnx.helper.make_attribute(name, default), description)
            for name, (kind, default, description) in _attributes(operator).items()
        ],
    )


def register_schemas() -> None:
    """Makes the operators known to onnx in this process; harmless when done before."""
    for operator in (CALIBRATED, PLAIN):
        if not onnx.defs.has(operator, DOMAIN):
            onnx.defs.register_schema(schema(operator))


def _attributes(operator: str) -> dict[str, tuple[OpSchema.AttrType, AttributeDefault | None, str]]:
    return {**_PLAIN_ATTRIBUTES, **(_CALIBRATION_ATTRIBUTES if operator == CALIBRATED else {})}
