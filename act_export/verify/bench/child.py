"""The process that a benchmark measures in: `python -m act_export.verify.bench.child`, started by `bench_file`.

Time is measured in one process for all contenders, memory in one for each. A process of its own is needed for both: the
thread pool that ONNX Runtime's sessions share must be made before the first of them, and the largest resident size of
a process can't be told apart by model. The plan comes on standard input as JSON; every line of standard output is an
event, a JSON object: `step` with the part that is `done`, then `result`, or `error` with what the user can do about it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_export.errors import ActExportError
from act_export.progress import Progress
from act_export.runtime.cuda_driver import CudaDriver
from act_export.runtime.device import Device, import_onnxruntime
from act_export.verify.bench.contenders import Contender, Running, placement, running

PAUSE_S = 0.1  # before a turn: the threads of the contender before stop spinning (ONNX Runtime's after 45 ms)
WARM_UP_S = 0.1
WARM_UP_TOKENS = 32


@dataclass(frozen=True)
class Workload:
    """What each contender has to do in a turn.

    Attributes:
        prompt_tokens: Of each sequence.
        batch: Number of sequences.
        vocabulary: The prompt's tokens are drawn from so many.
        seed: Of the prompt.
        threads: Within an operator; 0 leaves their number to ONNX Runtime.
    """

    prompt_tokens: int
    batch: int
    vocabulary: int
    seed: int
    threads: int

    def prompt(self) -> NDArray[np.int64]:
        """Token ids (batch, prompt_tokens), the same for all contenders."""
        shape = (self.batch, self.prompt_tokens)
        return np.random.default_rng(self.seed).integers(0, self.vocabulary, shape)


@dataclass(frozen=True)
class Turn:
    """What a contender took for one prompt and the tokens after it.

    Attributes:
        prompt_ms: The prompt's forward pass.
        first_token_ms: The same with reserving the cache before and choosing the token after it.
        step_ms: Each further token, with choosing it.
        tokens: Generated, by sequence.
    """

    prompt_ms: float
    first_token_ms: float
    step_ms: tuple[float, ...]
    tokens: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Memory:
    """Resident sizes of a process that loads one contender and takes one turn.

    Attributes:
        before_bytes: Of Python and what it has imported, before the model is loaded.
        load_peak_bytes: The largest until the model is loaded.
        loaded_bytes: With the model loaded.
        peak_bytes: The largest of all, loading included.
        turn_peak_bytes: The largest in the turn alone; None where the system can't tell.
        weights_bytes: Size of the weights: of the file, or of PyTorch's parameters.
        gpu_bytes: What the GPU has less free after the turn than before the model was loaded, CUDA's context apart;
            other processes on it count too. Neither ONNX Runtime nor PyTorch gives memory back before it ends, so this
            is their peak. None on the CPU.
    """

    before_bytes: int
    load_peak_bytes: int
    loaded_bytes: int
    peak_bytes: int
    turn_peak_bytes: int | None
    weights_bytes: int
    gpu_bytes: int | None = None

    @property
    def beyond_weights_bytes(self) -> int:
        """What the peak has over the weights: Python, libraries, repacked weights, cache and activations."""
        return self.peak_bytes - self.weights_bytes


def main() -> None:
    """Reads the plan, measures, and writes events."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and ends this process
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print isn't an event

    def send(event: dict[str, Any]) -> None:
        print(json.dumps(event), file=events, flush=True)

    plan = json.load(sys.stdin)
    contenders = [Contender(**{**given, "notes": tuple(given["notes"])}) for given in plan["contenders"]]
    measure = {"time": measure_time, "memory": measure_memory}[plan["measure"]]
    try:
        send({"result": measure(contenders, Workload(**plan["workload"]), lambda step, done: send(_step(step, done)))})
    except ActExportError as error:
        send({"error": str(error)})


def measure_time(contenders: list[Contender], workload: Workload, report: Progress) -> dict[str, Any]:
    """Turns of each contender, A, B, C, B, C, A, and the number of threads that they had."""
    prompt = workload.prompt()
    import_onnxruntime()
    threads_before = _threads_of_process()
    _share_threads(workload.threads)
    turns: dict[str, list[Turn]] = {contender.name: [] for contender in contenders}
    of_all = sum(contender.rounds for contender in contenders) + len(contenders)
    threads, done = workload.threads, 0
    with ExitStack() as stack:
        models = {}
        for contender in contenders:
            report(f"loading {contender.name}", done / of_all)
            models[contender.name] = stack.enter_context(running(contender, threads))
            threads = threads or 1 + _threads_of_process() - threads_before  # the first contender is a session
            take_turn(models[contender.name], prompt, new_tokens=2)  # the first run of a session reserves its memory
            done += 1
        for number in range(max(contender.rounds for contender in contenders)):
            first = number % len(contenders)  # each begins in turn: who does has waited, and who comes next has not
            for contender in [*contenders[first:], *contenders[:first]]:
                if number < contender.rounds:
                    report(f"round {number + 1}, {contender.name}", done / of_all)
                    _warm_up(models[contender.name], prompt)
                    turns[contender.name].append(take_turn(models[contender.name], prompt, contender.new_tokens))
                    done += 1
    return {"threads": threads, "turns": {name: list(map(asdict, taken)) for name, taken in turns.items()}}


def measure_memory(contenders: list[Contender], workload: Workload, _: Progress) -> dict[str, Any]:
    """Memory of the one contender, in this process, and on a GPU where its nodes run."""
    (contender,) = contenders
    device = Device.parse(contender.device)
    _import_libraries(contender)
    free_before = _free_gpu_bytes(device)
    before = _resident_bytes("VmRSS")
    _share_threads(workload.threads)
    with running(contender, workload.threads) as model:
        load_peak, loaded = _resident_bytes("VmHWM"), _resident_bytes("VmRSS")
        restarted = _restart_peak()
        take_turn(model, workload.prompt(), contender.new_tokens)
        peak = _resident_bytes("VmHWM")
        memory = Memory(
            before_bytes=before,
            load_peak_bytes=load_peak,
            loaded_bytes=loaded,
            peak_bytes=max(load_peak, peak),
            turn_peak_bytes=peak if restarted else None,
            weights_bytes=model.weights_bytes,
            gpu_bytes=free_before - _free_gpu_bytes(device) if device.is_cuda else None,
        )
    del model  # and its memory: the placement loads the model again
    found = placement(contender) if device.is_cuda else None
    return {"memory": asdict(memory), "placement": asdict(found) if found is not None else None}


def take_turn(model: Running, prompt: NDArray[np.int64], new_tokens: int) -> Turn:
    """Runs a prompt (batch, tokens) and generates greedily: one token from the prompt, the others step by step."""
    began = time.perf_counter()
    model.begin(len(prompt), prompt.shape[1] + new_tokens)
    ready = time.perf_counter()
    logits = model.step(prompt)
    ran = time.perf_counter()
    tokens = [_most_likely(logits)]
    stamps = [time.perf_counter()]
    for _ in range(new_tokens - 1):
        tokens.append(_most_likely(model.step(tokens[-1])))
        stamps.append(time.perf_counter())
    return Turn(
        prompt_ms=1e3 * (ran - ready),
        first_token_ms=1e3 * (stamps[0] - began),
        step_ms=tuple((1e3 * np.diff(stamps)).tolist()),
        tokens=tuple(map(tuple, np.concatenate(tokens, 1).tolist())),
    )


def _most_likely(logits: NDArray[Any]) -> NDArray[np.int64]:
    """(batch, vocabulary) -> (batch, 1)."""
    return np.asarray(logits.argmax(-1), np.int64)[:, None]


def _warm_up(model: Running, prompt: NDArray[np.int64]) -> None:
    """Waits until the contender before has come to rest, then runs short prompts: threads awake, code in cache."""
    time.sleep(PAUSE_S)
    end = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < end:
        take_turn(model, prompt[:, :WARM_UP_TOKENS], new_tokens=2)


def _share_threads(threads: int) -> None:
    import_onnxruntime().set_global_thread_pool_sizes(threads, 1)


def _import_libraries(contender: Contender) -> None:
    """What a contender needs before its model, so that the size before loading has it."""
    import_onnxruntime()
    if contender.calibration:
        importlib.import_module("act_export.attention.hook")  # with PyTorch and transformers


def _threads_of_process() -> int:
    return len(os.listdir("/proc/self/task"))


def _free_gpu_bytes(device: Device) -> int:
    return CudaDriver().free_bytes(device.index) if device.is_cuda else 0


def _resident_bytes(field: str) -> int:
    """VmRSS, the resident size now, or VmHWM, the largest so far."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


def _restart_peak() -> bool:
    """Lets VmHWM begin again from the size now; whether that could be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _step(step: str, done: float) -> dict[str, Any]:
    return {"step": step, "done": done}


if __name__ == "__main__":
    main()
