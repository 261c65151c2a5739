"""What can't be grafted is refused with a reason, nothing is written then, and the input is never touched."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from foreign_models import CALIBRATION, DATA, Decoder
from graft_sources import edit, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from act_export.calibration.file import Calibration, CalibrationError, ModelIdentity
from act_export.errors import ActExportError
from act_export.graft import UnsupportedPatternError
from act_export.graft.job import graft
from act_export.runtime import Session


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "isn't an ONNX model, or only part of one"),
        (b"not a model at all", "can't read .* as an ONNX file"),
        (b"PK\x03\x04" + bytes(100), "can't read .* as an ONNX file"),
        (b"\x08\x0a", "isn't an ONNX model, or only part of one"),
    ],
    ids=["empty", "text", "zip", "only a version"],
)
def test_other_files(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "in.onnx").write_bytes(content)
    refused(tmp_path / "in.onnx", tmp_path / "out.onnx", reason)


def test_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "in.onnx", tmp_path / "out.onnx", "there is no model")


WHOLE = Decoder(layers=2).model().SerializeToString()


@settings(max_examples=60)
@given(length=st.one_of(st.integers(0, len(WHOLE) - 1), st.integers(len(WHOLE) - 60, len(WHOLE) - 1)))
def test_the_first_part_of_a_file(length: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Refused wherever it ends."""
    folder = tmp_path_factory.mktemp("cut")
    (folder / "in.onnx").write_bytes(WHOLE[:length])
    with pytest.raises(ActExportError):
        graft(folder / "in.onnx", CALIBRATION, folder / "out.onnx")
    assert [path.name for path in folder.iterdir()] == ["in.onnx"]


def test_a_value_that_nothing_makes(file: Path, tmp_path: Path) -> None:
    edit(file, lambda model: model.graph.node.pop(20))
    refused(file, tmp_path / "out.onnx", r"is damaged or not whole: .* reads '.*', which nothing makes")


def test_an_output_that_nothing_makes(file: Path, tmp_path: Path) -> None:
    edit(file, lambda model: model.graph.node.pop())
    refused(file, tmp_path / "out.onnx", "nothing makes its output 'logits'")


def test_operators_that_the_file_doesnt_import(file: Path, tmp_path: Path) -> None:
    edit(file, lambda model: model.opset_import.pop())
    refused(file, tmp_path / "out.onnx", "'com.microsoft'")


def test_missing_weights(external: Path, tmp_path: Path) -> None:
    (external.parent / DATA).unlink()
    refused(external, tmp_path / "out.onnx", f"needs its weights in .*{DATA}, which isn't there; put it beside")


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_weights_cut_short(kept: float, external: Path, tmp_path: Path) -> None:
    data = external.parent / DATA
    os.truncate(data, int(data.stat().st_size * kept))
    refused(external, tmp_path / "out.onnx", r"has \d+ bytes, and .* ends at byte \d+; the file isn't whole")


def set_place(path: Path, key: str, value: str | None) -> None:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        kept = [(entry.key, entry.value) for entry in tensor.external_data if entry.key != key]
        del tensor.external_data[:]
        for name, text in [*kept, *([(key, value)] if value is not None else [])]:
            tensor.external_data.add(key=name, value=text)

    edit(path, change)


@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../secret", "a/../../secret", "", "a" * 100_000, "*/_ORT_MEM_ADDR_/*"]
)
def test_weights_from_elsewhere(location: str, external: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(1 << 20))
    set_place(external, "location", location)
    refused(external, tmp_path / "out.onnx", "leads out of|no name of a file|isn't there|address of memory")


def test_weights_behind_a_link(external: Path, tmp_path: Path) -> None:
    data = external.parent / DATA
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    refused(external, tmp_path / "out.onnx", r"is a link to .*elsewhere, out of .*; copy the file")
    data.unlink()
    shutil.move(tmp_path / "elsewhere", external.parent / "inside")
    data.symlink_to("inside")
    assert graft(external, CALIBRATION, tmp_path / "out.onnx").layers == (0, 1)
    assert not (tmp_path / DATA).is_symlink()
    assert graft(external, CALIBRATION, external.parent / "beside.onnx").layers == (0, 1)


def test_a_folder_of_links_as_in_the_hubs_cache(external: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--any--model"
    folder = cache / "snapshots" / "0"
    folder.mkdir(parents=True)
    (tmp_path / "in").rename(cache / "blobs")
    for name, hidden in (("model.onnx", "a"), (DATA, "b")):
        (cache / "blobs" / name).rename(cache / "blobs" / hidden)
        (folder / name).symlink_to(Path("..", "..", "blobs", hidden))
    refused(folder / "model.onnx", folder / "out.onnx", "is a link out of its folder, so that only model.onnx can")
    written = graft(folder, CALIBRATION, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    with Session.open(written.path) as session:
        assert session.calibration == CALIBRATION


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("offset", "many", "which is no number of bytes"),
        ("offset", "1_000", "which is no number of bytes"),
        ("offset", "9" * 100_000, "which is no number of bytes"),
        ("length", "-1", "which is no number of bytes"),
        ("offset", "-8", "which is no number of bytes"),
        ("offset", "99999999", "ends at byte"),
        ("length", "99999999", "its type and shape make"),
        ("length", "1", "its type and shape make"),
    ],
)
def test_places_that_make_no_sense(key: str, value: str, reason: str, external: Path, tmp_path: Path) -> None:
    set_place(external, key, value)
    refused(external, tmp_path / "out.onnx", reason)


def test_weights_without_a_length(external: Path, tmp_path: Path) -> None:
    set_place(external, "length", None)
    assert graft(external, CALIBRATION, tmp_path / "out.onnx", check=False).layers == (0, 1)
    set_place(external, "offset", str((external.parent / DATA).stat().st_size - 4))
    refused(external, tmp_path / "more.onnx", "ends at byte")


def test_weights_in_a_graph_within_the_graph(external: Path, tmp_path: Path) -> None:
    tensor = TensorProto(name="inner", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["unused"], value=tensor)],
        "inner",
        [],
        [helper.make_tensor_value_info("unused", TensorProto.FLOAT, [4])],
    )
    true = numpy_helper.from_array(np.array(True), "true")

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(true)
        model.graph.node.append(helper.make_node("If", ["true"], ["any"], then_branch=inner, else_branch=inner))

    edit(external, change)
    refused(external, tmp_path / "out.onnx", r"'\.\./secret' leads out of")


def test_weights_in_a_function(external: Path, tmp_path: Path) -> None:
    tensor = TensorProto(name="inner", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    node = helper.make_node("Constant", [], ["values"], value=tensor)
    function = helper.make_function("other", "Weights", [], ["values"], [node], [helper.make_opsetid("", 22)])
    edit(external, lambda model: model.functions.append(function))
    refused(external, tmp_path / "out.onnx", r"'\.\./secret' leads out of")


@pytest.mark.parametrize("name", ["../in.onnx", "/in.onnx", "sub/model.onnx", "gone.onnx"])
def test_a_configuration_that_names_another_file(name: str, file: Path, tmp_path: Path) -> None:
    name = str(file) if name.startswith("/") else name
    folder = Decoder().save_folder(tmp_path / "in", filename=name)
    (folder / "sub").mkdir()
    shutil.copy(file, folder / "sub" / "model.onnx")
    refused(folder, tmp_path / "out", rf"filename = '{name}', which is no file of its folder|gone\.onnx")


@pytest.mark.parametrize(
    ("calibration", "reason"),
    [
        (Calibration({5: (0,)}), "layer 5 is out of range; the model has layers 0 to 1"),
        (Calibration({0: (4,)}), "head 4 of layer 0 is out of range; the model has heads 0 to 3"),
        (Calibration({}), "has no heads, so there is nothing to graft"),
        (replace(CALIBRATION, model=ModelIdentity("llama", 3, 4)), "number of layers is 3 in the calibration, 2 in"),
        (replace(CALIBRATION, model=ModelIdentity("llama", 2, 8)), "number of heads is 8 in the calibration, 4 in"),
        (
            replace(CALIBRATION, model=ModelIdentity("qwen2", 2, 4)),
            "architecture is qwen2 in the calibration, llama in the model",
        ),
    ],
    ids=["layer", "head", "none", "layers", "heads", "architecture"],
)
def test_a_calibration_of_another_model(calibration: Calibration, reason: str, tmp_path: Path) -> None:
    folder = Decoder().save_folder(tmp_path / "in")
    refused(folder, tmp_path / "out", reason, CalibrationError, calibration=calibration)


@pytest.mark.parametrize(("named", "wanted"), [("gemma3", "gemma3_text"), ("LLAMA", "llama"), ("phi-3", "phi3")])
def test_exporters_spell_architectures_their_own_way(named: str, wanted: str, tmp_path: Path) -> None:
    folder = Decoder().save_folder(tmp_path / "in")
    text = (folder / "genai_config.json").read_text().replace('"type": "llama"', f'"type": "{named}"')
    (folder / "genai_config.json").write_text(text)
    calibration = replace(CALIBRATION, model=ModelIdentity(wanted, 2, 4))
    assert graft(folder, calibration, tmp_path / "out").layers == (0, 1)


def test_models_that_have_a_calibration(file: Path, tiny_file: Path, tmp_path: Path) -> None:
    once = graft(file, CALIBRATION, tmp_path / "once.onnx").path
    refused(once, tmp_path / "twice.onnx", r"was grafted before. For other heads .*--remove .*act-export adapter")
    refused(tiny_file, tmp_path / "out.onnx", "has a calibration already, from its export.*act-export adapter")


def test_a_model_without_attention(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"], name="relu")],
        "any",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)]), tmp_path / "in.onnx")
    refused(tmp_path / "in.onnx", tmp_path / "out.onnx", "no attention with a cache .* its nodes are 1 Relu")


def test_a_merged_decoder(tmp_path: Path) -> None:
    whole = Decoder().model()
    branch = onnx.GraphProto(name="branch")
    branch.node.extend(whole.graph.node)
    branch.output.extend(whole.graph.output)
    inputs = [*whole.graph.input, helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])]
    node = helper.make_node(
        "If",
        ["use_cache_branch"],
        [output.name for output in whole.graph.output],
        name="optimum::if",
        then_branch=branch,
        else_branch=branch,
    )
    graph = helper.make_graph([node], "merged", inputs, whole.graph.output, whole.graph.initializer)
    onnx.save(helper.make_model(graph, opset_imports=whole.opset_import), tmp_path / "in.onnx")
    refused(tmp_path / "in.onnx", tmp_path / "out.onnx", "inside an If node, as merged decoders do; export it without")


def test_old_operators(file: Path, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = 14

    edit(file, change)
    refused(file, tmp_path / "out.onnx", "the model has opset 14; 15 or newer is needed")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("attention_mask", "no input attention_mask"), ("input_ids", "neither input_ids nor inputs_embeds")],
)
def test_inputs_of_other_names(name: str, reason: str, file: Path, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.input[:] = ["other" if value == name else value for value in node.input]
        next(each for each in model.graph.input if each.name == name).name = "other"

    edit(file, change)
    refused(file, tmp_path / "out.onnx", reason, UnsupportedPatternError)


def test_names_that_are_ours(file: Path, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[3].name = "act/mine"

    edit(file, change)
    refused(file, tmp_path / "out.onnx", "'act/mine' has a name that begins with 'act/'")


def test_two_attentions_of_one_layer(file: Path, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        first, second = (node for node in model.graph.node if node.op_type == "GroupQueryAttention")
        second.input[3:5] = first.input[3:5]

    edit(file, change)
    refused(file, tmp_path / "out.onnx", "are both attention of layer 0", UnsupportedPatternError)
