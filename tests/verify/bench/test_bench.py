"""The benchmark: every contender does the same work, every number has its ratio, and no figure is asserted."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from tiny import save_checkpoint, tiny_checkpoint

from act_export.calibration.file import Calibration
from act_export.commands.bench_table import print_bench_report
from act_export.errors import ActExportError
from act_export.export import build_model
from act_export.runtime import NodePlacement
from act_export.runtime.cuda_driver import Gpu
from act_export.verify.bench import job as bench
from act_export.verify.bench.contenders import EXPORTED, FOREIGN, PYTORCH, Contender, running
from act_export.verify.bench.job import bench_file
from act_export.verify.bench.measurements import BenchReport, BenchRequest, Ratio

PROMPT, NEW, BATCH, ROUNDS = 40, 6, 2, 3


def request(file: Path, *against: Path, **changes) -> BenchRequest:
    small = BenchRequest(file, against, prompt_tokens=PROMPT, new_tokens=NEW, batch=BATCH, rounds=ROUNDS, threads=1)
    return replace(small, **changes)


def foreign_model(exported: Path, out: Path, *, shared: bool) -> Path:
    """The plain export as another exporter would write it: no metadata, no logits_to_keep.

    With `shared`, its attention is GroupQueryAttention, there are no position_ids and the cache has a symbolic size, as
    onnxruntime-genai's builder writes it. Otherwise it is standard operators that join past and new keys.
    """
    model = onnx.load(exported)
    if not shared:
        model = onnx.inliner.inline_local_functions(model)
    graph = model.graph
    del model.metadata_props[:]
    dropped = {"logits_to_keep", "position_ids"} if shared else {"logits_to_keep"}
    kept = [given for given in graph.input if given.name not in dropped]
    del graph.input[:]
    graph.input.extend(kept)
    if shared:
        for given in graph.input:
            if given.name.startswith("past"):
                given.type.tensor_type.shape.dim[3].dim_param = "kv_cache_dim"
        _use_group_query_attention(graph)
        del model.functions[:]
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        (out.parent / "genai_config.json").write_text('{"model": {"context_length": 64, "decoder": {"head_size": 8}}}')
    onnx.save(model, out)
    return out


def _use_group_query_attention(graph: onnx.GraphProto) -> None:
    constants = {"g_one": [1], "g_end": [2**62], "g_axis": [1], "g_scalar": 1}
    for name, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    make = helper.make_node
    before = [
        make("ReduceSum", ["attention_mask", "g_axis"], ["g_count"], keepdims=0),
        make("Sub", ["g_count", "g_scalar"], ["g_last"]),
        make("Cast", ["g_last"], ["g_lengths"], to=TensorProto.INT32),
        make("Shape", ["attention_mask"], ["g_total_long"], start=1, end=2),
        make("Squeeze", ["g_total_long"], ["g_total_scalar"]),
        make("Cast", ["g_total_scalar"], ["g_total"], to=TensorProto.INT32),
        make("CumSum", ["attention_mask", "g_scalar"], ["g_places"]),
        make("Sub", ["g_places", "g_scalar"], ["g_positions"]),
        make("Shape", ["input_ids"], ["g_sequence"], start=1, end=2),
        make("Neg", ["g_sequence"], ["g_start"]),
        make("Slice", ["g_positions", "g_start", "g_end", "g_axis"], ["position_ids"]),
    ]
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend(before)
    for node in nodes:
        if node.op_type == "Attention" and node.domain == "act":
            given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
            names = ("num_heads", "kv_num_heads", "scale")
            node = helper.make_node(
                "GroupQueryAttention",
                [*node.input[:5], "g_lengths", "g_total"],
                list(node.output),
                domain="com.microsoft",
                **{name: given[name] for name in names},
            )
        graph.node.append(node)


@pytest.fixture(scope="module")
def shared_file(tiny_plain_file, tmp_path_factory) -> Path:
    return foreign_model(tiny_plain_file, tmp_path_factory.mktemp("genai") / "model.onnx", shared=True)


@pytest.fixture(scope="module")
def joining_file(tiny_plain_file, tmp_path_factory) -> Path:
    return foreign_model(tiny_plain_file, tmp_path_factory.mktemp("optimum") / "joining.onnx", shared=False)


@pytest.fixture(scope="module")
def beside_pytorch(tiny_file, tiny_plain_file, checkpoint_folder) -> BenchReport:
    """The calibrated file beside the plain one and PyTorch, which takes fewer rounds and steps."""
    given = request(tiny_file, tiny_plain_file, pytorch=str(checkpoint_folder), pytorch_rounds=2, pytorch_tokens=4)
    return bench_file(given)


def test_pytorch_does_the_same_work(beside_pytorch):
    file, plain, pytorch = beside_pytorch.contenders
    assert pytorch.contender.name == "PyTorch"
    assert pytorch.same_tokens == 4
    for turn in pytorch.turns:
        assert turn.tokens == tuple(tokens[:4] for tokens in file.turns[0].tokens)
    assert plain.same_tokens < NEW  # calibration changes this model's answers


def test_turns(beside_pytorch):
    for one, rounds, tokens in zip(beside_pytorch.contenders, (ROUNDS, ROUNDS, 2), (NEW, NEW, 4), strict=True):
        assert len(one.turns) == rounds
        for turn in one.turns:
            assert turn.tokens == one.turns[0].tokens
            assert [len(row) for row in turn.tokens] == [tokens] * BATCH
            assert len(turn.step_ms) == tokens - 1
            assert min(turn.prompt_ms, *turn.step_ms) > 0
            assert turn.first_token_ms > turn.prompt_ms
    assert beside_pytorch.threads == 1


def test_medians_and_rates(beside_pytorch):
    one = beside_pytorch.contenders[0]
    assert one.prompt_ms == median(turn.prompt_ms for turn in one.turns)
    assert one.prompt_tokens_per_s == pytest.approx(BATCH * PROMPT * 1e3 / one.prompt_ms)
    assert one.decode_ms == median(mean(turn.step_ms) for turn in one.turns)
    assert one.decode_tokens_per_s == pytest.approx(BATCH * 1e3 / one.decode_ms)


def test_ratios_are_over_what_both_have(beside_pytorch):
    file, _, pytorch = beside_pytorch.contenders
    of_plain, of_pytorch = beside_pytorch.ratios
    assert (of_plain.against, of_plain.rounds, of_plain.steps) == ("plain0", ROUNDS, NEW - 1)
    assert (of_pytorch.against, of_pytorch.rounds, of_pytorch.steps) == ("PyTorch", 2, 3)
    ours = median(mean(turn.step_ms[:3]) for turn in file.turns[:2])
    assert of_pytorch.file_decode_ms == ours
    assert of_pytorch.decode.of_medians == pytest.approx(ours / pytorch.decode_ms)
    assert (of_plain.file_prompt_ms, of_plain.file_decode_ms) == (file.prompt_ms, file.decode_ms)
    low, high = of_pytorch.decode.quartiles
    assert low <= high
    assert of_pytorch.memory.of_medians == pytest.approx(file.memory.peak_bytes / pytorch.memory.peak_bytes)


def test_memory(beside_pytorch):
    for one in beside_pytorch.contenders:
        memory = one.memory
        assert 0 < memory.before_bytes <= memory.load_peak_bytes <= memory.peak_bytes
        assert memory.weights_bytes > 0
        assert memory.beyond_weights_bytes == memory.peak_bytes - memory.weights_bytes
    file, _, pytorch = (one.memory for one in beside_pytorch.contenders)
    assert file.before_bytes < pytorch.before_bytes  # the file's process has neither torch nor transformers


def test_json_has_every_round(beside_pytorch, tmp_path):
    beside_pytorch.save(tmp_path / "bench.json")
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [len(one["turns"]) for one in found["contenders"]] == [ROUNDS, ROUNDS, 2]
    assert found["contenders"][0]["turns"][0]["step_ms"]
    assert found["ratios"][0]["decode"]["of_medians"] > 0
    assert found["machine"]["versions"]["onnxruntime"]
    assert found["request"]["prompt_tokens"] == PROMPT


def test_what_is_printed(beside_pytorch):
    text = printed(beside_pytorch)
    for words in (
        "40 prompt tokens, 6 new tokens, batch 2, 1 thread, 3 rounds",
        "tokens/s",
        "ms a token",
        "peak memory",
        "tiny0: native library",
        "2 of 3 rounds, the first 4 of 6 new tokens",
        "4 of 4",
        "load average",
        "onnxruntime",
    ):
        assert words in text
    for ratios in beside_pytorch.ratios:
        for ratio in (ratios.prompt, ratios.first_token, ratios.decode):
            assert f"{ratio.of_medians:.3f} +-{ratio.spread:.3f}" in text


def test_unsteady_rounds_are_told(beside_pytorch):
    file, *others = beside_pytorch.contenders
    slow = replace(file.turns[0], prompt_ms=1e4 * file.turns[1].prompt_ms)
    disturbed = replace(file, turns=(slow, *file.turns[1:]))
    assert "other work was running; measure again" in printed(replace(beside_pytorch, contenders=(disturbed, *others)))
    steady = replace(file, turns=(file.turns[0],) * ROUNDS)
    assert "measure again" not in printed(replace(beside_pytorch, contenders=(steady,), ratios=()))


def printed(report: BenchReport) -> str:
    out = io.StringIO()
    print_bench_report(report, Console(file=out, highlight=False, markup=False))
    return out.getvalue()


def test_other_exporters(tiny_plain_file, shared_file, joining_file):
    report = bench_file(request(tiny_plain_file, shared_file, joining_file, rounds=1))
    _, shared, joining = report.contenders
    assert shared.contender.kernel == "ONNX Runtime's GroupQueryAttention"
    assert shared.contender.notes == ("computes the logits of all positions of a prompt",)
    assert "can't be the same memory" in joining.contender.notes[1]
    assert (shared.same_tokens, joining.same_tokens) == (NEW, NEW)
    assert "GroupQueryAttention" in printed(report)


def test_a_file_alone_and_its_portable_functions(tiny_file):
    native, portable = (bench_file(request(tiny_file, portable=portable, rounds=1)) for portable in (False, True))
    assert native.contenders[0].contender.kernel == "native library"
    assert portable.contenders[0].contender.kernel == "portable functions"
    assert native.contenders[0].turns[0].tokens == portable.contenders[0].turns[0].tokens
    assert not native.ratios
    assert "ratio" not in printed(native)


def test_threads_that_onnxruntime_chooses(tiny_file):
    assert 1 <= bench_file(request(tiny_file, threads=None, rounds=1)).threads <= (os.cpu_count() or 1)


def test_progress_ends_near_the_end(tiny_file):
    seen = []
    bench_file(request(tiny_file, rounds=1), progress=lambda step, done: seen.append((step, done)))
    assert [step for step, _ in seen] == ["loading tiny0", "round 1, tiny0", "memory of tiny0"]
    assert [done for _, done in seen] == sorted(done for _, done in seen)
    assert seen[-1][1] < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_tokens": -3}, "prompt tokens is -3; give 1 or more"),
        ({"new_tokens": 1}, "new tokens is 1; give 2 or more"),
        ({"batch": 0}, "batch is 0; give 1 or more"),
        ({"threads": -1}, "threads is -1; give 1 or more"),
        ({"rounds": 0}, "rounds is 0; give 1 or more"),
        ({"pytorch_rounds": 0}, "pytorch rounds is 0"),
        ({"pytorch_tokens": 1}, "pytorch tokens is 1"),
        ({"seed": -1}, "seed is -1; give 0 or more"),
    ],
)
def test_numbers_out_of_range(tiny_file, changes, message):
    with pytest.raises(ActExportError, match=message):
        request(tiny_file, **changes)


def test_a_context_that_is_too_short(tiny_file, shared_file):
    with pytest.raises(
        ActExportError, match=r"200 prompt and 57 new tokens are 257; the context of .* holds 256: lower"
    ):
        bench_file(request(tiny_file, prompt_tokens=200, new_tokens=57))
    with pytest.raises(ActExportError, match="holds 64"):
        bench_file(request(tiny_file, shared_file, prompt_tokens=60, new_tokens=5))


def test_the_same_file_twice(tiny_file, tmp_path):
    (tmp_path / "link").symlink_to(tiny_file.parent)
    with pytest.raises(ActExportError, match=r"link/model.onnx is given twice"):
        bench_file(request(tiny_file, tmp_path / "link"))


def test_a_file_of_another_exporter_alone(shared_file):
    with pytest.raises(ActExportError, match="wasn't written by act-export"):
        bench_file(request(shared_file))


def test_another_model(tiny_file, tmp_path):
    heads = Calibration({1: (2,), 2: (0, 1)})  # whose trace the tests of streamed models have
    build_model(tiny_checkpoint(num_hidden_layers=3), heads, tmp_path / "deep.onnx")
    with pytest.raises(ActExportError, match=r"isn't the model of .*: 3 layers .*, not 2 layers"):
        bench_file(request(tiny_file, tmp_path / "deep.onnx"))


@pytest.mark.in_turn(2)
def test_another_model_in_pytorch(tiny_file, tmp_path):
    other = save_checkpoint(tmp_path / "other", seed=5)
    with pytest.raises(ActExportError, match="exported from another model"):
        bench_file(request(tiny_file, pytorch=str(other)))


def test_a_process_that_fails(tiny_file, monkeypatch):
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    with pytest.raises(RuntimeError, match="ended with code"):
        bench_file(request(tiny_file))


def test_a_process_that_is_killed(tiny_file, monkeypatch):
    real = subprocess.Popen

    def killed(command, **options):
        return real([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], **options)

    monkeypatch.setattr(bench.subprocess, "Popen", killed)
    with pytest.raises(ActExportError, match="for lack of memory; lower --prompt-tokens"):
        bench_file(request(tiny_file))


def contender(kind: str, source: Path, **changes) -> Contender:
    return Contender("it", kind, str(source), "", native=True, rounds=1, new_tokens=2, **changes)


def test_where_nodes_of_contenders_run(tiny_file, shared_file, joining_file):
    """In a process of its own, as ONNX Runtime's global thread pool needs it."""
    script = (
        "import sys; from dataclasses import asdict; from act_export.verify.bench import child, contenders\n"
        "child._share_threads(1)\n"
        "for kind, source in zip(sys.argv[1::2], sys.argv[2::2]):\n"
        "    one = contenders.Contender('it', kind, source, '', native=True, rounds=1, new_tokens=2)\n"
        "    found = contenders.placement(one)\n"
        "    print(None if found is None else sorted(found.operators['CPUExecutionProvider'].items()))\n"
    )
    asked = [EXPORTED, tiny_file, FOREIGN, shared_file, FOREIGN, joining_file, PYTORCH, "any"]
    ran = subprocess.run([sys.executable, "-c", script, *map(str, asked)], capture_output=True, text=True, check=True)
    exported, shared, joining, pytorch = ran.stdout.splitlines()
    assert "('CalibratedAttention', 2)" in exported
    assert "('GroupQueryAttention', 2)" in shared
    assert "Attention" not in joining
    assert pytorch == "None"


def test_a_report_of_a_gpu(beside_pytorch):
    """What a GPU adds, in a report that has none."""
    placement = NodePlacement("cuda:0", {"a": "CUDAExecutionProvider"}, {"CUDAExecutionProvider": {"Attention": 1}}, 0)
    ones = [
        replace(one, memory=replace(one.memory, gpu_bytes=number * 10**9), placement=placed)
        for one, number, placed in zip(beside_pytorch.contenders, (3, 4, 6), (placement, placement, None), strict=True)
    ]
    gpu = Gpu("Stand-in", "9.0", 80 * 10**9, "580.65.06", "13.0")
    report = replace(
        beside_pytorch,
        contenders=tuple(ones),
        ratios=tuple(bench._ratios(ones[0], other) for other in ones[1:]),
        machine=replace(beside_pytorch.machine, gpu=gpu),
    )
    text = printed(report)
    for words in (
        "3000 MB",
        "0.750",
        "0.500",
        "tiny0: attention nodes: 1 of 1 on CUDA; nodes: 1 on CUDA; on the CPU: none; Memcpy nodes: 0",
        "GPU: Stand-in, compute capability 9.0, 80.0 GB memory, driver 580.65.06, CUDA 13.0 of the driver",
    ):
        assert words in text
    assert json.loads(report.to_json())["contenders"][0]["placement"]["copies"] == 0
    assert "GPU" not in printed(beside_pytorch)


def test_pytorch_runs_in_the_precision_of_the_file(tiny, checkpoint_folder, tmp_path):
    build_model(tiny, None, tmp_path / "half.onnx", dtype="float16")
    with running(
        contender(PYTORCH, checkpoint_folder, calibration=str(tmp_path / "half.onnx")), threads=1
    ) as in_pytorch:
        in_pytorch.begin(1, 8)
        assert in_pytorch.step(np.array([[5, 6]])).dtype == np.float32
        assert in_pytorch._hooked.model.dtype == torch.float16


def test_a_device_that_is_not_there(tiny_file):
    with pytest.raises(ActExportError, match="pass cpu, cuda or cuda:N"):
        request(tiny_file, device="gpu")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(ActExportError, match="built without CUDA"):
            bench_file(request(tiny_file, device="cuda"))


def test_spread_of_a_ratio():
    assert Ratio(1.0, (0.9, 1.3)).spread == pytest.approx(0.2)
    assert Ratio(1.0, None).spread == 0
