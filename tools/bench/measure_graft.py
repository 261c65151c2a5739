"""What a graft into models of onnxruntime-genai's builder keeps, costs and takes, on smollm2-135m.

    .venv/bin/python tools/bench/measure_graft.py [parity] [int4] [tokens] [adapters] [speed] [large] [--folder F]

Models are built once and kept in the folder: the checkpoint, the builder's models in float32 and in int4 at accuracy
level 1 and 4, their grafts with the shipped recipe, with and without the native library, and with every head of every
layer calibrated, and act-export's own export. `large` builds a model of random weights of about 3 GB, and grafts it in
a process of its own.

parity  logits of the float32 graft against act-export's own export, and 64 greedy tokens
int4    logits of the int4 graft at accuracy level 1 against PyTorch running the reference on its dequantised weights
tokens  128 greedy tokens of onnxruntime-genai, native library and portable functions, against act-export's own loop
adapters  the same with three calibrations, switched between generators as adapters
speed   onnxruntime-genai on a prompt of 512 tokens and 128 more: grafted by ungrafted, in turns, medians
large   time and largest resident set of the graft
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from act_export.attention.hook import attention_hook
from act_export.attention.reference_attention import ReferenceAttention
from act_export.calibration.file import Calibration
from act_export.checkpoint.load import load_checkpoint
from act_export.commands.console import run_program
from act_export.runtime import Session, generate
from act_export.tasks import load_examples
from act_export.verify.parity.dequantized import dequantized
from act_export.verify.parity.metrics import compare_logits

MODEL = "smollm2-135m"
LAYERS, HEADS = 30, 9
TEXT = "The history of Rome is long: it begins with a small town on a river, and it goes on.\n"
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 512, 128, 7
LARGE_LAYERS = 3  # of Llama-2-7B's shape: 3.5 GB in float32, with embedding and head


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", choices=[*MEASURES, []], metavar="MEASURE", help=", ".join(MEASURES))
    parser.add_argument("--folder", type=Path, default=Path("build/measure_graft"))
    parser.add_argument("--graft-large", nargs=3, help=argparse.SUPPRESS)  # the measured process itself
    arguments = parser.parse_args()
    if arguments.graft_large:
        graft_large(*map(Path, arguments.graft_large))
        return 0
    arguments.folder.mkdir(parents=True, exist_ok=True)
    models = Models(arguments.folder)
    for name in arguments.what or MEASURES:
        MEASURES[name](models)
    print(f"load average at the end {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    return 0


class Models:
    """The folder's models; each is made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """A file or folder of that name, whole."""
        path = self.folder / name
        if not path.exists():
            print(f"making {path} ...", file=sys.stderr, flush=True)
            partial = self.folder / f"partial-{name}"
            shutil.rmtree(partial, ignore_errors=True)
            make(partial)
            partial.replace(path)
        return path

    @property
    def checkpoint(self) -> Path:
        def make(path: Path) -> None:
            loaded = load_checkpoint(MODEL)
            loaded.model.save_pretrained(path)
            assert loaded.tokenizer is not None
            loaded.tokenizer.save_pretrained(path)

        return self.made("checkpoint", make)

    def built(self, name: str, precision: str, *options: str, checkpoint: Path | None = None) -> Path:
        """A model of onnxruntime-genai's builder."""

        def make(path: Path) -> None:
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint or self.checkpoint]
            command += ["-o", path, "-p", precision, "-e", "cpu", "-c", self.folder / "builder-cache"]
            command += ["--extra_options", *options] if options else []
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        return self.made(name, make)

    @property
    def float32(self) -> Path:
        return self.built("genai-fp32", "fp32")

    def int4(self, level: int) -> Path:
        return self.built(f"genai-int4-level-{level}", "int4", f"accuracy_level={level}")

    def grafted(self, source: Path, *options: str, suffix: str = "", calibration: str = MODEL) -> Path:
        return self.made(
            f"{source.name}-calibrated{suffix}",
            lambda path: act_export("graft", source, "--calibration", calibration, "--out", path, *options),
        )

    def all_heads(self, source: Path) -> Path:
        file = self.folder / "all-heads.json"
        Calibration({layer: tuple(range(HEADS)) for layer in range(LAYERS)}).save(file)
        return self.grafted(source, suffix="-all-heads", calibration=str(file))

    @property
    def own(self) -> Path:
        return self.made("own", lambda path: act_export(MODEL, "--calibration", MODEL, "--out", path, "--no-verify"))


def act_export(*arguments: object) -> None:
    command = [sys.executable, "-m", "act_export", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def prompts(models: Models) -> list[list[int]]:
    """Texts of the model's parity check, as token ids of several lengths."""
    from act_export.verify.parity.cases import parity_cases

    loaded = load_checkpoint(MODEL)
    cases = parity_cases(loaded.model, loaded.tokenizer)
    return [case.calls[0][0].tolist() for case in cases if len(case.calls[0]) == 1]


def parity(models: Models) -> None:
    graft = models.grafted(models.float32)
    rows = []
    with Session.open(models.own) as own, Session.open(graft) as other:
        for ids in prompts(models):
            given, mask = np.array([ids]), np.ones((1, len(ids)), np.int64)
            rows.append(np.abs(own.run(given, mask).logits - other.run(given, mask).logits).max())
        text = [encode(models, TEXT)]
        tokens = [generate(session, text, max_new_tokens=64) for session in (own, other)]
    print(
        f"float32 graft against act-export's own export: logits within {max(rows):.1e} in {len(rows)} prompts, "
        f"64 greedy tokens {'the same' if tokens[0] == tokens[1] else 'DIFFER'}"
    )


def int4(models: Models) -> None:
    graft = models.grafted(models.int4(1))
    given = dequantized(graft / "model.onnx", load_checkpoint(MODEL)).checkpoint
    pairs = []
    with Session.open(graft) as session, torch.no_grad():
        reference = ReferenceAttention(session.calibration)
        with attention_hook(given.model, reference) as hooked:
            for ids in questions(models, 1_000):
                token_ids, mask = np.array([ids]), np.ones((1, len(ids)), np.int64)
                expected = hooked(torch.from_numpy(token_ids), torch.from_numpy(mask)).logits.numpy()
                pairs.append((session.run(token_ids, mask).logits[0], expected[0]))
    metrics = compare_logits(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
    print(
        f"int4 graft at accuracy level 1 against the reference on its dequantised weights: logits within "
        f"{metrics.max_difference:.1e}, argmax agreement {metrics.argmax_agreement:.2%} over {metrics.positions} "
        f"positions"
    )


def questions(models: Models, positions: int) -> list[list[int]]:
    """Prompts of SST-2, as many as have so many positions together."""
    texts: list[list[int]] = []
    for example in load_examples("sst2").examples:
        texts.append(encode(models, example.prompt))
        if sum(map(len, texts)) >= positions:
            return texts
    raise ValueError(f"the task has fewer than {positions} positions")


def tokens(models: Models) -> None:
    for source in (models.float32, models.int4(1)):
        native = models.grafted(source)
        portable = models.grafted(source, "--portable", suffix="-portable")
        ids = encode(models, TEXT)
        with Session.open(native) as session:
            expected = generate(session, [ids], max_new_tokens=NEW_TOKENS)[0]
        for name, folder in (("native library", native), ("portable functions", portable)):
            found = Genai(folder).generate(ids, NEW_TOKENS)
            same = "the same" if found == expected else "NOT the same"
            print(f"{source.name}: {len(found)} tokens of onnxruntime-genai, {name}, are {same} as act-export's own")


def adapters(models: Models) -> None:
    other = models.folder / "other.json"
    Calibration(dict.fromkeys(range(0, LAYERS, 3), (0, 4)), beta=1.5, gamma=0.5).save(other)
    ids = encode(models, TEXT)
    for source in (models.float32, models.int4(1)):
        folder = models.grafted(source, "--calibration", str(other), suffix="-twice")
        genai = Genai(folder)
        with Session.open(folder) as session:
            names = list(session.calibrations)
            expected = {
                name: generate(session, [ids], max_new_tokens=NEW_TOKENS, calibration=name)[0] for name in names
            }
        found = {name: genai.generate(ids, NEW_TOKENS, folder / "adapters" / f"{name}.onnx_adapter") for name in names}
        for name in names:
            same = "the same" if found[name] == expected[name] else "NOT the same"
            print(f"{source.name}, {name}: {NEW_TOKENS} tokens are {same} as act-export's own")
        print(f"{source.name}: {len({*map(tuple, found.values())})} of {len(names)} differ from each other")


def speed(models: Models) -> None:
    for source in (models.float32, models.int4(4)):
        folders = [source, models.grafted(source), models.all_heads(source)]
        running = [Genai(folder) for folder in folders]
        ids = np.random.default_rng(0).integers(100, 40_000, PROMPT_TOKENS).tolist()
        times: list[list[tuple[float, float]]] = [[] for _ in folders]
        for turn in range(ROUNDS + 1):
            for model, own in zip(running, times, strict=True):
                measured = model.time(ids, NEW_TOKENS)
                if turn:
                    own.append(measured)
        plain = times[0]
        for folder, own in zip(folders[1:], times[1:], strict=True):
            ratios = {
                what: median(part(mine) for mine in own) / median(part(theirs) for theirs in plain)
                for what, part in (
                    ("prompt", lambda pair: pair[0]),
                    ("new tokens", lambda pair: pair[1]),
                    ("together", sum),
                )
            }
            line = ", ".join(f"{what} {ratio:.3f}" for what, ratio in ratios.items())
            print(f"{folder.name} by {source.name}, prompt {PROMPT_TOKENS} + {NEW_TOKENS}: {line}")
        print(
            f"  ungrafted: prompt {median(p for p, _ in plain):.2f} s, new tokens {median(n for _, n in plain):.2f} s"
        )


def large(models: Models) -> None:
    def make(path: Path) -> None:
        command = [sys.executable, Path(__file__).parent / "random_llama.py", "--out", path, "--layers", LARGE_LAYERS]
        subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
        for file in models.checkpoint.glob("tokenizer*"):  # the builder wants one
            shutil.copy2(file, path)

    source = models.built("genai-large", "fp32", checkpoint=models.made("large-checkpoint", make))
    calibration = models.folder / "large.json"
    Calibration(dict.fromkeys(range(LARGE_LAYERS), (0, 5, 31))).save(calibration)
    out = models.folder / "genai-large-calibrated"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--graft-large", str(source), str(calibration), str(out)]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    size = sum(path.stat().st_size for path in source.glob("model.onnx*"))
    print(
        f"graft of a model of {size / 1e9:.2f} GB: {measured['seconds']:.1f} s, largest resident set "
        f"{measured['peak_bytes'] / 1e6:.0f} MB"
    )
    shutil.rmtree(out)


def graft_large(source: Path, calibration: Path, out: Path) -> None:
    started = time.perf_counter()
    from act_export.graft.job import graft

    graft(source, Calibration.load(calibration), out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": time.perf_counter() - started, "peak_bytes": peak}))


def encode(models: Models, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(models.checkpoint)(text).input_ids)


class Genai:
    """A model in onnxruntime-genai."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai

        self.genai: Any = onnxruntime_genai
        self.model = self.genai.Model(str(folder))

    def generate(self, ids: Sequence[int], count: int, adapter: Path | None = None) -> list[int]:
        """Greedy tokens, as many even where the text ends before."""
        generator = self._generator(len(ids) + count)
        if adapter is not None:
            loaded = self.genai.Adapters(self.model)
            loaded.load(str(adapter), adapter.stem)
            generator.set_active_adapter(loaded, adapter.stem)
        generator.append_tokens(ids)
        found = []
        for _ in range(count):
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        return found

    def time(self, ids: Sequence[int], count: int) -> tuple[float, float]:
        """Seconds of the prompt with the first token, and of the others."""
        generator = self._generator(len(ids) + count)
        started = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(count - 1):
            generator.generate_next_token()
        return first - started, time.perf_counter() - first

    def _generator(self, length: int) -> Any:
        parameters = self.genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=length, min_length=length)
        return self.genai.Generator(self.model, parameters)


MEASURES: dict[str, Callable[[Models], None]] = {
    "parity": parity,
    "int4": int4,
    "tokens": tokens,
    "adapters": adapters,
    "speed": speed,
    "large": large,
}

if __name__ == "__main__":
    run_program(main)
