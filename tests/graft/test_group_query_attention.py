"""GroupQueryAttention: with beta = 1 nothing changes, with a calibration it is what the reference computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from close import assert_logits_close
from foreign_models import CALIBRATION, NOTHING, PAD, VOCABULARY, Decoder, Reference, prompt
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from act_export.calibration.file import Calibration
from act_export.errors import VerificationError
from act_export.graft import UnsupportedPatternError
from act_export.graft.graph import Graph
from act_export.graft.job import graft
from act_export.graft.rewriters import group_query_attention
from act_export.runtime import Session

TOLERANCE = {TensorProto.FLOAT: 2e-5, TensorProto.FLOAT16: 3e-2}
KINDS = {
    "packed": Decoder(),
    "separate": Decoder(packed=False, scale=0.0),
    "interleaved": Decoder(interleaved=True, seed=1),
    "partly rotary": Decoder(head_size=32, rotary_size=16, scale=0.0, seed=2),
    "no rotary": Decoder(rotary=False, seed=3),
    "norms": Decoder(norms=True, packed=False, seed=4),
    "softcap": Decoder(softcap=2.0, says_head_size=True),
    "one group": Decoder(kv_heads=4, seed=5),
    "one key head": Decoder(kv_heads=1, seed=6),
    "half": Decoder(element_type=TensorProto.FLOAT16, seed=17),
}
WINDOWS = Decoder(windows=(5, 9), seed=7)


def grafted(decoder: Decoder, calibration: Calibration, folder: Path, **options) -> Path:
    folder.mkdir(exist_ok=True)
    return graft(decoder.save(folder / "in.onnx"), calibration, folder / "out.onnx", **options).path


def calls(ragged: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and mask of a prompt, a chunk and two single tokens; ragged: of a batch whose prompts end in padding."""
    if not ragged:
        tokens, lengths = prompt(17), (11, 4, 1, 1)
        ends = np.cumsum(lengths)
        return [
            (np.array([tokens[end - length : end]]), np.ones((1, end), np.int64))
            for end, length in zip(ends, lengths, strict=True)
        ]
    ids = np.array([prompt(11, 1), prompt(7, 2) + [PAD] * 4])
    mask = (ids != PAD).astype(np.int64)
    found = [(ids, mask)]
    for step in range(3):
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], 1)
        found.append((np.array([prompt(1, 3 + step), prompt(1, 9 + step)]), mask))
    return found


def session_logits(session: Session, made: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    state, found = None, []
    for ids, mask in made:
        logits, state = session.run(ids, mask, state)
        found.append(logits[mask[:, -ids.shape[1] :] != 0])
    return found


def original_logits(path: Path, decoder: Decoder, made: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Of the model before: by ONNX Runtime itself, as onnxruntime-genai calls it."""
    session = onnxruntime.InferenceSession(path)
    names = [given.name for given in session.get_inputs()][2:]
    outputs = [output.name for output in session.get_outputs()]
    shape = len(made[0][0]), decoder.kv_heads, 0, decoder.head_size
    state = [np.zeros(shape, decoder.dtype) for _ in names]
    found = []
    for ids, mask in made:
        given = {"input_ids": ids, "attention_mask": mask, **dict(zip(names, state, strict=True))}
        logits, *state = session.run(outputs, given)
        found.append(logits[mask[:, -ids.shape[1] :] != 0])
    return found


def reference_logits(reference: Reference, made: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    return [reference.run(ids, mask)[mask[:, -ids.shape[1] :] != 0] for ids, mask in made]


def assert_all_close(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> None:
    for logits, wanted in zip(found, expected, strict=True):
        assert_logits_close(logits, wanted, tolerance)


def largest_difference(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("native", [True, False], ids=["native", "portable"])
@pytest.mark.parametrize("ragged", [False, True], ids=["chunks", "ragged"])
@pytest.mark.parametrize("kind", KINDS)
def test_calibrated_as_the_reference(kind: str, ragged: bool, native: bool, tmp_path: Path) -> None:
    decoder, made = KINDS[kind], calls(ragged)
    path = grafted(decoder, CALIBRATION, tmp_path)
    reference = Reference(decoder, CALIBRATION)
    expected = reference_logits(reference, made)
    with Session.open(path, native=native, threads=1) as session:
        found = session_logits(session, made)
    if decoder.element_type == TensorProto.FLOAT16 and reference.smallest_margin < 5e-4:
        pytest.fail("rounding decides what is a sink; take another seed")
    assert_all_close(found, expected, TOLERANCE[decoder.element_type])
    assert largest_difference(found, reference_logits(Reference(decoder), made)) > 0.5


@pytest.mark.parametrize("native", [True, False], ids=["native", "portable"])
def test_windows_as_the_reference(native: bool, tmp_path: Path) -> None:
    made = calls(ragged=False)
    path = grafted(WINDOWS, CALIBRATION, tmp_path)
    with Session.open(path, native=native, threads=1) as session:
        found = session_logits(session, made)
    assert_all_close(found, reference_logits(Reference(WINDOWS, CALIBRATION), made), 2e-5)
    unlimited = replace(WINDOWS, windows=(-1,))
    assert largest_difference(found, reference_logits(Reference(unlimited, CALIBRATION), made)) > 0.1


@pytest.mark.parametrize("ragged", [False, True], ids=["chunks", "ragged"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "norms"])
def test_beta_of_one_changes_nothing(kind: str, ragged: bool, tmp_path: Path) -> None:
    decoder, made = KINDS[kind], calls(ragged)
    path = grafted(decoder, NOTHING, tmp_path)
    before = original_logits(tmp_path / "in.onnx", decoder, made)
    with Session.open(path, threads=1) as session:
        after = session_logits(session, made)
    assert_all_close(after, before, TOLERANCE[decoder.element_type])


@pytest.mark.parametrize("native", [True, False], ids=["native", "portable"])
def test_a_ragged_batch_is_its_sequences_alone(native: bool, tmp_path: Path) -> None:
    path = grafted(Decoder(), CALIBRATION, tmp_path)
    made = calls(ragged=True)
    with Session.open(path, native=native, threads=1) as session:
        together, state = [], None
        for ids, mask in made:
            logits, state = session.run(ids, mask, state)
            together.append([logits[row][mask[row, -ids.shape[1] :] != 0] for row in range(2)])
        for row in range(2):
            alone, state = [], None
            for ids, mask in made:
                real = mask[row] != 0
                tokens = ids[row][real[-ids.shape[1] :]]
                logits, state = session.run(tokens[None], np.ones((1, real.sum()), np.int64), state)
                alone.append(logits[0])
            assert_all_close([each[row] for each in together], alone, 2e-5)


decoders = st.builds(
    Decoder,
    layers=st.just(1),
    heads=st.just(4),
    kv_heads=st.sampled_from([1, 2, 4]),
    head_size=st.sampled_from([16, 32]),
    rotary_size=st.sampled_from([0, 16]),
    packed=st.booleans(),
    rotary=st.booleans(),
    interleaved=st.booleans(),
    norms=st.booleans(),
    windows=st.sampled_from([(-1,), (1,), (3,), (8,)]),
    softcap=st.sampled_from([0.0, 1.5]),
    scale=st.sampled_from([0.0, 0.4]),
    says_head_size=st.booleans(),
    seed=st.integers(0, 99),
)


@settings(max_examples=60)
@given(
    decoder=decoders,
    heads=st.sets(st.integers(0, 3), min_size=1).map(lambda heads: tuple(sorted(heads))),
    beta=st.sampled_from([0.0, 0.4, 1.6]),
    threshold=st.sampled_from([("absolute", 0.12), ("relative", 1.7)]),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    native=st.booleans(),
)
def test_any_attention(
    decoder: Decoder,
    heads: tuple[int, ...],
    beta: float,
    threshold: tuple[str, float],
    lengths: list[int],
    native: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    mode, value = threshold
    calibration = Calibration({0: heads}, beta=beta, threshold=value, threshold_mode=mode)
    tokens, ends = prompt(sum(lengths), decoder.seed), np.cumsum(lengths)
    made = [
        (np.array([tokens[end - length : end]]), np.ones((1, end), np.int64))
        for end, length in zip(ends, lengths, strict=True)
    ]
    reference = Reference(decoder, calibration)
    expected = reference_logits(reference, made)
    assume(reference.smallest_margin > 1e-5)  # else rounding decides what is a sink
    path = grafted(decoder, calibration, tmp_path_factory.mktemp("any"))
    with Session.open(path, native=native, threads=1) as session:
        assert_all_close(session_logits(session, made), expected, 5e-5)


def attention(model: onnx.ModelProto, layer: int = 1) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type == "GroupQueryAttention"][layer]


def set_attribute(node: onnx.NodeProto, name: str, value: object) -> None:
    kept = [given for given in node.attribute if given.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def set_input(node: onnx.NodeProto, index: int, name: str) -> None:
    node.input.extend([""] * (index + 1 - len(node.input)))
    node.input[index] = name


@pytest.mark.parametrize(
    ("index", "what"),
    [
        (10, "a bias of the logits (its input attention_bias)"),
        (11, "learned sinks (its input head_sink)"),
        (12, "a quantised cache (its input k_scale)"),
        (13, "a quantised cache (its input v_scale)"),
        (16, "sequences of different lengths in one call (its input query_seqlens)"),
    ],
)
def test_inputs_that_the_operator_lacks(index: int, what: str, tmp_path: Path) -> None:
    model = Decoder().model()
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(4, np.float32), "more"))
    set_input(attention(model), index, "more")
    refuses(model, tmp_path, what)


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("causal", 0, "causal = 0"),
        ("kv_cache_bit_width", 4, "kv_cache_bit_width = 4"),
        ("k_quant_type", "PER_CHANNEL", "k_quant_type = 'PER_CHANNEL'"),
        ("v_quant_type", "PER_TENSOR", "v_quant_type = 'PER_TENSOR'"),
        ("qk_output", 2, "qk_output = 2"),
        ("smooth_softmax", 1, "smooth_softmax = 1"),
        ("of_next_year", 1, "an attribute 'of_next_year' that this version of act-export doesn't know"),
    ],
)
def test_attributes_that_the_operator_lacks(name: str, value: object, what: str, tmp_path: Path) -> None:
    model = Decoder().model()
    set_attribute(attention(model), name, value)
    refuses(model, tmp_path, what)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("causal", 1),
        ("kv_cache_bit_width", 0),
        ("k_quant_type", "NONE"),
        ("qk_output", 0),
        ("smooth_softmax", -1),
        ("smooth_softmax", 0),
    ],
)
def test_attributes_that_change_nothing(name: str, value: object, tmp_path: Path) -> None:
    model = Decoder().model()
    set_attribute(attention(model), name, value)
    onnx.save(model, tmp_path / "in.onnx")
    assert graft(tmp_path / "in.onnx", CALIBRATION, tmp_path / "out.onnx", check=False).layers == (0, 1)


def test_one_norm_of_two(tmp_path: Path) -> None:
    model = Decoder(norms=True).model()
    set_input(attention(model), 15, "")
    refuses(model, tmp_path, "normalises only one of query and key")


def test_an_attention_without_cache(tmp_path: Path) -> None:
    model = Decoder().model()
    node = attention(model)
    node.output[1] = node.output[2] = ""
    for output in [output for output in model.graph.output if output.name.startswith("present.1.")]:
        model.graph.output.remove(output)
    refuses(model, tmp_path, "has no cache; export the model with past_key_values")


def test_no_scale_and_no_head_size(tmp_path: Path) -> None:
    model = Decoder(scale=0.0).model()
    node = attention(model)
    identity = helper.make_node("Identity", [node.input[0]], ["unknown"], name="identity")
    model.graph.node.insert(list(model.graph.node).index(node), identity)
    attention(model).input[0] = "unknown"
    refuses(model, tmp_path, "has no scale, and the graph doesn't say its head size")


def refuses(model: onnx.ModelProto, folder: Path, what: str) -> None:
    """Where the layer is calibrated; naming the node and writing nothing."""
    onnx.save(model, folder / "in.onnx")
    with pytest.raises(UnsupportedPatternError) as caught:
        graft(folder / "in.onnx", CALIBRATION, folder / "out.onnx")
    assert what in str(caught.value)
    assert "layer 1 can't be calibrated: com.microsoft.GroupQueryAttention" in str(caught.value)
    assert "'/model/layers.1.attn/GroupQueryAttention'" in str(caught.value)
    assert [path.name for path in folder.iterdir()] == ["in.onnx"]
    only_the_first = Calibration({0: (1,)}, threshold=0.1)
    assert graft(folder / "in.onnx", only_the_first, folder / "out.onnx").layers == (0,)


@pytest.mark.parametrize(
    ("name", "value"), [("scale", 0.3), ("local_window_size", 5), ("softcap", 3.0), ("rotary_interleaved", 1)]
)
def test_the_comparison_sees_a_wrong_reading(
    name: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the rewriter to misread an attribute, the comparison would tell."""
    read = group_query_attention.attribute

    def misread(node: onnx.NodeProto, asked: str, default: object = None) -> object:
        return value if asked == name else read(node, asked, default)

    monkeypatch.setattr(group_query_attention, "attribute", misread)
    path = Decoder().save(tmp_path / "in.onnx")
    with pytest.raises(VerificationError, match=r"layer 0: the operator differs .* nothing was written"):
        graft(path, CALIBRATION, tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_the_comparison_sees_nan(tmp_path: Path) -> None:
    decoder = Decoder()
    model = decoder.model()
    table = next(tensor for tensor in model.graph.initializer if tensor.name == "cos_cache")
    table.CopyFrom(numpy_helper.from_array(np.full((192, 8), np.nan, np.float32), "cos_cache"))
    onnx.save(model, tmp_path / "in.onnx")
    with pytest.raises(VerificationError, match="differs"):
        graft(tmp_path / "in.onnx", CALIBRATION, tmp_path / "out.onnx")


def test_norms_inside_cant_be_compared_on_a_cpu(tmp_path: Path) -> None:
    written = graft(Decoder(norms=True).save(tmp_path / "in.onnx"), CALIBRATION, tmp_path / "out.onnx")
    assert written.difference is None
    assert "2 of 2 layers weren't compared" in written.notes[0]


def test_an_attention_that_onnxruntime_refuses(tmp_path: Path) -> None:
    path = Decoder(rotary_size=8).save(tmp_path / "in.onnx")  # it wants multiples of 16
    with pytest.raises(UnsupportedPatternError, match=r"(?s)layer 0 can't be compared .*cos_cache.*--no-check"):
        graft(path, CALIBRATION, tmp_path / "out.onnx")


def test_head_size_by_what_the_graph_declares() -> None:
    """As of a quantised projection, whose weights have another shape, or one whose output is declared."""
    model = Decoder(scale=0.0, head_size=32).model()
    product = next(node for node in model.graph.node if attention(model, 0).input[0] in node.output)
    product.op_type, product.domain = "MatMulNBits", "com.microsoft"
    product.attribute.append(helper.make_attribute("N", 8 * 32))
    weights = next(tensor for tensor in model.graph.initializer if tensor.name == product.input[1])
    weights.CopyFrom(numpy_helper.from_array(np.zeros((256, 1, 16), np.uint8), weights.name))
    site = next(iter(group_query_attention.find(Graph(model.graph))))
    assert site.terms is not None
    assert (site.terms.head_size, site.terms.scale) == (32, 32**-0.5)

    declared = helper.make_tensor_value_info(product.output[0], TensorProto.FLOAT, ["batch", "sequence", 8 * 64])
    model.graph.value_info.append(declared)
    site = next(iter(group_query_attention.find(Graph(model.graph))))
    assert site.terms is not None
    assert site.terms.head_size == 64


def test_every_other_node_stays(tmp_path: Path) -> None:
    before = Decoder(layers=3).model()
    onnx.save(before, tmp_path / "in.onnx")
    after = onnx.load(graft(tmp_path / "in.onnx", CALIBRATION, tmp_path / "out.onnx").path)
    kept = [node for node in before.graph.node if node not in (attention(before, 0), attention(before, 1))]
    assert [node for node in after.graph.node if not node.name.startswith("act/")] == kept
    *others, calibration = after.graph.initializer
    assert (others, calibration.name) == (list(before.graph.initializer), "calibration")
    assert after.graph.input[: len(before.graph.input)] == before.graph.input
    assert [given.name for given in after.graph.input[len(before.graph.input) :]] == [
        "calibration",
        "past_sink_scores.0",
        "past_sink_scores.1",
    ]
    assert after.graph.output[0].type.tensor_type.shape.dim[2].dim_value == VOCABULARY
