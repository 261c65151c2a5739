"""Questions that a known calibration answers: what a search should find."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tiny import save_checkpoint, tiny_checkpoint

from act_export.attention.hook import attention_hook
from act_export.attention.reference_attention import ReferenceAttention
from act_export.calibration.file import Calibration
from act_export.checkpoint.load import Checkpoint, load_checkpoint
from act_export.search import SearchTask
from act_export.tasks import EncodedExample, Example, Generation, Questions, encode_examples, split_examples
from act_export.tasks.batching import Batching
from act_export.tasks.generation import generate_answers
from act_export.tasks.language_model import TorchLanguageModel
from act_export.tasks.scoring import predicted_choice, score_choices

PLANTED = Calibration({0: (1,)}, beta=0.0, threshold=0.1)
GENERATION = Generation(max_new_tokens=4, stop=(), metric="f1")
CHOICES = (" w97", " w98")


class Words:
    """A tokenizer whose text "w5 w17" is the tokens 5 and 17."""

    all_special_tokens = ()
    added_tokens_encoder: dict[str, int] = {}  # noqa: RUF012
    eos_token_id = None

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        return SimpleNamespace(input_ids=[int(word[1:] or 0) for word in text.split()])

    def decode(self, tokens: list[int], *, skip_special_tokens: bool = False) -> str:
        return " ".join(f"w{token}" for token in tokens)


def words_checkpoint() -> Checkpoint:
    return replace(tiny_checkpoint(), tokenizer=Words())


def reference_scores(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    examples: list[EncodedExample],
    *,
    length_normalized: bool = False,
) -> list[tuple[float, ...]]:
    """One prompt at a time, through the reference hook."""
    with attention_hook(checkpoint.model, ReferenceAttention(calibration)) as hooked:
        return score_choices(TorchLanguageModel(hooked), examples, Batching(1), length_normalized=length_normalized)


def reference_texts(
    checkpoint: Checkpoint, calibration: Calibration | None, examples: list[EncodedExample], generation: Generation
) -> list[str]:
    """What the model says through the reference hook, one prompt at a time."""
    with attention_hook(checkpoint.model, ReferenceAttention(calibration)) as hooked:
        return generate_answers(
            TorchLanguageModel(hooked),
            examples,
            Batching(1),
            tokenizer=checkpoint.tokenizer,
            max_new_tokens=generation.max_new_tokens,
            stop=generation.stop,
        )


def prompts(count: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 14, (count,), generator=generator).tolist()
    return [" ".join(f"w{t}" for t in torch.randint(3, 96, (n,), generator=generator).tolist()) for n in lengths]


def planted_task(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    *,
    name: str = "planted",
    choices: tuple[str, ...] = CHOICES,
    content_free: str = "w3 w3 w3",
    sizes: tuple[int, int, int] = (40, 50, 50),
    seed: int = 0,
    length_normalized: bool = False,
    first_token: bool = False,
) -> SearchTask:
    """Questions whose right answer is what the model, calibrated so, says."""
    examples = [
        Example(prompt, choices, 0, content_free=content_free, first_token=first_token)
        for prompt in prompts(sum(sizes), seed)
    ]
    scores = reference_scores(
        checkpoint, calibration, encode_examples(checkpoint.tokenizer, examples), length_normalized=length_normalized
    )
    said = [predicted_choice(row[: len(choices)]) for row in scores]
    answered = [replace(e, answer=choice) for e, choice in zip(examples, said, strict=True)]
    rank, choose, report = sizes
    splits = split_examples(answered, rank=rank, choose=choose, report=report, seed=seed)
    return SearchTask(name, splits, length_normalized, questions=Questions(seed=seed))


def written_by(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    *,
    name: str = "written",
    sizes: tuple[int, int, int] = (20, 30, 30),
) -> SearchTask:
    """Questions whose right answer is what the model, calibrated so, writes."""
    examples = [Example(prompt, CHOICES[:1], 0) for prompt in prompts(sum(sizes))]
    texts = reference_texts(checkpoint, calibration, encode_examples(checkpoint.tokenizer, examples), GENERATION)
    answered = [replace(e, choices=(f" {text}",), references=(text,)) for e, text in zip(examples, texts, strict=True)]
    rank, choose, report = sizes
    return SearchTask(name, split_examples(answered, rank=rank, choose=choose, report=report), generation=GENERATION)


def save_planted(folder: Path, *, count: int = 130, seed: int = 0) -> tuple[Path, Path]:
    """A checkpoint folder, and a file of questions that `PLANTED` answers: `--rank 40 --choose 50` are enough."""
    checkpoint = load_checkpoint(str(save_checkpoint(folder / "checkpoint")))
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 14, (count,), generator=generator).tolist()
    texts = ["".join(map(chr, torch.randint(65, 91, (n,), generator=generator).tolist())) for n in lengths]
    examples = [Example(text, ("x", "y"), 0) for text in texts]
    scores = reference_scores(checkpoint, PLANTED, encode_examples(checkpoint.tokenizer, examples))
    rows = folder / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for text, row in zip(texts, scores, strict=True):
            file.write(json.dumps({"prompt": text, "choices": ["x", "y"], "answer": predicted_choice(row)}) + "\n")
    return folder / "checkpoint", rows
