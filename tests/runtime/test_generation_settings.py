"""Generation configurations: the tokens are those of transformers' own `generate`, and no field goes unnoticed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCABULARY, save_checkpoint, tiny_checkpoint, tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from act_export.checkpoint.load import load_checkpoint
from act_export.checkpoint.stop_tokens import end_tokens, stop_tokens
from act_export.errors import ActExportError, CheckpointError
from act_export.export import build_model
from act_export.runtime import Sampling, Session, generate
from act_export.runtime.generation_settings import USES, GenerationSettings, Use, fields_of
from act_export.runtime.sampling import left_pad
from act_export.runtime.text import load_generation_settings, stream_text

PROMPTS = [[5, 9, 200, 31, 7, 7, 40], [12, 3], [44, 45, 46, 47, 48, 49, 50, 51, 45, 46]]
NEW = 12
token = st.integers(3, VOCABULARY - 1)
# A field, and the values of it that are tried. Tokens after these prompts repeat, so that penalties show.
VALUES = {
    "bad_words_ids": st.lists(st.lists(token, min_size=1, max_size=2), min_size=1, max_size=40),
    "begin_suppress_tokens": st.lists(token, min_size=1, max_size=200),
    "encoder_no_repeat_ngram_size": st.integers(1, 3),
    "encoder_repetition_penalty": st.floats(0.5, 3.0),
    "exponential_decay_length_penalty": st.tuples(st.integers(0, 8), st.floats(1.01, 2.0)).map(list),
    "forced_bos_token_id": token,
    "forced_eos_token_id": st.one_of(token, st.lists(token, min_size=1, max_size=2, unique=True)),
    "min_length": st.integers(1, 20),
    "min_new_tokens": st.integers(1, NEW),
    "no_repeat_ngram_size": st.integers(1, 3),
    "remove_invalid_values": st.booleans(),
    "renormalize_logits": st.booleans(),
    "repetition_penalty": st.floats(0.5, 3.0),
    "sequence_bias": st.lists(
        st.tuples(st.lists(token, min_size=1, max_size=2), st.floats(-9, 9)).map(list), min_size=1
    ),
    "suppress_tokens": st.lists(token, min_size=1, max_size=200),
    "watermarking_config": st.just({"greenlist_ratio": 0.5, "bias": 4.0}),
}


@pytest.fixture(scope="module")
def session(tiny_plain_file):
    with Session.open(tiny_plain_file) as session:
        yield session


def theirs(model, prompts, new, **fields) -> list[list[int]]:
    """The new tokens by transformers, without those after the end."""
    ids, mask = map(torch.from_numpy, left_pad(prompts, 0))
    whole = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            **{"do_sample": False, "eos_token_id": 2, "pad_token_id": 0, **fields}, max_new_tokens=new
        ),
    )
    rows = whole[:, ids.shape[1] :].tolist()
    stops = fields.get("eos_token_id", 2)
    stops = stops if isinstance(stops, list) else [stops]
    return [row[: min((row.index(stop) + 1 for stop in stops if stop in row), default=len(row))] for row in rows]


def ours(session, prompts, new, *, stop=(2,), tokenizer=None, **fields) -> list[list[int]]:
    fields = json.loads(json.dumps(fields))
    used = GenerationSettings(fields, tokenizer=tokenizer)
    return generate(session, prompts, max_new_tokens=new, stop_tokens=stop, settings=used)


@given(st.data())
@settings(max_examples=12)
def test_greedy_tokens_are_those_of_transformers(session, tiny, data):
    names = data.draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=3, unique=True))
    fields = {name: data.draw(VALUES[name], label=name) for name in names}
    try:
        expected = theirs(tiny.model, PROMPTS, NEW, **fields)
    except ValueError:  # a combination that transformers refuses
        with pytest.raises(ActExportError, match="can't be applied"):
            ours(session, PROMPTS, NEW, **fields)
        return
    assert ours(session, PROMPTS, NEW, **fields) == expected


@pytest.mark.parametrize("name", sorted(VALUES))
def test_every_applied_field_is_tried(name):
    assert USES[name] is Use.APPLIED


@pytest.mark.parametrize(
    "fields", [{"repetition_penalty": 2.5}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": [62]}]
)
def test_settings_make_a_difference(session, fields):
    plain = generate(session, PROMPTS, max_new_tokens=NEW)
    fields = {**fields, "suppress_tokens": [plain[0][0]]} if "suppress_tokens" in fields else fields
    assert ours(session, PROMPTS, NEW, **fields) != plain


def test_it_ends_where_a_string_does(session, tiny):
    tokenizer = tiny_tokenizer()
    plain = generate(session, PROMPTS[:1], max_new_tokens=NEW)[0]
    end = tokenizer.decode(plain[4:6])
    assert "\ufffd" not in end
    ids = torch.tensor(PROMPTS[:1])
    expected = tiny.model.generate(
        ids, stop_strings=[end], tokenizer=tokenizer, max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    assert ours(session, PROMPTS[:1], NEW, stop_strings=[end], tokenizer=tokenizer) == [expected[0, 7:].tolist()]
    with pytest.raises(ActExportError, match="could not locate a tokenizer"):
        ours(session, PROMPTS[:1], NEW, stop_strings=[end])


def test_time_is_limited(session):
    assert len(ours(session, PROMPTS[:1], NEW, max_time=0.0)[0]) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.7},
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"typical_p": 0.5},
        {"top_h": 0.4},
        {"epsilon_cutoff": 0.05},
        {"eta_cutoff": 0.05},
        {"temperature": 1.4, "top_k": 7, "top_p": 0.8, "repetition_penalty": 1.5},
    ],
    ids=lambda fields: " ".join(fields),
)
def test_tokens_are_drawn_from_what_transformers_would_draw_from(tiny, fields):
    ids, mask = left_pad(PROMPTS)
    logits = (3 * np.random.default_rng(0).standard_normal((3, VOCABULARY))).astype(np.float32)
    used = GenerationSettings(fields)
    limits = {"max_new_tokens": 5, "stop_tokens": (2,), "vocabulary": VOCABULARY}
    found = used.rules(ids, mask, drawing=True, **limits).scores(ids, logits)
    config = GenerationConfig(**{"top_k": 0, **fields}, do_sample=True)
    tiny.model._prepare_special_tokens(config)
    processors = tiny.model._get_logits_processor(
        config, ids.shape[1], torch.from_numpy(ids), model_kwargs={"attention_mask": torch.from_numpy(mask)}
    )
    np.testing.assert_array_equal(found, processors(torch.from_numpy(ids), torch.from_numpy(logits)).numpy())
    greedy = used.rules(ids, mask, drawing=False, **limits)
    assert (greedy is not None) == ("repetition_penalty" in fields)


def test_tokens_are_drawn_by_the_seed(session):
    def draw(seed):
        used = GenerationSettings({"top_k": 40, "temperature": 3.0})
        return generate(session, PROMPTS, max_new_tokens=6, sampling=Sampling(1.0, seed=seed), settings=used)

    assert draw(1) == draw(1) != draw(2)


def test_every_field_of_transformers_has_a_use():
    """A new field of transformers' has to be put into the table."""
    assert set(vars(GenerationConfig())) - {"_original_object_hash"} <= set(USES)
    tried = {name for name, use in USES.items() if use is Use.APPLIED} - {"max_time", "stop_strings"}
    assert tried == set(VALUES)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_beams": 4, "guidance_scale": 1.5}, "asks for num_beams 4, guidance_scale 1.5, which isn't done here"),
        ({"num_beams": 1, "guidance_scale": 1, "token_healing": False, "use_cache": False}, None),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, "with temperature 0.6, top_p 0.9; this is greedy"),
        ({"do_sample": True}, "says to draw tokens; this is greedy: pass --sample"),
        ({"repetition_penalty": 2.0, "max_length": 4096, "eos_token_id": 2}, None),
    ],
)
def test_notes(fields, said):
    notes = GenerationSettings(fields).notes(drawing=False)
    assert len(notes) == (said is not None)
    if said is not None:
        assert said in notes[0]
    assert not any("greedy" in each for each in GenerationSettings(fields).notes(drawing=True))


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": -1.0},
        {"repetition_penalty": "high"},
        {"bad_words_ids": [[VOCABULARY]]},
        {"suppress_tokens": "abc"},
        {"min_length": [3]},
        {"exponential_decay_length_penalty": 3},
        {"sequence_bias": {"a": 1}},
        {"watermarking_config": {"bias": "x"}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_values_that_transformers_refuses(session, fields):
    with pytest.raises(ActExportError, match=r"generation_config.json can't be applied: .*--ignore-generation-config"):
        ours(session, PROMPTS, NEW, **fields)


def test_all_tokens_suppressed(session):
    with pytest.raises(ActExportError, match="no token is left"):
        ours(session, PROMPTS, NEW, suppress_tokens=list(range(VOCABULARY)))


@pytest.mark.parametrize("value", ["2", 2.0, [[2]], -1, [2, "3"], True, {"a": 2}], ids=repr)
def test_end_tokens_that_are_none(value, tmp_path):
    with pytest.raises(ActExportError, match=r"eos_token_id of x is .*correct it"):
        end_tokens(value, "eos_token_id of x", VOCABULARY)
    checkpoint = tiny_checkpoint()
    checkpoint.model.generation_config.eos_token_id = value
    with pytest.raises(ActExportError, match=r"eos_token_id of generation_config.json of tiny llama is"):
        build_model(checkpoint, None, tmp_path / "model.onnx")


def test_end_tokens_beyond_the_vocabulary(caplog):
    with pytest.raises(ActExportError, match=f"vocabulary has {VOCABULARY} tokens.*correct it"):
        end_tokens(VOCABULARY, "eos_token_id of x", VOCABULARY)
    checkpoint = tiny_checkpoint()
    expected = stop_tokens(checkpoint)
    checkpoint.model.config.eos_token_id = 50256
    checkpoint.model.generation_config.eos_token_id = [2, 5, VOCABULARY]
    assert stop_tokens(checkpoint) == sorted({*expected, 2, 5})
    assert "eos_token_id of config.json of tiny llama names 50256, which" in caplog.text


@pytest.mark.parametrize(("value", "tokens"), [(None, ()), (2, (2,)), ([2, 5], (2, 5)), ([], ())])
def test_end_tokens(value, tokens):
    assert end_tokens(value, "", VOCABULARY) == tokens


def test_a_file_says_what_its_model_said(tmp_path):
    folder = save_checkpoint(tmp_path / "checkpoint")
    asked = {"repetition_penalty": 1.7, "do_sample": True, "temperature": 0.6, "eos_token_id": [2, 7]}
    (folder / "generation_config.json").write_text(json.dumps({**asked, "transformers_version": "5.0"}))
    checkpoint = load_checkpoint(str(folder))
    build_model(checkpoint, None, tmp_path / "model.onnx", source="elsewhere")
    with Session.open(tmp_path / "model.onnx") as session:
        assert session.limits.stop_tokens == (2, 7)
        inside = load_generation_settings(session, checkpoint.tokenizer)
        assert dict(inside.fields) == fields_of(checkpoint.model.generation_config)
        assert asked.items() <= inside.fields.items()
        said = []
        pieces = stream_text(
            session, checkpoint.tokenizer, "One light", max_new_tokens=8, settings=inside, note=said.append
        )
        text = "".join(pieces)
        expected = theirs(
            checkpoint.model, [checkpoint.tokenizer("One light").input_ids], 8, **{**asked, "do_sample": False}
        )
        assert text == checkpoint.tokenizer.decode(expected[0], skip_special_tokens=True)
        assert text != "".join(stream_text(session, checkpoint.tokenizer, "One light", max_new_tokens=8))
        assert ["--sample" in each for each in said] == [True]
        # What lies beside the file has the say in an exported folder; elsewhere it may be another model's.
        beside = tmp_path / "generation_config.json"
        beside.write_text('{"no_repeat_ngram_size": 2}')
        assert load_generation_settings(session).fields == inside.fields
        (tmp_path / "config.json").write_text("{}")
        said = []
        assert load_generation_settings(session, note=said.append).fields == {"no_repeat_ngram_size": 2}
        assert said == [
            f"{beside} isn't what {session.path} was exported with; what it says now is used",
        ]
        checkpoint.model.generation_config.save_pretrained(tmp_path)
        assert asked.items() <= load_generation_settings(session, note=said.append).fields.items()
        assert len(said) == 1
        beside.write_text('{"no_repeat_ngram_size": 2}')
        assert not load_generation_settings(session, ignored=True).fields
        (tmp_path / "generation_config.json").write_text("[1]")
        with pytest.raises(ActExportError, match=r"generation_config.json is no JSON object.*--ignore"):
            load_generation_settings(session)


def test_a_neighbours_configuration(tmp_path, monkeypatch):
    build_model(tiny_checkpoint(), None, tmp_path / "a.onnx", source="owner/name")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text('{"no_repeat_ngram_size": 2}')

    def no_connection(*_, **__):
        raise CheckpointError("no connection")

    monkeypatch.setattr("act_export.runtime.text.fetch_checkpoint", no_connection)
    with Session.open(tmp_path / "a.onnx") as session:
        assert "no_repeat_ngram_size" not in load_generation_settings(session).fields
        session.record = replace(session.record, generation=None)  # as of an earlier version
        assert load_generation_settings(session).fields == {"no_repeat_ngram_size": 2}
        (tmp_path / "generation_config.json").unlink()
        said = []
        assert not load_generation_settings(session, note=said.append).fields
        assert said == ["no generation_config.json is used, that of owner/name can't be had: no connection"]


@pytest.mark.in_turn(2)
def test_a_model_whose_cache_is_computed_again(tmp_path):
    """Phi-3 with longrope: beyond some length transformers computes the whole sequence with the other frequencies."""
    limit = 16
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 8.0, 2.0, 6.0],
    }
    model = tiny_model("phi3", original_max_position_embeddings=limit, rope_parameters=rope)
    checkpoint = tiny_checkpoint("phi3", original_max_position_embeddings=limit, rope_parameters=rope)
    build_model(checkpoint, None, tmp_path / "model.onnx")
    with Session.open(tmp_path / "model.onnx") as session:
        expected = theirs(model, PROMPTS, 14, repetition_penalty=1.2)
        assert ours(session, PROMPTS, 14, repetition_penalty=1.2) == expected
        session.record = replace(session.record, recompute_beyond=None)
        assert ours(session, PROMPTS, 14, repetition_penalty=1.2) != expected
