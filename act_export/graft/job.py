"""The whole job: an exported model -> the same model, calibrated; and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.file import Calibration, CalibrationError, ModelIdentity
from act_export.errors import ActExportError
from act_export.graft import genai
from act_export.graft.check import check_layer
from act_export.graft.graph import Graph
from act_export.graft.metadata import add_metadata, identity_of
from act_export.graft.output import check_target, write
from act_export.graft.record import record_of, undo
from act_export.graft.rewrite import Rewritten, apply, find_sites, rewrite, supported
from act_export.graft.sink_state import StateLayout
from act_export.graft.site import AttentionSite
from act_export.graft.source import ModelSource, read_source
from act_export.graft.weights import own_names, rename_weights
from act_export.graft.well_formed import check_nodes
from act_export.onnx_file.external_data import data_files
from act_export.onnx_file.names import GENAI_CONFIG
from act_export.onnx_file.pack_sink_state import pack_sink_state
from act_export.onnx_file.record import FileRecord
from act_export.ops import schema
from act_export.ops.library import LibraryNotFoundError, library_path
from act_export.progress import Notice
from act_export.runtime.adapter import adapter_names


@dataclass(frozen=True)
class Grafted:
    """What was written.

    Attributes:
        path: The ONNX file.
        files: That its weights lie in, and their bytes.
        calibrations: That it can be given.
        layers: Calibrated layers.
        num_layers: Of the model.
        patterns: Operator that was replaced -> how often.
        difference: Largest difference of a rewritten layer with beta = 1 from what was there; None if not compared.
        layout: Where the sink state is.
        notes: What the user should know of.
    """

    path: Path
    files: Mapping[Path, int]
    calibrations: CalibrationSet
    layers: tuple[int, ...]
    num_layers: int
    patterns: Mapping[str, int]
    difference: float | None
    layout: StateLayout
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Removed:
    """What a removal wrote.

    Attributes:
        path: The ONNX file, as it was before the graft.
        layers: That were calibrated.
    """

    path: Path
    layers: tuple[int, ...]


def graft(
    path: str | os.PathLike[str],
    calibrations: Mapping[str, Calibration] | Calibration,
    out: str | os.PathLike[str],
    *,
    default: str | None = None,
    switchable: bool = False,
    layout: StateLayout | None = None,
    native: bool = True,
    check: bool = True,
    copy_weights: bool = False,
    progress: Notice = lambda _: None,
) -> Grafted:
    """Calibrates a model that was exported before.

    Args:
        path: An ONNX file, or a folder with one; of onnxruntime-genai's builder, Olive, optimum or act-export.
        calibrations: One, or several by name, which requests can ask for.
        out: A file `*.onnx`, or a folder, which also gets what else is in the input's folder. Weights in files of their
            own stay as they are: named again where the new graph lies beside the old one, copied otherwise.
        default: Name of the calibration that holds where a request doesn't say, or "plain"; None for the first.
        switchable: Every head can be calibrated, so that calibrations found later fit too.
        layout: Where the sink state goes; None for layers of the cache in a folder for onnxruntime-genai, else inputs
            of its own.
        native: A folder for onnxruntime-genai loads the native library from its side; otherwise the portable functions
            run.
        check: Compare each rewritten layer with what was there.
        copy_weights: A file gets copies of the weights under names of its own, so that it needs no file of the input.
        progress: Called with what is being done.

    Raises:
        ActExportError: If the input isn't whole, was calibrated before, has an attention that can't be replaced, or the
            output is in the way of something.
        CalibrationError: If the calibration doesn't fit the model.
        VerificationError: If a rewritten layer computes something else; nothing is written then.
    """
    out = Path(out)
    progress("reading the graph")
    source = read_source(path)
    check_target(source, out)
    _refuse_calibrated(source)
    library = _library() if native and source.folder is not None else None
    before = source.model
    check_nodes(before.graph, str(source.path))
    after = onnx.ModelProto.FromString(before.SerializeToString())
    graph = Graph(after.graph, after.opset_import)
    sites = find_sites(graph)
    every = _every_head(sites) if switchable else None
    chosen = CalibrationSet.of(calibrations, default=default, every=every)
    identity = identity_of(source, sites, chosen.each.values())
    _check_fits(chosen, identity, sites)
    if layout is StateLayout.PACKED and source.is_genai_folder:
        raise ActExportError(
            f"--state-in-cache is for hosts such as optimum; a folder with {GENAI_CONFIG} has the state in further "
            f"layers of the cache without it: leave it out"
        )
    if layout is None:
        layout = StateLayout.CACHE_LAYERS if source.is_genai_folder else StateLayout.SCORES
    templates = None
    if layout is StateLayout.CACHE_LAYERS:
        if source.config_name != GENAI_CONFIG:
            raise ActExportError(f"the sink state can be layers of the cache only in a folder with {GENAI_CONFIG}")
        templates = genai.cache_templates(source.config)
    written_as = StateLayout.SCORES if layout is StateLayout.PACKED else layout
    rewritten = rewrite(after, graph, sites, chosen, written_as, templates)
    removed = apply(after, graph, rewritten)
    packed = pack_sink_state(after) if layout is StateLayout.PACKED else None
    notes: list[str] = []
    config: str | None = None
    if source.is_genai_folder:
        loaded = library.name if library is not None else None
        name = source.path.name
        changed, notes = genai.calibrated_config(source.config, chosen.heads.heads, len(sites), name, loaded)
        config = genai.dump(changed)
    renamed = own_names(source.data, out) if copy_weights and source.folder is None else {}
    add_metadata(source, after, sites, rewritten, removed, identity, chosen, packed, renamed)
    found = _check(source, before, after, rewritten, progress) if check else []
    difference = max((each for each in found if each is not None), default=None)
    if None in found:
        notes.append(
            f"{found.count(None)} of {len(found)} layers weren't compared with what was there: ONNX Runtime can't run "
            f"theirs on a CPU, in bfloat16 or with norms inside the attention"
        )
    notes += _padding_in_windows(rewritten, layout)
    rename_weights(after, renamed)
    written = write(source, after, out, config, library, progress, renamed=renamed)
    return Grafted(
        path=written,
        files={written.parent / name: size for name, size in data_files(written).items()},
        calibrations=chosen,
        layers=tuple(rewritten.layers),
        num_layers=len(sites),
        patterns=_patterns(rewritten),
        difference=difference,
        layout=layout,
        notes=tuple(notes),
    )


def remove_graft(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, progress: Notice = lambda _: None
) -> Removed:
    """Takes the calibration out again: the graph as it was, node for node.

    Args:
        path: A file or folder that `graft` wrote.
        out: As of `graft`.
        progress: Called with what is being done.

    Raises:
        ActExportError: If the input wasn't grafted, isn't whole, or was changed afterwards.
    """
    out = Path(out)
    progress("reading the graph")
    source = read_source(path)
    check_target(source, out)
    adapters = adapter_names(FileRecord.read(source.properties, str(source.path))) if source.folder is not None else ()
    record = undo(source.model)
    library = _library() if record.had_library else None
    written = write(source, source.model, out, record.genai_config, library, progress, adapters, record.renamed)
    return Removed(written, record.layers)


def _every_head(sites: Mapping[int, AttentionSite]) -> dict[int, tuple[int, ...]]:
    terms = {layer: supported(sites, layer).terms for layer in sites}
    return {layer: tuple(range(each.num_heads)) for layer, each in terms.items() if each is not None}


def _check_fits(calibrations: CalibrationSet, identity: ModelIdentity, sites: Mapping[int, AttentionSite]) -> None:
    for layer in calibrations.heads.heads:
        if layer in sites:
            supported(sites, layer)  # of an attention that isn't understood, heads aren't known either
    for calibration in calibrations.each.values():
        calibration.check_fits(identity)
    if not len(calibrations.heads):
        raise CalibrationError("the calibration has no heads, so there is nothing to graft")
    for layer, heads in calibrations.heads.heads.items():
        terms = sites[layer].terms if layer in sites else None
        if terms is not None and heads[-1] >= terms.num_heads:
            raise CalibrationError(
                f"head {heads[-1]} of layer {layer} is out of range; the layer has heads 0 to {terms.num_heads - 1}"
            )


def _library() -> Path:
    try:
        return library_path()
    except LibraryNotFoundError as error:
        raise ActExportError(f"{error} Or pass --portable, which needs none") from error


def _refuse_calibrated(source: ModelSource) -> None:
    given = source.folder or source.path
    another = (
        f"another calibration of the heads that it can calibrate is an adapter, which needs no new file: act-export "
        f"adapter {given} --calibration FILE --out NAME.onnx_adapter"
    )
    if record_of(source.model) is not None:
        raise ActExportError(
            f"{source.path} was grafted before. For other heads take its graft out first: act-export graft {given} "
            f"--remove --out PLAIN; {another}"
        )
    nodes = source.model.graph.node
    if FileRecord.read(source.properties, str(source.path)).calibrations is not None or any(
        node.op_type == schema.CALIBRATED and node.domain == schema.DOMAIN for node in nodes
    ):
        raise ActExportError(
            f"{source.path} has a calibration already, from its export. For other heads graft the plain export, of "
            f"act-export MODEL --plain, or export again with --switchable; {another}"
        )


def _check(
    source: ModelSource, before: onnx.ModelProto, after: onnx.ModelProto, rewritten: Rewritten, progress: Notice
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
