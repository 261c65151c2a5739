"""What a checkpoint's small files may ask for: no time, memory, code or file that they have no say over."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny import save_checkpoint, tiny_model
from tiny_vision import tiny_whole

from act_export.checkpoint.dry_run import empty_model
from act_export.checkpoint.load import load_checkpoint
from act_export.checkpoint.small_files import check_small_files
from act_export.checkpoint.stored.safetensors_file import StoredTensor
from act_export.checkpoint.tokenizer import load_tokenizer_of
from act_export.errors import CheckpointError

BILLION = 10**9
SECONDS = 20  # on a machine with much else to do; without the check it is hours, or all memory


@pytest.fixture
def folder(checkpoint_folder, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint_folder, tmp_path / "checkpoint"))


def change_config(folder: Path, settings: dict, part: str | None = None) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config if part is None else config[part]).update(settings)
    path.write_text(json.dumps(config))


def refused(folder: Path, said: str, stream: bool = False) -> None:
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=said) as error:
        load_checkpoint(str(folder), stream=stream)
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < SECONDS


COUNTS = [
    ("llama", {"num_hidden_layers": BILLION}, "num_hidden_layers 1000000000; more than 100000"),
    ("llama", {"num_hidden_layers": 90_000}, r"more than \d+ weights \(num_hidden_layers: 90000\), but"),
    ("llama", {"num_labels": BILLION}, "num_labels 1000000000"),
    ("llama", {"first_k_dense_replace": BILLION}, "first_k_dense_replace 1000000000"),
    ("llama", {"num_attention_heads": BILLION}, "num_attention_heads 1000000000"),
    ("llama", {"vocab_size": 10**12}, r"\[1000000000000, 32\] \(vocab_size: 1000000000000"),
    ("llama", {"hidden_size": BILLION}, "hidden_size: 1000000000"),
    ("llama", {"intermediate_size": 10**15}, "intermediate_size: 1000000000000000"),
    ("llama", {"head_dim": 10**12}, r"a weight of Linear, weight, has shape \[4000000000000, 32\]"),
    ("gemma2", {"num_hidden_layers": BILLION, "layer_types": None}, "num_hidden_layers 1000000000"),
    ("gpt_neo", {"attention_types": [[["global", "local"], BILLION]]}, "attention_types 1000000000"),
    ("gpt2", {"n_positions": 200_000}, r"\[200000, 32\] \(n_positions: 200000"),
    ("gptj", {"n_positions": BILLION}, "a table .* for embed_positions in .*n_positions: 1000000000"),
    ("mpt", {"max_seq_len": BILLION}, "a table .*max_seq_len: 1000000000"),
    ("mixtral", {"num_local_experts": BILLION}, "num_local_experts 1000000000"),
    ("mixtral", {"num_local_experts": 90_000}, "num_local_experts: 90000"),
    ("mixtral", {"num_local_experts": 5}, r"shape \[4, 32\], but .* \[5, 32\] \(num_local_experts: 5\)"),
]


@pytest.mark.parametrize(("architecture", "settings", "said"), COUNTS, ids=lambda each: str(each)[:60])
def test_counts_without_measure(tmp_path, architecture, settings, said):
    tiny_model(architecture).save_pretrained(tmp_path)
    change_config(tmp_path, settings)
    refused(tmp_path, said)
    refused(tmp_path, said, stream=True)


def test_counts_in_a_text_tower(tmp_path):
    tiny_whole().save_pretrained(tmp_path)
    change_config(tmp_path, {"num_hidden_layers": BILLION}, "text_config")
    refused(tmp_path, r"text_config\.num_hidden_layers 1000000000")


LARGE = {
    "max_position_embeddings": 10**12,
    "sliding_window": 2**31,
    "created_at": 1714000000,
    "sampling_rate": 192000,
    "train_rows": 1000000,
    "eos": 151645,
}


@pytest.mark.parametrize("settings", [{name: value} for name, value in LARGE.items()], ids=list(LARGE))
def test_what_counts_nothing_may_be_large(folder, settings):
    change_config(folder, settings)
    assert load_checkpoint(str(folder)).identity.num_layers == 2


TEXTS = {
    "keys": (json.dumps({f"k{i}": i for i in range(40_000)}), r"has more than \d+ commas|has 40000 settings"),
    "levels": ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    "digits": ('{"a":' + "9" * 5_000 + "}", "a number of 5000 digits"),
    "no object": ("[1]", "no JSON object but a list"),
    "no JSON": ("{", "isn't JSON"),
}
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
    "pytorch_model.bin.index.json",
)


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("file", FILES)
def test_json_without_measure(folder, file, kind):
    if file.endswith(".index.json"):
        (folder / "model.safetensors").rename(folder / "pytorch_model-00001-of-00001.bin")
    text, said = TEXTS[kind]
    (folder / file).write_text(text)
    refused(folder, rf"{file} of .*({said}|no weight_map).*get the file anew")


def test_a_tokenizer_alone_is_looked_at_too(folder):
    (folder / "tokenizer_config.json").write_text(TEXTS["levels"][0])
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json of .* nested too deeply"):
        load_tokenizer_of(str(folder))


def test_a_tokenizer_may_list_every_token(folder):
    path = folder / "tokenizer_config.json"
    tokens = {str(n): {"content": f"<{n}>", "special": True, "lstrip": False, "rstrip": False} for n in range(150_000)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"listed": tokens}))
    check_small_files(folder, "it")


def test_files_that_nobody_reads(folder):
    (folder / "training_log.txt").symlink_to("/etc/hostname")
    (folder / "trainer_state.json").write_text("{")
    with (folder / "train.json").open("wb") as file:
        file.truncate(300 << 20)
    load_checkpoint(str(folder))


@pytest.mark.parametrize("file", ["model.safetensors.index.json", "model.safetensors", "tokenizer.json", "config.json"])
def test_pipes_arent_waited_for(folder, file):
    if file.startswith("model"):
        (folder / "model.safetensors").unlink()
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    refused(folder, rf"{file}.* no (plain )?file")


LINKED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")


@pytest.mark.parametrize("file", LINKED)
def test_links_out_of_the_folder(folder, tmp_path, file):
    outside = tmp_path / file
    if (folder / file).exists():
        (folder / file).rename(outside)
    else:
        outside.write_text("{}")
    (folder / file).symlink_to(outside)
    refused(folder, rf"{file} is a link to .*out of .*; copy the file there.*cp -rL")


def test_links_within_the_hubs_cache(checkpoint_folder, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.copytree(checkpoint_folder, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    assert load_checkpoint(str(snapshot)).revision == "0" * 40


@pytest.mark.parametrize("value", ["owner/kernel", "eager", "flash_attention_2", {"": "owner/kernel"}])
@pytest.mark.parametrize("setting", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_file_has_no_say_in_how_attention_is_computed(folder, setting, value, monkeypatch):
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", pytest.fail)
    change_config(folder, {setting: value})
    for stream in (False, True):
        assert load_checkpoint(str(folder), stream=stream).model.config._attn_implementation == "sdpa"


def test_nor_within_a_text_tower(tmp_path):
    tiny_whole().save_pretrained(tmp_path)
    for part in ("text_config", "vision_config"):
        change_config(tmp_path, {"_attn_implementation": "owner/kernel", "attn_implementation": "owner/kernel"}, part)
    assert load_checkpoint(str(tmp_path)).model.config._attn_implementation == "sdpa"


def test_nor_in_which_file_is_loaded(folder):
    change_config(folder, {"transformers_weights": "../other.safetensors", "fusion_config": {"qkv": True}})
    assert load_checkpoint(str(folder)).identity == load_checkpoint(str(folder), stream=True).identity


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_an_unknown_kind_of_rotary_embedding(tmp_path, key):
    save_checkpoint(tmp_path, tokenizer=False)
    config = json.loads((tmp_path / "config.json").read_text()) | {key: {"rope_type": "su", "factor": 2.0}}
    if key == "rope_scaling":
        del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, r"rope_type 'su', which transformers \S+ doesn't know in llama models; .*longrope")


def test_other_threads_build_what_they_like(folder):
    """While a model is tried out, one that is far larger than its files is built beside it."""
    built = []

    class Loader:
        @staticmethod
        def from_config(config, **_):
            other = threading.Thread(target=lambda: built.append(torch.nn.Linear(1000, 100)))
            other.start()
            other.join()
            return torch.nn.Linear(1, 1)

    config = tiny_model("llama").config
    tensors = {"weight": StoredTensor(folder, "weight", "F32", (2,), 0, 8)}
    empty_model(config, Loader, tensors, "it")
    assert len(built) == 1
