"""act-export MODEL --out F: calibrates and exports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import typer.core

from act_export.commands.console import (
    note,
    progress_bar,
    status,
)
from act_export.commands.loading import AskedModel, check_device
from act_export.commands.options import (
    AccuracyLevelOption,
    BetaOption,
    BlockSizeOption,
    CalibrationsOption,
    DataOption,
    DefaultOption,
    ModelArgument,
    ModeOption,
    RevisionOption,
    SeedOption,
    SwitchableOption,
    TaskOption,
    ThresholdOption,
    TrustOption,
)
from act_export.commands.parity_table import describe_engine
from act_export.errors import ActExportError

_GROWN = 1.9  # times the size of a GGUF file: one in half precision grows by 2

if TYPE_CHECKING:
    from act_export.checkpoint.load import Checkpoint
    from act_export.export.job import Converted


def export_command(
    model: ModelArgument,
    out: Annotated[
        Path | None,
        typer.Option(help="A file *.onnx, or a folder that also gets tokenizer, config, calibration and library."),
    ] = None,
    calibration: CalibrationsOption = None,
    default: DefaultOption = None,
    switchable: SwitchableOption = False,
    task: TaskOption = None,
    data: DataOption = None,
    beta: BetaOption = None,
    threshold: ThresholdOption = None,
    threshold_mode: ModeOption = None,
    plain: Annotated[bool, typer.Option("--plain", help="No calibrated heads: the baseline to compare with.")] = False,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare with PyTorch before writing.")] = True,
    seed: SeedOption = 0,
    dtype: Annotated[str, typer.Option(metavar="float32|float16|bfloat16|int8|int4", help="Of the file.")] = "float32",
    accuracy_level: AccuracyLevelOption = None,
    block_size: BlockSizeOption = None,
    search_quantized: Annotated[
        bool, typer.Option("--search-quantized", help="With int8 or int4: search heads on the rounded weights.")
    ] = False,
    inputs_embeds: Annotated[
        bool,
        typer.Option("--inputs-embeds", help="Take embeddings instead of token ids, for images; with --out FOLDER."),
    ] = False,
    state_in_cache: Annotated[
        bool, typer.Option("--state-in-cache", help="Sink state as part of the cache, for hosts such as optimum.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda|cuda:N", help="Where to compare; the file runs on both.")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read weights one at a time instead of loading the model; by default where it doesn't fit in memory.",
        ),
    ] = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Calibrates and exports MODEL (the default command)."""
    from act_export.calibration.calibration_set import CalibrationSet
    from act_export.calibration.recipes import named_calibrations
    from act_export.onnx_file.precision import check_dtype, quantization_of
    from act_export.onnx_file.publish import check_output
    from act_export.search.resolve import CalibrationRequest, asked_questions, resolve_calibrations
    from act_export.tasks import Questions

    check_dtype(dtype)
    quantization = quantization_of(dtype, accuracy_level, block_size)
    if search_quantized and (quantization is None or (task is None and data is None)):
        raise ActExportError("--search-quantized is for a search with --task or --data, and --dtype int8 or int4")
    if out is None:
        raise ActExportError(f"where to? act-export {model} --out calibrated.onnx, or --out with a folder's name")
    check_output(out)
    questions = Questions((task,) if task else (), (data,) if data else (), seed=seed)
    request = CalibrationRequest(plain, tuple(calibration or ()), questions, beta, threshold, threshold_mode)
    given = named_calibrations(calibration or ())
    if default is not None and (plain or calibration):
        CalibrationSet.of(given, default=default)  # refused before long work
    asked_model = AskedModel(model, revision=revision, trust_remote_code=trust_remote_code)
    asked_model.check()
    tasks = asked_questions(request)
    if verify or quantization is not None:
        check_device(device if verify else None)
    checkpoint = asked_model.load(stream=stream, fits=tuple(given.values()))
    from act_export.attention.hook import check_supported
    from act_export.checkpoint.text_tower import check_takes_embeddings
    from act_export.export.experts import check_experts
    from act_export.export.job import export_model, with_quantized_weights

    if checkpoint.streamed is not None:
        note("weights are read one at a time, as they are written")
    check_supported(checkpoint.model)
    check_experts(checkpoint.model)  # before a search
    if inputs_embeds:
        check_takes_embeddings(checkpoint.model)
    if larger := grown(model, checkpoint, dtype):
        note(larger)
    searched = checkpoint
    if search_quantized:
        note(f"rounding weights to {dtype}, to search on them")
        searched = with_quantized_weights(checkpoint, dtype, block_size=block_size)
    with progress_bar("search") as progress:
        chosen = resolve_calibrations(searched, request, tasks=tasks, notice=note, progress=progress)
    if chosen and not switchable and not any(each.num_calibrated_heads for each in chosen.values()):
        note("nothing that was tried gained more than luck explains, so no head is calibrated: this is a plain export")
    with status() as step:
        written = export_model(
            checkpoint,
            chosen,
            out,
            default=default,
            switchable=switchable,
            dtype=dtype,
            accuracy_level=accuracy_level,
            block_size=block_size,
            state_in_cache=state_in_cache,
            inputs_embeds=inputs_embeds,
            verify=verify,
            device=device or "cpu",
            progress=step,
        )
    _summarize(written)


def grown(model: str, checkpoint: Checkpoint, dtype: str) -> str:
    """A line where a quantized GGUF file becomes a much larger export; empty elsewhere."""
    from act_export.checkpoint.fetch import is_gguf
    from act_export.checkpoint.gguf.built_in import BUILT_IN, built_in_gguf
    from act_export.checkpoint.gguf.shards import read_gguf
    from act_export.onnx_file.precision import BITS

    if dtype in BITS or not is_gguf(model):
        return ""
    file = built_in_gguf(model) if model in BUILT_IN else Path(model).expanduser()
    stored = sum(part.stat().st_size for part in read_gguf(file)[1])
    weights_bytes = sum(each.numel() for each in checkpoint.model.parameters()) * (4 if dtype == "float32" else 2)
    if weights_bytes < _GROWN * stored:
        return ""
    return (
        f"note: {model} has {stored / 1e6:.0f} MB, and in {dtype} the export has about {weights_bytes / 1e6:.0f} MB; "
        f"--dtype int4 stores weights in 4 bits, rounded anew"
    )


def _summarize(written: Converted) -> None:
    from act_export.calibration.recipes import describe_calibrations
    from act_export.onnx_file.inspect import inspect_file
    from act_export.onnx_file.names import EMBEDDING_FILE

    path = next(file for file in written.files if file.suffix == ".onnx" and file.name != EMBEDDING_FILE)
    found = inspect_file(path)
    for line in describe_calibrations(written.calibrations, found.identity, found.precision):
        note(line)
    if written.parity is None:
        note("parity: not checked")
    else:
        for engine in written.parity.engines:
            ratio = written.parity.error_ratio(engine)
            half = (
                ""
                if ratio is None or written.parity.pytorch is None
                else f", {ratio:.2f} times the mean error of {written.parity.pytorch.engine}"
            )
            note(
                f"parity: {describe_engine(engine)}"
                + half
                + (", greedy tokens identical" if engine.greedy_identical else "")
            )
        if written.parity.remark:
            note(written.parity.remark)
        if written.parity.placement is not None:
            note(f"placement: {written.parity.placement.describe()}")
    for file in written.files:
        if file.suffix in (".onnx", ".data"):
            note(f"{file.stat().st_size / 1e6:9.1f} MB  {file}")
    print(path)
