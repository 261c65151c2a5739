"""Grafted folders in onnxruntime-genai: greedy, batches, beams, sampling, chats, rewinding, and the configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from foreign_models import CALIBRATION, VOCABULARY, Decoder, prompt
from genai_folders import DECODERS, ENGINES, OTHER, PROMPT, STEPS, generator, steps

from act_export.graft.job import graft
from act_export.onnx_file.state import State
from act_export.runtime import Sampling, Session, generate, select

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


def test_sampling_of_act_exports_runtime_runs_on_the_folder_too(folders: dict) -> None:
    with Session.open(folders["float32", "native"], threads=1) as session:
        found = generate(session, [PROMPT], max_new_tokens=5, sampling=Sampling(temperature=1.0, seed=1))
    assert len(found[0]) == 5
