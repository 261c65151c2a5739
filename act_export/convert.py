"""The whole job: checkpoint -> calibration -> ONNX file -> parity check."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from act_export.calibration.file import Calibration
from act_export.calibration.recipes import announce, find_recipes, named_recipe
from act_export.checkpoint.fetch import public_name
from act_export.checkpoint.load import Checkpoint
from act_export.checkpoint.streamed.cut import LAYERS, cut_calibration, cut_checkpoint, describe_cut
from act_export.checkpoint.text_tower import config_of
from act_export.errors import ActExportError, VerificationError
from act_export.export import build_model
from act_export.export.embedding import write_embedding
from act_export.files import copy_content, scratch_folder, staging_folder
from act_export.onnx_file.inspect import inspect_file
from act_export.onnx_file.names import EMBEDDING_FILE
from act_export.onnx_file.output import COMPANIONS, check_output, is_file_output, publish, staged
from act_export.onnx_file.pack_sink_state import pack_file
from act_export.onnx_file.precision import BITS
from act_export.ops.library import library_path
from act_export.progress import Notice, Progress
from act_export.runtime import Session
from act_export.runtime.session import placement_of
from act_export.search import SearchOptions, Threshold
from act_export.search_job import SearchJob, run_search
from act_export.verify.bfloat16_on_cpu import runnable_on_cpu
from act_export.verify.dequantized import dequantized
from act_export.verify.parity import verify_sessions
from act_export.verify.parity_report import CaseResult, ParityReport

DEFAULT_TASK = "sst2"
DEFAULT_SEED = 0
_BFLOAT16_ON_CPU = (
    "ONNX Runtime has no bfloat16 kernels for a CPU: standard operators computed in float32 and their results were "
    "rounded, the attention ran in bfloat16. --device cuda compares with the kernels that a GPU runs"
)


@dataclass(frozen=True)
class CalibrationRequest:
    """What the user said about the calibration.

    Attributes:
        plain: No calibrated heads: the baseline.
        calibration: A calibration file, or the name of a shipped recipe.
        task: Search on this task.
        data: Search on this JSON Lines file of prompts, choices and answers.
        beta: Instead of the calibration's.
        threshold: Instead of the calibration's.
        threshold_mode: Instead of the calibration's.
        seed: Of a search's splits.
    """

    plain: bool = False
    calibration: str | os.PathLike[str] | None = None
    task: str | None = None
    data: Path | None = None
    beta: float | None = None
    threshold: float | None = None
    threshold_mode: str | None = None
    seed: int = DEFAULT_SEED

    def __post_init__(self) -> None:
        """Raises ActExportError for options that contradict each other, or a calibration that isn't there."""
        sources = [
            name
            for name, given in (
                ("--plain", self.plain),
                ("--calibration", self.calibration),
                ("--task", self.task),
                ("--data", self.data),
            )
            if given
        ]
        if len(sources) > 1:
            raise ActExportError(f"{' and '.join(sources)} exclude each other; pass one of them")
        overrides = (self.beta, self.threshold, self.threshold_mode)
        if self.plain and any(value is not None for value in overrides):
            raise ActExportError(
                "--plain has no calibration to change; leave out --beta, --threshold, --threshold-mode"
            )
        # Values out of range are refused here, before any long work.
        Calibration({}).with_overrides(beta=self.beta, threshold=self.threshold, threshold_mode=self.threshold_mode)
        if self.calibration is not None and named_recipe(self.calibration) is None:
            Calibration.load(self.calibration)


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote.

    Attributes:
        files: Final paths.
        calibration: Baked in; None for a plain export.
        parity: The verification's report; None if it was switched off.
    """

    files: tuple[Path, ...]
    calibration: Calibration | None
    parity: ParityReport | None


def resolve_calibration(
    checkpoint: Checkpoint,
    request: CalibrationRequest,
    *,
    notice: Notice = lambda _: None,
    progress: Progress | None = None,
) -> Calibration | None:
    """The calibration to use: given, shipped, or searched; None for a plain export.

    Args:
        checkpoint: The model.
        request: What the user asked for.
        notice: Called with a line about what was decided.
        progress: For a search.

    Raises:
        ActExportError: If a file doesn't fit the model, or there is no data to search on.
    """
    if request.plain:
        return None
    calibration = _calibration_without_search(checkpoint, request, notice)
    if calibration is not None:
        return calibration.with_overrides(
            beta=request.beta, threshold=request.threshold, threshold_mode=request.threshold_mode
        )
    _refuse_search(checkpoint)
    if checkpoint.tokenizer is None:
        raise ActExportError(
            f"{checkpoint.name} has no tokenizer, so there is nothing to search heads with; pass --calibration FILE or "
            f"--plain"
        )
    return search_calibration(checkpoint, request, progress=progress)


def _calibration_without_search(
    checkpoint: Checkpoint, request: CalibrationRequest, notice: Notice
) -> Calibration | None:
    """The given calibration, or the model's recipe where nothing was given; None where a search is asked for."""
    given = request.calibration
    named = named_recipe(given) if given is not None else None
    if given is not None and named is None:
        calibration = Calibration.load(given)
        calibration.check_fits(checkpoint.identity)
        return calibration
    recipes = find_recipes(checkpoint.identity, checkpoint.names)
    if named is not None:
        named.calibration.check_fits(checkpoint.identity)
        notice(announce(named, [recipe for recipe in recipes if recipe.name != named.name]))
        return named.calibration
    if request.task is not None or request.data is not None:
        for recipe in recipes:
            if recipe.tasks == (request.task,):
                notice(f"a recipe for this model is shipped: --calibration {recipe.name} needs no search")
        return None
    if recipes:
        notice(announce(recipes[0], recipes[1:]))
        return recipes[0].calibration
    if checkpoint.streamed is None:
        notice(f"no recipe is shipped for this model: searching on {DEFAULT_TASK}")
    return None


def _refuse_search(checkpoint: Checkpoint) -> None:
    """Raises ActExportError if the model's weights aren't in memory."""
    if checkpoint.streamed is not None:
        raise ActExportError(
            f"{checkpoint.name} is read one weight at a time, and a search needs it in memory; pass --plain, "
            f"--calibration FILE or a shipped recipe's name, or search first: act-export search --dtype bfloat16 takes "
            f"half the memory, --device-map auto several GPUs"
        )


def search_calibration(
    checkpoint: Checkpoint, request: CalibrationRequest, *, progress: Progress | None = None
) -> Calibration:
    """Searches on the requested task or data, the default task where neither is given; see `act_export.search_job`."""
    defaults = Calibration({}).with_overrides(
        beta=request.beta, threshold=request.threshold, threshold_mode=request.threshold_mode
    )
    assert isinstance(defaults.beta, float | int)
    options = SearchOptions(
        betas=(defaults.beta,),
        thresholds=(Threshold(defaults.threshold, defaults.threshold_mode),),
        seed=request.seed,
    )
    data = (request.data,) if request.data is not None else ()
    tasks = () if data else (request.task or DEFAULT_TASK,)
    result = run_search(checkpoint, SearchJob(tasks, data, options=options), progress=progress)
    (calibration,) = result.calibrations.values()
    return calibration


def with_quantized_weights(checkpoint: Checkpoint, dtype: str, *, block_size: int | None = None) -> Checkpoint:
    """The model with the weights that its int4 or int8 export has, to search heads on.

    Raises:
        ActExportError: If `dtype` isn't int4 or int8, or the model can't be exported.
    """
    if dtype not in BITS:
        raise ActExportError(f"dtype is {dtype!r}, which quantizes no weights; pass --dtype {' or '.join(BITS)}")
    _refuse_search(checkpoint)
    with scratch_folder() as folder:
        path = folder / f"{dtype}.onnx"
        build_model(checkpoint, None, path, dtype=dtype, block_size=block_size)
        return replace(dequantized(path, checkpoint).checkpoint, weights=dtype)


def export_model(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    out: str | os.PathLike[str],
    *,
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
        calibration: Baked in; None for a plain export.
        out: A file `*.onnx`, or a folder, which also gets tokenizer, configuration, calibration and native library.
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
    name = out.name if is_file_output(out) else "model.onnx"
    if inputs_embeds and checkpoint.streamed is not None:
        raise ActExportError(
            f"{checkpoint.name} is read one weight at a time, which an export that takes embeddings can't be; load it "
            f"whole: --no-stream"
        )

    def build(made_from: Checkpoint, baked: Calibration | None, path: Path, step: str) -> None:
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
            report = _verify_cut(checkpoint, calibration, folder, build, device=device, progress=progress)
            _refuse_failure(report)
            gc.collect()  # what is left of the cut is in cycles of the exporter's
        build(checkpoint, calibration, folder / name, "exporting")
        if inputs_embeds and not is_file_output(out):
            write_embedding(checkpoint, folder / EMBEDDING_FILE, dtype=dtype)
        if not is_file_output(out):
            _add_companions(folder, checkpoint, calibration)
        if verify and checkpoint.streamed is None:
            report = verify_file(folder / name, checkpoint, calibration, device=device, progress=progress)
            _refuse_failure(report)
        files = publish(folder, out.parent) if is_file_output(out) else publish(folder, out, stale=COMPANIONS)
    return Converted(tuple(files), calibration, report)


def _refuse_failure(report: ParityReport) -> None:
    if not report.passed:
        raise VerificationError(
            "the exported model disagrees with PyTorch by more than its precision allows; nothing was written\n"
            + describe_failures(report)
        )


def _verify_cut(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    folder: Path,
    build: Callable[[Checkpoint, Calibration | None, Path, str], None],
    *,
    device: str,
    progress: Notice,
) -> ParityReport:
    """Parity of the first layers of a model that is too large to be compared whole, exported like the whole."""
    progress(f"reading {LAYERS} layers")
    cut, baked = cut_checkpoint(checkpoint), cut_calibration(calibration)
    with staging_folder(folder, "cut") as place:
        path = place / "cut.onnx"
        build(cut, baked, path, f"exporting {LAYERS} layers")
        report = verify_file(path, cut, baked, device=device, progress=progress)
    remarks = (describe_cut(checkpoint, calibration), report.remark)
    return replace(report, remark="; ".join(filter(None, remarks)))


def verify_file(
    path: Path,
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    *,
    device: str = "cpu",
    progress: Notice = lambda _: None,
) -> ParityReport:
    """Parity of a file, with the native library and with the portable functions, against PyTorch.

    Args:
        path: The ONNX file.
        checkpoint: The model that it was exported from, in float32. A file with quantized weights is compared with a
            copy that has the file's weights, dequantized.
        calibration: What should be baked in; None for a plain export.
        device: "cpu", "cuda" or "cuda:N".
        progress: Called with what is being compared.

    Raises:
        ActExportError: If the file or the device can't be used, or PyTorch itself fails in the file's type.
    """
    found = inspect_file(path)
    precision, rounding = found.precision, None
    if precision in BITS:
        progress("dequantizing the file's weights")
        quantized = dequantized(path, checkpoint)
        checkpoint, precision, rounding = quantized.checkpoint, quantized.precision, quantized.rounding
    with ExitStack() as stack:
        stands_in = precision == "bfloat16" and device == "cpu"
        file = stack.enter_context(runnable_on_cpu(path)) if stands_in else path
        report = verify_sessions(
            checkpoint,
            calibration,
            {
                "native library": lambda: Session.open(file, native=True, device=device),
                "portable functions": lambda: Session.open(file, native=False, device=device),
            },
            precision=precision,
            rounding=rounding,
            pads_left=found.pads_left,
            takes_embeddings=found.takes_embeddings,
            device=device,
            progress=progress,
        )
    if device != "cpu":
        progress("where nodes run")
        return replace(report, placement=placement_of(path, native=True, device=device))
    return replace(report, remark=_BFLOAT16_ON_CPU) if stands_in else report


def describe_failures(report: ParityReport) -> str:
    """The failed rows of a report, a line each."""
    lines = []
    if not report.hook_passed:
        lines.append(f"  reference hook against the model's own attention: {report.hook.max_difference:.2e}")
    if report.placement is not None and not report.runs_on_device:
        lines.append(f"  not all attention runs on {report.placement.device}: {report.placement.describe()}")
    for engine in report.engines:
        if not engine.passed and all(result.passed for result in engine.results):
            lines.append(f"  {engine.engine}: a sink flipped in {engine.flipped:.0%} of sequences")
        for result in engine.results:
            if not result.passed:
                lines.append(
                    f"  {engine.engine}, {result.case}: largest difference {result.metrics.max_difference:.2e}, mean "
                    f"{result.metrics.mean_difference:.2e}{_times(report, result)}, same "
                    f"argmax {result.metrics.argmax_agreement:.1%}, {result.wrong_sinks} wrong sinks, sink scores "
                    f"off by {result.score_difference:.1e} at the most, greedy tokens "
                    f"{'differ' if result.greedy_identical is False else 'agree'}"
                )
    return "\n".join(lines)


def _times(report: ParityReport, result: CaseResult) -> str:
    """A case's mean error by that of PyTorch in the same half type; nothing in float32."""
    if report.pytorch is None:
        return ""
    own = {each.case: each.metrics.mean_difference for each in report.pytorch.results}
    limit = max(own.get(result.case, 0.0), report.pytorch.of_all_cases.mean_difference)
    return f" ({result.metrics.mean_difference / max(limit, 1e-30):.1f} times that of {report.pytorch.engine})"


def _add_companions(folder: Path, checkpoint: Checkpoint, calibration: Calibration | None) -> None:
    takes_embeddings = (folder / EMBEDDING_FILE).is_file()
    config_of(checkpoint.model, with_vision=takes_embeddings).save_pretrained(folder)
    if checkpoint.model.generation_config is not None:
        checkpoint.model.generation_config.save_pretrained(folder)
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.save_pretrained(folder)
    if calibration is not None:
        calibration.save(folder / "calibration.json")
    library = library_path()
    copy_content(library, folder / library.name)
