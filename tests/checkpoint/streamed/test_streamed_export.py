"""A streamed checkpoint's export is that of the loaded one, byte for byte, and takes little memory."""

from __future__ import annotations

import copy
import filecmp
import gc
import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from shards_on_disk import first_shard, save_in_shards
from tiny import CALIBRATION
from typer.testing import CliRunner

import act_export.checkpoint.streamed.decide as decide
from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.file import Calibration
from act_export.calibration.strengths import CalibratedHeads
from act_export.checkpoint.load import load_checkpoint
from act_export.commands.main import app
from act_export.errors import ActExportError, CheckpointError, VerificationError
from act_export.export import build_model
from act_export.export.cut import cut_calibrations, cut_checkpoint, describe_cut
from act_export.export.job import export_model, with_quantized_weights
from act_export.export.trace import trace
from act_export.onnx_file.inspect import inspect_file
from act_export.onnx_file.save import save_model
from act_export.search.resolve import CalibrationRequest, resolve_calibrations
from act_export.tasks import Questions
from act_export.verify.parity.metrics import Metrics
from act_export.verify.parity.parity_report import ParityReport


def resolved(checkpoint, request, **rest):
    """The one calibration that is found; None for none."""
    found = [*resolve_calibrations(checkpoint, request, **rest).values()]
    assert len(found) <= 1
    return found[0] if found else None


HEADS = {1: (2,), 2: (0, 1)}  # of the model in the folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_in_shards(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


SLOW = pytest.mark.slow
CASES = [
    ("llama", "bfloat16"),
    pytest.param("llama", "int4", marks=SLOW),
    pytest.param("gpt2", "float32", marks=SLOW),
    pytest.param("gemma3_text", "float16", marks=SLOW),
    pytest.param("mixtral", "float32", marks=SLOW),
    pytest.param("gpt_oss", "float32", marks=SLOW),
]


@pytest.mark.parametrize(("architecture", "dtype"), CASES)
def test_the_same_file_as_from_memory(traced_anew, tmp_path, architecture, dtype):
    source = save_in_shards(tmp_path / "checkpoint", architecture)
    whole = load_checkpoint(str(source))
    before = {name: (each.data_ptr(), each.clone()) for name, each in whole.model.named_parameters()}
    for name, checkpoint in (("whole", whole), ("streamed", load_checkpoint(str(source), stream=True))):
        (tmp_path / name).mkdir()
        build_model(checkpoint, CALIBRATION, tmp_path / name / "a.onnx", dtype=dtype)
    for file in ("a.onnx", "a.onnx.data"):
        assert filecmp.cmp(tmp_path / "whole" / file, tmp_path / "streamed" / file, shallow=False), file
    for name, parameter in whole.model.named_parameters():  # the loaded model is left as it was
        assert before[name][0] == parameter.data_ptr()
        assert torch.equal(before[name][1], parameter)


@pytest.mark.in_turn(2)
def test_no_weight_is_read_before_it_is_written(folder):
    checkpoint = load_checkpoint(str(folder), stream=True)
    read: list[str] = []

    def reading(name: str) -> torch.Tensor:
        read.append(name)
        return checkpoint.streamed.read(name)

    graph = trace(checkpoint.model, CalibratedHeads(HEADS), read_weight=reading).graph
    assert not read
    tensors = [value.const_value for value in graph.initializers.values() if value.const_value is not None]
    assert all(isinstance(tensor, ir.LazyTensor) for tensor in tensors if tensor.size > 1024)
    for tensor in tensors:
        tensor.numpy()
    assert len(read) == len(set(read)) == 1 + 3 * 3  # the embedding, and of each layer what isn't small


@pytest.mark.in_turn(2)
def test_the_first_layers_are_compared(folder, tmp_path):
    """On the command line, and the whole is written."""
    (tmp_path / "heads.json").write_text(json.dumps(HEADS))
    options = ("--out", tmp_path / "a.onnx", "--calibration", tmp_path / "heads.json", "--stream")
    result = CliRunner().invoke(app, [str(each) for each in (folder, *options)])
    assert result.exit_code == 0, result.output
    assert "weights are read one at a time" in result.output
    assert "first 2 of 3 layers with 1 of 3 calibrated heads was compared" in result.output
    assert inspect_file(tmp_path / "a.onnx").num_layers == 3
    assert (tmp_path / "a.onnx.data").stat().st_size > 100_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data", "heads.json"]


def test_nothing_of_a_model_stays_in_memory(traced_anew, tiny, tmp_path):
    """Though onnxscript keeps the last graph."""
    model = copy.deepcopy(tiny.model)
    numbers = np.zeros((259, 32), np.float32)
    model.get_input_embeddings().weight.data = torch.from_numpy(numbers)
    memory = weakref.ref(numbers)
    build_model(replace(tiny, model=model), None, tmp_path / "a.onnx")
    del model, numbers
    gc.collect()
    assert memory() is None


def test_nothing_is_written_where_the_first_layers_disagree(folder, tmp_path, monkeypatch):
    same = Metrics(1, 1.0, 1.0, 0.0, 0.0, 0)
    failed = ParityReport("float32", same, hook_passed=False, engines=())
    built: list[str] = []
    monkeypatch.setattr("act_export.export.job.build_model", lambda *given, **_: built.append(given[2].name))
    monkeypatch.setattr("act_export.export.job.verify_file", lambda *_, **__: failed)
    with pytest.raises(VerificationError, match="nothing was written"):
        export_model(load_checkpoint(str(folder), stream=True), None, tmp_path / "a.onnx")
    assert built == ["cut.onnx"]
    assert not list(tmp_path.iterdir())


def test_progress_in_bytes(tmp_path):
    """Before each weight, up to the last."""
    values = [
        ir.Value(name=name, const_value=ir.tensor(np.full((8, size), 1, np.float32), name=name))
        for name, size in (("a", 100), ("b", 200), ("c", 50))
    ]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 23})
    seen: list[tuple[int, int]] = []
    save_model(ir.Model(graph, ir_version=10), tmp_path / "a.onnx", lambda *progress: seen.append(progress))
    assert seen == [(0, 11200), (3200, 11200), (9600, 11200)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neo", "gemma3_text", "mpt", "qwen3_moe"])
def test_a_cut_computes_what_the_first_layers_do(tmp_path, architecture):
    changes = {
        "gpt2": {"n_layer": 4},
        "gpt_neo": {"num_layers": 4, "num_hidden_layers": 4, "attention_types": [[["global", "local"], 2]]},
        "mpt": {"n_layers": 4},
        "gemma3_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    }
    source = save_in_shards(tmp_path, architecture, **changes.get(architecture, {"num_hidden_layers": 4}))
    cut = cut_checkpoint(load_checkpoint(str(source), stream=True))
    whole = load_checkpoint(str(source)).model
    assert cut.identity.num_layers == 2
    ids = torch.arange(1, 12)[None]
    # after the last layer a model's hidden states are normalized; the cut's own last layer is the whole's second
    layers = whole.model.layers if hasattr(whole, "model") else getattr(whole.transformer, "h", None)
    if layers is None:
        layers = whole.transformer.blocks
    del layers[2:]
    assert torch.equal(cut.model(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)


def cut_calibration(calibration):
    return cut_calibrations(CalibrationSet.of(calibration)).default_calibration


def test_what_a_cut_keeps_of_a_calibration():
    cut = cut_calibration(Calibration({1: (0, 3), 5: (1,)}, beta={1: (0.2, 1.7), 5: (0.5,)}, threshold=0.07))
    assert (cut.heads, cut.beta, cut.threshold) == ({1: (0, 3)}, {1: (0.2, 1.7)}, 0.07)
    later = Calibration({3: (2,), 4: (1,), 5: (0, 1)}, beta={3: (0.2,), 4: (0.3,), 5: (0.5, 0.6)})
    assert cut_calibration(later).heads == {0: (2,), 1: (1,)}
    assert cut_calibration(later).beta == {0: (0.2,), 1: (0.3,)}
    assert cut_calibration(Calibration({})).heads == {}
    assert cut_calibration(None) is None


def test_what_was_compared_is_said(folder):
    checkpoint = load_checkpoint(str(folder), stream=True)
    for calibration, said in (
        (None, "3 layers was compared"),
        (Calibration({}), "3 layers was compared"),
        (Calibration({1: (2,), 2: (0, 1)}), "with 1 of 3 calibrated heads was compared"),
        (Calibration({2: (0, 1)}), "with 2 of 2 calibrated heads, those of layer 2, was compared"),
    ):
        assert said in describe_cut(checkpoint, CalibrationSet.of(calibration).heads)


def test_what_needs_the_model_in_memory_says_so(folder, tmp_path):
    checkpoint = load_checkpoint(str(folder), stream=True)
    for request in (CalibrationRequest(), CalibrationRequest(questions=Questions(("sst2",)))):
        with pytest.raises(ActExportError, match="a search needs it in memory; pass --plain, --calibration"):
            resolved(checkpoint, request)
    assert resolved(checkpoint, CalibrationRequest(plain=True)) is None
    with pytest.raises(ActExportError, match="a search needs it in memory"):
        with_quantized_weights(checkpoint, "int4")
    with pytest.raises(ActExportError, match="--no-stream"):
        export_model(checkpoint, None, tmp_path / "out", inputs_embeds=True)


def test_a_shard_that_goes_away(tmp_path, monkeypatch):
    checkpoint = load_checkpoint(str(save_in_shards(tmp_path / "checkpoint")), stream=True)
    first_shard(tmp_path / "checkpoint").unlink()
    read_all = lambda *_, **__: [checkpoint.streamed.read(name) for name in checkpoint.streamed.origins]  # noqa: E731
    monkeypatch.setattr("act_export.export.job.build_model", read_all)
    with pytest.raises(CheckpointError, match="can't read"):
        export_model(checkpoint, None, tmp_path / "a.onnx", verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(("free", "streams"), [(10**12, False), (10**5, True), (None, False)])
def test_memory_decides(folder, monkeypatch, free, streams):
    monkeypatch.setattr(decide, "available_bytes", lambda: free)
    assert (load_checkpoint(str(folder), stream=None).streamed is not None) == streams
    assert load_checkpoint(str(folder)).streamed is None


def test_other_files_are_loaded_whole(tmp_path, monkeypatch):
    save_in_shards(tmp_path)
    model = load_checkpoint(str(tmp_path)).model
    for path in tmp_path.glob("model*"):
        path.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(decide, "available_bytes", lambda: 10)
    assert load_checkpoint(str(tmp_path), stream=None).streamed is None
    with pytest.raises(CheckpointError, match=r"aren't in \.safetensors files; load it whole: --no-stream"):
        load_checkpoint(str(tmp_path), stream=True)


MEASURED = """
import sys
from pathlib import Path
import act_export.export.job
from act_export.checkpoint.load import load_checkpoint
from act_export.export import build_model

def peak_kilobytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

peaks = [peak_kilobytes()]
checkpoint = load_checkpoint(sys.argv[1], stream=True)
build_model(checkpoint, None, Path(sys.argv[2]), dtype="bfloat16", progress=lambda *_: peaks.append(peak_kilobytes()))
print(peaks[0], peaks[1], peak_kilobytes())
"""


@SLOW
def test_memory_is_bounded(tmp_path):
    """Of a model of 440 MB in shards of one matrix each."""
    sizes = {"hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 16, "head_dim": 128}
    folder = save_in_shards(tmp_path / "checkpoint", max_shard_size="70MB", **sizes)
    shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert sum(shards) > 400e6
    assert len(shards) >= 6
    command = [sys.executable, "-c", MEASURED, str(folder), str(tmp_path / "a.onnx")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    imported, traced, written = (1024 * int(number) for number in result.stdout.split())
    assert traced - imported < sum(shards) / 2  # torch's own exporter; no weight is there yet
    assert written - traced < 6 * max(shards)  # a matrix in bfloat16, in float32 and transposed, and in bfloat16 again
    assert written - imported < sum(shards)
