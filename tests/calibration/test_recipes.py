"""Recipes: which ones a model gets, which one is used by itself, and the ones that are shipped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import save_checkpoint, tiny_checkpoint, tiny_model, tiny_tokenizer

from act_export.calibration import recipes as module
from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.file import Calibration, CalibrationError, ModelIdentity, Provenance
from act_export.calibration.recipes import (
    announce,
    describe_calibration,
    describe_calibrations,
    find_recipes,
    named_recipe,
    shipped_recipes,
)
from act_export.checkpoint.load import load_checkpoint
from act_export.errors import ActExportError
from act_export.export.job import export_model
from act_export.onnx_file.inspect import inspect_file
from act_export.runtime import Session
from act_export.search.resolve import CalibrationRequest, resolve_calibrations
from act_export.tasks import Questions

IDENTITY = ModelIdentity("llama", 2, 4, "sha256:ab")
BY_NAME = ModelIdentity("llama", 2, 4, name="Owner/Model-1")
SHAPE_OF_THE_PAPERS_MODELS = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_size": 64,
    "head_dim": 2,
    "intermediate_size": 16,
}
PUBLISHED = {
    "llama-2-7b-chat-classification": (184, 2, 30),
    "llama-2-7b-chat-multiple-choice": (74, 2, 31),
    "mistral-7b-instruct-v0.2-classification": (16, 2, 14),
    "mistral-7b-instruct-v0.2-multiple-choice": (104, 2, 31),
}


def resolved(checkpoint, request, **rest):
    """The one calibration that is found; None for none."""
    found = [*resolve_calibrations(checkpoint, request, **rest).values()]
    assert len(found) <= 1
    return found[0] if found else None


def write(folder: Path, name: str, model: ModelIdentity | None, *tasks: str, method: str = "gates") -> Calibration:
    recipe = Calibration({0: (1,)}, model=model, provenance=Provenance(method, tasks))
    recipe.save(folder / f"{name}.json")
    return recipe


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder of recipes in place of the shipped one."""
    path = tmp_path / "recipes"
    path.mkdir()
    monkeypatch.setattr(module, "recipes_folder", lambda: path)
    return path


def names(recipes) -> list[str]:
    return [recipe.name for recipe in recipes]


@given(st.dictionaries(st.from_regex(r"[a-z]{1,4}", fullmatch=True), st.integers(0, 4), min_size=1, max_size=5))
def test_most_tasks_first_then_by_name(tmp_path_factory, counts):
    folder = tmp_path_factory.mktemp("recipes")
    for name, count in counts.items():
        write(folder, name, IDENTITY, *[f"task{i}" for i in range(count)])
    assert names(find_recipes(IDENTITY, folder=folder)) == sorted(counts, key=lambda name: (-counts[name], name))


def test_only_recipes_of_the_model(folder):
    write(folder, "mine", IDENTITY, "sst2")
    write(folder, "of-other-weights", ModelIdentity("llama", 2, 4, "sha256:cd"), "sst2", "cb")
    write(folder, "of-another-shape", ModelIdentity("llama", 2, 8, name="Owner/Model-1"), "sst2", "cb")
    write(folder, "of-no-model", None, "sst2", "cb")
    write(folder, "of-a-shape", ModelIdentity("llama", 2, 4), "sst2", "cb")
    assert names(find_recipes(IDENTITY, ["Owner/Model-1"])) == ["mine"]
    assert find_recipes(ModelIdentity("llama", 2, 4, "sha256:ef"), ["Owner/Model-1"]) == []


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("Owner/Model-1", True),
        ("owner/model-1", True),
        ("MODEL-1", True),
        ("Other/Model-1", False),
        ("model-1-finetuned", False),
        ("Model-1/Owner", False),
        ("Owner", False),
        ("", False),
    ],
)
def test_a_recipe_without_a_fingerprint_goes_by_the_name(folder, name, fits):
    write(folder, "published", BY_NAME, "sst2")
    assert names(find_recipes(IDENTITY, ["something-else", name])) == (["published"] if fits else [])
    assert find_recipes(IDENTITY) == []


def test_named_recipes(folder, tmp_path, monkeypatch):
    for name in ("tiny-1b", "tiny-1b-sst2", "tiny-1b-boolq"):
        write(folder, name, IDENTITY, "sst2")
    found = named_recipe("tiny-1b-sst2")
    assert found is not None
    assert found.path == folder / "tiny-1b-sst2.json"
    assert named_recipe(tmp_path / "tiny-1b") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-1b").write_text("{}")
    assert named_recipe("tiny-1b") is None, "a file in the current folder goes first"


@pytest.mark.parametrize(
    ("given_name", "message"),
    [
        ("tiny-1b-sst", "did you mean tiny-1b-sst2"),
        ("Tiny-1B-SST2.json", "did you mean tiny-1b-sst2"),
        ("tiny", "tiny-1b-sst2"),
        ("xyzzy", "recipes are tiny-1b, tiny-1b-sst2"),
    ],
)
def test_an_unknown_name_lists_near_ones(folder, given_name, message):
    for name in ("tiny-1b", "tiny-1b-sst2"):
        write(folder, name, IDENTITY, "sst2")
    with pytest.raises(CalibrationError, match=f"no calibration file {given_name}.*{message}"):
        named_recipe(given_name)
    with pytest.raises(CalibrationError, match=message):
        CalibrationRequest(calibrations=(given_name,))


def test_what_is_announced(folder):
    write(folder, "joint", IDENTITY, "sst2", "boolq")
    write(folder, "sst2", IDENTITY, "sst2")
    write(folder, "boolq", IDENTITY, "boolq")
    first, *others = find_recipes(IDENTITY)
    assert announce(first, others) == (
        "using the shipped recipe joint (sst2, boolq); others for this model: boolq, sst2: --calibration boolq"
    )
    assert announce(first, []) == "using the shipped recipe joint (sst2, boolq)"


def test_the_joint_recipe_is_used_and_the_others_are_named(folder, tiny):
    joint = write(folder, "tiny", tiny.identity, "sst2", "boolq")
    single = write(folder, "tiny-boolq", tiny.identity, "boolq")
    said: list[str] = []
    assert resolved(tiny, CalibrationRequest(), notice=said.append) == joint
    assert said == [
        "using the shipped recipe tiny (sst2, boolq); others for this model: tiny-boolq: --calibration tiny-boolq"
    ]
    said.clear()
    assert resolved(tiny, CalibrationRequest(calibrations=("tiny-boolq",)), notice=said.append) == single
    assert said == ["using the shipped recipe tiny-boolq (boolq); others for this model: tiny: --calibration tiny"]
    changed = resolved(tiny, CalibrationRequest(beta=0.1))
    assert changed is not None
    assert (changed.heads, changed.beta) == (joint.heads, 0.1)
    assert resolved(tiny, CalibrationRequest(plain=True)) is None


def test_a_recipe_that_costs_elsewhere_is_used_by_name_only(folder, tiny):
    """The plain model is exported, without a search; a recipe that costs nothing goes before it."""
    costly = write(folder, "tiny", tiny.identity, "sst2", "boolq")
    noted = replace(costly, provenance=replace(costly.provenance, notes={"by_name_only": "it costs 5 points on CB"}))
    (folder / "tiny.json").write_text(noted.to_json())
    said: list[str] = []
    assert resolved(tiny, CalibrationRequest(), notice=said.append) is None
    assert said == [
        "no calibration: the shipped recipe tiny (sst2, boolq) isn't used unless it is named, because it costs 5 "
        "points on CB; --calibration tiny uses it"
    ]
    assert resolved(tiny, CalibrationRequest(calibrations=("tiny",))) == noted
    with pytest.raises(ActExportError, match=r"no calibration: .* there is nothing that --beta"):
        resolved(tiny, CalibrationRequest(beta=0.2))
    harmless = write(folder, "tiny-boolq", tiny.identity, "boolq")
    assert resolved(tiny, CalibrationRequest()) == harmless


def test_a_search_says_that_there_is_a_recipe(folder, tiny, monkeypatch):
    write(folder, "tiny", tiny.identity, "sst2", "boolq")
    write(folder, "tiny-boolq", tiny.identity, "boolq")
    found = {"boolq": Calibration({})}
    monkeypatch.setattr("act_export.search.resolve.search_calibration", lambda *_, **__: found)
    checkpoint = with_tokenizer(tiny)
    said: list[str] = []
    request = CalibrationRequest(questions=Questions(("boolq",)))
    assert resolved(checkpoint, request, notice=said.append) is found["boolq"]
    assert said == ["a recipe for this model is shipped: --calibration tiny-boolq needs no search"]
    said.clear()
    resolved(checkpoint, CalibrationRequest(questions=Questions(("sst2",))), notice=said.append)
    assert said == []


def with_tokenizer(checkpoint):
    return replace(checkpoint, tokenizer=tiny_tokenizer())


def test_a_named_recipe_of_other_weights_is_refused_before_it_is_announced(folder, tiny):
    write(folder, "other", ModelIdentity("llama", 2, 4, "sha256:of-others"), "sst2")
    said: list[str] = []
    with pytest.raises(CalibrationError, match="fingerprint of the weights is sha256:of-others"):
        resolved(tiny, CalibrationRequest(calibrations=("other",)), notice=said.append)
    assert said == []


def test_a_named_recipe_without_a_fingerprint_fits_any_weights_of_the_shape(folder, tiny):
    recipe = write(folder, "published", BY_NAME, "sst2", method="published")
    said: list[str] = []
    assert resolved(tiny, CalibrationRequest(calibrations=("published",)), notice=said.append) == recipe
    assert said == [
        "using the shipped recipe published (sst2; heads published by others, not measured here; for Owner/Model-1, "
        "whose weights can't be told from others)"
    ]
    other_shape = tiny_checkpoint(num_attention_heads=2)
    with pytest.raises(CalibrationError, match="number of heads is 4 in the calibration, 2 in the model"):
        resolved(other_shape, CalibrationRequest(calibrations=("published",)))


@pytest.mark.in_turn(2)
def test_a_recipe_without_a_fingerprint_is_exported_with_the_models_own(folder, tiny, tmp_path):
    recipe = write(folder, "published", BY_NAME, "sst2", method="published")
    export_model(tiny, recipe, tmp_path / "m.onnx", verify=False)
    assert inspect_file(tmp_path / "m.onnx").calibration == recipe
    with Session.open(tmp_path / "m.onnx") as session:
        assert session.calibration == recipe
        assert session.record.model == tiny.identity


def of_the_papers_shape(folder: Path, architecture: str, recorded: str | None = None) -> Path:
    """A random checkpoint with 32 layers of 32 heads."""
    changes = {"sliding_window": None} if architecture == "mistral" else {}
    save_checkpoint(folder, architecture=architecture, **SHAPE_OF_THE_PAPERS_MODELS, **changes)
    if recorded is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": recorded}))
    return folder


@pytest.mark.parametrize(
    ("folder_name", "recorded"),
    [
        ("Llama-2-7b-chat-hf", None),
        ("llama-2-7B-CHAT-HF", None),
        ("models--meta-llama--Llama-2-7b-chat-hf/snapshots/0123abc", None),
        ("mine", "meta-llama/Llama-2-7b-chat-hf"),
        ("mine", "/data/Llama-2-7b-chat-hf"),
    ],
)
def test_the_papers_llama_gets_the_published_recipe(tmp_path, folder_name, recorded):
    checkpoint = load_checkpoint(str(of_the_papers_shape(tmp_path / folder_name, "llama", recorded)))
    said: list[str] = []
    calibration = resolved(checkpoint, CalibrationRequest(), notice=said.append)
    (shipped,) = [one for one in shipped_recipes() if one.name == "llama-2-7b-chat-classification"]
    assert calibration == shipped.calibration
    (line,) = said
    assert line.startswith("using the shipped recipe llama-2-7b-chat-classification (sst2, ")
    assert "heads published by others, not measured here" in line
    assert line.endswith("--calibration llama-2-7b-chat-multiple-choice")
    other = resolved(checkpoint, CalibrationRequest(calibrations=("llama-2-7b-chat-multiple-choice",)))
    assert other is not None
    assert other.num_calibrated_heads == PUBLISHED["llama-2-7b-chat-multiple-choice"][0]


def test_a_mistral_of_another_name_gets_none(tmp_path):
    named = load_checkpoint(str(of_the_papers_shape(tmp_path / "Mistral-7B-Instruct-v0.2", "mistral")))
    assert names(find_recipes(named.identity, named.names)) == [
        "mistral-7b-instruct-v0.2-classification",
        "mistral-7b-instruct-v0.2-multiple-choice",
    ]
    other = load_checkpoint(str(of_the_papers_shape(tmp_path / "Mistral-7B-Instruct-v0.3", "mistral")))
    assert other.identity == named.identity
    assert find_recipes(other.identity, other.names) == []
    named_by_the_user = resolved(other, CalibrationRequest(calibrations=("mistral-7b-instruct-v0.2-multiple-choice",)))
    assert named_by_the_user is not None


def test_the_shipped_recipes_are_as_act_export_writes_them():
    recipes = shipped_recipes()
    assert set(PUBLISHED) | {"smollm2-135m"} <= set(names(recipes))
    for recipe in recipes:
        assert recipe.calibration.to_json() == recipe.path.read_text(encoding="utf-8"), recipe.name
        assert recipe.calibration.model is not None, recipe.name
        recipe.calibration.check_fits(recipe.calibration.model)
        assert recipe.tasks, recipe.name


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_published_recipes_say_where_they_are_from(name):
    recipe = named_recipe(name)
    assert recipe is not None
    heads, first, last = PUBLISHED[name]
    calibration = recipe.calibration
    assert (calibration.num_calibrated_heads, min(calibration.heads), max(calibration.heads)) == (heads, first, last)
    assert (calibration.beta, calibration.threshold, calibration.threshold_mode) == (0.4, 0.1, "absolute")
    assert calibration.model is not None
    assert calibration.model.fingerprint is None
    origin = calibration.provenance
    assert origin is not None
    assert set(origin.source) == {"paper", "repository", "commit"}
    assert (origin.method, origin.plain_accuracy, origin.calibrated_accuracy) == ("published", None, None)
    assert len(recipe.tasks) == (9 if "classification" in name else 7)


def test_no_recipe_for_an_unknown_model():
    assert find_recipes(IDENTITY, ["tiny"]) == []
    assert tiny_model().config.model_type == IDENTITY.architecture


MINE, OTHER = ModelIdentity("llama", 2, 4, "a" * 64), ModelIdentity("llama", 2, 4, "b" * 64)
BEYOND = {"control": "label prior", "accuracy": 0.74, "gain": 0.02, "interval_95": [-0.03, 0.07]}


def found(model: ModelIdentity | None = MINE, **notes: object) -> Calibration:
    origin = Provenance("gates", ("sst2", "mine.jsonl"), {"report": 240}, 0, 0.613, 0.762, notes=notes)
    return Calibration({0: (1,)}, model=model, provenance=origin)


@pytest.mark.parametrize(
    ("calibration", "model", "dtype", "measured"),
    [
        (found(), MINE, "float32", True),
        (found(), MINE, "bfloat16", True),
        (found(), OTHER, "float32", False),
        (found(), replace(MINE, fingerprint=None), "float32", False),
        (found(replace(MINE, fingerprint=None)), replace(MINE, fingerprint=None), "float32", False),
        (found(None), MINE, "float32", False),
        (found(), None, "float32", False),
        (found(), MINE, "int4", False),
        (found(weights="int4"), MINE, "int4", True),
        (found(weights="int4 of m.onnx"), MINE, "int4", True),
        (found(weights="int8"), MINE, "int4", False),
        (found(weights="int4"), MINE, "float32", False),
    ],
)
def test_accuracies_are_said_of_the_weights_that_they_are_of(calibration, model, dtype, measured):
    (line,) = list(describe_calibrations(CalibrationSet.of(calibration), model, dtype))
    assert ("held-out accuracy 61.3% plain, 76.2% calibrated" in line) == measured
    assert ("found on other weights, unmeasured here" in line) == (not measured)
    assert ("act-export eval FILE --task sst2 --data mine.jsonl" in line) == (not measured)
    assert line.count("%") == (2 if measured else 0)


@pytest.mark.parametrize(
    ("notes", "said"),
    [
        ({"gain_beyond_control": BEYOND}, "beyond the best control, 'label prior': +2.0 points (-3.0 to +7.0)"),
        (
            {
                "gain_beyond_control": BEYOND,
                "gain_with_remedy_on_both": {"control": "label prior", "gain": 0.03, "interval_95": [0.01, 0.05]},
            },
            "+2.0 points (-3.0 to +7.0), with that remedy on both: +3.0 (+1.0 to +5.0)",
        ),
        ({"gain_beyond_control": BEYOND, "gain_with_remedy_on_both": {"control": "plain", "gain": 0.03}}, "to +7.0)"),
        ({"average_gain_beyond_controls": {"gain": 0.1}}, "beyond the best controls: +10.0 points"),
        ({"controls": {"without_choice_bias": {"plain": 0.75, "calibrated": 0.77}}}, "taken off both: +2.0 points"),
        ({"gain_beyond_control": "much", "controls": 3}, None),
        ({}, None),
    ],
)
def test_what_a_gain_is_beyond_the_best_control_stands_beside_it(notes, said):
    line = describe_calibration(found(**notes), measured=True)
    assert said is None or line.endswith(said)
    assert ("points" in line) == (said is not None)
    assert "points" not in describe_calibration(found(**notes), measured=False)
