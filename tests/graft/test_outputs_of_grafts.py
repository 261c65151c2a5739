"""Where a graft is written, and what it brings along."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest
from foreign_models import CALIBRATION, DATA, Decoder, hashes
from graft_sources import edit, refused

from act_export.calibration.file import ModelIdentity
from act_export.errors import ActExportError
from act_export.graft import StateLayout
from act_export.graft.job import graft, remove_graft
from act_export.graft.source import read_source
from act_export.onnx_file.inspect import inspect_file
from act_export.runtime import Session

ADAPTERS = ("adapters/calibrated.onnx_adapter", "adapters/plain.onnx_adapter")


def test_folders(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    refused(folder, tmp_path / "out", r"should have one ONNX model, and has none; pass the folder or file of a model")
    (folder / "model.safetensors").touch()
    refused(folder, tmp_path / "out", r"is a checkpoint, not an exported model; export it: act-export .*in --out OUT")
    (folder / "model.safetensors").unlink()
    for name in ("b.onnx", "a.onnx"):
        Decoder().save(folder / name)
    refused(folder, tmp_path / "out", r"should have one ONNX model, and has several: a\.onnx, b\.onnx; pass")
    (folder / "a.onnx").rename(folder / "model.onnx")
    assert graft(folder, CALIBRATION, tmp_path / "out").path == tmp_path / "out" / "model.onnx"
    assert set(hashes(tmp_path / "out")) == {"model.onnx", "b.onnx", "libact_ops.so", *ADAPTERS}
    assert (tmp_path / "out" / "b.onnx").read_bytes() == (folder / "b.onnx").read_bytes()


def test_the_input_is_no_output(file: Path, tmp_path: Path) -> None:
    refused(file, file, "is the input, which stays as it is")
    (tmp_path / "link.onnx").symlink_to(file)
    refused(file, tmp_path / "link.onnx", "is the input, which stays as it is")
    refused(tmp_path / "link.onnx", file, "is the input, which stays as it is")


def test_outputs_within_the_input(tmp_path: Path) -> None:
    folder = Decoder().save_folder(tmp_path / "in")
    refused(folder, folder, "is the input, which stays as it is")
    refused(folder, folder / "sub", "lies inside the input")
    refused(folder, tmp_path / "in" / ".." / "in" / "sub" / "more", "lies inside the input")
    (tmp_path / "link").symlink_to(folder)
    refused(folder, tmp_path / "link", "is the input, which stays as it is")
    refused(folder, tmp_path / "link" / "sub", "lies inside the input")


def test_an_output_around_the_input(tmp_path: Path) -> None:
    Decoder().save(tmp_path / "model.onnx")
    folder = Decoder().save_folder(tmp_path / "in")
    (folder / "in").mkdir()
    refused(folder, tmp_path, "contains the input")


def test_kinds_of_output(file: Path, tmp_path: Path) -> None:
    folder = Decoder().save_folder(tmp_path / "in")
    refused(folder, tmp_path / "out.onnx", r"is a folder, so --out must be one too; .*out\.onnx is a name of a file")
    refused(file, tmp_path / "out", r"is a file, so --out must be a name ending in \.onnx")
    refused(file, file / "out.onnx", "is no folder", ActExportError)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "letter.txt").write_text("dear")
    refused(folder, tmp_path / "others", "holds other files", ActExportError)


def test_weights_of_another_model_in_the_way(external: Path, tmp_path: Path) -> None:
    (tmp_path / DATA).write_bytes(b"another's")
    refused(external, tmp_path / "out.onnx", "is in the way of the weights")


def test_state_in_the_cache_needs_a_configuration(file: Path, tmp_path: Path) -> None:
    refused(file, tmp_path / "out.onnx", "only in a folder with genai_config.json", layout=StateLayout.CACHE_LAYERS)


@pytest.mark.parametrize("error", [OSError(28, "no space"), RuntimeError("any"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["save", "copy_content", "publish"])
def test_an_interrupted_write_leaves_nothing(
    at: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    folder = Decoder().save_folder(tmp_path / "in")
    before = hashes(tmp_path)
    module = import_module("act_export.graft.output")
    monkeypatch.setattr(onnx if at == "save" else module, at, fails)
    with pytest.raises(ActExportError if isinstance(error, OSError) else type(error)):
        graft(folder, CALIBRATION, tmp_path / "out")
    assert hashes(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_full_disk_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    folder = Decoder().save_folder(tmp_path / "in")
    refused(folder, tmp_path / "out", "has 0 MB free; the export needs", ActExportError)


def test_another_output_is_replaced(tmp_path: Path) -> None:
    folder = Decoder().save_folder(tmp_path / "in")
    for beta in (0.3, 0.6):
        graft(folder, replace(CALIBRATION, beta=beta), tmp_path / "out")
        with Session.open(tmp_path / "out") as session:
            assert session.calibration is not None
            assert session.calibration.beta == beta
    assert set(hashes(tmp_path / "out")) == {*hashes(folder), "libact_ops.so", *ADAPTERS}


def test_weights_stay_beside_a_graph_in_the_same_folder(external: Path) -> None:
    before = hashes(external.parent)
    written = graft(external, CALIBRATION, external.parent / "calibrated.onnx")
    after = hashes(external.parent)
    assert after.pop("calibrated.onnx")
    assert after == before
    with Session.open(written.path) as session:
        assert session.run(np.array([[3, 4]]), np.ones((1, 2), np.int64)).logits.shape == (1, 2, 64)


@pytest.mark.parametrize("beside", [True, False])
def test_copied_weights_are_the_graft_s_own(external: Path, tmp_path: Path, beside: bool) -> None:
    place = external.parent if beside else tmp_path / "new" / "place"
    before = hashes(external.parent)
    written = graft(external, CALIBRATION, place / "calibrated.onnx", copy_weights=True)
    assert written.files == {place / "calibrated.onnx.data": (external.parent / DATA).stat().st_size}
    removed = remove_graft(written.path, tmp_path / "again" / "model.onnx")
    assert hashes(removed.path.parent) == before
    (external.parent / DATA).unlink()
    with Session.open(written.path) as session:
        assert session.run(np.array([[3, 4]]), np.ones((1, 2), np.int64)).logits.shape == (1, 2, 64)


def test_the_files_of_a_graft_beside_its_input(external: Path) -> None:
    written = graft(external, CALIBRATION, external.parent / "calibrated.onnx")
    assert list(written.files) == [external.parent / DATA]
    assert set(inspect_file(written.path).weights) == {DATA}


def test_weights_in_a_folder_below(external: Path, tmp_path: Path) -> None:
    (external.parent / "weights").mkdir()
    (external.parent / DATA).rename(external.parent / "weights" / "all.bin")

    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "weights/all.bin"

    edit(external, change)
    assert read_source(external).data == ("weights/all.bin",)
    graft(external.parent, CALIBRATION, tmp_path / "out")
    assert set(hashes(tmp_path / "out")) == {"model.onnx", "weights/all.bin", "libact_ops.so", *ADAPTERS}
    graft(external, CALIBRATION, tmp_path / "one.onnx")
    assert (tmp_path / "weights" / "all.bin").read_bytes() == (external.parent / "weights" / "all.bin").read_bytes()


def test_the_configuration_of_optimum(file: Path, tmp_path: Path) -> None:
    """Beside a file, for the model's limits and name."""
    fields = {
        "model_type": "llama",
        "vocab_size": 64,
        "max_position_embeddings": 192,
        "eos_token_id": [1, 2],
        "head_dim": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    written = graft(file, replace(CALIBRATION, model=ModelIdentity("llama", 2, 4)), tmp_path / "out.onnx")
    with Session.open(written.path) as session:
        assert (session.limits.vocabulary, session.limits.context) == (64, 192)
        assert session.limits.stop_tokens == (1, 2)
        assert session.record.model == ModelIdentity("llama", 2, 4)


def test_a_companion_that_is_a_link_out_of_the_folder(tmp_path: Path) -> None:
    folder = Decoder().save_folder(tmp_path / "in")
    (tmp_path / "secret").write_text("mine")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    refused(folder, tmp_path / "out", r"tokenizer\.json is a link to .*secret, out of .*in; copy")


def test_what_an_earlier_output_left_goes(tmp_path: Path) -> None:
    graft(Decoder().save_folder(tmp_path / "genai"), CALIBRATION, tmp_path / "out")
    plain = tmp_path / "plain"
    plain.mkdir()
    Decoder().save(plain / "model.onnx")
    graft(plain, CALIBRATION, tmp_path / "out")
    left = set(hashes(tmp_path / "out"))
    assert {"model.onnx", "libact_ops.so"} <= left
    assert "genai_config.json" not in left


def test_state_in_cache_is_not_for_genai(tmp_path: Path) -> None:
    folder = Decoder().save_folder(tmp_path / "in")
    with pytest.raises(ActExportError, match="--state-in-cache is for hosts such as optimum"):
        graft(folder, CALIBRATION, tmp_path / "out", layout=StateLayout.PACKED)


def test_what_lies_beside_weights_in_a_folder_of_their_own(tmp_path: Path) -> None:
    folder = Decoder().save_folder(tmp_path / "in")
    model = onnx.load(folder / "model.onnx")
    (folder / "weights").mkdir()
    onnx.save(
        model, folder / "model.onnx", save_as_external_data=True, location="weights/model.data", size_threshold=256
    )
    (folder / "weights" / "license.txt").write_text("free")
    graft(folder, CALIBRATION, tmp_path / "out")
    assert (tmp_path / "out" / "weights" / "license.txt").read_text() == "free"
    same = [(place / "weights" / "model.data").read_bytes() for place in (folder, tmp_path / "out")]
    assert same[0] == same[1]
