"""Vision-language models: the text tower alone, and the calibrated tower with a real image against the whole model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from close import assert_logits_close
from tiny import CALIBRATION, tiny_tokenizer
from tiny_vision import CONFIGURATIONS, IMAGE_TOKEN, compare_with_whole, tiny_whole, tower_checkpoint
from transformers import Qwen2VLConfig
from typer.testing import CliRunner

import act_export
from act_export.attention.hook import attention_hook, check_supported
from act_export.attention.reference_attention import ReferenceAttention
from act_export.checkpoint.load import load_checkpoint
from act_export.checkpoint.text_tower import IMAGES_AS_EMBEDDINGS, check_takes_embeddings, one_rotation, text_tower
from act_export.commands.main import app
from act_export.errors import ActExportError, CheckpointError, SessionError
from act_export.export import build_model
from act_export.export.embedding import write_embedding
from act_export.export.job import export_model
from act_export.onnx_file.inspect import inspect_file
from act_export.runtime import Session, generate
from act_export.verify.parity.job import verify_file

LARGEST_DIFFERENCE = 1e-4  # of a logit
PAGE = (Path(act_export.__file__).parent / "docs" / "vision.md").read_text(encoding="utf-8")


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def whole():
    return tiny_whole()


@pytest.fixture(scope="module")
def folder(whole, tmp_path_factory):
    """The tower of Qwen2-VL that takes embeddings, verified."""
    out = tmp_path_factory.mktemp("vision") / "tower"
    written = export_model(tower_checkpoint(whole), CALIBRATION, out, inputs_embeds=True)
    assert max(engine.max_difference for engine in written.parity.engines) < 1e-4
    cases = [result.case for result in written.parity.engines[0].results]
    assert "embeddings of no token" in cases
    return out


@pytest.fixture(scope="module")
def checkpoint_folder_with_vision(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen2_vl")
    tiny_whole().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_the_text_tower_computes_what_the_whole_does(family):
    whole = tiny_whole(family)
    tower = tower_checkpoint(whole).model
    check_supported(tower)
    ids = torch.randint(3, 240, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=mask).logits
        with attention_hook(tower, ReferenceAttention(None)) as hooked:
            assert_logits_close(hooked(ids, mask).logits, expected, 2e-5)


def check_images(whole, session) -> None:
    found = compare_with_whole(whole, tower_checkpoint(whole).model, session, CALIBRATION)
    assert found.by_calibration > 0.1
    assert max(found.prompt, found.decode) < LARGEST_DIFFERENCE


@pytest.mark.parametrize("native", [True, False], ids=["native", "portable"])
def test_images_in_the_calibrated_tower(whole, folder, native):
    with Session.open(folder, native=native) as session:
        check_images(whole, session)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_images_in_other_families(family, tmp_path):
    """llava: positions of one axis, and images that are so many tokens wherever they stand."""
    whole = tiny_whole(family)
    checkpoint = tower_checkpoint(whole)
    build_model(checkpoint, CALIBRATION, tmp_path / "model.onnx", inputs_embeds=True)
    write_embedding(checkpoint, tmp_path / "embedding.onnx")
    with Session.open(tmp_path) as session:
        check_images(whole, session)


def test_the_rotation_of_the_graph_is_that_of_transformers(whole):
    tower = text_tower(whole, "tiny")
    rotary = tower.model.rotary_emb
    places = torch.randint(0, 200, (3, 2, 9), generator=torch.Generator().manual_seed(2))
    x = torch.zeros(())
    expected = rotary(x, places), rotary(x, places[:1])
    with one_rotation(tower):
        found = rotary(x, places), rotary(x, places[:1])
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert "forward" not in vars(rotary)


def test_the_graph_has_one_rotation_for_all_layers(folder):
    found = json.loads(run("inspect", folder, "--json").stdout)
    assert found["family"] == "qwen2_vl"
    assert (found["embedding_size"], found["position_axes"]) == (32, 3)
    assert found["nodes"] <= 20 * 2 + 14
    shown = run("inspect", folder).output
    assert "for the text of a qwen2_vl model" in shown
    assert "embeddings of width 32" in shown


def test_ids_and_embeddings_are_told_apart(whole, folder, tmp_path):
    text, mask = np.array([[5, 6, 7]]), np.ones((1, 3), np.int64)
    placeholder = np.array([[5, IMAGE_TOKEN, 7]])
    with Session.open(folder) as session:
        embeddings = session.embed(text)
        np.testing.assert_array_equal(session.run(text, mask).logits, session.run(embeddings, mask).logits)
        np.testing.assert_array_equal(session.embed(placeholder)[:, 0], embeddings[:, 0])
        with pytest.raises(SessionError, match=r"token 250 stands for an image.*session.embed"):
            session.run(placeholder, mask)
        with pytest.raises(SessionError, match=r"takes embeddings \(batch, sequence, 32\).*\(1, 3, 31\)"):
            session.run(embeddings[..., 1:], mask)
        with pytest.raises(SessionError, match="token 259 is not in the vocabulary"):
            session.embed(text + 252)
        with pytest.raises(SessionError, match=r"position_ids has shape \(2, 1, 3\)"):
            session.run(embeddings, mask, None, np.zeros((2, 1, 3), np.int64))
        cache = session.allocate(1)
        with pytest.raises(SessionError, match=r"position_ids has shape \(3, 1, 2\); its last two must be \(1, 3\)"):
            cache.step(embeddings, position_ids=np.zeros((3, 1, 2), np.int64))
        assert cache.step(embeddings).shape == (1, 1, 259)
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(folder / name, tmp_path)
    with Session.open(tmp_path) as alone:
        np.testing.assert_array_equal(alone.run(embeddings, mask).logits.shape, (1, 3, 259))
        with pytest.raises(SessionError, match=r"these are token ids; there is no embedding\.onnx beside it"):
            alone.run(text, mask)
    report = verify_file(tmp_path / "model.onnx", tower_checkpoint(whole), CALIBRATION)  # by the model's embedding
    assert report.passed


def test_positions_go_on_after_the_largest(folder):
    """After an image and in chunks, as if each step were given its own."""
    random = np.random.default_rng(0)
    embeddings = random.normal(size=(2, 6, 32)).astype(np.float32)
    mask = np.array([[0, 0, 1, 1, 1, 1], [1] * 6])
    places = np.where(mask, random.integers(0, 40, (3, 2, 6)), 0)
    following = np.array([[5, 6], [7, 8]])
    largest = places.max((0, 2))[:, None]
    with Session.open(folder) as session:
        cache = session.allocate(2, capacity=3)
        for part in (slice(0, 3), slice(3, 6)):
            cache.step(embeddings[:, part], mask[:, part], position_ids=places[..., part])
        ours = cache.step(following, logits_to_keep=0)
        first = session.run(embeddings[:, :3], mask[:, :3], None, places[..., :3])
        second = session.run(embeddings[:, 3:], mask, first.state, places[..., 3:])
        whole_mask = np.concatenate([mask, np.ones((2, 2), np.int64)], 1)
        theirs = session.run(following, whole_mask, second.state, largest + np.array([1, 2]))
        assert_logits_close(ours, theirs.logits, 1e-5)
        assert np.abs(ours - session.run(following, whole_mask, second.state).logits).max() > 0.1
        assert cache.next_positions.tolist() == (largest[:, 0] + 3).tolist()
        cache.reset()
        assert cache.next_positions.tolist() == [0, 0]


def test_generation_looks_tokens_up(whole, folder):
    checkpoint = tower_checkpoint(whole)
    prompts = [[5, 6, 7, 8], [9, 10]]
    with Session.open(folder) as session:
        answers = generate(session, prompts, max_new_tokens=5)
        with attention_hook(checkpoint.model, ReferenceAttention(CALIBRATION)) as hooked, torch.no_grad():
            ids = torch.tensor([prompts[0] + answers[0][:-1]])
            first = hooked(torch.tensor(prompts[:1]), torch.ones(1, 4, dtype=torch.long))
            following = hooked(ids[:, 4:], torch.ones_like(ids), first.state, one_at_a_time=True)
            expected = torch.cat([first.logits[0, -1:], following.logits[0]]).argmax(-1).tolist()
        assert answers[0] == expected
        with pytest.raises(SessionError, match="stands for an image"):
            generate(session, [[5, IMAGE_TOKEN]], max_new_tokens=1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int4"])
def test_other_types(whole, dtype, tmp_path):
    written = export_model(tower_checkpoint(whole), CALIBRATION, tmp_path / "out", inputs_embeds=True, dtype=dtype)
    assert written.parity.passed
    assert inspect_file(tmp_path / "out").precision == dtype


@pytest.mark.in_turn(2)
def test_on_the_command_line(checkpoint_folder_with_vision, tmp_path):
    out, heads = tmp_path / "out", tmp_path / "heads.json"
    heads.write_text(json.dumps(CALIBRATION.heads))
    options = ("--calibration", heads, "--inputs-embeds", "--no-verify")
    result = run(checkpoint_folder_with_vision, "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out / "model.onnx")
    assert {"embedding.onnx", "embedding.onnx.data", "model.onnx", "tokenizer.json"} <= {p.name for p in out.iterdir()}
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["image_token_id"]) == ("qwen2_vl", IMAGE_TOKEN)
    assert run("generate", out, "One light", "--max-new-tokens", 3).exit_code == 0
    # The same folder again, for text: nothing of the first export stays.
    result = run(checkpoint_folder_with_vision, "--out", out, "--plain")
    assert result.exit_code == 0, result.output
    assert not (out / "embedding.onnx").exists()
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen2_vl_text"
    assert run("generate", out, "One light", "--max-new-tokens", 3).exit_code == 0
    with Session.open(out) as session, pytest.raises(SessionError, match=r"text alone.*--inputs-embeds"):
        session.run(np.array([[5, IMAGE_TOKEN]]), np.ones((1, 2), np.int64))
    with Session.open(out) as session, pytest.raises(SessionError, match=r"takes token ids.*float32.*--inputs-embeds"):
        session.run(np.zeros((1, 2, 32), np.float32), np.ones((1, 2), np.int64))


def test_identity_is_of_the_tower(checkpoint_folder_with_vision, whole):
    loaded = load_checkpoint(str(checkpoint_folder_with_vision))
    assert loaded.identity == tower_checkpoint(whole).identity
    assert (loaded.identity.architecture, loaded.identity.num_layers) == ("qwen2_vl_text", 2)
    assert not any("visual" in name for name, _ in loaded.model.named_parameters())


def test_a_configuration_without_its_vision_encoder(checkpoint_folder_with_vision, tmp_path):
    for path in checkpoint_folder_with_vision.iterdir():
        shutil.copy(path, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ActExportError, match=r"qwen2_vl model, has no vision_config; copy the config\.json"):
        load_checkpoint(str(tmp_path))


def test_families_whose_images_need_more_than_embeddings(tmp_path):
    tower = tower_checkpoint(tiny_whole("gemma3"))
    with pytest.raises(
        ActExportError, match=r"gemma3 models: tokens of an image attend to each other in both directions"
    ):
        build_model(tower, None, tmp_path / "m.onnx", inputs_embeds=True)
    with pytest.raises(ActExportError, match="it isn't known that images reach it"):
        check_takes_embeddings(tower_checkpoint(tiny_whole("idefics3")).model)
    assert not list(tmp_path.iterdir())


def test_a_tower_that_computes_something_else(whole, monkeypatch):
    monkeypatch.setattr(whole, "forward", scaled(whole.forward))
    with pytest.raises(ActExportError, match=r"computes other logits than the whole model does, by 5\.0e-01"):
        text_tower(whole, "tiny")


def scaled(forward):
    def run(*arguments, **others):
        outputs = forward(*arguments, **others)
        outputs.logits = 2 * outputs.logits
        return outputs

    return run


def test_a_model_without_a_tower():
    with pytest.raises(ActExportError, match="has no language_model or text_model"):
        text_tower(tower_checkpoint(tiny_whole()).model, "tiny")


@pytest.mark.slow
def test_a_plain_language_model_takes_embeddings_too(tiny, tiny_file, tmp_path):
    build_model(tiny, CALIBRATION, tmp_path / "model.onnx", inputs_embeds=True)
    assert inspect_file(tmp_path).position_axes == 1
    ids, mask = np.array([[5, 6, 7, 8]]), np.ones((1, 4), np.int64)
    with torch.no_grad():
        embeddings = tiny.model.get_input_embeddings()(torch.from_numpy(ids)).numpy()
    with Session.open(tiny_file) as takes_ids, Session.open(tmp_path) as session:
        expected = takes_ids.run(ids, mask).logits
        assert_logits_close(session.run(embeddings, mask).logits, expected, 1e-5)


def test_a_checkpoint_of_a_text_tower_alone(tmp_path):
    Qwen2VLConfig(**CONFIGURATIONS["qwen2_vl"]).text_config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        load_checkpoint(str(tmp_path))


@pytest.mark.slow
def test_bench_and_graft_take_such_files(whole, folder, tmp_path):
    result = run("bench", folder, "--prompt-tokens", 16, "--new-tokens", 4, "--rounds", 1)
    assert result.exit_code == 0, result.output
    plain = tmp_path / "plain"
    export_model(tower_checkpoint(whole), None, plain, inputs_embeds=True, verify=False)
    (tmp_path / "heads.json").write_text(CALIBRATION.to_json())
    result = run("graft", plain, "--calibration", tmp_path / "heads.json", "--out", tmp_path / "graft")
    assert result.exit_code == 0, result.output
    ids, mask = np.array([[5, 6, 7]]), np.ones((1, 3), np.int64)
    with Session.open(tmp_path / "graft") as graft, Session.open(folder) as session:
        assert_logits_close(graft.run(ids, mask).logits, session.run(ids, mask).logits, 1e-5)


def test_the_program_of_the_page(checkpoint_folder_with_vision, folder, tmp_path, monkeypatch, capsys):
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "CHECKPOINT").symlink_to(checkpoint_folder_with_vision)
    (tmp_path / "tower").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert capsys.readouterr().out.strip("\n")


def test_the_tables_of_the_page_name_every_family():
    families, numbers = PAGE.split("## Numbers")
    for family in IMAGES_AS_EMBEDDINGS:
        assert family in families
    for family in CONFIGURATIONS:
        assert f"| {family} |" in numbers
