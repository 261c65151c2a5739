"""Profiles the sinks of a model over sources of prompts; interrupted, it goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from act_export.calibration.file import Calibration
from act_export.checkpoint.fetch import public_name
from act_export.checkpoint.load import Checkpoint
from act_export.errors import ActExportError
from act_export.profile.answer_pair import AnswerPairs
from act_export.profile.partial import PartialTally
from act_export.profile.profiling import profile_batch
from act_export.profile.request import USUAL, EffectsOf, ProfileOptions, PromptSource, check_names
from act_export.profile.sink_profile import SinkProfile
from act_export.profile.sink_statistics import ALL, ExamplePrompt
from act_export.profile.tally import Tally, statistics_of
from act_export.progress import Progress
from act_export.tasks import EncodedExample
from act_export.tasks.batching import Batching, batches
from act_export.version import __version__

SUMS_VERSION = 2  # of what a step adds to the sums; sums of another version aren't gone on from
EXAMPLE_TOKENS = 1024  # at the most: the example's whole maps are in memory where it is calibrated
_SAVE_EVERY_SECONDS = 10.0
_EFFECT_COST = 2  # of a batch, in profiles of the same: forward, backward, and every head's calibrated map


@dataclass(frozen=True)
class _Step:
    """One batch: computed first, then counted, which takes no time. Between the two nothing of it is in the sums."""

    what: str
    cost: float
    compute: Callable[[], Callable[[], None]]


def profile_sinks(
    checkpoint: Checkpoint,
    sources: Sequence[PromptSource],
    options: ProfileOptions = USUAL,
    *,
    calibration: Calibration | None = None,
    partial: Path | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
    notes: Mapping[str, Any] | None = None,
    answers: AnswerPairs | None = None,
) -> SinkProfile:
    """Where the sinks are, by source and over all.

    No attention map is kept: memory grows with the length of the longest prompt, not its square. Effects are measured
    by the sources' own functions, which may take more.

    Args:
        checkpoint: The model, with its tokenizer where tokens shall have texts.
        sources: At least one, each with at least one prompt.
        options: See `ProfileOptions`.
        calibration: Run one example of each source with it too.
        partial: Folder that keeps unfinished work until the profile is finished; the same call goes on from there.
            None to keep nothing.
        out: Where to write the profile, see `SinkProfile.save`; unfinished work is removed after that.
        progress: Called before every batch.
        notes: To be kept in the profile's options.
        answers: To be kept in the profile, see `act_export.profile.answers.answer_pairs`.

    Raises:
        ActExportError: If there is no source or prompt, or two sources have the same name; if the model's attention
            can't be exchanged.
        CalibrationError: If the calibration isn't for this model.
    """
    _check(sources)
    identity = checkpoint.identity
    if calibration is not None:
        calibration.check_fits(identity)
    tallies = [Tally(source.prompts, identity.num_layers, identity.num_heads, options.thresholds) for source in sources]
    seen: dict[str, Tensor] = {}
    steps = [
        step
        for source, tally in zip(sources, tallies, strict=True)
        for step in _steps(checkpoint, source, tally, options, seen)
    ]
    kept = PartialTally(partial, _digest(checkpoint, sources, options), tallies) if partial is not None else None
    _run(steps, kept, progress)
    texts = _texts(checkpoint, {token for tally in tallies for token in tally.sink_ids()})
    profile = SinkProfile(
        model=identity,
        model_name=public_name(checkpoint.name),
        overall=statistics_of(ALL, tallies, texts),
        sources={
            source.name: tally.statistics(source.name, texts) for source, tally in zip(sources, tallies, strict=True)
        },
        examples=tuple(example for source in sources for example in _example(checkpoint, source, calibration, seen)),
        calibration=calibration,
        answers=answers,
        options={
            **options.thresholds,
            "batch_tokens": options.batch_tokens,
            "dtype": str(checkpoint.model.dtype).removeprefix("torch."),
            "device": checkpoint.model.device.type,
            **({"revision": checkpoint.revision} if checkpoint.revision else {}),
            **(notes or {}),
        },
        versions={
            "act-export": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )
    if out is not None:
        profile.save(out)
    if kept is not None:
        kept.discard()
    return profile


def _check(sources: Sequence[PromptSource]) -> None:
    if not sources:
        raise ActExportError("there is nothing to profile; name at least one source of prompts")
    for source in sources:
        if not source.prompts or not all(source.prompts):
            raise ActExportError(f"{source.name} has no prompts, or one without tokens; each source needs at least one")
    check_names([source.name for source in sources])


def _steps(
    checkpoint: Checkpoint,
    source: PromptSource,
    tally: Tally,
    options: ProfileOptions,
    seen: dict[str, Tensor],
) -> Iterator[_Step]:
    """The batches of a source. Its example runs alone, as it would again after a stop; its sink scores go to `seen`."""
    example = _example_index(source)

    def profile(batch: Sequence[tuple[int, ...]]) -> Callable[[], None]:
        computed = list(profile_batch(checkpoint.model, batch))

        def count() -> None:
            for ids, statistics in zip(batch, computed, strict=True):
                tally.add(ids, statistics)
            if example is not None and batch == [source.prompts[example]]:
                seen[source.name] = computed[0].scores

        return count

    def measure(effects: EffectsOf, batch: Sequence[EncodedExample]) -> Callable[[], None]:
        gradients = effects(batch)
        return lambda: tally.add_effects(gradients, len(batch))

    rest = [prompt for index, prompt in enumerate(source.prompts) if index != example]
    together = batches([EncodedExample(prompt, (), 0) for prompt in rest], Batching(None, options.batch_tokens))
    first = [[source.prompts[example]]] if example is not None else []
    for batch in (*first, *([rest[index] for index in indices] for indices in together)):
        cost = float(sum(map(len, batch)))
        yield _Step(source.name, cost, lambda batch=batch: profile(batch))  # type: ignore[misc]
    if source.effects is None:
        return
    for indices in batches(source.questions, Batching(None, options.batch_tokens)):
        asked = [source.questions[index] for index in indices]
        cost = float(_EFFECT_COST * sum(len(question.prompt) for question in asked))
        yield _Step(
            f"{source.name}, effects of heads",
            cost,
            lambda effects=source.effects, asked=asked: measure(effects, asked),  # type: ignore[misc]
        )


def _run(steps: Sequence[_Step], kept: PartialTally | None, progress: Progress | None) -> None:
    total = sum(step.cost for step in steps)
    done = 0
    if kept is not None:
        kept.check()
        done = kept.resume()
    saved = done
    saved_at, save_took = time.monotonic(), 0.0
    whole = True  # the sums are those of `done` steps
    try:
        for step in steps[done:]:
            if progress is not None:
                progress(step.what, sum(earlier.cost for earlier in steps[:done]) / total)
            count = step.compute()
            whole = False
            count()
            done, whole = done + 1, True
            now = time.monotonic()
            if kept is not None and now - saved_at > max(_SAVE_EVERY_SECONDS, 20 * save_took):
                kept.save(done)
                saved, saved_at, save_took = done, time.monotonic(), time.monotonic() - now
    finally:
        if kept is not None and whole and saved < done < len(steps):
            kept.save(done)
    if progress is not None:
        progress("done", 1.0)


def _example_index(source: PromptSource) -> int | None:
    """The source's first prompt that isn't too long; None where all are."""
    lengths = map(len, source.prompts)
    return next((index for index, length in enumerate(lengths) if 1 < length <= EXAMPLE_TOKENS), None)


def _example(
    checkpoint: Checkpoint, source: PromptSource, calibration: Calibration | None, seen: Mapping[str, Tensor]
) -> Iterator[ExamplePrompt]:
    index = _example_index(source)
    if index is None:
        return
    ids = source.prompts[index]
    scores = seen[source.name] if source.name in seen else _scores(checkpoint, ids)  # it ran before a stop
    calibrated = _scores(checkpoint, ids, calibration) if calibration is not None else None
    texts = _texts(checkpoint, set(ids))
    yield ExamplePrompt(
        source.name,
        torch.tensor(ids).numpy(),
        tuple(texts[token] for token in ids),
        scores.float().numpy(),
        calibrated.float().numpy() if calibrated is not None else None,
    )


def _scores(checkpoint: Checkpoint, ids: tuple[int, ...], calibration: Calibration | None = None) -> Tensor:
    (statistics,) = profile_batch(checkpoint.model, [ids], calibration)
    return statistics.scores


def _texts(checkpoint: Checkpoint, ids: set[int]) -> dict[int, str]:
    """What tokens stand for; of a part of a letter, the tokenizer's own name for it."""
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        return {token: f"<{token}>" for token in ids}
    # Behind another token: some tokenizers leave out the space that a text begins with.
    anchor = tokenizer("a", add_special_tokens=False).input_ids
    before = str(tokenizer.decode(anchor))
    texts = {}
    for token in ids:
        text = str(tokenizer.decode([*anchor, token]))
        own = text[len(before) :] if text.startswith(before) else ""
        texts[token] = own if own and "\ufffd" not in own else str(tokenizer.convert_ids_to_tokens(token))
    return texts


def _digest(checkpoint: Checkpoint, sources: Sequence[PromptSource], options: ProfileOptions) -> str:
    """Different where a step would be, or would give something else."""
    content = [
        SUMS_VERSION,
        str(checkpoint.identity),
        str(checkpoint.model.dtype),
        checkpoint.model.device.type,
        options.thresholds,
        options.batch_tokens,
        __version__,
        torch.__version__,
        transformers.__version__,
        [
            [
                source.name,
                source.prompts,
                [[q.prompt, q.choices, q.answer, q.first_token] for q in source.questions],
                source.form,
            ]
            for source in sources
        ],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
