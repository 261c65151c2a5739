"""The model repository for Triton: read by Triton's own schema, checked against ONNX Runtime as its backend does."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer.main
from close import assert_logits_close
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from no_file import KINDS, is_untouched, make
from onnx import TensorProto, helper
from typer.testing import CliRunner

import act_export
from act_export.commands.main import app
from act_export.errors import ActExportError
from act_export.export.triton import Signature, Tensor, model_config, read_signature, write_repository
from act_export.ops.library import library_path
from act_export.runtime.session import Session

# Its generated schema is all that is taken of it: it pins other versions of what is installed here.
CLIENT = "tritonclient==2.73.0"
TYPES = {
    "TYPE_INT64": "tensor(int64)",
    "TYPE_FP32": "tensor(float)",
    "TYPE_FP16": "tensor(float16)",
    "TYPE_BF16": "tensor(bfloat16)",
}


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    """Triton's `model_config_pb2`."""
    folder = tmp_path_factory.mktemp("tritonclient")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary",
        ":all:",
        "-d",
        folder,
        CLIENT,
    ]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = archive.extract("tritonclient/grpc/model_config_pb2.py", folder)
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parse(schema):
    """Reads a `config.pbtxt`; unknown fields, wrong types and unknown enumerators are errors."""
    return lambda path: text_format.Parse(path.read_text(encoding="utf-8"), schema.ModelConfig())


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def backend_accepts(config, session) -> None:
    """What the ONNX Runtime backend checks when it loads a model: counts, names, types, ranks, dimensions."""
    inner = session.onnxruntime_session
    inputs = {node.name: node for node in inner.get_inputs()}
    settings = {node.name: node for node in inner.get_overridable_initializers()}
    assert sum(not field.optional for field in config.input) == len(inputs)
    for field in config.input:
        node = (settings if field.optional else inputs)[field.name]
        assert TYPES[config_type(field)] == node.type
        if node.shape:
            wanted = [dim if isinstance(dim, int) else -1 for dim in node.shape]
            assert len(wanted) == len(field.dims)
            assert all(dim in (-1, own) for dim, own in zip(wanted, field.dims, strict=True))
        else:
            assert list(field.dims) == [1]
    outputs = {node.name: node for node in inner.get_outputs()}
    assert {output.name for output in config.output} == outputs.keys()
    for output in config.output:
        node = outputs[output.name]
        assert TYPES[config_type(output)] == node.type
        assert [dim if isinstance(dim, int) else -1 for dim in node.shape] == list(output.dims)


def config_type(field) -> str:
    return field.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[field.data_type].name


@pytest.mark.parametrize("which", ["tiny_file", "tiny_plain_file"])
def test_repository_of_an_export(which, request, tmp_path, parse):
    file = request.getfixturevalue(which)
    result = run("triton", file, "--out", tmp_path / "models", "--name", "tiny")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "models" / "tiny"
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == {"config.pbtxt", "1/model.onnx", "1/model.onnx.data", "1/libact_ops.so"}
    assert set(result.stdout.split()) == {str(folder / name) for name in there}
    assert not list((tmp_path / "models").glob(".*"))
    config = parse(folder / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 0)
    (library,) = config.model_operations.op_library_filename
    assert library == str(folder / "1" / "libact_ops.so")
    assert Path(library).read_bytes() == library_path().read_bytes()
    (group,) = config.instance_group
    assert group.kind == group.KIND_CPU
    optional = ["logits_to_keep", "calibration"] if which == "tiny_file" else ["logits_to_keep"]
    assert [field.name for field in config.input if field.optional] == optional
    sinks = {field.name for field in config.input if field.name.startswith("past_sink_scores.")}
    assert len(sinks) == (2 if which == "tiny_file" else 0)
    with Session.open(folder / "1") as session:
        backend_accepts(config, session)


def test_a_request_by_the_configuration_alone(tiny_file, tmp_path, parse):
    """Arrays of the configuration's names, types and dimensions run; the optional input may be left out."""
    write_repository(tiny_file, tmp_path, name="tiny")
    config = parse(tmp_path / "tiny" / "config.pbtxt")
    tokens = [5, 6, 7]
    numbers = {"input_ids": [tokens], "attention_mask": [[1] * len(tokens)], "position_ids": [range(len(tokens))]}
    feeds = {
        field.name: np.array(numbers[field.name], np.int64)
        if field.name in numbers
        else np.zeros([1, field.dims[1], 0, field.dims[3]], np.float32)
        for field in config.input
        if not field.optional
    }
    with Session.open(tmp_path / "tiny" / "1") as session:
        outputs = session.onnxruntime_session.run([output.name for output in config.output], feeds)
        expected = session.run(np.array([tokens]), np.ones((1, len(tokens)), np.int64)).logits
    for output, array in zip(config.output, outputs, strict=True):
        assert len(output.dims) == array.ndim
        assert all(dim in (-1, size) for dim, size in zip(output.dims, array.shape, strict=True))
    assert_logits_close(outputs[[output.name for output in config.output].index("logits")], expected, 1e-5)


@pytest.mark.parametrize(
    ("device", "kind", "gpus"), [("cpu", "KIND_CPU", []), ("cuda", "KIND_GPU", []), ("cuda:2", "KIND_GPU", [2])]
)
def test_devices(tiny_file, tmp_path, parse, device, kind, gpus):
    result = run("triton", tiny_file, "--out", tmp_path, "--name", "tiny", "--device", device, "--portable")
    assert result.exit_code == 0, result.output
    config = parse(tmp_path / "tiny" / "config.pbtxt")
    (group,) = config.instance_group
    assert group.kind == getattr(group, kind)
    assert list(group.gpus) == gpus
    assert not config.model_operations.op_library_filename
    assert not (tmp_path / "tiny" / "1" / "libact_ops.so").exists()


def test_library_without_cuda_kernels_is_refused(tiny_file, tmp_path, monkeypatch):
    from act_export.export import triton
    from act_export.ops.library import LibraryInfo

    monkeypatch.setattr(triton, "library_info", lambda path: LibraryInfo(path, cuda=()))
    with pytest.raises(ActExportError, match=r"no CUDA kernels.*--portable"):
        write_repository(tiny_file, tmp_path, name="tiny", device="cuda")
    assert not list(tmp_path.iterdir())


def test_where_the_server_sees_it(tiny_file, tmp_path, parse):
    write_repository(tiny_file, tmp_path, name="tiny", served_from="/models")
    config = parse(tmp_path / "tiny" / "config.pbtxt")
    assert list(config.model_operations.op_library_filename) == ["/models/tiny/1/libact_ops.so"]
    with pytest.raises(ActExportError, match="must be absolute"):
        write_repository(tiny_file, tmp_path, name="tiny", served_from="models")


def test_name_comes_from_the_file_or_its_folder(tiny_file, tmp_path):
    copy = tmp_path / "in" / "chat-model"
    shutil.copytree(tiny_file.parent, copy)
    write_repository(copy, tmp_path / "out")
    assert (tmp_path / "out" / "chat-model" / "1" / "model.onnx").is_file()
    for name in ("a/b", "", ".hidden", "two words"):
        with pytest.raises(ActExportError, match="--name"):
            write_repository(copy, tmp_path / "out", name=name)


def test_replaces_its_own_and_refuses_other_files(tiny_file, tiny_plain_file, tmp_path, parse):
    write_repository(tiny_file, tmp_path, name="tiny")
    write_repository(tiny_file, tmp_path, name="other")
    write_repository(tiny_plain_file, tmp_path, name="tiny")
    assert "past_sink_scores" not in (tmp_path / "tiny" / "config.pbtxt").read_text()
    assert "past_sink_scores" in (tmp_path / "other" / "config.pbtxt").read_text()
    write_repository(tiny_plain_file, tmp_path, name="tiny", native=False)
    assert not (tmp_path / "tiny" / "1" / "libact_ops.so").exists()
    (tmp_path / "tiny" / "2").mkdir()
    (tmp_path / "tiny" / "2" / "model.onnx").write_text("someone's")
    result = run("triton", tiny_file, "--out", tmp_path, "--name", "tiny")
    assert result.exit_code == 2
    assert "2/model.onnx" in result.output
    assert "past_sink_scores" not in (tmp_path / "tiny" / "config.pbtxt").read_text()
    (tmp_path / "plain-file").write_text("")
    with pytest.raises(ActExportError, match="is no folder"):
        write_repository(tiny_file, tmp_path / "plain-file")
    with pytest.raises(ActExportError, match="is no folder"):
        write_repository(tiny_file, tmp_path, name="plain-file")


def test_what_cannot_be_served(tiny_file, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name in ("text.onnx", "empty.onnx"):
        with pytest.raises(ActExportError, match="as an ONNX file"):
            write_repository(tmp_path / name, out)
    with pytest.raises(ActExportError, match="there is no model"):
        write_repository(tmp_path / "missing.onnx", out)
    lone = tmp_path / "lone" / "model.onnx"
    lone.parent.mkdir()
    shutil.copy(tiny_file, lone)
    with pytest.raises(ActExportError, match=r"model\.onnx\.data, which isn't there"):
        write_repository(lone, out)
    weights = Path(f"{tiny_file}.data").read_bytes()
    Path(f"{lone}.data").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ActExportError, match="the file isn't whole"):
        write_repository(lone, out)
    model = onnx.load(tiny_file, load_external_data=False)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    Path(f"{lone}.data").write_bytes(weights)
    onnx.save(model, lone)
    with pytest.raises(ActExportError, match="without a shape"):
        write_repository(lone, out)
    assert not out.exists()


def test_of_another_exporter(tmp_path, parse):
    """No operators of ours: no library. A setting is optional, a weight among the inputs is none of the caller's."""
    weight = helper.make_tensor("weight", TensorProto.FLOAT16, [2], [1, 2])
    scale = helper.make_tensor("scale", TensorProto.FLOAT16, [], [1])
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "weight"], ["y"]), helper.make_node("Mul", ["y", "scale"], ["z"])],
        "g",
        [info(name, TensorProto.FLOAT16, shape) for name, shape in [("x", ["n", 2]), ("weight", [2]), ("scale", [])]],
        [info("z", TensorProto.FLOAT16, ["n", 2])],
        [weight, scale],
    )
    path = tmp_path / 'quo"ted.onnx'
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    write_repository(path, tmp_path / "out", name="z")
    config = parse(tmp_path / "out" / "z" / "config.pbtxt")
    assert [(field.name, list(field.dims), field.optional) for field in config.input] == [
        ("x", [-1, 2], False),
        ("scale", [1], True),
    ]
    assert [config_type(field) for field in (*config.input, *config.output)] == ["TYPE_FP16"] * 3
    assert not config.model_operations.op_library_filename
    assert {p.name for p in (tmp_path / "out" / "z" / "1").iterdir()} == {"model.onnx"}


def test_a_type_that_triton_lacks(tmp_path):
    tensor = Tensor("x", TensorProto.COMPLEX64, (None,))
    with pytest.raises(ActExportError, match="x is of type"):
        model_config("m", Signature(tmp_path, (tensor,), (tensor,), (), False))


@given(name=st.text(st.characters(exclude_categories=["Cs"]), min_size=1), dims=st.lists(st.none() | st.integers(1, 9)))
def test_any_name_and_shape_survive(schema, name, dims):
    tensor = Tensor(name, TensorProto.FLOAT, tuple(dims))
    text = model_config("m", Signature(Path("m"), (tensor,), (tensor,), (), True), library=f"/{name}")
    config = text_format.Parse(text, schema.ModelConfig())
    assert config.input[0].name == config.output[0].name == name
    assert list(config.input[0].dims) == [-1 if dim is None else dim for dim in dims] or [1]
    assert list(config.model_operations.op_library_filename) == [f"/{name}"]


@pytest.mark.parametrize("native", [True, False])
def test_signature_agrees_with_the_session(tiny_file, native):
    signature = read_signature(tiny_file)
    assert signature.uses_library
    with Session.open(tiny_file, native=native) as session:
        inner = session.onnxruntime_session
        nodes = [*inner.get_inputs(), *inner.get_overridable_initializers()]
        assert {tensor.name for tensor in signature.inputs} == {node.name for node in nodes}
        assert [tensor.name for tensor in signature.outputs] == [node.name for node in inner.get_outputs()]


def test_every_option_is_on_the_page():
    page = (Path(act_export.__file__).parent / "docs" / "hosts.md").read_text(encoding="utf-8")
    table = page.split("| option | meaning |")[1].split("\n\n")[0]
    options = {name for option in typer.main.get_command(app).commands["triton"].params for name in option.opts}
    named = set(re.findall(r"`(--[a-z-]+)", table)) | {"--out"}  # which the example has
    assert named == {name for name in options if name.startswith("--")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["models", "models/m", "models/m/config.pbtxt", "models/m/1/model.onnx"])
def test_what_is_no_file_is_neither_followed_nor_replaced(place, kind, tmp_path):
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "any", [value], [value])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    before = make(tmp_path / place, kind)
    if kind == "folder" and place.count("/") < 2:
        assert write_repository(tmp_path / "m.onnx", tmp_path / "models")
        return
    with pytest.raises(ActExportError):
        write_repository(tmp_path / "m.onnx", tmp_path / "models")
    assert is_untouched(tmp_path / place, before)


def test_weights_behind_links_are_copied_or_refused(tiny_file, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for suffix in ("", ".data"):
        shutil.copy(f"{tiny_file}{suffix}", folder / f"model.onnx{suffix}")
    (folder / "model.onnx.data").rename(folder / "weights")
    (folder / "model.onnx.data").symlink_to("weights")
    write_repository(folder, tmp_path / "models", name="m", native=False)
    copied = tmp_path / "models" / "m" / "1" / "model.onnx.data"
    assert copied.is_file()
    assert not copied.is_symlink()
    (folder / "weights").rename(tmp_path / "elsewhere")
    (folder / "model.onnx.data").unlink()
    (folder / "model.onnx.data").symlink_to("../elsewhere")
    with pytest.raises(ActExportError, match="is a link to"):
        write_repository(folder, tmp_path / "models", name="n")
    assert not (tmp_path / "models" / "n").exists()
