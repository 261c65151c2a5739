"""How a graph takes new tokens: as ids, or as embeddings that a file beside it looks up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from act_export.errors import SessionError
from act_export.files import path_inside
from act_export.onnx_file.external_data import data_files
from act_export.onnx_file.names import EMBEDDING_FILE, EMBEDDINGS, IDS, POSITIONS
from act_export.onnx_file.state import DTYPES, bound_type
from act_export.runtime.device import import_onnxruntime

Lookup = Callable[[NDArray[np.int64]], NDArray[Any]]
"""Token ids (batch, sequence) -> embeddings (batch, sequence, hidden size)."""


def checked_mask(mask: Any, name: str) -> NDArray[np.int64]:
    """A mask of tokens, 1 for real ones and 0 for padding.

    Args:
        mask: Whole numbers or booleans, of any shape; floats that are 0 and 1 will do.
        name: What it is called, for errors.

    Raises:
        SessionError: If there is anything else in it: it isn't clear whether that stands for a token.
    """
    found = np.asarray(mask)
    if found.dtype.kind not in "biuf":
        raise SessionError(f"{name} is of {found.dtype}; it must be of 1 for real tokens and 0 for padding")
    other = found[(found != 0) & (found != 1)]
    if other.size:
        raise SessionError(f"{name} has {other[0]} in it; it must be 1 for real tokens and 0 for padding")
    return found.astype(np.int64, copy=False)


@dataclass
class TokenInput:
    """The inputs of a graph for new tokens and their positions.

    Attributes:
        path: The ONNX file.
        name: "input_ids" or "inputs_embeds".
        dtype: Of its arrays.
        size: Width of an embedding; None for ids.
        position_axes: Positions of a token: 1, with M-RoPE 3, or 0 where the graph counts by itself.
        vocabulary: Number of token ids; None if it isn't known.
        placeholders: Tokens that stand for images, videos or sound.
        lookup: What looks embeddings up; None for `embedding.onnx` beside the file.
        shared_threads: Whether that runs in the process's own thread pool, see `Session.open`.
    """

    path: Path
    name: str
    dtype: np.dtype[Any]
    size: int | None
    position_axes: int
    vocabulary: int | None = None
    placeholders: tuple[int, ...] = ()
    lookup: Lookup | None = field(default=None, repr=False)
    shared_threads: bool = False

    @classmethod
    def of(cls, inner: Any, path: Path, *, vocabulary: int | None = None, placeholders: tuple[int, ...] = ()) -> Self:
        """Those of an `onnxruntime.InferenceSession` over a file."""
        inputs = {given.name: given for given in inner.get_inputs()}
        axes = 0
        if POSITIONS in inputs:
            shape = inputs[POSITIONS].shape
            axes = shape[0] if len(shape) == 3 else 1
        name, dtype, size = IDS, np.dtype(np.int64), None
        if EMBEDDINGS in inputs and IDS not in inputs:
            given = inputs[EMBEDDINGS]
            name, dtype, size = EMBEDDINGS, DTYPES[given.type], given.shape[-1]
        return cls(path, name, dtype, size, axes, vocabulary, placeholders)

    @property
    def takes_embeddings(self) -> bool:
        """Whether the graph takes embeddings."""
        return self.size is not None

    def zeros(self, batch: int, sequence: int) -> NDArray[Any]:
        """New tokens, all zero."""
        return np.zeros((batch, sequence) if self.size is None else (batch, sequence, self.size), self.dtype)

    def tokens(self, given: NDArray[Any]) -> NDArray[Any]:
        """New tokens as the graph takes them: ids (batch, sequence), or embeddings (batch, sequence, size).

        Args:
            given: The same, or ids that can be looked up.

        Raises:
            SessionError: If there is no token or an unknown one, these are ids and the file takes embeddings, or the
                other way round, or one of several ids stands for an image. (A single one the model may have drawn.)
        """
        given = np.asarray(given)
        if given.ndim == 2 and np.issubdtype(given.dtype, np.integer):
            self._check_ids(given)
            self._check_placeholders(given)
            return given.astype(np.int64, copy=False) if self.size is None else self._embeddings(self._looked_up(given))
        if self.size is None:
            raise SessionError(
                f"{self.path} takes token ids (batch, sequence), integers, and these are {given.dtype} of shape "
                f"{given.shape}; a file that takes embeddings is exported with --inputs-embeds"
            )
        return self._embeddings(given)

    def embed(self, input_ids: NDArray[np.int64]) -> NDArray[Any]:
        """Embeddings (batch, sequence, size) of token ids (batch, sequence).

        They are the caller's to change: those of placeholders are to be replaced by an image's.

        Raises:
            SessionError: If the file takes ids, a token isn't in the vocabulary, or there is nothing to look it up in.
        """
        if self.size is None:
            raise SessionError(
                f"{self.path} takes token ids; a file that takes embeddings is exported with --inputs-embeds"
            )
        input_ids = np.asarray(input_ids)
        if not np.issubdtype(input_ids.dtype, np.integer):
            raise SessionError(f"the token ids to look up are {input_ids.dtype}; they must be whole numbers")
        self._check_ids(input_ids)
        return self._looked_up(input_ids)

    def positions(self, given: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions as the graph takes them, (batch, sequence) or (3, batch, sequence).

        Args:
            given: Those, or (batch, sequence) that hold for all three.

        Raises:
            SessionError: If they have another shape, or are no whole numbers.
        """
        axes, given = self.position_axes, np.asarray(given)
        if given.dtype.kind not in "iu":
            raise SessionError(f"position_ids are {given.dtype}; they must be whole numbers")
        if given.ndim == 2 and axes > 1:
            given = np.broadcast_to(given, (axes, *given.shape))
        if given.ndim != (3 if axes > 1 else 2) or (axes > 1 and len(given) != axes):
            wanted = f"({axes}, batch, sequence), or (batch, sequence) for text" if axes > 1 else "(batch, sequence)"
            raise SessionError(f"position_ids has shape {given.shape}; {self.path} takes {wanted}")
        return np.ascontiguousarray(given, np.int64)

    def _looked_up(self, input_ids: NDArray[np.int64]) -> NDArray[Any]:
        if self.lookup is None:
            place = path_inside(self.path.parent, EMBEDDING_FILE, f"the embeddings of {self.path}", error=SessionError)
            if not place.is_file():
                raise SessionError(
                    f"{self.path} takes embeddings (batch, sequence, {self.size}), and these are token ids; there is "
                    f"no {EMBEDDING_FILE} beside it to look them up in: export to a folder, or pass embeddings"
                )
            self.lookup = EmbeddingFile(place, shared_threads=self.shared_threads)
        return self.lookup(input_ids)

    def _embeddings(self, given: NDArray[Any]) -> NDArray[Any]:
        if given.ndim != 3 or given.shape[-1] != self.size or not given.size or given.dtype.kind in "iub":
            raise SessionError(
                f"{self.path} takes embeddings (batch, sequence, {self.size}), at least one, and these are "
                f"{given.dtype} of shape {given.shape}"
            )
        return np.ascontiguousarray(given, self.dtype)

    def _check_ids(self, input_ids: NDArray[np.int64]) -> None:
        if not input_ids.size:
            raise SessionError(f"input_ids has shape {input_ids.shape}; give at least one token")
        lowest, highest = input_ids.min(), input_ids.max()
        if lowest < 0 or (self.vocabulary is not None and highest >= self.vocabulary):
            wrong = lowest if lowest < 0 else highest
            raise SessionError(f"token {wrong} is not in the vocabulary of {self.vocabulary} tokens")

    def _check_placeholders(self, input_ids: NDArray[np.int64]) -> None:
        found = input_ids[np.isin(input_ids, self.placeholders)]
        if found.size and input_ids.shape[1] > 1:
            advice = (
                "pass embeddings, with the image's in its place: session.embed(ids) gives those of the text"
                if self.takes_embeddings
                else "this file takes text alone; export the model with --inputs-embeds to give it images"
            )
            raise SessionError(f"token {found[0]} stands for an image, a video or sound: {advice}")


class EmbeddingFile:
    """The model that looks embeddings up, on the CPU; an export to a folder has it beside the other."""

    def __init__(self, path: Path, *, shared_threads: bool = False) -> None:
        """Loads it; `shared_threads` as in `Session.open`.

        Raises:
            SessionError: If ONNX Runtime refuses it.
        """
        onnxruntime = import_onnxruntime()
        data_files(path, SessionError)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.use_per_session_threads = not shared_threads
        try:
            self._inner = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise SessionError(f"ONNX Runtime can't load {path}: {error}") from error
        (output,) = self._inner.get_outputs()
        self._dtype, self._size = DTYPES[output.type], int(output.shape[-1])

    def __call__(self, input_ids: NDArray[np.int64]) -> NDArray[Any]:
        """Embeddings (batch, sequence, hidden size) of token ids (batch, sequence)."""
        ids = np.ascontiguousarray(input_ids, np.int64)
        found = np.empty((*ids.shape, self._size), self._dtype)
        binding = self._inner.io_binding()
        binding.bind_input(IDS, "cpu", 0, ids.dtype, ids.shape, ids.ctypes.data)
        binding.bind_output(EMBEDDINGS, "cpu", 0, bound_type(found.dtype), found.shape, found.ctypes.data)
        self._inner.run_with_iobinding(binding)
        return found
