"""A graft can be taken out again: what was there comes back byte for byte, or nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from foreign_models import CALIBRATION, DATA, Decoder, hashes
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from act_export.calibration.file import Calibration
from act_export.errors import ActExportError
from act_export.export import build_model
from act_export.graft import StateLayout, remove_graft
from act_export.graft.job import graft
from act_export.graft.record import digest, record_of, removed_nodes
from act_export.onnx_file.record import GRAFT, GraftRecord
from act_export.ops.library import library_path

DECODERS = {
    "packed": Decoder(layers=3),
    "separate, norms": Decoder(layers=3, packed=False, norms=True),
    "no rotary, window": Decoder(layers=3, rotary=False, windows=(-1, 5)),
}
ALL = Calibration(dict.fromkeys(range(3), (0, 2)), threshold=0.1)


@pytest.mark.parametrize("calibration", [CALIBRATION, ALL, Calibration({2: (3,)})], ids=["some", "all", "last"])
@pytest.mark.parametrize("external", [False, True], ids=["inside", "beside"])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_file(kind: str, external: bool, calibration: Calibration, tmp_path: Path) -> None:
    path = DECODERS[kind].save(tmp_path / "in.onnx", external=external)
    before = hashes(tmp_path)
    graft(path, calibration, tmp_path / "grafted.onnx")
    written = remove_graft(tmp_path / "grafted.onnx", tmp_path / "back.onnx")
    after = hashes(tmp_path)
    assert after["back.onnx"] == before["in.onnx"] != after["grafted.onnx"]
    assert set(after) == {*before, "back.onnx", "grafted.onnx"}
    assert {name: after[name] for name in before} == before
    assert written.layers == tuple(calibration.heads)


def test_a_file_in_another_folder(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    path = Decoder().save(tmp_path / "one" / "model.onnx", external=True)
    graft(path, CALIBRATION, tmp_path / "two" / "model.onnx")
    remove_graft(tmp_path / "two" / "model.onnx", tmp_path / "three" / "model.onnx")
    assert hashes(tmp_path / "three") == hashes(tmp_path / "one")
    assert set(hashes(tmp_path / "two")) == {"model.onnx", DATA}


@pytest.mark.parametrize("native", [True, False], ids=["native", "portable"])
@pytest.mark.parametrize("layout", [None, StateLayout.SCORES], ids=["layers of the cache", "scores"])
@pytest.mark.parametrize("external", [False, True], ids=["inside", "beside"])
def test_a_folder(external: bool, layout: StateLayout | None, native: bool, tmp_path: Path) -> None:
    folder = Decoder().save_folder(tmp_path / "in", external=external)
    text = json.dumps({"ü": 1, **Decoder().genai_config()}, indent=1, ensure_ascii=False)
    (folder / "genai_config.json").write_bytes(text.replace("\n", "\r\n").encode())
    (folder / "adapters").mkdir()
    (folder / "adapters" / "one.bin").write_bytes(b"1")
    graft(folder, CALIBRATION, tmp_path / "grafted", layout=layout, native=native)
    remove_graft(tmp_path / "grafted", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(folder)


def test_an_export_of_act_exports(tiny_plain_file: Path, tmp_path: Path) -> None:
    calibration = Calibration({0: (1,), 1: (0, 3)}, threshold=0.06)
    graft(tiny_plain_file, calibration, tmp_path / "grafted.onnx")
    remove_graft(tmp_path / "grafted.onnx", tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == tiny_plain_file.read_bytes()


def test_an_export_for_which_a_search_found_no_heads_is_refused(tiny, tmp_path: Path) -> None:
    """Its record says so, and would be taken for the graft's."""
    build_model(tiny, Calibration({}), tmp_path / "none.onnx")
    with pytest.raises(ActExportError, match="graft the plain export"):
        graft(tmp_path / "none.onnx", Calibration({0: (1,)}), tmp_path / "out.onnx")


def test_adapters_that_somebody_took_away_are_not_missed(tmp_path: Path) -> None:
    folder = Decoder().save_folder(tmp_path / "in")
    graft(folder, CALIBRATION, tmp_path / "grafted")
    shutil.rmtree(tmp_path / "grafted" / "adapters")
    remove_graft(tmp_path / "grafted", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(folder)


@settings(max_examples=15)
@given(
    decoder=st.builds(
        Decoder,
        layers=st.integers(1, 3),
        packed=st.booleans(),
        rotary=st.booleans(),
        norms=st.booleans(),
        windows=st.sampled_from([(-1,), (3,), (-1, 4)]),
    ),
    heads=st.sets(st.integers(0, 3), min_size=1).map(sorted).map(tuple),
    layout=st.sampled_from([StateLayout.SCORES, StateLayout.CACHE_LAYERS]),
)
def test_any_graft(
    decoder: Decoder, heads: tuple[int, ...], layout: StateLayout, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("any")
    folder = decoder.save_folder(root / "in")
    graft(folder, Calibration({decoder.layers - 1: heads}), root / "grafted", layout=layout, check=False)
    remove_graft(root / "grafted", root / "back")
    assert hashes(root / "back") == hashes(folder)


def change_attribute(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "SkipSimplifiedLayerNormalization")
    node.attribute[0].f = 0.5


def change_name(model: onnx.ModelProto) -> None:
    model.graph.node[-1].name = "renamed"


def change_weights(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.raw_data)
    tensor.raw_data = b"\1" + tensor.raw_data[1:]


def add_metadata(model: onnx.ModelProto) -> None:
    model.metadata_props.add(key="by", value="somebody")


def change_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def change_removed_node(model: onnx.ModelProto) -> None:
    """The record itself: another window in the attention that was there."""
    record = record_of(model)
    assert record is not None
    (index, node), *_ = removed_nodes(record)
    node.attribute.append(helper.make_attribute("causal", 1))
    changed = replace(record, removed=((index, node.SerializeToString()), *record.removed[1:])).to_json()
    next(entry for entry in model.metadata_props if entry.key == GRAFT).value = changed


@pytest.mark.parametrize(
    "change", [change_attribute, change_name, change_weights, add_metadata, change_input, change_removed_node]
)
def test_a_graft_that_was_changed(change: Callable[[onnx.ModelProto], None], tmp_path: Path) -> None:
    graft(Decoder().save(tmp_path / "in.onnx"), CALIBRATION, tmp_path / "grafted.onnx")
    model = onnx.load(tmp_path / "grafted.onnx")
    change(model)
    onnx.save(model, tmp_path / "grafted.onnx")
    before = hashes(tmp_path)
    with pytest.raises(ActExportError, match="something else was changed after it was grafted; take the original file"):
        remove_graft(tmp_path / "grafted.onnx", tmp_path / "back.onnx")
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("target", ["grafted", "grafted/sub", "out.onnx"])
def test_outputs_in_the_way(target: str, tmp_path: Path) -> None:
    graft(Decoder().save_folder(tmp_path / "in"), CALIBRATION, tmp_path / "grafted")
    before = hashes(tmp_path)
    with pytest.raises(ActExportError, match=r"is the input|lies inside the input|must be one too"):
        remove_graft(tmp_path / "grafted", tmp_path / target)
    assert hashes(tmp_path) == before


def test_nothing_to_remove(tiny_file: Path, tmp_path: Path) -> None:
    for path in (Decoder().save(tmp_path / "in.onnx"), tiny_file):
        with pytest.raises(ActExportError, match="this model wasn't grafted, so there is nothing to remove"):
            remove_graft(path, tmp_path / "back.onnx")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the record of the graft isn't JSON"),
        ("3", "is 3; it must be an object"),
        ("[]", "it must be an object"),
        ("{}", "has no field 'format'"),
        ('{"format": 2}', "grafted by another version of act-export"),
        ('{"format": 1}', "has no field 'digest'"),
        ('{"format": 1, "digest": "", "removed": [[0, "AAAA"]]}', "a node in removed can't be read"),
        ('{"format": 1, "digest": "", "removed": [[0, "no base64"]]}', "a node in removed can't be read"),
        ('{"format": 1, "digest": "", "removed": [[0.5, "AAAA"]]}', "has index = 0.5; it must be a whole number"),
        ('{"format": 1, "removed": [], "of_next_year": 1}', "has an unknown field 'of_next_year'"),
    ],
)
def test_a_record_that_cant_be_read(text: str, reason: str) -> None:
    with pytest.raises(ActExportError, match=reason):
        GraftRecord.from_json(text)


def test_what_the_record_says(tmp_path: Path) -> None:
    folder = Decoder(layers=3).save_folder(tmp_path / "in")
    original = onnx.load(folder / "model.onnx", load_external_data=False)
    model = onnx.load(graft(folder, CALIBRATION, tmp_path / "out").path, load_external_data=False)
    record = record_of(model)
    assert record is not None
    assert record.digest == digest(original)
    assert record.layers == (0, 1)
    removed = removed_nodes(record)
    assert [node.op_type for _, node in removed] == ["GroupQueryAttention"] * 2
    assert [original.graph.node[index] for index, _ in removed] == [node for _, node in removed]
    assert (record.shares_buffers, record.pads_left) == (True, False)
    assert record.genai_config == (folder / "genai_config.json").read_text()
    assert record.inputs == tuple(f"past_key_values.{layer}.{part}" for layer in (3, 4) for part in ("key", "value"))
    assert set(record.opsets) == {"act"}
    assert GraftRecord.from_json(record.to_json()) == record
    assert record_of(original) is None


def test_padding_before_a_sequence_if_every_layer_can(tmp_path: Path) -> None:
    path = Decoder().save(tmp_path / "in.onnx")
    model = onnx.load(graft(path, Calibration({0: (0,), 1: (0,)}), tmp_path / "out.onnx").path)
    record = record_of(model)
    assert record is not None
    assert record.pads_left


def test_a_library_that_the_folder_had_comes_back(tmp_path: Path) -> None:
    folder = Decoder().save_folder(tmp_path / "in")
    shutil.copy2(library_path(), folder)
    graft(folder, CALIBRATION, tmp_path / "grafted", native=False)
    assert not (tmp_path / "grafted" / library_path().name).exists()
    remove_graft(tmp_path / "grafted", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(folder)
