"""Grafted folders in onnxruntime-genai: greedy, batches, beams, sampling, chats, rewinding, and the configuration."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_models import CALIBRATION, CONTEXT, PAD, VOCABULARY, Decoder, hashes, prompt
from onnx import TensorProto

from act_export.calibration.file import ModelIdentity
from act_export.errors import ActExportError
from act_export.graft import StateLayout, remove_graft
from act_export.graft.genai import cache_templates, calibrated_config
from act_export.graft.job import graft
from act_export.onnx_file.state import State
from act_export.ops.library import library_path
from act_export.runtime import Sampling, Session, generate, select

og = pytest.importorskip("onnxruntime_genai")

PROMPT, OTHER = prompt(14, 1), prompt(9, 2)
STEPS = 24
ENGINES = ("native", "portable")
DECODERS = {
    "float32": Decoder(layers=3, packed=False),
    "float16": Decoder(layers=3, element_type=TensorProto.FLOAT16),
    "windows": Decoder(layers=3, windows=(-1, 6, 6)),
}
WINDOW = {"window_size": 6, "slide_key_value_cache": False, "slide_inputs": False, "layers": [1, 2], "cache_slack": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """By decoder and engine; "plain" is the original."""
    made = {}
    for name, decoder in DECODERS.items():
        root = tmp_path_factory.mktemp(name.replace(" ", "_"))
        made[name, "plain"] = decoder.save_folder(root / "plain")
        for engine in ENGINES:
            graft(root / "plain", CALIBRATION, root / engine, native=engine == "native")
            made[name, engine] = root / engine
    return made


@cache
def model(folder: Path) -> Any:
    return og.Model(str(folder))


def generator(folder: Path, tokens: Sequence[Sequence[int]] = (PROMPT,), **options: Any) -> Any:
    """Of prompts, the shorter ones padded behind."""
    parameters = og.GeneratorParams(model(folder))
    parameters.set_search_options(**{"max_length": CONTEXT, "batch_size": len(tokens), **options})
    made = og.Generator(model(folder), parameters)
    longest = max(map(len, tokens))
    made.append_tokens(np.array([[*row, *[PAD] * (longest - len(row))] for row in tokens], np.int32))
    return made


def steps(running: Any, count: int = STEPS) -> list[list[int]]:
    """New tokens of each sequence."""
    found = []
    for _ in range(count):
        running.generate_next_token()
        found.append([int(token) for token in running.get_next_tokens()])
    return [list(row) for row in zip(*found, strict=True)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", DECODERS)
def test_greedy_as_act_exports_own_runtime(kind: str, engine: str, folders: dict) -> None:
    folder = folders[kind, engine]
    (found,) = steps(generator(folder))
    with Session.open(folder, native=engine == "native", threads=1) as session:
        assert generate(session, [PROMPT], max_new_tokens=STEPS) == [found]
        assert session.calibration == CALIBRATION
    assert found != steps(generator(folders[kind, "plain"]))[0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("share", [True, False], ids=["shared buffers", "growing buffers"])
def test_a_batch_is_its_prompts_alone(kind: str, engine: str, share: bool, folders: dict) -> None:
    folder, options = folders[kind, engine], {"past_present_share_buffer": share}
    together = steps(generator(folder, [PROMPT, OTHER, OTHER[:4]], **options))
    assert together == [steps(generator(folder, [each]))[0] for each in (PROMPT, OTHER, OTHER[:4])]


def test_growing_buffers(folders: dict) -> None:
    for kind in DECODERS:
        for engine in ENGINES:
            folder = folders[kind, engine]
            assert steps(generator(folder, past_present_share_buffer=False)) == steps(generator(folder))


def beams(session: Session, count: int, new: int) -> tuple[list[int], float]:
    """Beam search over states by value: the best sequence and its log-probability."""
    state: State | None = None
    ids, sequences = np.array([PROMPT]), [[]]
    scores = np.zeros(1)
    for step in range(new):
        mask = np.ones((len(ids), len(PROMPT) + step), np.int64)
        logits, state = session.run(ids, mask, state, logits_to_keep=1)
        shifted = logits[:, -1].astype(np.float64)
        shifted -= shifted.max(-1, keepdims=True)
        chances = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)) + scores[:, None]
        order = np.argsort(-chances, axis=None)[:count]
        rows, tokens = np.divmod(order, VOCABULARY)
        scores = chances.ravel()[order]
        sequences = [[*sequences[row], int(token)] for row, token in zip(rows, tokens, strict=True)]
        state, ids = select(state, rows), tokens[:, None]
    return sequences[0], float(scores[0])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["float32", "windows"])
def test_beams_take_their_state_along(kind: str, engine: str, folders: dict) -> None:
    for share in (True, False):
        options = {"num_beams": 3, "max_length": len(PROMPT) + STEPS, "past_present_share_buffer": share}
        running = generator(folders[kind, engine], **options)
        while not running.is_done():
            running.generate_next_token()
        found = [int(token) for token in running.get_sequence(0)][len(PROMPT) :]
        with Session.open(folders[kind, engine], native=engine == "native", threads=1) as session:
            best, score = beams(session, 3, STEPS)
            greedy, less = beams(session, 1, STEPS)
        assert found == best
        assert best != greedy, "this model's beams never differ from the greedy tokens"
        assert score > less


@pytest.mark.parametrize("kind", DECODERS)
def test_sampling_is_the_same_native_and_portable(kind: str, folders: dict) -> None:
    options = {"do_sample": True, "top_k": 20, "temperature": 0.8, "random_seed": 3}
    native, portable = (steps(generator(folders[kind, engine], **options)) for engine in ENGINES)
    assert native == portable
    assert native != steps(generator(folders[kind, "native"]))


def session_tokens(
    session: Session, chunks: Sequence[Sequence[int]], new: int, state: State | None = None
) -> list[int]:
    """Greedy tokens after calls of these chunks."""
    past = next(iter(state.values())).shape[2] if state is not None else 0
    found: list[int] = []
    waiting = [list(chunk) for chunk in chunks]
    while len(found) < new:
        chunk = waiting.pop(0) if waiting else [found[-1]]
        past += len(chunk)
        logits, state = session.run(np.array([chunk]), np.ones((1, past), np.int64), state)
        if not waiting:
            found.append(int(logits[0, -1].argmax()))
    return found


def session_state(session: Session, chunks: Sequence[Sequence[int]]) -> State:
    state, past = None, 0
    for chunk in chunks:
        past += len(chunk)
        _, state = session.run(np.array([chunk]), np.ones((1, past), np.int64), state)
    assert state is not None
    return state


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", DECODERS)
def test_a_chat_is_one_sequence_in_chunks(kind: str, engine: str, folders: dict) -> None:
    """The token generated last isn't in the cache yet: it goes before what is said next."""
    running = generator(folders[kind, engine])
    (said,) = steps(running, 5)
    running.rewind_to(running.token_count() - 1)
    running.append_tokens(np.array([said[-1], *OTHER], np.int32))
    (found,) = steps(running, 10)
    with Session.open(folders[kind, engine], native=engine == "native", threads=1) as session:
        chunks = [PROMPT, *([token] for token in said[:-1]), [said[-1], *OTHER]]
        assert session_tokens(session, chunks, 10) == found


@pytest.mark.parametrize("engine", ["plain", *ENGINES])
def test_a_chat_that_leaves_the_last_token_out(engine: str, folders: dict) -> None:
    """Appending at once, onnxruntime-genai counts the token generated last and never runs it: a column of zeros."""
    running = generator(folders["float32", engine])
    (said,) = steps(running, 5)
    running.append_tokens(np.array(OTHER, np.int32))
    (found,) = steps(running, 10)
    with Session.open(folders["float32", engine], native=engine == "native", threads=1) as session:
        state = session_state(session, [PROMPT, *([token] for token in said[:-1])])
        longer = {name: np.pad(array, [(0, 0), (0, 0), (0, 1), (0, 0)]) for name, array in state.items()}
        assert session_tokens(session, [OTHER], 10, longer) == found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", DECODERS)
def test_after_rewinding_the_means_that_remain_stay(kind: str, engine: str, folders: dict) -> None:
    running = generator(folders[kind, engine])
    (said,) = steps(running, 8)
    running.rewind_to(len(PROMPT) - 3)
    running.append_tokens(np.array(OTHER, np.int32))
    (found,) = steps(running, 12)
    with Session.open(folders[kind, engine], native=engine == "native", threads=1) as session:
        whole = session_state(session, [PROMPT, *([token] for token in said[:-1])])
        kept = {name: array[:, :, : len(PROMPT) - 3] for name, array in whole.items()}
        assert session_tokens(session, [OTHER], 12, kept) == found
        anew = session_state(session, [PROMPT[:-3]])
        moved = max(float(np.abs(kept[name].astype(float) - anew[name]).max()) for name in kept)
        assert moved > 1e-3, "the means of another prompt: rewinding isn't the same as never having seen the rest"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", DECODERS)
def test_rewinding_to_the_start_is_a_fresh_start(kind: str, engine: str, folders: dict) -> None:
    folder = folders[kind, engine]
    running = generator(folder, [OTHER])
    steps(running, 20)
    running.rewind_to(0)
    running.append_tokens(np.array(PROMPT, np.int32))
    assert steps(running) == steps(generator(folder))


@pytest.mark.parametrize("length", [0, 5])
def test_growing_buffers_cant_be_rewound(length: int, folders: dict) -> None:
    """onnxruntime-genai does that only where the caches of all layers have one shape; it says so."""
    running = generator(folders["float32", "native"], past_present_share_buffer=False)
    steps(running, 3)
    with pytest.raises(RuntimeError, match="rewind"):
        running.rewind_to(length)


def test_short_caches(tmp_path: Path) -> None:
    """Layers whose cache is no longer than their window: those that are calibrated keep all of it."""
    decoder = Decoder(layers=3, windows=(-1, 6, 6), short_caches=True)
    folder = decoder.save_folder(tmp_path / "in", sliding_window=WINDOW)
    written = graft(folder, CALIBRATION, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert config["model"]["decoder"]["sliding_window"] == {**WINDOW, "layers": [2]}
    assert written.difference is not None
    assert "1 calibrated layers with a sliding window keep their whole cache" in written.notes
    whole = DECODERS["windows"].save_folder(tmp_path / "whole")
    graft(whole, CALIBRATION, tmp_path / "expected")
    assert steps(generator(tmp_path / "out")) == steps(generator(tmp_path / "expected"))


def test_windows_in_batches_are_told_of(tmp_path: Path, folders: dict) -> None:
    written = graft(folders["windows", "plain"], CALIBRATION, tmp_path / "out")
    assert written.notes == (
        "the sliding window of layer 1 counts padding too: give a batch prompts of the same length",
    )
    folder = folders["windows", "native"]
    same = [PROMPT, prompt(14, 5)]
    assert steps(generator(folder, same)) == [steps(generator(folder, [each]))[0] for each in same]


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
    assert set(after) - set(before) == library
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


def test_sampling_of_act_exports_runtime_runs_on_the_folder_too(folders: dict) -> None:
    with Session.open(folders["float32", "native"], threads=1) as session:
        found = generate(session, [PROMPT], max_new_tokens=5, sampling=Sampling(temperature=1.0, seed=1))
    assert len(found[0]) == 5
