"""The sink profile, and its two files: arrays in NAME.safetensors, all else in NAME.json beside it.

The format, tensor by tensor, is described in `act_export/docs/profile.md`; `load_profile` refuses whatever doesn't fit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from act_export.calibration.file import Calibration, CalibrationError, ModelIdentity
from act_export.errors import ActExportError, others_errors, shortened, shown
from act_export.files import write_whole
from act_export.json_fields import Fields
from act_export.json_file import read_bytes, read_object
from act_export.profile.answer_pair import AnswerPair, AnswerPairs
from act_export.profile.sink_statistics import (
    ABSOLUTE,
    ALL,
    GRID,
    MODES,
    POSITION_EDGES,
    RELATIVE_BINS,
    ExamplePrompt,
    LaterSinks,
    SinkStatistics,
    SinkTokens,
)

FORMAT = "act-export sink profile"
FORMAT_VERSION = 2
_LARGEST_TENSORS = 4 << 30  # bytes
_LONGEST_PROMPT = 1 << 20  # characters
_ROUNDING = 1e-4  # by which a share may lie beyond 0 or 1
_INFINITY = float("inf")


@dataclass(frozen=True)
class _Tensor:
    """What a tensor must be: its axes by name, its type, and the range of its values."""

    axes: tuple[str, ...]
    dtype: str = "float32"
    lowest: float = 0.0
    highest: float = _INFINITY


_HEADS = ("layers", "heads")
_STATISTICS = {
    "initial_score": _Tensor(_HEADS, highest=1),
    "initial_score_std": _Tensor(_HEADS, highest=1),
    "mass_std": _Tensor(_HEADS, highest=1),
    "entropy": _Tensor(_HEADS),
    "mean_map": _Tensor((*_HEADS, "grid", "grid"), highest=1),
    "absolute_exposure": _Tensor(("absolute bins",)),
    "relative_exposure": _Tensor(("relative bins",)),
}
_BY_MODE = {
    "initial_rate": _Tensor(_HEADS, highest=1),
    "rate": _Tensor(_HEADS, highest=1),
    "count": _Tensor(_HEADS),
    "mass": _Tensor(_HEADS, highest=1),
    "absolute_positions": _Tensor((*_HEADS, "absolute bins")),
    "relative_positions": _Tensor((*_HEADS, "relative bins")),
}
_TOKENS = {
    "ids": _Tensor(("tokens",), "int64"),
    "occurrences": _Tensor(("tokens",), "int64"),
    "sinks": _Tensor(("tokens", "layers"), "int64"),
    "mass": _Tensor(("tokens",), highest=1),
    "mass_outside": _Tensor(("tokens",), highest=1),
}
_EFFECTS = _Tensor(_HEADS, lowest=-_INFINITY)
_EXAMPLE = {"ids": _Tensor(("tokens",), "int64"), "scores": _Tensor((*_HEADS, "tokens"), highest=1)}
_CALIBRATED = _Tensor((*_HEADS, "tokens"), highest=1)


@dataclass(frozen=True, eq=False, repr=False)
class SinkProfile:
    """Where a model's attention sinks are.

    Attributes:
        model: The model it belongs to.
        model_name: As it was asked for.
        overall: Statistics over the prompts of all sources, each prompt with the same weight.
        sources: Statistics by source, in the order they were asked for.
        examples: One prompt of each source, with its sink scores.
        calibration: The one that the examples were also run with; None for none.
        answers: To some of the prompts without and with it; None where there are none.
        options: How it was made: strings and numbers by name.
        versions: Of the packages that took part.
    """

    model: ModelIdentity
    model_name: str
    overall: SinkStatistics
    sources: Mapping[str, SinkStatistics]
    examples: tuple[ExamplePrompt, ...] = ()
    calibration: Calibration | None = None
    answers: AnswerPairs | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """What it is of, without the arrays."""
        size = f"{self.model.num_layers} layers of {self.model.num_heads} heads"
        return f"<SinkProfile of {self.model_name}, {size}: {', '.join(self.sources)}>"

    def __getitem__(self, source: str) -> SinkStatistics:
        """Statistics of one source, or of `ALL`.

        Raises:
            ActExportError: If there is no such source, with those there are.
        """
        if source == ALL:
            return self.overall
        if source not in self.sources:
            raise ActExportError(f"the profile has no source {source!r}; it has {', '.join((*self.sources, ALL))}")
        return self.sources[source]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes PATH (safetensors), and a JSON file of the same name beside it; see `save_profile`.

        Raises:
            ActExportError: If the name doesn't end with .safetensors, or the files can't be written.
        """
        save_profile(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SinkProfile:
        """Reads and checks a profile.

        Raises:
            ActExportError: If a file is missing or isn't a profile's, naming what doesn't fit.
        """
        return load_profile(path)


def unreachable(profile: SinkProfile) -> list[str]:
    """Thresholds that no sink score of some prompts can exceed, since none is above 1: a line for each."""
    lines = []
    for mode, sinks in profile.overall.by.items():
        shortest = profile.overall.shortest
        tau = sinks.threshold if mode == ABSOLUTE else sinks.threshold / shortest
        if tau >= 1:
            of = f"{sinks.threshold:g}" if mode == ABSOLUTE else f"{sinks.threshold:g} / {shortest} tokens"
            lines.append(
                f"the {mode} threshold is {of} for the shortest prompt; no sink score is above 1, so there are none"
            )
    return lines


def save_profile(profile: SinkProfile, path: str | os.PathLike[str]) -> None:
    """Writes a profile's two files; see `SinkProfile.save`."""
    path = _checked_name(path)
    tensors = dict(_tensors(profile))
    content = save_tensors({name: np.ascontiguousarray(array) for name, array in tensors.items()})
    statistics = [profile.overall, *profile.sources.values()]
    document = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "tensors": {"file": path.name, "sha256": hashlib.sha256(content).hexdigest()},
        "model": {"asked_for": profile.model_name, **asdict(profile.model)},
        "grid": GRID,
        "position_edges": list(POSITION_EDGES),
        "relative_bins": RELATIVE_BINS,
        "thresholds": {mode: profile.overall.by[mode].threshold for mode in MODES},
        "sources": [
            {
                "name": source.name,
                **{name: getattr(source, name) for name in _COUNTS},
                "token_texts": {mode: list(source.by[mode].tokens.texts) for mode in MODES},
            }
            for source in statistics
        ],
        "examples": [{"source": example.source, "texts": list(example.texts)} for example in profile.examples],
        "calibration": json.loads(profile.calibration.to_json()) if profile.calibration is not None else None,
        "answers": asdict(profile.answers) if profile.answers is not None else None,
        "options": dict(profile.options),
        "versions": dict(profile.versions),
    }
    try:
        write_whole(path, content)
        write_whole(path.with_suffix(".json"), json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ActExportError(f"can't write {path}: {error.strerror}; pass another place with --out") from error


def load_profile(path: str | os.PathLike[str]) -> SinkProfile:
    """Reads a profile by either of its files' names; see `SinkProfile.load`."""
    path = Path(path)
    if not path.name or path.is_dir():
        raise ActExportError(f"{path} is a folder; pass a profile in it, e.g. {path / 'profile.safetensors'}")
    document_path, tensors_path = path.with_suffix(".json"), path.with_suffix(".safetensors")
    advice = f"a profile has two files, {tensors_path.name} and {document_path.name}, which act-export profile writes"
    found = read_object(document_path, advice=advice)
    fields = Fields(found, str(document_path), advice="make the profile again")
    if found.get("format") != FORMAT:
        raise ActExportError(f"{document_path} is not a sink profile's; act-export profile writes one")
    if found.get("version") != FORMAT_VERSION:
        raise fields.refused(
            f"has version {shown(found.get('version'))}; this act-export reads version {FORMAT_VERSION}"
        )
    content = read_bytes(tensors_path, advice=advice, largest_bytes=_LARGEST_TENSORS)
    if fields.inner("tensors").text("sha256") != hashlib.sha256(content).hexdigest():
        raise ActExportError(
            f"{tensors_path} and {document_path} aren't of the same run; make the profile again, or put the right "
            f"files side by side"
        )
    for what, own in (("grid", GRID), ("position_edges", list(POSITION_EDGES)), ("relative_bins", RELATIVE_BINS)):
        if fields.value(what) != own:
            raise fields.refused(f"has {what} = {shown(found[what])}; this version has {shown(own)}")
    with others_errors(f"{tensors_path} is not a safetensors file", "make the profile again"):
        tensors = load_tensors(content)
    return _Reader(tensors, fields).profile()


_COUNTS = ("prompts", "tokens", "shortest", "longest", "shared", "effect_prompts")


class _Reader:
    """Takes tensors out of a file, one after the other, each as it must be; in the end none is left."""

    def __init__(self, tensors: dict[str, NDArray[Any]], document: Fields) -> None:
        self.tensors = tensors
        self.document = document
        model = document.inner("model")
        self.model_name = model.text("asked_for")
        self.model = ModelIdentity(
            model.text("architecture"),
            model.whole("num_layers", 1),
            model.whole("num_heads", 1),
            model.text("fingerprint") if model.given("fingerprint") else None,
            model.text("name") if model.given("name") else None,
        )
        self.sizes = {
            "layers": self.model.num_layers,
            "heads": self.model.num_heads,
            "grid": GRID,
            "absolute bins": len(POSITION_EDGES),
            "relative bins": RELATIVE_BINS,
        }

    def profile(self) -> SinkProfile:
        document = self.document
        found = [self._statistics(source) for source in document.objects("sources")]
        names = [source.name for source in found]
        if len(found) < 2 or names[0] != ALL or len(set(names)) < len(names):
            raise document.refused(f"has the sources {shown(names)}; they must be {ALL!r} and one more, all different")
        overall, *sources = found
        profile = SinkProfile(
            model=self.model,
            model_name=self.model_name,
            overall=overall,
            sources={source.name: source for source in sources},
            examples=tuple(self._example(index, given) for index, given in enumerate(document.objects("examples"))),
            calibration=self._calibration(),
            answers=self._answers(),
            options=dict(document.inner("options").members),
            versions=dict(document.inner("versions").members),
        )
        if self.tensors:
            raise document.refused(f"has a tensor {shown(sorted(self.tensors)[0])} that doesn't belong to a profile")
        return profile

    def _calibration(self) -> Calibration | None:
        if not self.document.given("calibration"):
            return None
        try:
            text = json.dumps(self.document.value("calibration"))
            return Calibration.from_json(text, source=f"{self.document.what}: calibration")
        except CalibrationError as error:
            raise ActExportError(str(error)) from error

    def _answers(self) -> AnswerPairs | None:
        if not self.document.given("answers"):
            return None
        given = self.document.inner("answers")
        tried = given.whole("tried", 1)
        shown = tuple(_answer_pair(each) for each in given.objects("shown"))
        return AnswerPairs(shown, tried, given.whole("differing", 0, tried))

    def _statistics(self, given: Fields) -> SinkStatistics:
        name = given.text("name")
        place = f"sources/{name}"
        fields: dict[str, Any] = {what: given.whole(what, 0, 2**53) for what in _COUNTS}
        texts = given.inner("token_texts")
        fields |= {what: self._take(f"{place}/{what}", wanted) for what, wanted in _STATISTICS.items()}
        return SinkStatistics(
            name=name,
            **fields,
            effects=self._take(f"{place}/effects", _EFFECTS) if fields["effect_prompts"] else None,
            by={mode: self._later(place, mode, texts.texts(mode)) for mode in MODES},
        )

    def _later(self, place: str, mode: str, texts: tuple[str, ...]) -> LaterSinks:
        self.sizes["tokens"] = len(texts)
        tokens = {what: self._take(f"{place}/{mode}/tokens/{what}", wanted) for what, wanted in _TOKENS.items()}
        return LaterSinks(
            mode,
            self.document.inner("thresholds").number(mode, 0),
            **{what: self._take(f"{place}/{mode}/{what}", wanted) for what, wanted in _BY_MODE.items()},
            tokens=SinkTokens(texts=texts, **tokens),
        )

    def _example(self, index: int, given: Fields) -> ExamplePrompt:
        texts = given.texts("texts")
        self.sizes["tokens"] = len(texts)
        place = f"examples/{index}"
        return ExamplePrompt(
            given.text("source"),
            texts=texts,
            **{what: self._take(f"{place}/{what}", wanted) for what, wanted in _EXAMPLE.items()},
            calibrated_scores=self._take(f"{place}/calibrated_scores", _CALIBRATED)
            if f"{place}/calibrated_scores" in self.tensors
            else None,
        )

    def _take(self, name: str, wanted: _Tensor) -> NDArray[Any]:
        if name not in self.tensors:
            raise self.document.refused(f"lacks the tensor {shown(name)}")
        array = self.tensors.pop(name)
        shape = tuple(self.sizes[axis] for axis in wanted.axes)
        if array.shape != shape or array.dtype.name != wanted.dtype:
            raise self.document.refused(
                f"has {shortened(name, 100)} as {array.dtype.name} {array.shape}; it must be {wanted.dtype} {shape} "
                f"({', '.join(wanted.axes)})"
            )
        beyond = ~((array >= wanted.lowest - _ROUNDING) & (array <= wanted.highest + _ROUNDING))
        if not np.isfinite(array).all() or beyond.any():
            value = array[beyond | ~np.isfinite(array)].flat[0]
            raise self.document.refused(
                f"has the value {value} in {shortened(name, 100)}; it must lie from {wanted.lowest:g} to "
                f"{wanted.highest:g}"
            )
        return array


def _answer_pair(given: Fields) -> AnswerPair:
    source, prompt, plain, calibrated, right = (
        given.text(name, _LONGEST_PROMPT) for name in ("source", "prompt", "plain", "calibrated", "right")
    )
    plain_right, calibrated_right = (
        given.flag(name) if given.given(name) else None for name in ("plain_right", "calibrated_right")
    )
    return AnswerPair(source, prompt, plain, calibrated, right, plain_right, calibrated_right)


def _tensors(profile: SinkProfile) -> Iterator[tuple[str, NDArray[Any]]]:
    for source in (profile.overall, *profile.sources.values()):
        place = f"sources/{source.name}"
        for name in _STATISTICS:
            yield f"{place}/{name}", getattr(source, name)
        if source.effects is not None:
            yield f"{place}/effects", source.effects
        for mode in MODES:
            for name in _BY_MODE:
                yield f"{place}/{mode}/{name}", getattr(source.by[mode], name)
            for name in _TOKENS:
                yield f"{place}/{mode}/tokens/{name}", getattr(source.by[mode].tokens, name)
    for index, example in enumerate(profile.examples):
        for name in _EXAMPLE:
            yield f"examples/{index}/{name}", getattr(example, name)
        if example.calibrated_scores is not None:
            yield f"examples/{index}/calibrated_scores", example.calibrated_scores


def _checked_name(path: str | os.PathLike[str]) -> Path:
    if Path(path).suffix != ".safetensors":
        example = f"{Path(path).stem or 'profile'}.safetensors"
        raise ActExportError(f"{path} doesn't end with .safetensors; pass e.g. {example}")
    return Path(path)
