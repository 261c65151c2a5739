"""What a sink profile costs, and how far it is from brute force, on smollm2-135m.

    .venv/bin/python tools/bench/measure_profile.py [--lengths 512,2048,8192] [--rounds 3] [--effects]
                                              [--memory] [--brute-force]

Speed: a profile of the same prompts against a plain forward pass with PyTorch's own attention, in turns (plain,
profile, plain, profile), the median of the rounds' ratios; with --effects that of SST-2 with the effects of heads.
Memory: what a profile of one prompt adds to a process that has the model, each length in a process of its own. Brute
force: largest difference of each statistic from the one that whole attention maps of transformers' eager attention
give, on 20 prompts of SST-2.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from act_export.checkpoint.load import Checkpoint, load_checkpoint
from act_export.commands.console import run_program
from act_export.commands.options import numbers_of
from act_export.profile import PromptSource, profile_sinks
from act_export.profile.job import ProfileJob, encode_prompts, load_prompts
from act_export.profile.request import BATCH_TOKENS
from act_export.runtime.sampling import left_pad
from act_export.tasks import EncodedExample, Questions, encode_examples, load_examples, split_examples
from act_export.tasks.batching import Batching, batches

Prompts = tuple[tuple[int, ...], ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="512,2048,8192")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--effects", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--brute-force", action="store_true")
    parser.add_argument("--measure-one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_one:
        print(json.dumps(memory_of(arguments.measure_one)))
        return
    lengths = [int(length) for length in numbers_of("--lengths", arguments.lengths, whole=True)]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    if arguments.memory:
        memory(lengths)
        return
    checkpoint = load_checkpoint("smollm2-135m")
    if arguments.brute_force:
        brute_force(checkpoint)
        return
    print(f"{'prompts':>24} {'plain s':>9} {'profile s':>9} {'ratio':>6}")
    if arguments.effects:
        job = ProfileJob(Questions(("sst2",)))
        sources = encode_prompts(checkpoint, job, load_prompts(job))
        report("96 of SST-2, effects", *speed(checkpoint, sources[0], arguments.rounds))
        return
    sst2 = sst2_prompts(checkpoint, 96)
    for label, prompts in [(f"96 of SST-2, {mean_length(sst2):.0f} tokens", sst2)] + [
        (f"one of {length} tokens", (random_prompt(length),)) for length in lengths
    ]:
        report(label, *speed(checkpoint, PromptSource("prompts", prompts), arguments.rounds))


def report(label: str, plain: list[float], profile: list[float]) -> None:
    ratio = median(b / a for a, b in zip(plain, profile, strict=True))
    print(f"{label:>24} {median(plain):9.2f} {median(profile):9.2f} {ratio:6.2f}", flush=True)


def speed(checkpoint: Checkpoint, source: PromptSource, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of plain passes and of profiles, in turns, after a round that isn't counted."""
    plain, profile = [], []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        plain_passes(checkpoint, source.prompts)
        between = time.perf_counter()
        profile_sinks(checkpoint, [source])
        profile.append(time.perf_counter() - between)
        plain.append(between - start)
    return plain[1:], profile[1:]


def plain_passes(checkpoint: Checkpoint, prompts: Prompts) -> None:
    """The same batches through the model's own attention."""
    for indices in batches([EncodedExample(prompt, (), 0) for prompt in prompts], Batching(None, BATCH_TOKENS)):
        input_ids, mask = map(torch.from_numpy, left_pad([prompts[index] for index in indices]))
        with torch.no_grad():
            checkpoint.model(input_ids=input_ids, attention_mask=mask, logits_to_keep=1, use_cache=False)


def memory(lengths: list[int]) -> None:
    print(f"{'tokens':>8} {'peak MB':>9} {'before MB':>9} {'added MB':>9} {'KB a token':>10}")
    for length in lengths:
        done = subprocess.run(
            [sys.executable, __file__, "--measure-one", str(length)], check=True, capture_output=True, text=True
        )
        before, peak = json.loads(done.stdout.splitlines()[-1])
        added = peak - before
        print(f"{length:8d} {peak / 1e6:9.0f} {before / 1e6:9.0f} {added / 1e6:9.0f} {added / 1e3 / length:10.1f}")


def memory_of(length: int) -> tuple[int, int]:
    """Bytes of this process before a profile of one prompt, and at its peak (Linux)."""
    checkpoint = load_checkpoint("smollm2-135m")
    profile_sinks(checkpoint, [PromptSource("short", (random_prompt(16),))])  # what a first call sets up
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    profile_sinks(checkpoint, [PromptSource("long", (random_prompt(length),))])
    return before, resident("VmHWM")


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def brute_force(checkpoint: Checkpoint) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "profile"))
    from brute_force import differences

    prompts = sst2_prompts(checkpoint, 20)
    profile = profile_sinks(checkpoint, [PromptSource("sst2", prompts)])
    for name, difference in differences(profile["sst2"], checkpoint.model, list(prompts)).items():
        print(f"{name:>32} {difference:.1e}")


def sst2_prompts(checkpoint: Checkpoint, count: int) -> Prompts:
    examples = split_examples(load_examples("sst2").examples).rank[:count]
    return tuple(example.prompt for example in encode_examples(checkpoint.tokenizer, examples))


def random_prompt(length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(0).integers(100, 40_000, length).tolist())


def mean_length(prompts: Prompts) -> float:
    return sum(map(len, prompts)) / len(prompts)


if __name__ == "__main__":
    run_program(main)
