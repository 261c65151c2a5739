"""The command line. Each command is a few lines over the API."""

from __future__ import annotations

import difflib
import json
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.text import Text

from act_export.calibration.recipes import describe_calibration
from act_export.checkpoint.hub import is_on_hub
from act_export.command_line import (
    EXIT_NOBODY_READS,
    EXIT_UNUSABLE,
    AccuracyLevelOption,
    BatchTokensOption,
    BetaOption,
    BlockSizeOption,
    ChatOption,
    DataFilesOption,
    DataOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    FileArgument,
    JsonOption,
    ModelArgument,
    ModeOption,
    PortableOption,
    RevisionOption,
    ScoringOption,
    SeedOption,
    ShotsOption,
    TaskOption,
    TasksOption,
    ThresholdOption,
    TokenizerOption,
    TruncateOption,
    TrustOption,
    WeightsOption,
    console,
    fail,
    fetch_model,
    interrupt,
    load_model,
    names_of,
    note,
    numbers_of,
    progress_bar,
    reports_errors,
    status,
    terminate,
)
from act_export.errors import ActExportError, VerificationError
from act_export.files import check_replaceable, check_writable
from act_export.graft_command import graft_command
from act_export.limits import allow_process_limits
from act_export.printing import PlainConsole, PlainTable, printable, readers_ended
from act_export.profile_commands import profile_command, report_command
from act_export.version import __version__

if TYPE_CHECKING:
    from act_export.export.job import Converted
    from act_export.verify.parity.parity_report import ParityReport

DEFAULT_COMMAND = "export"


class _DefaultToExport(typer.core.TyperGroup):
    """`act-export MODEL --out F` is `act-export export MODEL --out F`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own_options = {"--help", "--version", "--install-completion", "--show-completion"}
        if args and args[0] not in self.commands and args[0] not in own_options:
            _refuse_mistyped_command(args[0], [name for name in self.commands if name != DEFAULT_COMMAND])
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)


def _refuse_mistyped_command(word: str, commands: list[str]) -> None:
    near = difflib.get_close_matches(word, commands, n=1, cutoff=0.7)
    if near and not Path(word).exists():
        fail(f"there is no command {word!r} and no model of that name; did you mean {near[0]}?", EXIT_UNUSABLE)


app = typer.Typer(
    cls=_DefaultToExport,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Attention sink calibration baked into ONNX models.\n\n"
    "[bold]act-export MODEL --out calibrated.onnx[/bold] is the whole job: MODEL is a checkpoint folder, a hub id, a "
    ".gguf file or smollm2-135m.",
)


def main() -> None:
    """Entry point of the `act-export` command."""
    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    allow_process_limits()
    try:
        app()
    finally:
        if readers_ended():
            sys.exit(EXIT_NOBODY_READS)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command(DEFAULT_COMMAND)
@reports_errors
def export_command(
    model: ModelArgument,
    out: Annotated[
        Path | None,
        typer.Option(help="A file *.onnx, or a folder that also gets tokenizer, config, calibration and library."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="FILE|NAME", help="Calibration file or shipped recipe; otherwise that, or a search."),
    ] = None,
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
    from act_export.attention.hook import check_supported
    from act_export.checkpoint.text_tower import check_takes_embeddings
    from act_export.export.experts import check_experts
    from act_export.export.job import export_model, with_quantized_weights
    from act_export.onnx_file.output import check_output
    from act_export.onnx_file.precision import element_type, quantization_of
    from act_export.search.resolve import CalibrationRequest, resolve_calibration

    element_type(dtype)
    quantization = quantization_of(dtype, accuracy_level, block_size)
    if search_quantized and (quantization is None or (task is None and data is None)):
        raise ActExportError("--search-quantized is for a search with --task or --data, and --dtype int8 or int4")
    if out is None:
        raise ActExportError(f"where to? act-export {model} --out calibrated.onnx, or --out with a folder's name")
    check_output(out)
    request = CalibrationRequest(plain, calibration, task, data, beta, threshold, threshold_mode, seed)
    if verify or quantization is not None:
        _check_device(device if verify else None)
    checkpoint = load_model(model, revision=revision, trust_remote_code=trust_remote_code, stream=stream)
    if checkpoint.streamed is not None:
        note("weights are read one at a time, as they are written")
    check_supported(checkpoint.model)
    check_experts(checkpoint.model)  # before a search
    if inputs_embeds:
        check_takes_embeddings(checkpoint.model)
    searched = checkpoint
    if search_quantized:
        note(f"rounding weights to {dtype}, to search on them")
        searched = with_quantized_weights(checkpoint, dtype, block_size=block_size)
    with progress_bar("search") as progress:
        chosen = resolve_calibration(searched, request, notice=note, progress=progress)
    if chosen is not None and not chosen.num_calibrated_heads:
        note("calibration doesn't help this model on this data, so no head is calibrated: this is a plain export")
    with status() as step:
        written = export_model(
            checkpoint,
            chosen,
            out,
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


@app.command("search")
@reports_errors
def search_command(
    model: ModelArgument,
    out: Annotated[Path | None, typer.Option(help="The calibration file to write; for several tasks a folder.")] = None,
    task: TasksOption = None,
    data: DataFilesOption = None,
    scoring: ScoringOption = None,
    shots: ShotsOption = 0,
    chat: ChatOption = False,
    truncate: TruncateOption = False,
    method: Annotated[
        str, typer.Option(metavar="gates|gates+confirm|exhaustive", help="How heads are ranked.")
    ] = "gates",
    beta: Annotated[str | None, typer.Option(metavar="B,...", help="Strengths to try: scale of later sinks.")] = None,
    threshold: Annotated[str | None, typer.Option(metavar="T,...", help="Sink score thresholds to try.")] = None,
    threshold_mode: Annotated[
        str | None, typer.Option(metavar="absolute|relative", help="Or both, by comma, each with its thresholds.")
    ] = None,
    heads: Annotated[str | None, typer.Option(metavar="N,...", help="Numbers of heads to try.")] = None,
    confirm: Annotated[int, typer.Option(help="Heads that gates+confirm measures exactly.")] = 40,
    rank: Annotated[int | None, typer.Option(help="Questions to rank heads with, of each task.")] = None,
    choose: Annotated[int | None, typer.Option(help="Questions to choose with.")] = None,
    report: Annotated[int | None, typer.Option(help="Questions to report the gain on.")] = None,
    seed: SeedOption = 0,
    joint: Annotated[bool, typer.Option("--joint/--no-joint", help="Several tasks: also one set for all.")] = True,
    random_draws: Annotated[int, typer.Option(help="Random head sets to compare with.")] = 3,
    batch_tokens: BatchTokensOption = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for ranking, a third more time.")
    ] = False,
    dtype: DtypeOption = "float32",
    weights: WeightsOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    journal: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where finished work is kept, if not in the cache folder.")
    ] = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Finds the heads to calibrate: writes a calibration file with the accuracy that shows it.

    Interrupted or killed, the same command goes on where it stopped. Under torchrun the processes share the work.
    """
    from act_export.attention.hook import check_supported
    from act_export.onnx_file.load import model_file
    from act_export.search import SearchOptions, process_group
    from act_export.search.job import SearchJob, check_output, run_search, save_result
    from act_export.search.processes import own_device, process_index
    from act_export.search.request import BATCH_TOKENS, HEAD_COUNTS, thresholds_of
    from act_export.search.resolve import DEFAULT_TASK
    from act_export.search_table import print_search_result
    from act_export.verify.parity.dequantized import dequantized

    names = names_of(task)
    options = SearchOptions(
        method=method,
        betas=numbers_of("--beta", beta) or SearchOptions().betas,
        thresholds=thresholds_of(numbers_of("--threshold", threshold), threshold_mode),
        head_counts=tuple(map(int, numbers_of("--heads", heads, whole=True))) or HEAD_COUNTS,
        confirm=confirm,
        seed=seed,
        batch_tokens=BATCH_TOKENS if batch_tokens is None else batch_tokens,
        gradient_checkpointing=gradient_checkpointing,
        random_draws=random_draws,
        chat=chat,
        truncate=truncate,
    )
    job = SearchJob(
        tasks=names if names or data else (DEFAULT_TASK,),
        data=tuple(data or ()),
        scoring=scoring,
        shots=shots,
        rank=rank,
        choose=choose,
        report=report,
        options=options,
        joint=joint,
        journal=journal,
    )
    several = len(job.tasks) + len(job.data) > 1
    target = out or Path("calibrations" if several else "calibration.json")
    check_output(target, job)
    tasks = job.load()
    with process_group():
        checkpoint = load_model(
            model,
            dtype=dtype,
            device=own_device(device, device_map),
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        check_supported(checkpoint.model)
        if weights is not None:
            checkpoint = dequantized(model_file(weights), checkpoint).checkpoint
        first = process_index() == 0
        started = time.monotonic()
        with progress_bar("search") as progress:
            result = run_search(checkpoint, job, tasks=tasks, progress=progress if first else None)
        if not first:
            return
        note(f"searched in {time.monotonic() - started:.1f} s")
        computed, known = result.units
        if computed < known:
            note(f"{known - computed} of {known} units of work were found in the journal or came from other processes")
        if result.damaged:
            note(f"{result.damaged} lines of the journal were damaged; what they had was computed again")
        files = save_result(result, target)
        print_search_result(result)
        for name, calibration in result.calibrations.items():
            if calibration.heads:
                note(f"{name}: {describe_calibration(calibration)}")
            else:
                p = result.reports[name].p
                note(f"{name}: no head is calibrated: nothing tried gained more than luck explains (p = {p:.2g})")
        for file in files:
            print(file)


app.command("graft")(reports_errors(graft_command))
app.command("profile")(reports_errors(profile_command))
app.command("report")(reports_errors(report_command))


@app.command("verify")
@reports_errors
def verify_command(
    file: FileArgument,
    against: Annotated[str, typer.Option(metavar="MODEL", help="The checkpoint that it was exported from.")],
    device: DeviceOption = None,
    as_json: JsonOption = False,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Compares an exported model with PyTorch running the reference."""
    from act_export.onnx_file.inspect import inspect_file
    from act_export.verify.parity.job import describe_failures, verify_file

    found = inspect_file(file)
    _check_device(device)
    checkpoint = load_model(against, revision=revision, trust_remote_code=trust_remote_code)
    if found.identity.differences(checkpoint.identity):
        raise ActExportError(
            f"{file} was exported from another model: {found.identity}, and {against} is {checkpoint.identity}"
        )
    with status() as step:
        report = verify_file(found.path, checkpoint, found.calibration, device=device or "cpu", progress=step)
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    else:
        console.print(_parity_table(report))
        if report.remark:
            note(report.remark)
        if report.placement is not None:
            note(report.placement.describe())
    if not report.passed:
        raise VerificationError(f"{file} disagrees with PyTorch\n{describe_failures(report)}")


@app.command("generate")
@reports_errors
def generate_command(
    file: FileArgument,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Text to continue, or with --chat the user's message.")
    ],
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="64; it may end before.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens, as the model's generation_config.json says.")
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="Draw tokens at this temperature; 0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many of the likeliest; 0 is all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that make up this much.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    ignore_generation_config: Annotated[
        bool, typer.Option("--ignore-generation-config", help="Leave out the penalties etc. that it asks for.")
    ] = False,
    portable: PortableOption = False,
    device: DeviceOption = None,
    tokenizer: TokenizerOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Generates text, streaming it: greedily, or with --sample or --temperature by drawing tokens."""
    from act_export.runtime import Session
    from act_export.runtime.text import generation_of_options, load_generation_settings, load_tokenizer, stream_text

    sampling, options = generation_of_options(sample, temperature, top_k, top_p, seed)
    if options and not sampling.temperature:
        note(f"{', '.join(options)}: no effect without --sample or --temperature")
    with Session.open(file, native=not portable, device=device or "cpu") as session:
        text_tokenizer = load_tokenizer(session, tokenizer, trust_remote_code=trust_remote_code)
        settings = load_generation_settings(session, text_tokenizer, ignored=ignore_generation_config, note=note)
        pieces = stream_text(
            session,
            text_tokenizer,
            prompt,
            chat=chat,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            settings=settings.but(**options),
            note=note,
        )
        for piece in pieces:
            print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)
    print()


@app.command("eval")
@reports_errors
def eval_command(
    file: FileArgument,
    against: Annotated[
        Path | None, typer.Option(metavar="PLAIN.onnx", help="A plain export to compare with, in the same run.")
    ] = None,
    task: TasksOption = None,
    data: DataFilesOption = None,
    split: Annotated[
        str, typer.Option(metavar="report|held-out|all", help="The search's report split, all it left out, or all.")
    ] = "report",
    seed: Annotated[
        int | None,
        typer.Option(help="Of splits and shots; for splits the file's own search has the say where there was one."),
    ] = None,
    scoring: ScoringOption = None,
    shots: ShotsOption = 0,
    chat: ChatOption = False,
    truncate: TruncateOption = False,
    limit: Annotated[int | None, typer.Option(help="Questions of each task at the most.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens that run together at the most.")] = None,
    portable: PortableOption = False,
    device: DeviceOption = None,
    tokenizer: TokenizerOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measures accuracy through ONNX Runtime, calibrated against plain."""
    from act_export.search.resolve import DEFAULT_TASK
    from act_export.verify.evaluate.job import evaluate_files
    from act_export.verify.evaluate.results import EvaluationRequest
    from act_export.verify.evaluation_report import print_evaluation_report, report_json

    names = tuple(dict.fromkeys(names_of(task)))
    request = EvaluationRequest(
        file=file,
        against=against,
        tasks=names if names or data else (DEFAULT_TASK,),
        data=tuple(data or ()),
        split=split,
        seed=seed,
        scoring=scoring,
        shots=shots,
        chat=chat,
        truncate=truncate,
        limit=limit,
        batch_tokens=batch_tokens,
        portable=portable,
        device=device or "cpu",
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
    )
    with progress_bar("eval") as progress:
        report = evaluate_files(request, progress=progress)
    if as_json:
        print(report_json(report))
    else:
        print_evaluation_report(report)


@app.command(
    "lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
@reports_errors
def lm_eval_command(context: typer.Context) -> None:
    """Runs lm-evaluation-harness with the model type act-onnx; all options are its own."""
    try:
        from act_export.verify.evaluate.harness import run_harness
    except ModuleNotFoundError as error:
        raise ActExportError(f"{error}; pip install 'act-export[lm-eval]'") from error

    run_harness(context.args)


@app.command("bench")
@reports_errors
def bench_command(
    file: FileArgument,
    against: Annotated[
        list[Path] | None,
        typer.Option(metavar="PLAIN.onnx", help="Another file of the model, also of another exporter; repeatable."),
    ] = None,
    pytorch: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The checkpoint: PyTorch with the same calibration, eager.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Of each sequence.")] = 1024,
    new_tokens: Annotated[int, typer.Option(help="Generated after each prompt.")] = 128,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Of an operator; otherwise what ONNX Runtime chooses.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 5,
    pytorch_rounds: Annotated[int | None, typer.Option(help="Turns of PyTorch; otherwise as many.")] = None,
    pytorch_tokens: Annotated[int, typer.Option(help="New tokens of PyTorch, which is slow.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the prompt's random tokens.")] = 0,
    portable: PortableOption = False,
    device: DeviceOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every measurement there.")
    ] = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measures speed and memory, beside other files and PyTorch."""
    from act_export.verify.bench.job import BenchRequest, bench_file
    from act_export.verify.bench_report import print_bench_report

    if json_file is not None:
        check_replaceable(json_file)
        if not json_file.parent.is_dir():
            raise ActExportError(f"there is no folder {json_file.parent}; create it, e.g. --json bench.json")
        check_writable(json_file.parent, advice="pass another place with --json")
    if revision is not None and pytorch is None:
        raise ActExportError(
            f"--revision {revision} is of --pytorch MODEL, which isn't given; add it, or leave --revision out"
        )
    request = BenchRequest(
        file=file,
        against=tuple(against or ()),
        pytorch=pytorch,
        revision=revision,
        trust_remote_code=trust_remote_code,
        portable=portable,
        device=device or "cpu",
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        threads=threads,
        rounds=rounds,
        pytorch_rounds=pytorch_rounds,
        pytorch_tokens=pytorch_tokens,
        seed=seed,
    )
    if pytorch is not None and is_on_hub(pytorch):  # before the processes that are measured, and with a bar
        fetched = fetch_model(pytorch, revision=revision, trust_remote_code=trust_remote_code)
        request = replace(request, pytorch=fetched.name, revision=fetched.revision)
    with progress_bar("bench") as progress:
        report = bench_file(request, progress=progress)
    print_bench_report(report)
    if json_file is not None:
        report.save(json_file)


@app.command("inspect")
@reports_errors
def inspect_command(file: FileArgument, as_json: JsonOption = False) -> None:
    """Shows what is baked into an exported file."""
    from act_export.onnx_file.inspect import inspect_file

    found = inspect_file(file)
    if as_json:
        print(json.dumps(asdict(found), indent=2, default=str))
        return
    table = PlainTable(show_header=False)

    def row(name: str, text: str) -> None:
        table.add_row(printable(name, lines=False), printable(text, lines=False))

    row("file", str(found.path))
    commit = f" at {found.revision}" if found.revision else ""
    row("made by", f"act-export {found.version} from {found.source}{commit}")
    row("model", f"{found.architecture}, {found.num_layers} layers, {found.num_heads} heads")
    if found.family:
        row("tower", f"for the text of a {found.family} model")
    if found.takes_embeddings:
        axes = "time, height and width" if found.position_axes > 1 else "one each"
        row("takes", f"embeddings of width {found.embedding_size} instead of token ids; positions: {axes}")
    row("precision", found.precision)
    if found.accuracy_level is not None:
        row("quantization", f"blocks of {found.block_size}, accuracy level {found.accuracy_level}")
    row("graph", f"opset {found.opset}, {found.nodes} nodes, {found.weights_bytes / 1e6:.0f} MB of weights")
    for operator, count in found.operators.items():
        row(operator, f"{count} nodes")
    row("calibration", describe_calibration(found.calibration) if found.calibration else "none (plain)")
    if found.sink_state:
        row("sink state", ", ".join(found.sink_state))
    PlainConsole().print(table)


@app.command("triton")
@reports_errors
def triton_command(
    file: FileArgument,
    out: Annotated[Path, typer.Option(metavar="REPOSITORY", help="The model repository; other models there stay.")],
    name: Annotated[str | None, typer.Option(help="Of the model in the server; otherwise the file's.")] = None,
    served_from: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where the server sees REPOSITORY, e.g. /models in a container.")
    ] = None,
    portable: PortableOption = False,
    device: DeviceOption = None,
) -> None:
    """Writes FILE into a model repository of Triton Inference Server."""
    from act_export.export.triton import write_repository

    for path in write_repository(
        file, out, name=name, device=device or "cpu", native=not portable, served_from=served_from
    ):
        print(path)


@app.command("library")
@reports_errors
def library_command() -> None:
    """Prints the path of the native library, for C++, C#, Triton and other hosts."""
    from act_export.ops.library import LibraryNotFoundError, library_path

    try:
        print(library_path())
    except LibraryNotFoundError as error:
        raise ActExportError(str(error)) from error


def _check_device(device: str | None) -> None:
    """Raises ActExportError early where ONNX Runtime can't run on a device (None: the CPU)."""
    from act_export.runtime.cuda import prepare_cuda
    from act_export.runtime.device import Device, import_onnxruntime

    place = Device.parse(device or "cpu")
    onnxruntime = import_onnxruntime()
    if place.is_cuda:
        prepare_cuda(onnxruntime, place.index, native=True)


def _parity_table(report: ParityReport) -> PlainTable:
    table = PlainTable(title=Text(printable(f"parity with PyTorch, {report.precision}", lines=False), style="italic"))
    for column in ("engine", "case", "positions", "max diff", "mean diff", "argmax", "top 10", "flips", "passed"):
        table.add_column(column, justify="left" if column in ("engine", "case") else "right")
    hook = report.hook
    table.add_row(
        "reference hook",
        "against the model's own attention",
        str(hook.positions),
        f"{hook.max_difference:.1e}",
        f"{hook.mean_difference:.1e}",
        f"{hook.argmax_agreement:.1%}",
        f"{hook.top10_agreement:.1%}",
        "",
        "yes" if report.hook_passed else "NO",
    )
    for engine in ([report.pytorch] if report.pytorch is not None else []) + list(report.engines):
        for result in engine.results:
            metrics = result.metrics
            table.add_row(
                engine.engine,
                result.case,
                str(metrics.positions),
                f"{metrics.max_difference:.1e}",
                f"{metrics.mean_difference:.1e}",
                f"{metrics.argmax_agreement:.1%}",
                f"{metrics.top10_agreement:.1%}",
                str(result.flips),
                "" if engine is report.pytorch else "yes" if result.passed else "NO",
            )
    return table


def _summarize(written: Converted) -> None:
    from act_export.onnx_file.names import EMBEDDING_FILE

    calibration = written.calibration
    note(f"calibration: {describe_calibration(calibration) if calibration is not None else 'none (plain)'}")
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
                f"parity: {engine.engine} within {engine.max_difference:.1e} of PyTorch in {len(engine.results)} cases"
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
    print(next(file for file in written.files if file.suffix == ".onnx" and file.name != EMBEDDING_FILE))
