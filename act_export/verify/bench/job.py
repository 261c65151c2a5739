"""Speed and memory of an exported model, beside other files and PyTorch, in ratios measured in one run.

All contenders get the same prompt of random tokens and generate greedily, without stopping. (Random tokens hold later
sinks as text does: 13 against 17, in the three calibrated heads of smollm2-135m and 1024 tokens.) They take turns, A,
B, C, B, C, A, in one process whose ONNX Runtime sessions share one thread pool. With a pool each, as is the default,
the threads of the session that ran last spin on and take the cores from the one that comes next; the shared pool has
ONNX Runtime's own settings, spinning included. A turn begins after a pause, in which PyTorch's threads come to rest
too, and short runs that aren't timed. A ratio is that of two medians over the same rounds, and of a decoded token over
the same steps: cache lengths are the same on both sides.

Memory is the largest resident size of a fresh process that loads one contender and takes one turn.

On a GPU, a time ends when the last position's logits are in the host's memory: every run waits for the GPU. Caches stay
on the GPU, of all contenders.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from statistics import mean, median, quantiles
from typing import Any

from act_export.errors import ActExportError
from act_export.onnx_file.graph_state import GROUP_QUERY_ATTENTION
from act_export.onnx_file.language_model import ModelFile, read_model_file
from act_export.progress import Progress
from act_export.runtime.device import Device
from act_export.runtime.node_placement import NodePlacement
from act_export.runtime.request import check_choice
from act_export.verify.bench.child import Memory, Turn, Workload
from act_export.verify.bench.contenders import EXPORTED, FOREIGN, PYTORCH, Contender
from act_export.verify.bench.machine import describe_machine
from act_export.verify.bench.measurements import BenchReport, BenchRequest, Measured, Ratio, Ratios

_SHARE_OF_TIME = 0.9  # of the progress


def bench_file(request: BenchRequest, *, progress: Progress = lambda _step, _done: None) -> BenchReport:
    """Measures speed and memory of an exported model, and of what it is compared with.

    Args:
        request: What to measure.
        progress: Called with what is being done, and the part that is done.

    Raises:
        ActExportError: If a file is given twice, isn't the same model, or its context is too short; if a file can't be
            read or run.
    """
    files = _read_files(request)
    contenders = _contenders(request, files)
    placeholders = [token for file in files for token in file.limits.placeholders]  # of images: no text
    vocabulary = min([file.vocabulary for file in files] + placeholders)
    workload = Workload(request.prompt_tokens, request.batch, vocabulary, request.seed, request.threads or 0)
    load_before = os.getloadavg()[0]
    timed = _run_child("time", contenders, workload, lambda step, done: progress(step, _SHARE_OF_TIME * done))
    workload = replace(workload, threads=timed["threads"])
    memories, placements = [], []
    for number, contender in enumerate(contenders):
        progress(f"memory of {contender.name}", _SHARE_OF_TIME + (1 - _SHARE_OF_TIME) * number / len(contenders))
        found = _run_child("memory", [contender], workload)
        memories.append(Memory(**found["memory"]))
        placements.append(NodePlacement(**found["placement"]) if found["placement"] is not None else None)
    turns = [tuple(map(_turn, timed["turns"][contender.name])) for contender in contenders]
    measured = tuple(
        replace(_measured(contender, taken, memory, request, turns[0][0]), placement=placed)
        for contender, taken, memory, placed in zip(contenders, turns, memories, placements, strict=True)
    )
    return BenchReport(
        request=request,
        contenders=measured,
        ratios=tuple(_ratios(measured[0], other) for other in measured[1:]),
        threads=timed["threads"],
        machine=describe_machine(Device.parse(request.device)),
        load_before=load_before,
        load_after=os.getloadavg()[0],
    )


def _read_files(request: BenchRequest) -> list[ModelFile]:
    """The file and those it is compared with, all of one model."""
    files = [read_model_file(path) for path in (request.file, *request.against)]
    first, *others = files
    if not first.ours:
        raise ActExportError(
            f"{first.path} wasn't written by act-export; measure one that was, and this one --against it"
        )
    for number, file in enumerate(files):
        if any(file.path.samefile(earlier.path) for earlier in files[:number]):
            raise ActExportError(f"{file.path} is given twice; leave it out, or compare with another file")
    for file in others:
        if file.cache_shape != first.cache_shape:
            raise ActExportError(
                f"{file.path} isn't the model of {first.path}: {_describe_cache(file)}, not {_describe_cache(first)}; "
                f"compare exports of the same model"
            )
    for choice in request.calibrations:
        check_choice(first.path, choice)
    needed = request.prompt_tokens + request.new_tokens
    for file in files:
        context = file.limits.context
        if context is not None and needed > context:
            raise ActExportError(
                f"{request.prompt_tokens} prompt and {request.new_tokens} new tokens are {needed}; the context of "
                f"{file.path} holds {context}: lower --prompt-tokens or --new-tokens"
            )
    return files


def _describe_cache(file: ModelFile) -> str:
    part = file.state_inputs[0]
    return f"{len(file.state_inputs) // 2} layers with {part.heads} key-value heads of size {part.size}"


def _contenders(request: BenchRequest, files: Sequence[ModelFile]) -> list[Contender]:
    (own, *others), (name, *names) = files, _names(files)
    contender = _contender_of_file(request, own, name)
    found = [replace(contender, name=f"{name} ({choice})", choice=choice) for choice in request.calibrations]
    found = found or [contender]
    found += [_contender_of_file(request, file, name) for file, name in zip(others, names, strict=True)]
    if request.pytorch is not None:
        found.append(
            Contender(
                name=PYTORCH,
                kind=PYTORCH,
                source=request.pytorch,
                revision=request.revision,
                trust_remote_code=request.trust_remote_code,
                kernel=f"PyTorch, eager, {files[0].precision}, reference attention with the file's calibration",
                device=request.device,
                native=False,
                rounds=min(request.pytorch_rounds or request.rounds, request.rounds),
                new_tokens=min(request.pytorch_tokens, request.new_tokens),
                calibration=str(files[0].path),
            )
        )
    return found


def _contender_of_file(request: BenchRequest, file: ModelFile, name: str) -> Contender:
    notes = [] if file.last_logits else ["computes the logits of all positions of a prompt"]
    if file.ours:
        kernel = "portable functions" if request.portable else "native library"
    else:
        kernel = f"ONNX Runtime's {' and '.join(file.attention) or 'operators'}"
        if GROUP_QUERY_ATTENTION not in file.attention:
            notes.append("its past and present can't be the same memory")
    return Contender(
        name=name,
        kind=EXPORTED if file.ours else FOREIGN,
        source=str(file.path),
        kernel=kernel,
        native=file.ours and not request.portable,
        device=request.device,
        rounds=request.rounds,
        new_tokens=request.new_tokens,
        notes=tuple(notes),
    )


def _names(files: Sequence[ModelFile]) -> list[str]:
    """As short as they can be and still differ: the file's, or of model.onnx the folder's; or else the whole path."""
    paths = [file.path.absolute() for file in files]
    names = [path.parent.name if path.name == "model.onnx" else path.name for path in paths]
    return names if len({*names, PYTORCH}) == len(names) + 1 else list(map(str, paths))


def _run_child(
    measure: str,
    contenders: Sequence[Contender],
    workload: Workload,
    progress: Progress = lambda _step, _done: None,
) -> dict[str, Any]:
    """The result of `act_export.verify.bench.child`."""
    plan = {"measure": measure, "contenders": list(map(asdict, contenders)), "workload": asdict(workload)}
    command = [sys.executable, "-P", "-m", "act_export.verify.bench.child"]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with suppress(BrokenPipeError), child.stdin:  # it may have failed already: its last words say why
                child.stdin.write(json.dumps(plan))
            for line in child.stdout:
                event = json.loads(line)
                if "error" in event:
                    raise ActExportError(event["error"])
                if "result" in event:
                    result: dict[str, Any] = event["result"]
                    return result
                progress(event["step"], event["done"])
            code = child.wait()
        finally:
            child.kill()
        said.seek(0)
        last_words = said.read().strip()
    names = ", ".join(contender.name for contender in contenders)
    if code == -signal.SIGKILL:
        raise ActExportError(
            f"the process that ran {names} was killed, probably for lack of memory; lower --prompt-tokens or --batch, "
            f"or compare fewer files"
        )
    raise RuntimeError(f"the process that measured {measure} of {names} ended with code {code}:\n{last_words}")


def _turn(fields: dict[str, Any]) -> Turn:
    tokens = tuple(map(tuple, fields["tokens"]))
    return Turn(**{**fields, "step_ms": tuple(fields["step_ms"]), "tokens": tokens})


def _measured(
    contender: Contender, turns: tuple[Turn, ...], memory: Memory, request: BenchRequest, of_file: Turn
) -> Measured:
    prompt_ms = median(turn.prompt_ms for turn in turns)
    decode_ms = median(mean(turn.step_ms) for turn in turns)
    return Measured(
        contender=contender,
        turns=turns,
        memory=memory,
        prompt_ms=prompt_ms,
        prompt_tokens_per_s=1e3 * request.batch * request.prompt_tokens / prompt_ms,
        first_token_ms=median(turn.first_token_ms for turn in turns),
        decode_ms=decode_ms,
        decode_tokens_per_s=1e3 * request.batch / decode_ms,
        same_tokens=min(map(_same_tokens, turns[0].tokens, of_file.tokens)),
    )


def _same_tokens(tokens: Sequence[int], others: Sequence[int]) -> int:
    pairs = list(zip(tokens, others, strict=False))
    return next((place for place, (token, other) in enumerate(pairs) if token != other), len(pairs))


def _ratios(file: Measured, other: Measured) -> Ratios:
    rounds = min(len(file.turns), len(other.turns))
    steps = min(len(file.turns[0].step_ms), len(other.turns[0].step_ms))

    def of_times(time: Callable[[Turn], float]) -> Ratio:
        ours, theirs = ([time(turn) for turn in side.turns[:rounds]] for side in (file, other))
        pairs = [one / another for one, another in zip(ours, theirs, strict=True)]
        low, _, high = quantiles(pairs, n=4, method="inclusive") if rounds > 1 else pairs * 3
        return Ratio(median(ours) / median(theirs), (low, high))

    gpu = [side.memory.gpu_bytes or 0 for side in (file, other)]
    beyond = [side.memory.beyond_weights_bytes for side in (file, other)]
    return Ratios(
        against=other.contender.name,
        prompt=of_times(lambda turn: turn.prompt_ms),
        first_token=of_times(lambda turn: turn.first_token_ms),
        decode=of_times(lambda turn: mean(turn.step_ms[:steps])),
        memory=Ratio(file.memory.peak_bytes / other.memory.peak_bytes, None),
        memory_beyond_weights=Ratio(beyond[0] / beyond[1], None) if min(beyond) > 0 else None,
        gpu_memory=Ratio(gpu[0] / gpu[1], None) if min(gpu) > 0 else None,
        rounds=rounds,
        steps=steps,
        file_prompt_ms=median(turn.prompt_ms for turn in file.turns[:rounds]),
        file_decode_ms=median(mean(turn.step_ms[:steps]) for turn in file.turns[:rounds]),
    )
