"""Profiles as they are made: stopped and gone on with, with effects, with an example before and after calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_profile_file import assert_same
from tiny import CALIBRATION, VOCABULARY, tiny_checkpoint, tiny_tokenizer

from act_export.calibration import Calibration, CalibrationError
from act_export.checkpoint import Checkpoint
from act_export.errors import ActExportError
from act_export.hooks import AttentionCall, LayerState, ReferenceAttention, attention_hook
from act_export.profile import (
    ProfileError,
    ProfileOptions,
    PromptSource,
    SinkProfile,
    attention_statistics,
    profile_sinks,
    run,
)
from act_export.profile.tally import Tally
from act_export.reference import attention_probabilities, calibrate_with_state
from act_export.tasks import EncodedExample

LENGTHS = (40, 12, 33, 25, 8, 40)


def prompts(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> tuple[tuple[int, ...], ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths)


def effects_of(batch):
    """Stands for a gradient: depends on the batch, and has both signs."""
    return (
        torch.tensor(
            [
                [len(example.prompt) * (layer - 0.5) * (head + 1) for head in range(4)]
                for layer in range(2)
                for example in batch
            ]
        )
        .view(2, len(batch), 4)
        .sum(1)
    )


def sources() -> list[PromptSource]:
    questions = tuple(EncodedExample(prompt, ((5,), (6,)), 0) for prompt in prompts(1))
    return [
        PromptSource("plain", prompts(0)),
        PromptSource("asked", prompts(1), questions, effects_of, "made up"),
    ]


OPTIONS = ProfileOptions(batch_tokens=60)


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
    assert_same(profiled(checkpoint, partial=tmp_path), whole)
    kept.write_bytes(kept.read_bytes()[:-7])  # what a full disk would leave
    assert_same(profiled(checkpoint, partial=tmp_path), whole)


def test_other_work_is_not_gone_on_from(checkpoint, tmp_path):
    kept: set[Path] = set()
    for options, given in (
        (OPTIONS, sources()),
        (ProfileOptions(batch_tokens=61), sources()),
        (ProfileOptions(0.2, batch_tokens=60), sources()),
        (OPTIONS, sources()[:1]),
        (OPTIONS, [PromptSource("plain", prompts(2)), sources()[1]]),
        (OPTIONS, [sources()[0], PromptSource("asked", prompts(1), sources()[1].questions, effects_of, "otherwise")]),
    ):
        before = len(kept)
        profile_sinks(checkpoint, given, options, partial=tmp_path)
        kept = set(tmp_path.iterdir())
        assert len(kept) == before + 1
    profile_sinks(tiny_checkpoint(seed=1), sources(), OPTIONS, partial=tmp_path)
    assert len(set(tmp_path.iterdir())) == len(kept) + 1


def test_a_place_that_can_not_be_written_to(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileError, match="can't keep unfinished work"):
        profiled(checkpoint, partial=tmp_path / "file")


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
        self.scores: list[torch.Tensor] = []

    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, LayerState]:
        group = call.query.shape[1] // call.key.shape[1]
        maps = attention_probabilities(
            call.query, call.key.repeat_interleave(group, 1), call.attention_mask != 0, scale=call.scale
        )
        layer = self.calibration.layer(call.layer) if self.calibration is not None else None
        for head, beta in zip(layer.heads, layer.beta, strict=True) if layer is not None else ():
            maps[:, head] = calibrate_with_state(
                maps[:, head], beta=beta, threshold=layer.threshold, threshold_mode=layer.threshold_mode
            ).probabilities
        tokens = maps.shape[-1]
        self.scores.append(maps[0].sum(1) / torch.arange(tokens, 0, -1))
        return super().attend(call)


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
    with pytest.raises(ProfileError, match=message):
        profile_sinks(checkpoint, given)


def test_numbers_out_of_range(checkpoint):
    with pytest.raises(ProfileError, match="batch_tokens is 0"):
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
