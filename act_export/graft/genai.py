"""onnxruntime-genai's folder: what its configuration must say so that it carries the sink state."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from act_export.errors import ActExportError
from act_export.graft.rewrite import Templates
from act_export.json_file import look_up
from act_export.onnx_file.names import GENAI_CONFIG
from act_export.ops.library import NAMES

_T = TypeVar("_T", dict[str, Any], list[Any])
_TEMPLATES = (
    ("inputs", "past_key_names"),
    ("inputs", "past_value_names"),
    ("outputs", "present_key_names"),
    ("outputs", "present_value_names"),
)


def cache_templates(config: Mapping[str, Any]) -> Templates:
    """Names of a layer's cache, with %d for its number.

    Raises:
        ActExportError: If the configuration has no such fields, or is one of a pipeline.
    """
    decoder = _decoder(config)
    if decoder.get("pipeline"):
        raise ActExportError(f"{GENAI_CONFIG} describes a pipeline of models; act-export takes decoders of one model")
    found = [look_up(decoder, part, name) for part, name in _TEMPLATES]
    for (part, name), template in zip(_TEMPLATES, found, strict=True):
        if not isinstance(template, str) or template.count("%d") != 1:
            raise ActExportError(
                f"{GENAI_CONFIG} has model.decoder.{part}.{name} = {template!r}; it must be a name with %d for the "
                f"layer, as onnxruntime-genai's model builder writes it"
            )
    past_key, past_value, present_key, present_value = found
    return past_key, past_value, present_key, present_value


def calibrated_config(
    config: Mapping[str, Any], layers: Iterable[int], num_layers: int, filename: str, library: str | None
) -> tuple[dict[str, Any], list[str]]:
    """The configuration of a grafted folder.

    Args:
        config: As it was.
        layers: Calibrated layers.
        num_layers: Of the model.
        filename: Of the ONNX model.
        library: File name of the native library beside it; None for the portable functions.

    Returns:
        The configuration, and a line for each thing that the user should know of.

    Raises:
        ActExportError: If it loads another library, or a field is of another form than onnxruntime-genai reads.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(config))
    decoder = _decoder(changed)
    decoder["filename"] = filename
    options = _expect(dict, decoder.setdefault("session_options", {}), "session_options")
    notes = []
    if library is not None:
        if options.get("custom_ops_library") not in (None, library):
            raise ActExportError(
                f"{GENAI_CONFIG} loads the operator library {options['custom_ops_library']!r} already, and "
                f"onnxruntime-genai takes only one; pass --portable, which needs none"
            )
        options["custom_ops_library"] = library
    elif options.get("custom_ops_library") in NAMES:
        del options["custom_ops_library"]  # the folder's own copy of the library isn't taken along
    providers = "session_options.provider_options"
    for entry in _expect(list, options.get("provider_options", []), providers):
        for provider, settings in _expect(dict, entry, providers).items():
            if isinstance(settings, dict) and str(settings.get("enable_cuda_graph", "0")) == "1":
                settings["enable_cuda_graph"] = "0"
                notes.append(f"{provider}: CUDA graphs are switched off, with them the mask doesn't say how long it is")
    if "sliding_window" in decoder:
        notes += _keep_whole(decoder, set(layers), num_layers)
    return changed, notes


def dump(config: Mapping[str, Any]) -> str:
    """The file's text."""
    return json.dumps(config, indent=4, ensure_ascii=False) + "\n"


def _keep_whole(decoder: dict[str, Any], layers: set[int], num_layers: int) -> list[str]:
    """Calibrated layers, and the layers that carry sink state, keep their whole cache rather than a window of it."""
    window = _expect(dict, decoder["sliding_window"], "sliding_window")
    shortened = _expect(list, window.get("layers") or list(range(num_layers)), "sliding_window.layers")
    rest = [layer for layer in shortened if layer not in layers]
    kept = len(shortened) - len(rest)
    if rest:
        window["layers"] = rest
    else:
        del decoder["sliding_window"]
    return [f"{kept} calibrated layers with a sliding window keep their whole cache"] if kept else []


def _decoder(config: Mapping[str, Any]) -> dict[str, Any]:
    decoder = look_up(config, "model", "decoder")
    if not isinstance(decoder, dict):
        raise ActExportError(
            f"{GENAI_CONFIG} has no model.decoder; it isn't one of a decoder that onnxruntime-genai runs"
        )
    return decoder


def _expect(kind: type[_T], value: Any, field: str) -> _T:
    if not isinstance(value, kind):
        name = {dict: "object", list: "array"}[kind]
        raise ActExportError(f"{GENAI_CONFIG} has model.decoder.{field} = {value!r}; expected a JSON {name}")
    return value
