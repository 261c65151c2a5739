"""MODEL by its hub id, against a hub on this machine; huggingface_hub's own code runs throughout."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
from fake_hub import TOKEN, FakeHub, Repository, in_place_of_the_hub, use_endpoint
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from tiny import CALIBRATION, save_checkpoint, tiny_model, tiny_tokenizer

from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.file import Calibration, CalibrationError
from act_export.checkpoint.hub import HubId, is_on_hub
from act_export.checkpoint.load import Checkpoint, load_checkpoint
from act_export.checkpoint.tokenizer import load_tokenizer_of
from act_export.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub, and an empty cache for what comes from it."""
    with in_place_of_the_hub(monkeypatch, tmp_path) as running:
        yield running


@pytest.fixture
def served(hub, checkpoint_folder) -> FakeHub:
    """The hub with a tiny model, owner/name."""
    hub.repositories["owner/name"] = Repository({"main": checkpoint_folder})
    return hub


@pytest.fixture
def own(hub, checkpoint_folder, tmp_path) -> Path:
    """Files of owner/name, to change."""
    folder = shutil.copytree(checkpoint_folder, tmp_path / "own")
    hub.repositories["owner/name"] = Repository({"main": folder})
    return folder


@pytest.fixture
def offline(monkeypatch):
    """Call it, and the hub may not be asked any more."""
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def cut_off(monkeypatch):
    """Call it, and nothing listens where the hub was."""

    def cut() -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            use_endpoint(monkeypatch, f"http://127.0.0.1:{free.getsockname()[1]}")

    return cut


def message_of(source: str = "owner/name", **options: object) -> str:
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(source, **options)
    assert "\n" not in str(raised.value)
    assert TOKEN not in str(raised.value)
    return str(raised.value)


def test_a_model(served, checkpoint_folder):
    loaded = load_checkpoint("owner/name")
    assert loaded.name == "owner/name"
    assert loaded.names == ("owner/name",)
    assert loaded.revision == served.repositories["owner/name"].commit("main")
    assert loaded.identity == load_checkpoint(str(checkpoint_folder)).identity
    assert loaded.tokenizer("ab").input_ids == load_tokenizer_of(str(checkpoint_folder))("ab").input_ids


def test_only_what_is_needed_is_downloaded(hub, own):
    for name in (
        "pytorch_model.bin",
        "README.md",
        "model-q4.gguf",
        "modeling_own.py",
        "onnx/model.onnx",
        "a/config.json",
    ):
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).write_bytes(b"not needed")
    load_checkpoint("owner/name")
    needed = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert set(hub.downloaded()) == needed
    assert len(hub.downloaded()) == len(needed)
    assert hub.downloaded()[-1] == "model.safetensors"


def test_the_tokenizer_alone(served):
    assert load_tokenizer_of("owner/name")("ab").input_ids
    assert "model.safetensors" not in served.downloaded()


def test_what_is_cached_is_not_downloaded_again(served):
    load_checkpoint("owner/name")
    served.requests.clear()
    load_checkpoint("owner/name")
    assert served.downloaded() == []
    served.requests.clear()
    load_checkpoint("owner/name", revision=served.repositories["owner/name"].commit("main"))
    assert served.requests == []


def test_another_cache_folder(served, tmp_path):
    loaded = load_checkpoint("owner/name", cache_dir=tmp_path / "elsewhere")
    place = tmp_path / "elsewhere" / "models--owner--name" / "snapshots" / loaded.revision
    assert (place / "model.safetensors").is_file()
    assert not (tmp_path / "cache").exists()
    from_folder = load_checkpoint(str(place))
    assert (from_folder.revision, from_folder.names) == (loaded.revision, (loaded.revision, "owner/name"))


@pytest.mark.parametrize("given_as", ["revision", "at"])
@pytest.mark.parametrize("revision", ["v1", "refs/pr/3", "commit"])
def test_a_revision(hub, checkpoint_folder, tmp_path, revision, given_as):
    other = save_checkpoint(tmp_path / "other", seed=7)
    repository = Repository({"main": checkpoint_folder, "v1": other, "refs/pr/3": other})
    hub.repositories["owner/name"] = repository
    asked = repository.commit("v1") if revision == "commit" else revision
    loaded = (
        load_checkpoint(f"owner/name@{asked}") if given_as == "at" else load_checkpoint("owner/name", revision=asked)
    )
    assert loaded.revision == repository.commit(asked)
    assert loaded.name == "owner/name"
    assert loaded.identity == load_checkpoint(str(other)).identity
    assert loaded.identity != load_checkpoint("owner/name").identity


def test_revisions_that_disagree(served):
    assert "owner/name@v1 names one revision, and 'v2' is asked for" in message_of("owner/name@v1", revision="v2")
    assert "revision of owner/name is empty" in message_of("owner/name@")
    assert served.requests == []


def test_a_revision_of_what_has_none(checkpoint_folder):
    for source in (str(checkpoint_folder), "smollm2-135m"):
        assert f"revision is 'v1', but {source} is no hub id" in message_of(source, revision="v1")


_WORDS = st.text("aB3_.-", min_size=1, max_size=9).map(lambda word: f"a{word}z")


@given(_WORDS, _WORDS, st.none() | st.text("aB3_.-/@", min_size=1, max_size=9))
def test_a_hub_id_is_read_as_it_is_written(owner, name, revision):
    written = HubId(f"{owner}/{name}", revision)
    assert HubId.parse(str(written)) == written


@pytest.mark.parametrize(
    "source", ["name", "a/b/c", "/a/b", "./a", "~/a", "a/", "/a", "a/b.gguf", "", "@main", "smollm2-135m"]
)
def test_no_hub_id(source):
    assert HubId.parse(source) is None


def test_a_folder_goes_before_the_hub(monkeypatch, tmp_path, checkpoint_folder):
    shutil.copytree(checkpoint_folder, tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert not is_on_hub("owner/name")
    assert load_checkpoint("owner/name").revision == ""


def test_shards(hub, own, monkeypatch):
    expected = load_checkpoint(str(own)).identity
    (own / "model.safetensors").unlink()
    tiny_model().save_pretrained(own, max_shard_size="40KB")
    shards = {path.name for path in own.glob("model-*.safetensors")}
    assert len(shards) > 1
    assert load_checkpoint("owner/name").identity == expected
    assert shards <= set(hub.downloaded())


def test_a_shard_that_is_missing(hub, own):
    (own / "model.safetensors").unlink()
    tiny_model().save_pretrained(own, max_shard_size="40KB")
    shard = sorted(own.glob("model-*.safetensors"))[-1]
    shard.unlink()
    assert f"owner/name lacks {shard.name}, which the index of its weights names" in message_of()


def test_weights_of_pickle_alone(hub, own):
    import torch

    (own / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), own / "pytorch_model.bin")
    assert load_checkpoint("owner/name").identity.num_layers == 2
    assert "pytorch_model.bin" in hub.downloaded()


def test_a_download_that_breaks_off_goes_on(served, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    served.breaks_after = 50_000
    assert load_checkpoint("owner/name").identity.num_layers == 2
    assert served.ranges == ["bytes=50000-"]


@pytest.mark.parametrize("token", [TOKEN, None])
def test_no_such_model(hub, monkeypatch, token):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    message = message_of("owner/nothing")
    assert "there is no model owner/nothing on the hub, nor a folder of that name; check the spelling" in message
    assert ("hf auth login" in message) == (token is None)


@pytest.mark.parametrize("source", ["owner/name@v9", f"owner/name@{COMMIT}"])
def test_no_such_revision(served, source):
    assert f"owner/name has no revision '{source.partition('@')[2]}'; give a branch, a tag or" in message_of(source)


@pytest.mark.parametrize("source", ["owner/na me", "owner/na--me", "owner/name:x"])
def test_what_can_be_no_hub_id(served, source):
    assert f"'{source}' is no hub id (owner/name)" in message_of(source)
    assert served.requests == []


@pytest.mark.parametrize("access", ["gated", "private"])
@pytest.mark.parametrize("way", ["HF_TOKEN", "log in", "argument"])
def test_a_model_that_wants_a_token(served, monkeypatch, tmp_path, access, way):
    served.repositories["owner/name"].access = access
    said = {"gated": "owner/name is gated: ask for access at http", "private": "or it is private: then log in with"}
    message = message_of()
    assert said[access] in message
    assert "`hf auth login`, or set HF_TOKEN" in message
    assert "model.safetensors" not in served.downloaded()
    if way == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    elif way == "log in":
        (tmp_path / "token").write_text(TOKEN)
    assert said[access] in message_of(token=False)
    assert served.tokens == set()
    assert load_checkpoint("owner/name", token=TOKEN if way == "argument" else None).identity.num_layers == 2
    assert served.tokens == {TOKEN}


def test_a_token_that_is_not_valid(served, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    message = message_of()
    assert "refuses owner/name with the token in use: the token is invalid" in message
    assert "hf_expired" not in message


def test_a_hub_that_fails(served, monkeypatch):
    served.status = 403
    assert f"the hub {constants.ENDPOINT} answers 403 for owner/name; try again later" in message_of()


def test_offline_and_not_cached(hub, offline, tmp_path):
    offline()
    message = message_of()
    assert f"owner/name isn't in the cache {tmp_path / 'cache'}, or not whole, and HF_HUB_OFFLINE forbids" in message
    assert hub.requests == []


@pytest.mark.parametrize("revision", ["", "@main", "@commit"])
def test_offline_and_cached(served, offline, revision):
    loaded = load_checkpoint("owner/name")
    offline()
    served.requests.clear()
    again = load_checkpoint("owner/name" + revision.replace("commit", loaded.revision))
    assert (again.revision, again.identity) == (loaded.revision, loaded.identity)
    assert again.tokenizer is not None
    assert served.requests == []


def test_offline_and_only_the_tokenizer_cached(served, offline):
    load_tokenizer_of("owner/name")
    offline()
    assert "or not whole, and HF_HUB_OFFLINE forbids" in message_of()


def test_a_cache_that_another_tool_filled(hub, offline, checkpoint_folder, tmp_path):
    """As the hub's client lays it out, without any record of which files there are."""
    model = tmp_path / "cache" / "models--owner--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    (model / "blobs").mkdir()
    (model / "snapshots" / COMMIT).mkdir(parents=True)
    for number, file in enumerate(sorted(checkpoint_folder.iterdir())):
        shutil.copy(file, model / "blobs" / str(number))
        (model / "snapshots" / COMMIT / file.name).symlink_to(Path("../../blobs") / str(number))
    offline()
    loaded = load_checkpoint("owner/name")
    assert (loaded.revision, loaded.names) == (COMMIT, ("owner/name",))
    assert loaded.identity == load_checkpoint(str(checkpoint_folder)).identity


def test_no_network(hub, cut_off, tmp_path):
    cut_off()
    message = message_of()
    assert f"can't reach the hub {constants.ENDPOINT} for owner/name, and it isn't in the cache" in message
    assert "refused" in message


def test_no_network_but_cached(served, cut_off):
    loaded = load_checkpoint("owner/name")
    cut_off()
    assert load_checkpoint("owner/name").revision == loaded.revision


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model-q4.gguf", "model-q4.gguf: get one file with `hf download owner/name model-q4.gguf` and pass the path"),
        ("onnx/model.onnx", "onnx/model.onnx: it is exported already: get it with `hf download owner/name`"),
        ("README.md", "it isn't a checkpoint of transformers; it has README.md"),
        ("", "it has no files"),
    ],
)
def test_a_repository_without_a_configuration(hub, tmp_path, file, said):
    folder = tmp_path / "own"
    folder.mkdir()
    if file:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()
    hub.repositories["owner/name"] = Repository({"main": folder})
    assert said in message_of()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "is quantized (awq, 4 bits)"),
        ({"model_type": "no_such_model"}, "'no_such_model', which transformers"),
        ({"model_type": "distilbert"}, "doesn't know as a causal language model"),
        ({"model_type": "t5"}, "only decoder-only models can be calibrated"),
        ({"architectures": ["BertForMaskedLM"]}, "is no causal language model"),
        ({"auto_map": {"AutoConfig": "configuration_own.C"}, "model_type": "own"}, "needs code of its own"),
    ],
)
def test_what_can_not_be_used_is_refused_before_its_weights_come(hub, own, change, said):
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, **change}))
    assert said in message_of()
    assert "model.safetensors" not in hub.downloaded()


def test_an_adapter(hub, own):
    (own / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}')
    (own / "config.json").unlink()
    assert "is an adapter (LORA, adapter_config.json) for owner/base; merge it" in message_of()


def test_weights_in_another_format(hub, own):
    (own / "model.safetensors").rename(own / "weights.pt")
    assert "weights.pt: load it in PyTorch" in message_of()


def test_a_tokenizer_that_transformers_knows_by_its_hub_id(hub, own):
    """Its configuration names another class, which is known to be wrong for models of this name."""
    settings = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "GPT2Tokenizer"}))
    hub.repositories["deepseek-ai/deepseek-coder-tiny"] = hub.repositories["owner/name"]
    assert type(load_tokenizer_of("owner/name")).__name__ == "GPT2Tokenizer"
    assert type(load_checkpoint("deepseek-ai/deepseek-coder-tiny").tokenizer).__name__ == "TokenizersBackend"


def test_what_searches_profiles_and_files_record(served, tiny_file, tmp_path):
    import onnx

    from act_export.export.metadata import metadata
    from act_export.onnx_file.inspect import inspect_file
    from act_export.runtime import Session
    from act_export.runtime.text import load_tokenizer
    from act_export.search.provenance import hub_model

    loaded: Checkpoint = load_checkpoint("owner/name")
    assert hub_model(loaded) == {"name": "owner/name", "revision": loaded.revision}
    file = Path(shutil.copy(tiny_file, tmp_path))
    shutil.copy(f"{tiny_file}.data", tmp_path)
    model = onnx.load(file, load_external_data=False)
    onnx.helper.set_model_props(model, metadata(CalibrationSet.of(CALIBRATION), loaded, loaded.name))
    onnx.save(model, file)
    assert inspect_file(file).revision == loaded.revision
    served.repositories["owner/name"].revisions["main"] = tmp_path  # whatever comes later, the file's commit counts
    served.requests.clear()
    with Session.open(file) as session:
        assert load_tokenizer(session)("ab").input_ids == tiny_tokenizer()("ab").input_ids
    assert served.requests == []


def test_a_model_that_is_not_from_the_hub_records_no_revision(tiny):
    from act_export.export.metadata import metadata
    from act_export.search.provenance import hub_model

    assert hub_model(tiny) == {}
    assert "act_export.revision" not in metadata(CalibrationSet.of(None), tiny, "tiny")


def test_a_calibration_that_isnt_for_the_model_is_refused_before_weights_are_fetched(served):
    with pytest.raises(CalibrationError, match="head 4 of layer 0 is out of range"):
        load_checkpoint("owner/name", fits=[Calibration({0: (4,)})])
    assert any("config.json" in request for request in served.requests)
    assert not any("safetensors" in request and request.startswith("GET") for request in served.requests)
