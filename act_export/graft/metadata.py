"""What a grafted file says of itself: the model that it is, its calibration, and the record of the graft."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import onnx
from onnx import TensorProto

from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.file import Calibration, ModelIdentity
from act_export.graft.graph import Graph, attribute
from act_export.graft.record import digest
from act_export.graft.rewrite import Rewritten
from act_export.graft.site import AttentionSite
from act_export.graft.source import ModelSource
from act_export.json_fields import Fields
from act_export.onnx_file.names import GENAI_CONFIG
from act_export.onnx_file.packed_state import PackedState
from act_export.onnx_file.record import GRAFT, PACKED, FileRecord, GraftRecord, Limits
from act_export.ops.library import NAMES
from act_export.version import __version__

_CACHE_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}
_NO_PADDING_BEFORE = "GroupQueryAttention"  # it counts tokens, and takes the first ones of a row for real


def identity_of(
    source: ModelSource, sites: Mapping[int, AttentionSite], calibrations: Iterable[Calibration] = ()
) -> ModelIdentity:
    """The model as calibrations name it, as far as the file or its configuration says.

    Weights may be quantised, so there is no fingerprint but that of act-export's own exports.
    """
    recorded = FileRecord.read(source.properties, str(source.path)).model
    if recorded is not None:
        return recorded
    heads = max((site.terms.num_heads for site in sites.values() if site.terms is not None), default=0)
    whole = _model_config(source)
    named = whole.get("type") or whole.get("model_type")
    architecture = named if isinstance(named, str) else None
    for expected in (each.model.architecture for each in calibrations if each.model is not None):
        if architecture is None or _plain_name(architecture) == _plain_name(expected):
            architecture = expected
            break
    return ModelIdentity(architecture or "unknown", len(sites), heads)


def _model_config(source: ModelSource) -> Mapping[str, Any]:
    """What the configuration says of the model: genai_config.json a level deeper than config.json."""
    found = source.config.get("model")
    return found if isinstance(found, dict) else source.config


def _plain_name(architecture: str) -> str:
    """Exporters write gemma3_text as gemma3text or gemma3, and so on."""
    return architecture.lower().replace("_", "").replace("-", "").removesuffix("text")


def add_metadata(
    source: ModelSource,
    model: onnx.ModelProto,
    sites: Mapping[int, AttentionSite],
    rewritten: Rewritten,
    removed: list[tuple[int, onnx.NodeProto]],
    identity: ModelIdentity,
    calibrations: CalibrationSet,
    packed: PackedState | None,
    renamed: Mapping[str, str],
) -> None:
    """Adds what sessions, `inspect` and `--remove` read.

    Args:
        source: The model before.
        model: The model now; changed in place.
        sites: Attention of all layers.
        rewritten: What was put in their places.
        removed: Nodes that were taken out, with their indices.
        identity: See `identity_of`.
        calibrations: That it can be given.
        packed: Where the sink state is in the cache, if it is.
        renamed: Files of weights that the model calls otherwise now, and what it calls them.
    """
    before = source.model
    texts = FileRecord(
        version=__version__,
        source=(source.folder or source.path).name,
        model=identity,
        dtype=_precision(model, sites),
        limits=_limits(source),
        calibrations=calibrations,
    ).write()
    added = {key: text for key, text in texts.items() if key not in source.properties}
    functions_before = {(each.domain, each.name) for each in before.functions}
    states = [layer.state for layer in rewritten.layers.values()]
    record = GraftRecord(
        digest=digest(before),
        removed=tuple((index, node.SerializeToString(deterministic=True)) for index, node in removed),
        inputs=packed.inputs if packed else tuple(name for each in states for name in each.past),
        outputs=packed.outputs if packed else tuple(name for each in states for name in each.present),
        functions=tuple(each.name for each in rewritten.functions if (each.domain, each.name) not in functions_before),
        opsets=tuple(rewritten.opsets),
        metadata=(*added, GRAFT, PACKED) if packed else (*added, GRAFT),
        shares_buffers=all(site.shares_buffers for site in sites.values()),
        pads_left=not any(node.op_type == _NO_PADDING_BEFORE for node in model.graph.node),
        layers=tuple(rewritten.layers),
        genai_config=(source.path.parent / GENAI_CONFIG).read_bytes().decode("utf-8")  # line ends as they are
        if source.is_genai_folder
        else None,
        had_library=source.folder is not None and any((source.folder / name).is_file() for name in NAMES),
        renamed={new: old for old, new in renamed.items()},
    )
    for key, text in {**added, GRAFT: record.to_json()}.items():
        model.metadata_props.add(key=key, value=text)


def _precision(model: onnx.ModelProto, sites: Mapping[int, AttentionSite]) -> str:
    """How weights are stored: quantised to so many bits, or as the cache."""
    bits = {attribute(node, "bits", 4) for node in model.graph.node if node.op_type == "MatMulNBits"}
    if bits:
        return f"int{min(bits)}"
    graph = Graph(model.graph)
    kind = graph.element_type(next(iter(sites.values())).cache.past_key)
    return _CACHE_TYPES.get(kind or 0, "float32")


def _limits(source: ModelSource) -> Limits:
    whole = _model_config(source)
    stop = whole.get("eos_token_id")
    given = {
        "vocab_size": whole.get("vocab_size") or None,
        "context": whole.get("context_length") or whole.get("max_position_embeddings") or None,
        "eos_token_id": stop if isinstance(stop, list) else [stop] if stop is not None else [],
    }
    advice = "correct it there, or take the file away"
    fields = Fields(given, source.config_name or "the configuration", advice=advice)
    return Limits(
        fields.whole("vocab_size", 1) if fields.given("vocab_size") else None,
        fields.whole("context", 1) if fields.given("context") else None,
        fields.wholes("eos_token_id"),
    )
