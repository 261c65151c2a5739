"""The whole job: an exported model -> the same model, calibrated; and back."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from act_export import __version__
from act_export.calibration import Calibration, CalibrationError, ModelIdentity
from act_export.export.write import COMPANIONS, METADATA_PREFIX, check_free_space, check_output, is_file_output, staged
from act_export.graft import genai
from act_export.graft.check import check_layer
from act_export.graft.errors import GraftError
from act_export.graft.graph import Graph, attribute
from act_export.graft.pack_sink_state import pack_sink_state
from act_export.graft.record import KEY, GraftRecord, digest, record_of, undo
from act_export.graft.rewrite import Rewritten, apply, find_sites, rewrite, supported
from act_export.graft.sink_state import StateLayout
from act_export.graft.site import AttentionSite
from act_export.graft.source import GENAI_CONFIG, ModelSource, read_source
from act_export.ops import schema
from act_export.ops.library import NAMES, LibraryNotFoundError, library_path
from act_export.runtime.packed_state import PROPERTY, PackedState

Progress = Callable[[str], None]
_CACHE_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}
_SPARE_BYTES = 16 << 20
_NO_PADDING_BEFORE = "GroupQueryAttention"  # it counts tokens, and takes the first ones of a row for real


@dataclass(frozen=True)
class Grafted:
    """What was written.

    Attributes:
        path: The ONNX file.
        calibration: Baked in; None after a removal.
        layers: Calibrated layers.
        num_layers: Of the model.
        patterns: Operator that was replaced -> how often.
        difference: Largest difference of a rewritten layer with beta = 1 from what was there; None if not compared.
        layout: Where the sink state is.
        notes: What the user should know of.
    """

    path: Path
    calibration: Calibration | None
    layers: tuple[int, ...]
    num_layers: int
    patterns: Mapping[str, int]
    difference: float | None
    layout: StateLayout
    notes: tuple[str, ...]


def graft(
    path: str | os.PathLike[str],
    calibration: Calibration,
    out: str | os.PathLike[str],
    *,
    layout: StateLayout | None = None,
    native: bool = True,
    check: bool = True,
    progress: Progress = lambda _: None,
) -> Grafted:
    """Calibrates a model that was exported before.

    Args:
        path: An ONNX file, or a folder with one; of onnxruntime-genai's builder, Olive, optimum or act-export.
        calibration: Which heads.
        out: A file `*.onnx`, or a folder, which also gets what else is in the input's folder. Weights in files of their
            own stay as they are: named again where the new graph lies beside the old one, copied otherwise.
        layout: Where the sink state goes; None for layers of the cache in a folder for onnxruntime-genai, else inputs
            of its own.
        native: A folder for onnxruntime-genai loads the native library from its side; otherwise the portable functions
            run.
        check: Compare each rewritten layer with what was there.
        progress: Called with what is being done.

    Raises:
        GraftError: If the input isn't whole, was calibrated before, has an attention that can't be replaced, or the
            output is in the way of something.
        CalibrationError: If the calibration doesn't fit the model.
        VerificationError: If a rewritten layer computes something else; nothing is written then.
    """
    out = Path(out)
    progress("reading the graph")
    source = read_source(path)
    _check_target(source, out)
    _refuse_calibrated(source)
    if native and source.folder is not None:
        _check_library()
    before = source.model
    graph = Graph(before.graph, before.opset_import)
    sites = find_sites(graph)
    identity = identity_of(source, sites, calibration)
    _check_fits(calibration, identity, sites)
    if layout is StateLayout.PACKED and source.is_genai_folder:
        raise GraftError(
            f"--state-in-cache is for hosts such as optimum; a folder with {GENAI_CONFIG} has the state in further "
            f"layers of the cache without it: leave it out"
        )
    if layout is None:
        layout = StateLayout.CACHE_LAYERS if source.is_genai_folder else StateLayout.SCORES
    templates = None
    if layout is StateLayout.CACHE_LAYERS:
        if source.config_name != GENAI_CONFIG:
            raise GraftError(f"the sink state can be layers of the cache only in a folder with {GENAI_CONFIG}")
        templates = genai.cache_templates(source.config)
    after = onnx.ModelProto.FromString(before.SerializeToString())
    new_graph = Graph(after.graph, after.opset_import)
    new_sites = find_sites(new_graph)
    written_as = StateLayout.SCORES if layout is StateLayout.PACKED else layout
    rewritten = rewrite(after, new_graph, new_sites, calibration, written_as, templates)
    removed = apply(after, new_graph, rewritten)
    packed = pack_sink_state(after) if layout is StateLayout.PACKED else None
    notes: list[str] = []
    config: str | None = None
    if source.is_genai_folder:
        library = library_path().name if native else None
        name = source.path.name
        changed, notes = genai.calibrated_config(source.config, calibration.heads, len(sites), name, library)
        config = genai.dump(changed)
    _add_metadata(source, after, sites, rewritten, removed, identity, calibration, packed)
    found = _check(source, before, after, rewritten, progress) if check else []
    difference = max((each for each in found if each is not None), default=None)
    if None in found:
        notes.append(
            f"{found.count(None)} of {len(found)} layers weren't compared with what was there: ONNX Runtime can't run "
            f"theirs on a CPU, in bfloat16 or with norms inside the attention"
        )
    notes += _padding_in_windows(rewritten, layout)
    written = _write(source, after, out, config, native, progress)
    return Grafted(
        path=written,
        calibration=calibration,
        layers=tuple(rewritten.layers),
        num_layers=len(sites),
        patterns=_patterns(rewritten),
        difference=difference,
        layout=layout,
        notes=tuple(notes),
    )


def remove_graft(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, progress: Progress = lambda _: None
) -> Grafted:
    """Takes the calibration out again: the graph as it was, node for node.

    Args:
        path: A file or folder that `graft` wrote.
        out: As of `graft`.
        progress: Called with what is being done.

    Raises:
        GraftError: If the input wasn't grafted, isn't whole, or was changed afterwards.
    """
    out = Path(out)
    progress("reading the graph")
    source = read_source(path)
    _check_target(source, out)
    record = undo(source.model)
    written = _write(source, source.model, out, record.genai_config, False, progress)
    sites = find_sites(Graph(source.model.graph, source.model.opset_import))
    return Grafted(written, None, record.layers, len(sites), {}, None, StateLayout.SCORES, ())


def identity_of(
    source: ModelSource, sites: Mapping[int, AttentionSite], calibration: Calibration | None = None
) -> ModelIdentity:
    """The model as calibrations name it, as far as the file or its configuration says.

    Weights may be quantised, so there is no fingerprint but that of act-export's own exports.
    """
    text = source.properties.get(METADATA_PREFIX + "model")
    if text is not None:
        return ModelIdentity(**json.loads(text))
    heads = max((site.terms.num_heads for site in sites.values() if site.terms is not None), default=0)
    whole = _model_config(source)
    named = whole.get("type") or whole.get("model_type")
    architecture = named if isinstance(named, str) else None
    expected = calibration.model.architecture if calibration is not None and calibration.model is not None else None
    if expected is not None and (architecture is None or _plain_name(architecture) == _plain_name(expected)):
        architecture = expected
    return ModelIdentity(architecture or "unknown", len(sites), heads)


def _model_config(source: ModelSource) -> Mapping[str, Any]:
    """What the configuration says of the model: genai_config.json a level deeper than config.json."""
    found = source.config.get("model")
    return found if isinstance(found, dict) else source.config


def _plain_name(architecture: str) -> str:
    """Exporters write gemma3_text as gemma3text or gemma3, and so on."""
    return architecture.lower().replace("_", "").replace("-", "").removesuffix("text")


def _check_fits(calibration: Calibration, identity: ModelIdentity, sites: Mapping[int, AttentionSite]) -> None:
    for layer in calibration.heads:
        if layer in sites:
            supported(sites, layer)  # of an attention that isn't understood, heads aren't known either
    calibration.check_fits(identity)
    if not calibration.num_calibrated_heads:
        raise CalibrationError("the calibration has no heads, so there is nothing to graft")
    for layer, heads in calibration.heads.items():
        terms = sites[layer].terms if layer in sites else None
        if terms is not None and heads[-1] >= terms.num_heads:
            raise CalibrationError(
                f"head {heads[-1]} of layer {layer} is out of range; the layer has heads 0 to {terms.num_heads - 1}"
            )


def _check_library() -> None:
    try:
        library_path()
    except LibraryNotFoundError as error:
        raise GraftError(f"{error} Or pass --portable, which needs none") from error


def _refuse_calibrated(source: ModelSource) -> None:
    if record_of(source.model) is not None:
        raise GraftError(
            f"{source.path} was grafted before; take its graft out first: "
            f"act-export graft {source.folder or source.path} --remove --out PLAIN"
        )
    if any(node.op_type == schema.CALIBRATED and node.domain == schema.DOMAIN for node in source.model.graph.node):
        raise GraftError(
            f"{source.path} has a calibration already, from its export; graft the plain export, of act-export MODEL "
            f"--plain"
        )


def _check(
    source: ModelSource, before: onnx.ModelProto, after: onnx.ModelProto, rewritten: Rewritten, progress: Progress
) -> list[float | None]:
    found = []
    for number, layer in rewritten.layers.items():
        progress(f"comparing layer {number} with what was there")
        found.append(check_layer(before, after, source.path.parent, layer))
    return found


def _padding_in_windows(rewritten: Rewritten, layout: StateLayout) -> list[str]:
    """onnxruntime-genai puts padding behind shorter prompts, and what is generated behind that."""
    layers = [str(number) for number, layer in rewritten.layers.items() if _has_window(layer.site)]
    if not layers or layout is not StateLayout.CACHE_LAYERS:
        return []
    return [
        f"the sliding window of layer {', '.join(layers)} counts padding too: give a batch prompts of the same length"
    ]


def _has_window(site: AttentionSite) -> bool:
    return site.terms is not None and site.terms.sliding_window >= 0


def _patterns(rewritten: Rewritten) -> dict[str, int]:
    counts: dict[str, int] = {}
    for layer in rewritten.layers.values():
        nodes = layer.site.nodes
        named = next((node for node in nodes if "Attention" in node.op_type), None)
        kind = named.op_type if named is not None else "attention of single operators"
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def _add_metadata(
    source: ModelSource,
    model: onnx.ModelProto,
    sites: Mapping[int, AttentionSite],
    rewritten: Rewritten,
    removed: list[tuple[int, onnx.NodeProto]],
    identity: ModelIdentity,
    calibration: Calibration,
    packed: PackedState | None,
) -> None:
    before = source.model
    texts = {
        "version": __version__,
        "source": source.properties.get("act_export.source", (source.folder or source.path).name),
        "model": json.dumps(asdict(identity)),
        "dtype": _precision(model, sites),
        "limits": json.dumps(_limits(source)),
        "calibration": calibration.to_json(),
    }
    known = source.properties
    added = {METADATA_PREFIX + key: text for key, text in texts.items() if METADATA_PREFIX + key not in known}
    functions_before = {(each.domain, each.name) for each in before.functions}
    states = [layer.state for layer in rewritten.layers.values()]
    record = GraftRecord(
        digest=digest(before),
        removed=tuple(removed),
        inputs=packed.inputs if packed else tuple(name for each in states for name in each.past),
        outputs=packed.outputs if packed else tuple(name for each in states for name in each.present),
        functions=tuple(each.name for each in rewritten.functions if (each.domain, each.name) not in functions_before),
        opsets=tuple(rewritten.opsets),
        metadata=(*added, KEY, METADATA_PREFIX + PROPERTY) if packed else (*added, KEY),
        shares_buffers=all(site.shares_buffers for site in sites.values()),
        pads_left=not any(node.op_type == _NO_PADDING_BEFORE for node in model.graph.node),
        layers=tuple(rewritten.layers),
        genai_config=(source.path.parent / GENAI_CONFIG).read_bytes().decode("utf-8")  # line ends as they are
        if source.is_genai_folder
        else None,
    )
    for key, text in {**added, KEY: record.to_json()}.items():
        model.metadata_props.add(key=key, value=text)


def _precision(model: onnx.ModelProto, sites: Mapping[int, AttentionSite]) -> str:
    """How weights are stored: quantised to so many bits, or as the cache."""
    bits = {attribute(node, "bits", 4) for node in model.graph.node if node.op_type == "MatMulNBits"}
    if bits:
        return f"int{min(bits)}"
    graph = Graph(model.graph)
    kind = graph.element_type(next(iter(sites.values())).cache.past_key)
    return _CACHE_TYPES.get(kind or 0, "float32")


def _limits(source: ModelSource) -> dict[str, Any]:
    whole = _model_config(source)
    stop = whole.get("eos_token_id")
    return {
        "vocabulary": whole.get("vocab_size"),
        "context": whole.get("context_length") or whole.get("max_position_embeddings"),
        "stop_tokens": stop if isinstance(stop, list) else [stop] if stop is not None else [],
    }


def _check_target(source: ModelSource, out: Path) -> None:
    """Refuses outputs in the way of the input or of other files."""
    if source.folder is not None and is_file_output(out):
        raise GraftError(f"{source.folder} is a folder, so --out must be one too; {out} is a name of a file")
    if source.folder is None and not is_file_output(out):
        raise GraftError(f"{source.path} is a file, so --out must be a name ending in .onnx; {out} is none")
    place = out.parent if is_file_output(out) else out
    if out.resolve() in (source.path.resolve(), source.folder.resolve() if source.folder is not None else None):
        raise GraftError(f"{out} is the input, which stays as it is; pass another --out")
    if source.folder is not None and place.resolve().is_relative_to(source.folder.resolve()):
        raise GraftError(f"{out} lies inside the input; pass another --out")
    if source.folder is not None and source.folder.resolve().is_relative_to(place.resolve()):
        raise GraftError(f"{out} contains the input; pass another --out")
    check_output(out)


def _write(
    source: ModelSource,
    model: onnx.ModelProto,
    out: Path,
    config: str | None,
    native: bool,
    progress: Progress,
) -> Path:
    """Puts everything together beside the output, then moves it there; the graph comes last."""
    target = out.parent if is_file_output(out) else out
    name = out.name if is_file_output(out) else source.path.name
    data = _data_to_copy(source, target)
    others = _companions(source) if source.folder is not None else []
    sizes = [path.stat().st_size for path in [*data.values(), *others]]
    check_free_space(target if target.is_dir() else target.parent, sum(sizes) + model.ByteSize() + _SPARE_BYTES)
    with staged(out) as folder:
        onnx.save(model, folder / name)
        for location, path in data.items():
            progress(f"copying {location} ({path.stat().st_size / 1e6:.0f} MB)")
            (folder / location).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / location)
        for path in others:
            if path.is_dir():
                shutil.copytree(path, folder / path.name, symlinks=True)
            else:
                shutil.copy2(path, folder / path.name)
        if config is not None:
            (folder / GENAI_CONFIG).write_bytes(config.encode("utf-8"))
        if native and source.folder is not None:
            library = library_path()
            shutil.copy2(library, folder / library.name)
        _publish(folder, target, name, whole=not is_file_output(out))
    return target / name


def _data_to_copy(source: ModelSource, target: Path) -> dict[str, Path]:
    """Location -> file, of the weights that aren't where the new graph looks for them."""
    folder = source.path.parent
    if target.resolve() == folder.resolve():
        _refuse_links(source)
        return {}
    copies = {}
    for location in source.data:
        path, there = folder / location, target / location
        if there.exists() and source.folder is None:
            if not filecmp.cmp(there, path, shallow=False):
                raise GraftError(f"{there} is in the way of the weights, which have that name too; pass another folder")
            continue
        copies[location] = path
    return copies


def _refuse_links(source: ModelSource) -> None:
    """ONNX Runtime takes weights behind a link only beside the file that a model's own link leads to."""
    folder = source.path.parent
    for location in source.data:
        if not (folder / location).resolve().is_relative_to(folder.resolve()):
            raise GraftError(
                f"{folder / location} is a link out of its folder, so that only {source.path.name} can use it; pass "
                f"--out in another folder, where the weights are copied to"
            )


def _companions(source: ModelSource) -> list[Path]:
    """What else is in the folder: tokenizer, configuration and the like."""
    assert source.folder is not None
    tops = {Path(location).parts[0] for location in source.data}
    skipped = {source.path.name, *NAMES, *tops}
    found = [path for path in sorted(source.folder.iterdir()) if path.name not in skipped]
    places = (source.folder.resolve(), source.path.resolve().parent)  # of the hub's cache the model is a link, too
    for path in found:
        real = path.resolve()
        if not any(real.is_relative_to(place) for place in places):
            raise GraftError(f"{path} is a link to {real}, out of the folder; copy the file, or remove the link")
    return found


def _publish(folder: Path, target: Path, name: str, *, whole: bool) -> None:
    """Moves what was put together to its place; in a folder of its own, what an earlier output left there goes."""
    target.mkdir(exist_ok=True)
    (target / name).unlink(missing_ok=True)
    if whole:
        for stale in (COMPANIONS | {GENAI_CONFIG}) - {path.name for path in folder.iterdir()}:
            (target / stale).unlink(missing_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == name):
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
        path.replace(target / path.name)
