"""Folders of onnxruntime-genai, and their configuration."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from foreign_models import CALIBRATION, Decoder, hashes
from genai_folders import DECODERS, ENGINES, generator, steps

from act_export.calibration.file import ModelIdentity
from act_export.errors import ActExportError
from act_export.graft import StateLayout, remove_graft
from act_export.graft.genai import cache_templates, calibrated_config
from act_export.graft.job import graft
from act_export.ops.library import library_path
from act_export.runtime import Session


@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_folder_holds(engine: str, tmp_path: Path) -> None:
    folder = DECODERS["float32"].save_folder(tmp_path / "in")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "adapters").mkdir()
    (folder / "adapters" / "one.bin").write_bytes(b"1")
    before = hashes(folder)
    written = graft(folder, CALIBRATION, tmp_path / "out", native=engine == "native")
    after = hashes(tmp_path / "out")
    assert hashes(folder) == before
    assert (written.path, written.layout) == (tmp_path / "out" / "model.onnx", StateLayout.CACHE_LAYERS)
    library = {library_path().name} if engine == "native" else set()
    adapters = {f"adapters/{name}.onnx_adapter" for name in ("calibrated", "plain")}
    assert set(after) - set(before) == library | adapters
    assert set(before) - set(after) == set()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"model.onnx"} | (
        {"genai_config.json"} if engine == "native" else changed & {"genai_config.json"}
    )
    options = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert options.get("custom_ops_library") == (library_path().name if engine == "native" else None)


def test_the_name_of_another_file(tmp_path: Path) -> None:
    folder = DECODERS["float32"].save_folder(tmp_path / "in", filename="decoder.onnx")
    (folder / "model.onnx").rename(folder / "decoder.onnx")
    assert graft(folder, CALIBRATION, tmp_path / "out").path == tmp_path / "out" / "decoder.onnx"
    assert steps(generator(tmp_path / "out"), 3)
    remove_graft(tmp_path / "out", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(folder)


def test_cuda_graphs_are_switched_off() -> None:
    config = Decoder().genai_config()
    options = config["model"]["decoder"]["session_options"]
    options["provider_options"] = [{"cuda": {"enable_cuda_graph": "1", "device_id": "0"}}, {"cpu": {}}]
    before = copy.deepcopy(config)
    changed, notes = calibrated_config(config, [0], 2, "model.onnx", "libact_ops.so")
    assert config == before
    assert len(notes) == 1
    assert notes[0].startswith("cuda: CUDA graphs are switched off")
    assert changed["model"]["decoder"]["session_options"]["provider_options"] == [
        {"cuda": {"enable_cuda_graph": "0", "device_id": "0"}},
        {"cpu": {}},
    ]
    options["provider_options"] = [{"cuda": {"enable_cuda_graph": "0"}}]
    assert calibrated_config(config, [0], 2, "model.onnx", None)[1] == []


@pytest.mark.parametrize(
    ("layers", "calibrated", "kept"),
    [([1, 2], [0, 1], [2]), ([1, 2], [1, 2], None), (None, [0], [1, 2]), ([1], [0, 2], [1])],
)
def test_layers_of_a_window(layers: list[int] | None, calibrated: list[int], kept: list[int] | None) -> None:
    window = {"window_size": 6, **({"layers": layers} if layers is not None else {})}
    config = Decoder(layers=3).genai_config(sliding_window=window)
    changed, notes = calibrated_config(config, calibrated, 3, "model.onnx", None)
    found = changed["model"]["decoder"].get("sliding_window")
    assert found == (None if kept is None else {"window_size": 6, "layers": kept})
    shortened = set(calibrated) & set(layers if layers is not None else range(3))
    assert len(notes) == bool(shortened)


def test_another_library() -> None:
    config = Decoder().genai_config()
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = "libothers.so"
    with pytest.raises(ActExportError, match=r"loads the operator library 'libothers.so' already.*--portable"):
        calibrated_config(config, [0], 2, "model.onnx", "libact_ops.so")
    changed, _ = calibrated_config(config, [0], 2, "model.onnx", None)
    assert changed["model"]["decoder"]["session_options"]["custom_ops_library"] == "libothers.so"


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ("inputs", "past_key_names"),
        ("inputs", "past_value_names"),
        ("outputs", "present_key_names"),
        ("outputs", "present_value_names"),
    ],
)
@pytest.mark.parametrize("value", [None, "past_key", 7, "past.%d.%d"])
def test_a_field_that_is_missing_or_no_template(part: str, field: str, value: Any) -> None:
    config = Decoder().genai_config()
    if value is None:
        del config["model"]["decoder"][part][field]
    else:
        config["model"]["decoder"][part][field] = value
    with pytest.raises(ActExportError, match=rf"genai_config.json has model.decoder.{part}.{field} = "):
        cache_templates(config)


BROKEN = {
    "no model": (lambda config: config.pop("model"), "model.decoder"),
    "model is a list": (lambda config: config.update(model=[]), "model.decoder"),
    "no decoder": (lambda config: config["model"].pop("decoder"), "model.decoder"),
    "decoder is a name": (lambda config: config["model"].update(decoder="d"), "model.decoder"),
    "no file name": (lambda config: config["model"]["decoder"].pop("filename"), "model.decoder.filename"),
    "file name is a number": (lambda config: config["model"]["decoder"].update(filename=3), "model.decoder.filename"),
    "no inputs": (lambda config: config["model"]["decoder"].pop("inputs"), "model.decoder.inputs.past_key_names"),
    "inputs is a list": (lambda config: config["model"]["decoder"].update(inputs=[]), "model.decoder.inputs"),
    "options is a list": (
        lambda config: config["model"]["decoder"].update(session_options=[]),
        "model.decoder.session_options",
    ),
    "providers is a name": (
        lambda config: config["model"]["decoder"]["session_options"].update(provider_options="cuda"),
        "provider_options",
    ),
    "provider is a name": (
        lambda config: config["model"]["decoder"]["session_options"].update(provider_options=["cuda"]),
        "provider_options",
    ),
    "window is a number": (lambda config: config["model"]["decoder"].update(sliding_window=512), "sliding_window"),
    "layers is a number": (
        lambda config: config["model"]["decoder"].update(sliding_window={"layers": 3}),
        "sliding_window",
    ),
    "pipeline": (lambda config: config["model"]["decoder"].update(pipeline=[{"a": {}}]), "pipeline of models"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_configuration(kind: str, tmp_path: Path) -> None:
    change, named = BROKEN[kind]
    folder = Decoder().save_folder(tmp_path / "in")
    config = Decoder().genai_config()
    change(config)
    (folder / "genai_config.json").write_text(json.dumps(config))
    before = hashes(tmp_path)
    with pytest.raises(ActExportError) as caught:
        graft(folder, CALIBRATION, tmp_path / "out")
    assert named in str(caught.value)
    assert "genai_config.json" in str(caught.value)
    assert hashes(tmp_path) == before


def test_a_type_that_is_no_name(tmp_path: Path) -> None:
    """It is only compared with a calibration's."""
    folder = Decoder().save_folder(tmp_path / "in")
    config = Decoder().genai_config()
    config["model"]["type"] = ["llama"]
    (folder / "genai_config.json").write_text(json.dumps(config))
    identity = ModelIdentity("llama", 2, 4)
    written = graft(folder, replace(CALIBRATION, model=identity), tmp_path / "out")
    with Session.open(written.path) as session:
        assert session.record.model == identity


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\ufeff{}x"])
def test_a_configuration_that_cant_be_read(text: str, tmp_path: Path) -> None:
    folder = Decoder().save_folder(tmp_path / "in")
    (folder / "genai_config.json").write_text(text)
    with pytest.raises(ActExportError, match=r"genai_config\.json"):
        graft(folder, CALIBRATION, tmp_path / "out")
    assert not (tmp_path / "out").exists()
