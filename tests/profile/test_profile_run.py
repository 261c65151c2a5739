"""Profiles as they are made: stopped and gone on with, with effects, with an example before and after calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from close import assert_close
from safetensors.torch import save
from test_sink_profile import assert_same
from tiny import CALIBRATION, VOCABULARY, tiny_checkpoint, tiny_tokenizer
from tokenizers import decoders, models

from act_export.attention.call import AttentionCall, LayerState
from act_export.attention.hook import attention_hook
from act_export.attention.reference_attention import ReferenceAttention
from act_export.calibration.file import Calibration, CalibrationError
from act_export.calibration.reference import calibrate_with_state
from act_export.calibration.reference_operator import attention_probabilities
from act_export.checkpoint.load import Checkpoint
from act_export.errors import ActExportError
from act_export.profile import (
    ProfileOptions,
    PromptSource,
    SinkProfile,
    attention_statistics,
    profile_sinks,
    profiling,
    run,
    unreachable,
)
from act_export.profile.partial import PartialTally
from act_export.profile.tally import Tally
from act_export.tasks import EncodedExample

LENGTHS = (40, 12, 33, 25, 8, 40)  # the example, the first, would be with the last in a batch


def prompts(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> tuple[tuple[int, ...], ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths)


def effects_of(batch):
    """Stands for a gradient: depends on the batch, and has both signs."""
    values = [
        [len(example.prompt) * (layer - 0.5) * (head + 1) for head in range(4)]
        for layer in range(2)
        for example in batch
    ]
    return torch.tensor(values).view(2, len(batch), 4).sum(1)


def sources() -> list[PromptSource]:
    questions = tuple(EncodedExample(prompt, ((5,), (6,)), 0) for prompt in prompts(1))
    return [
        PromptSource("plain", prompts(0)),
        PromptSource("asked", prompts(1), questions, effects_of, "made up"),
    ]


OPTIONS = ProfileOptions(batch_tokens=80)


@pytest.fixture
def checkpoint() -> Checkpoint:
    return tiny_checkpoint()


def profiled(checkpoint: Checkpoint, **arguments) -> SinkProfile:
    return profile_sinks(checkpoint, sources(), OPTIONS, calibration=CALIBRATION, **arguments)


class Stop(BaseException):
    """As Ctrl-C, which is no Exception."""


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_stopped_between_batches_it_goes_on_to_the_same_result(checkpoint, tmp_path, steps):
    whole = profiled(checkpoint)
    seen: list[str] = []

    def stop(step: str, done: float) -> None:
        seen.append(step)
        if len(seen) > steps:
            raise Stop

    with pytest.raises(Stop):
        profiled(checkpoint, partial=tmp_path, progress=stop)
    assert len(list(tmp_path.iterdir())) == 1
    again: list[str] = []
    other = tmp_path / "kept nothing"
    profile_sinks(checkpoint, sources(), OPTIONS, partial=other)
    assert list(other.iterdir()) == []  # of finished work nothing is kept
    other.rmdir()
    resumed = profiled(
        checkpoint, partial=tmp_path, progress=lambda step, _: again.append(step), out=tmp_path / "p.safetensors"
    )
    assert_same(resumed, whole)
    alone: list[str] = []
    profiled(checkpoint, progress=lambda step, _: alone.append(step))
    assert again == alone[steps:]  # no batch was done twice
    assert {file.name for file in tmp_path.iterdir()} == {"p.safetensors", "p.json"}  # unfinished work is gone


@pytest.mark.parametrize("after", [1, 3, 4])
def test_stopped_within_a_batch_half_of_it_is_not_counted(checkpoint, tmp_path, monkeypatch, after):
    whole = profiled(checkpoint)
    monkeypatch.setattr(run, "_SAVE_EVERY_SECONDS", 0.0)
    add, calls = Tally.add, []

    def stop(self, ids, statistics):
        calls.append(ids)
        add(self, ids, statistics)
        if len(calls) == after:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Tally, "add", stop)
        with pytest.raises(Stop):
            profiled(checkpoint, partial=tmp_path)
    assert_same(profiled(checkpoint, partial=tmp_path), whole)


def test_stopped_while_a_batch_is_computed(checkpoint, tmp_path, monkeypatch):
    whole = profiled(checkpoint)
    compute, calls = run.profile_batch, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise Stop
        return compute(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run, "profile_batch", stop)
        with pytest.raises(Stop):
            profiled(checkpoint, partial=tmp_path)
    (kept,) = tmp_path.iterdir()
    content = kept.read_bytes()
    assert_same(profiled(checkpoint, partial=tmp_path), whole)
    kept.write_bytes(content[:-7])  # what a full disk would leave
    assert_same(profiled(checkpoint, partial=tmp_path), whole)


def test_other_work_is_not_gone_on_from(checkpoint, tmp_path):
    def unfinished(given, options, model=checkpoint):
        """What is kept of a profile that stops after a batch."""
        calls: list[str] = []

        def stop(step, done):
            calls.append(step)
            if len(calls) == 2:
                raise Stop

        with pytest.raises(Stop):
            profile_sinks(model, given, options, partial=tmp_path, progress=stop)

    kept: set[Path] = set()
    for options, given in (
        (OPTIONS, sources()),
        (ProfileOptions(batch_tokens=81), sources()),
        (ProfileOptions(0.2, batch_tokens=80), sources()),
        (OPTIONS, sources()[:1]),
        (OPTIONS, [PromptSource("plain", prompts(2)), sources()[1]]),
        (OPTIONS, [sources()[0], PromptSource("asked", prompts(1), sources()[1].questions, effects_of, "otherwise")]),
    ):
        before = len(kept)
        unfinished(given, options)
        kept = set(tmp_path.iterdir())
        assert len(kept) == before + 1
    unfinished(sources(), OPTIONS, tiny_checkpoint(seed=1))
    assert len(set(tmp_path.iterdir())) == len(kept) + 1


def test_a_place_that_can_not_be_written_to(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    called: list[str] = []
    with pytest.raises(ActExportError, match=r"can't keep unfinished work.*XDG_CACHE_HOME"):
        profiled(checkpoint, partial=tmp_path / "file", progress=lambda step, _: called.append(step))
    assert called == []  # before any work


def test_effects_are_means_over_their_prompts(checkpoint):
    profile = profiled(checkpoint)
    assert profile["plain"].effects is None
    assert profile["plain"].effect_prompts == 0
    wanted = np.array([[np.mean(LENGTHS) * (layer - 0.5) * (head + 1) for head in range(4)] for layer in range(2)])
    for name in ("asked", "all"):
        np.testing.assert_allclose(profile[name].effects, wanted, rtol=1e-6)
        assert profile[name].effect_prompts == len(LENGTHS)


class Recorded(ReferenceAttention):
    """The reference, and the sink scores of its calibrated maps."""

    def __init__(self, calibration: Calibration | None) -> None:
        super().__init__(calibration)
        self.given = calibration
        self.scores: list[torch.Tensor] = []

    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, LayerState]:
        group = call.query.shape[1] // call.key.shape[1]
        maps = attention_probabilities(
            call.query, call.key.repeat_interleave(group, 1), call.attention_mask != 0, scale=call.scale
        )
        layer = self.given.layer(call.layer) if self.given is not None else None
        for head, beta in zip(layer.heads, layer.beta, strict=True) if layer is not None else ():
            maps[:, head] = calibrate_with_state(
                maps[:, head], beta=beta, threshold=layer.threshold, threshold_mode=layer.threshold_mode
            ).probabilities
        tokens = maps.shape[-1]
        self.scores.append(maps[0].sum(1) / torch.arange(tokens, 0, -1))
        return super().attend(call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_about_the_same(checkpoint, dtype):
    whole = profiled(checkpoint)
    checkpoint.model.to(dtype)
    half = profiled(checkpoint)
    assert half.options["dtype"] == str(dtype).removeprefix("torch.")
    assert half.overall.mean_map.dtype == np.float32
    for field in ("initial_score", "entropy", "mean_map"):
        np.testing.assert_allclose(getattr(half.overall, field), getattr(whole.overall, field), atol=0.15)
    np.testing.assert_allclose(half.overall.mean_map.sum(-1), 1, atol=1e-5)


def test_entropy_of_large_logits_does_not_cancel():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 40, 8, generator=generator) * size for size in (1000, 3, 1))
    mask = torch.ones(1, 40, dtype=torch.long)
    call = AttentionCall(0, query, key, value, mask, 1.0, 0.0, -1, None)
    found = attention_statistics.attend_with_statistics(call, attention_statistics.map_grid(mask != 0, 32))[1]
    maps = attention_probabilities(query.double(), key.double(), mask != 0, scale=1.0)
    wanted = torch.special.entr(maps).sum(-1).mean(-1)
    assert query.abs().max() > 2000
    assert_close(found.entropy, wanted, 1e-5)
    assert (found.entropy >= 0).all()


def test_values_of_another_size_than_keys():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 9, 8, generator=generator) for heads in (4, 2))
    value = torch.randn(1, 2, 9, 5, generator=generator)
    mask = torch.ones(1, 9, dtype=torch.long)
    call = AttentionCall(0, query, key, value, mask, 0.3, 0.0, -1, None)
    output, _ = attention_statistics.attend_with_statistics(call, attention_statistics.map_grid(mask != 0, 32))
    maps = attention_probabilities(query, key.repeat_interleave(2, 1), mask != 0, scale=0.3)
    torch.testing.assert_close(output, maps @ value.repeat_interleave(2, 1))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_a_calibrated_prompt_is_the_same_in_a_padded_batch(architecture):
    model = tiny_checkpoint(architecture).model
    given = prompts(3, (30, 11, 22))
    together = list(profiling.profile_batch(model, given, CALIBRATION))
    plain = list(profiling.profile_batch(model, given))
    for prompt, found, uncalibrated in zip(given, together, plain, strict=True):
        (alone,) = profiling.profile_batch(model, [prompt], CALIBRATION)
        for one, other in zip(found, alone, strict=True):
            assert_close(one, other, 2e-5)
        assert (found.scores - uncalibrated.scores).abs().max() > 1e-3


def test_the_example_before_and_after_calibration_is_the_references(checkpoint):
    profile = profiled(checkpoint)
    assert [example.source for example in profile.examples] == ["plain", "asked"]
    for example, source in zip(profile.examples, sources(), strict=True):
        ids = source.prompts[0]
        assert tuple(example.ids) == ids
        wanted = []
        for calibration in (None, CALIBRATION):
            hook = Recorded(calibration)
            with torch.no_grad(), attention_hook(checkpoint.model, hook) as hooked:
                hooked(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
            wanted.append(torch.stack(hook.scores).numpy())
        np.testing.assert_allclose(example.scores, wanted[0], atol=1e-5)
        np.testing.assert_allclose(example.calibrated_scores, wanted[1], atol=1e-5)
        assert np.abs(wanted[0] - wanted[1]).max() > 0.01


def test_an_example_is_not_a_prompt_that_is_too_long(checkpoint, monkeypatch):
    monkeypatch.setattr(run, "EXAMPLE_TOKENS", 30)
    profile = profiled(checkpoint)
    assert [len(example.ids) for example in profile.examples] == [12, 12]
    monkeypatch.setattr(run, "EXAMPLE_TOKENS", 7)
    assert profiled(checkpoint).examples == ()


def test_texts_of_tokens(checkpoint):
    text = "a é\n"
    tokenizer = tiny_tokenizer()
    ids = tuple(tokenizer(text).input_ids)
    with_tokenizer = Checkpoint("tiny", checkpoint.model, tokenizer, checkpoint.identity)
    (example,) = profile_sinks(with_tokenizer, [PromptSource("text", (ids,))]).examples
    assert (example.texts[0], example.texts[-1]) == ("a", "\n")
    assert "\ufffd" not in "".join(example.texts)  # of a part of a letter, the tokenizer's name for it
    spaced = tiny_tokenizer()  # with names like those of Llama 2, whose decoder leaves out the first space
    spaced.backend_tokenizer.model = models.BPE(
        vocab={"<unk>": 10, "a": 11, "\u2581the": 12, "the": 13}, merges=[], unk_token="<unk>"
    )
    spaced.backend_tokenizer.pre_tokenizer = None
    spaced.backend_tokenizer.decoder = decoders.Metaspace()
    with_spaces = Checkpoint("tiny", checkpoint.model, spaced, checkpoint.identity)
    (example,) = profile_sinks(with_spaces, [PromptSource("text", ((12, 13, 12),))]).examples
    assert example.texts == (" the", "the", " the")
    (example,) = profile_sinks(checkpoint, [PromptSource("text", (ids,))]).examples
    assert example.texts == tuple(f"<{token}>" for token in ids)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "nothing to profile"),
        ([PromptSource("empty", ())], "empty has no prompts"),
        ([PromptSource("short", ((4,), ()))], "short has no prompts, or one without tokens"),
        ([PromptSource("a", ((4,),)), PromptSource("a", ((5,),))], "names two sources"),
        ([PromptSource("all", ((4,),))], "stands for all prompts"),
    ],
)
def test_sources_that_can_not_be_profiled(checkpoint, given, message):
    with pytest.raises(ActExportError, match=message):
        profile_sinks(checkpoint, given)


def test_numbers_out_of_range(checkpoint):
    with pytest.raises(ActExportError, match="batch_tokens is 0"):
        ProfileOptions(batch_tokens=0)
    with pytest.raises(CalibrationError, match="threshold is -1"):
        ProfileOptions(relative_threshold=-1)
    with pytest.raises(CalibrationError, match="layer 9"):
        profile_sinks(checkpoint, sources(), calibration=Calibration({9: (0,)}))


def test_attention_that_is_not_finite_is_refused(checkpoint):
    with torch.no_grad():
        checkpoint.model.model.layers[1].self_attn.q_proj.weight.fill_(float("nan"))
    with pytest.raises(ActExportError, match=r"is not finite.*float32"):
        profiled(checkpoint)


def test_no_whole_map_is_ever_in_memory(checkpoint, monkeypatch):
    """The largest part of an attention map grows with the length of a long prompt, not with its square."""
    rows = 8
    monkeypatch.setattr(attention_statistics, "_BLOCK_ELEMENTS", {"cpu": 64})
    monkeypatch.setattr(attention_statistics, "_BLOCK_ROWS", {"cpu": rows})
    largest: list[int] = []
    softmax = torch.softmax

    def measured(logits, axis, out):
        largest.append(logits.numel())
        return softmax(logits, axis, out=out)

    monkeypatch.setattr(attention_statistics.torch, "softmax", measured)
    for length in (16, 64, 200):
        largest.clear()
        profile_sinks(checkpoint, [PromptSource("long", prompts(0, (length,)))])
        assert max(largest) == rows * length


def test_a_threshold_that_nothing_can_exceed_is_said(checkpoint):
    assert unreachable(profiled(checkpoint)) == []  # 8 tokens, 5 / 8
    short = profile_sinks(checkpoint, [PromptSource("short", prompts(0, (5, 9)))])
    (line,) = unreachable(short)
    assert "the relative threshold is 5 / 5 tokens" in line
    (line, _) = unreachable(profile_sinks(checkpoint, [PromptSource("a", prompts(0, (4,)))], ProfileOptions(1.0)))
    assert "the absolute threshold is 1 for" in line


def test_a_profile_prints_in_a_line(checkpoint):
    profile = profiled(checkpoint)
    assert repr(profile) == "<SinkProfile of tiny llama, 2 layers of 4 heads: plain, asked>"
    assert repr(profile["asked"]) == "<SinkStatistics of asked: 6 prompts, 158 tokens>"


@pytest.mark.parametrize("damage", ["bit", "NaN", "cut", "older"])
def test_damaged_unfinished_work_is_done_again(tmp_path, damage):
    tallies = [Tally(((1, 2, 3),), 2, 2, OPTIONS.thresholds)]
    kept = PartialTally(tmp_path, "a", tallies)
    tallies[0].sums["occurrences"] += 3.0
    kept.save(7)
    assert PartialTally(tmp_path, "a", [Tally(((1, 2, 3),), 2, 2, OPTIONS.thresholds)]).resume() == 7
    content = kept.path.read_bytes()
    if damage == "bit":
        kept.path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "NaN":
        tallies[0].sums["occurrences"] *= float("nan")
        kept.save(7)
    elif damage == "cut":
        kept.path.write_bytes(content[: len(content) // 2])
    else:
        kept.path.write_bytes(save(kept._sums(), {"done": "7"}))
    fresh = Tally(((1, 2, 3),), 2, 2, OPTIONS.thresholds)
    assert PartialTally(tmp_path, "a", [fresh]).resume() == 0
    assert not fresh.sums["occurrences"].any()
