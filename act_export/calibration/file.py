"""The calibration file: which heads to calibrate, how strongly, and where that came from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from act_export.errors import ActExportError, shown
from act_export.files import write_whole
from act_export.json_fields import Fields
from act_export.json_file import parse_json, read_bytes

FORMAT = "act-export calibration"
FORMAT_VERSION = 1
_FIELDS = {"format", "version", "model", "heads", "beta", "gamma", "threshold", "threshold_mode", "provenance"}
_MODEL_FIELDS = {"architecture", "layers", "heads", "fingerprint", "name"}
DEFAULT_BETA = 0.4  # of the paper
STRENGTHS = {"beta": (0.0, 2.0), "gamma": (1 / 16, 16.0)}  # lowest and highest

Strength = float | Mapping[int, tuple[float, ...]]  # of all heads, or by layer one for each in the order of the heads
DEFAULT_THRESHOLD = {"absolute": 0.1, "relative": 5.0}  # of the released code; of the paper


class CalibrationError(ActExportError):
    """A calibration that is malformed or doesn't fit the model."""


@dataclass(frozen=True)
class ModelIdentity:
    """What a calibration must agree with before it is applied.

    Attributes:
        architecture: The configuration's model type, e.g. "llama".
        num_layers: Number of attention layers.
        num_heads: Number of query heads of each layer.
        fingerprint: "sha256:..." over the weights, see `act_export.checkpoint.fingerprint`; None where it isn't known:
            any weights of the shape fit.
        name: Hub id of the model that heads were published for without its weights; a loaded model's identity has none.
    """

    architecture: str
    num_layers: int
    num_heads: int
    fingerprint: str | None = None
    name: str | None = None

    def differences(self, other: ModelIdentity) -> list[tuple[str, object, object]]:
        """What tells the two models apart: what it is called, this one's value, the other's.

        A fingerprint that isn't known agrees with any; names are not compared.
        """
        compared: list[tuple[str, object, object]] = [
            ("architecture", self.architecture, other.architecture),
            ("number of layers", self.num_layers, other.num_layers),
            ("number of heads", self.num_heads, other.num_heads),
        ]
        if self.fingerprint is not None and other.fingerprint is not None:
            compared.append(("fingerprint of the weights", self.fingerprint, other.fingerprint))
        return [(what, mine, theirs) for what, mine, theirs in compared if mine != theirs]


@dataclass(frozen=True)
class Provenance:
    """Where a calibration came from; nothing here changes what it does.

    Attributes:
        method: How the heads were chosen, e.g. "gates".
        tasks: Names of the tasks they were chosen on.
        samples: Number of prompts of each split, e.g. {"rank": 96, "choose": 128, "report": 240}.
        seed: Seed of the splits.
        plain_accuracy: Accuracy on the report split without calibration, in [0, 1].
        calibrated_accuracy: The same with it.
        versions: Versions of the packages that took part.
        notes: Anything else worth keeping.
        source: Where somebody else published the heads, e.g. {"paper": "...", "repository": "...", "commit": "..."}.
    """

    method: str
    tasks: tuple[str, ...] = ()
    samples: Mapping[str, int] = field(default_factory=dict)
    seed: int | None = None
    plain_accuracy: float | None = None
    calibrated_accuracy: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerCalibration:
    """One layer's share of a calibration, ready for the operator's attributes.

    Attributes:
        heads: Calibrated query heads, ascending.
        beta: One value per head, of its later sinks.
        gamma: One value per head, of its initial token.
        threshold: tau, or alpha where the mode is "relative".
        threshold_mode: "absolute" or "relative".
    """

    heads: tuple[int, ...]
    beta: tuple[float, ...]
    gamma: tuple[float, ...]
    threshold: float
    threshold_mode: str

    @property
    def strengths(self) -> list[tuple[float, float, float]]:
        """beta, gamma and threshold of each head, as the operator takes them."""
        return [(beta, gamma, self.threshold) for beta, gamma in zip(self.beta, self.gamma, strict=True)]


@dataclass(frozen=True)
class Calibration:
    """The offline result: calibrated heads, their strengths, threshold, and where they came from.

    Attributes:
        heads: Calibrated query heads by layer; layers without any are left out.
        beta: Strength of the later sinks: one value for all heads, or one per head in the order of `heads`.
        threshold: tau, or alpha where the mode is "relative".
        threshold_mode: "absolute" or "relative".
        model: The model it belongs to; None fits any model that has the layers and heads.
        provenance: Where it came from.
        gamma: Strength of the initial token, given as beta is.
    """

    heads: Mapping[int, tuple[int, ...]]
    beta: Strength = DEFAULT_BETA
    threshold: float = DEFAULT_THRESHOLD["absolute"]
    threshold_mode: str = "absolute"
    model: ModelIdentity | None = None
    provenance: Provenance | None = None
    gamma: Strength = 1.0

    def __post_init__(self) -> None:
        """Checks every value that can be checked without the model.

        Raises:
            CalibrationError: Naming the value.
        """
        object.__setattr__(self, "heads", {layer: tuple(heads) for layer, heads in sorted(self.heads.items()) if heads})
        for layer, heads in self.heads.items():
            if layer < 0 or any(head < 0 for head in heads):
                raise CalibrationError(f"layer {layer} has heads {shown(list(heads))}; layers and heads count from 0")
            if list(heads) != sorted(set(heads)):
                raise CalibrationError(
                    f"layer {layer} has heads {shown(list(heads))}; list each once, in ascending order"
                )
        for name, (lowest, highest) in STRENGTHS.items():
            given = getattr(self, name)
            if isinstance(given, Mapping):
                object.__setattr__(self, name, {layer: tuple(given[layer]) for layer in sorted(given)})
                counts = {layer: len(values) for layer, values in given.items()}
                if counts != {layer: len(heads) for layer, heads in self.heads.items()}:
                    raise CalibrationError(
                        f"{name} by layer must have one value for each calibrated head of each layer"
                    )
            values = chain(*given.values()) if isinstance(given, Mapping) else [given]
            wrong = next((value for value in values if not lowest <= value <= highest), None)
            if wrong is not None:
                raise CalibrationError(f"{name} is {wrong}; it must lie in [{lowest:g}, {highest:g}]")
        if not 0 <= self.threshold < float("inf"):
            raise CalibrationError(f"threshold is {self.threshold}; it must be a number that is not negative")
        if self.threshold_mode not in DEFAULT_THRESHOLD:
            raise CalibrationError(
                f"threshold_mode is {self.threshold_mode!r}; it must be {' or '.join(map(repr, DEFAULT_THRESHOLD))}"
            )

    @property
    def num_calibrated_heads(self) -> int:
        """Number of calibrated heads over all layers."""
        return sum(len(heads) for heads in self.heads.values())

    def layer(self, index: int) -> LayerCalibration | None:
        """The share of layer `index`, or None where it has no calibrated head."""
        heads = self.heads.get(index)
        if not heads:
            return None
        beta, gamma = (
            given[index] if isinstance(given, Mapping) else (given,) * len(heads) for given in (self.beta, self.gamma)
        )
        return LayerCalibration(heads, beta, gamma, self.threshold, self.threshold_mode)

    def with_overrides(
        self, *, beta: float | None = None, threshold: float | None = None, threshold_mode: str | None = None
    ) -> Calibration:
        """This calibration with other values; an accuracy measured with the old ones is dropped.

        A new mode without a new threshold takes that mode's default threshold.

        Raises:
            CalibrationError: If a value is out of range.
        """
        new_mode = threshold_mode if threshold_mode is not None else self.threshold_mode
        if threshold is None:
            threshold = self.threshold if new_mode == self.threshold_mode else DEFAULT_THRESHOLD.get(new_mode, 0.0)
        changed = replace(self, beta=self.beta if beta is None else beta, threshold=threshold, threshold_mode=new_mode)
        if changed == self or changed.provenance is None:
            return changed
        measured_otherwise = replace(changed.provenance, plain_accuracy=None, calibrated_accuracy=None)
        return replace(changed, provenance=measured_otherwise)

    def check_fits(self, model: ModelIdentity) -> None:
        """Refuses a model that this calibration isn't for.

        Raises:
            CalibrationError: Naming every difference, or the first layer or head that the model doesn't have.
        """
        if self.model is not None:
            differences = [
                f"{what} is {mine} in the calibration, {theirs} in the model"
                for what, mine, theirs in self.model.differences(model)
            ]
            if differences:
                raise CalibrationError(
                    "the calibration belongs to another model: "
                    + "; ".join(differences)
                    + '. To use its heads all the same, pass a file with nothing but {"layer": [heads]}'
                )
        for layer, heads in self.heads.items():
            if layer >= model.num_layers:
                raise CalibrationError(
                    f"layer {layer} is out of range; the model has layers 0 to {model.num_layers - 1}"
                )
            if heads[-1] >= model.num_heads:
                raise CalibrationError(
                    f"head {heads[-1]} of layer {layer} is out of range; the model has heads 0 to {model.num_heads - 1}"
                )

    def to_json(self) -> str:
        """The file's text: stable, so that equal calibrations give equal bytes."""
        document: dict[str, Any] = {"format": FORMAT, "version": FORMAT_VERSION}
        if self.model is not None:
            known = {
                "name": self.model.name,
                "architecture": self.model.architecture,
                "layers": self.model.num_layers,
                "heads": self.model.num_heads,
                "fingerprint": self.model.fingerprint,
            }
            document["model"] = {key: value for key, value in known.items() if value is not None}
        document["heads"] = {str(layer): list(heads) for layer, heads in self.heads.items()}
        for name, given in (("beta", self.beta), ("gamma", self.gamma)):
            if name == "beta" or given != 1.0:  # files that don't use it stay readable for those who don't know it
                document[name] = (
                    {str(layer): list(values) for layer, values in given.items()}
                    if isinstance(given, Mapping)
                    else given
                )
        document["threshold"] = self.threshold
        document["threshold_mode"] = self.threshold_mode
        if self.provenance is not None:
            document["provenance"] = {
                key: value for key, value in asdict(self.provenance).items() if value not in (None, {}, ())
            }
        return _indent_but_keep_number_lists_on_one_line(document) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file, whole or not at all.

        Raises:
            CalibrationError: If a link, a device or the like is there.
            OSError: If the folder can't be written to.
        """
        write_whole(Path(path), self.to_json(), error=CalibrationError)

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "calibration") -> Calibration:
        """Parses a calibration file's text, or a bare `{"layer": [heads]}` mapping.

        Args:
            text: JSON.
            source: What to call it in errors, e.g. the file's path.

        Raises:
            CalibrationError: If it isn't JSON or not of that form.
        """
        fields = Fields(parse_json(text, source, error=CalibrationError), source, error=CalibrationError)
        bare = "format" not in fields.members and "heads" not in fields.members
        given = {"heads": heads_of(fields)} if bare else _whole(fields)
        try:
            return cls(**given)
        except CalibrationError as error:
            raise CalibrationError(f"{source}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Reads a calibration file.

        Raises:
            CalibrationError: If it can't be read or isn't a calibration.
        """
        content = read_bytes(Path(path), f"the calibration {path}", error=CalibrationError)
        return cls.from_json(content, source=str(path))


def _whole(fields: Fields) -> dict[str, Any]:
    """The fields of a `Calibration`, of a file that says more than heads."""
    fields.only(_FIELDS)
    for name, own in (("format", FORMAT), ("version", FORMAT_VERSION)):
        if name in fields.members and (type(fields.members[name]), fields.members[name]) != (type(own), own):
            raise fields.refused(f"has {name} = {shown(fields.members[name])}; this act-export reads {own!r}")
    mode = fields.text("threshold_mode", 100) if "threshold_mode" in fields.members else "absolute"
    per_head = any(isinstance(fields.members.get(name), dict) for name in STRENGTHS)
    known = "threshold" in fields.members
    return {
        "heads": heads_of(fields.inner("heads"), keep_order=per_head),
        **{name: _strength(fields, name) for name in STRENGTHS if name in fields.members},
        "threshold": fields.number("threshold") if known else DEFAULT_THRESHOLD.get(mode, 0.0),
        "threshold_mode": mode,
        "model": _model(fields.inner("model")) if fields.given("model") else None,
        "provenance": _provenance(fields.inner("provenance")) if fields.given("provenance") else None,
    }


def _strength(fields: Fields, name: str) -> Strength:
    if not isinstance(fields.members[name], dict):
        return fields.number(name)
    by_layer = fields.inner(name)
    return {_layer(layer, by_layer): by_layer.numbers(layer) for layer in by_layer.members}


def _model(fields: Fields) -> ModelIdentity:
    fields.only(_MODEL_FIELDS)
    return ModelIdentity(
        fields.text("architecture"),
        fields.whole("layers", 1),
        fields.whole("heads", 1),
        fields.text("fingerprint") if fields.given("fingerprint") else None,
        fields.text("name") if fields.given("name") else None,
    )


def _provenance(fields: Fields) -> Provenance:
    fields.only(set(Provenance.__dataclass_fields__))

    def accuracy(name: str) -> float | None:
        return fields.number(name, 0, 1) if fields.given(name) else None

    def members(name: str) -> Fields:
        return fields.inner(name) if fields.given(name) else Fields({}, name)

    samples, versions, source = members("samples"), members("versions"), members("source")
    return Provenance(
        fields.text("method"),
        fields.texts("tasks") if fields.given("tasks") else (),
        {name: samples.whole(name) for name in samples.members},
        fields.whole("seed", -(2**63), 2**63) if fields.given("seed") else None,
        accuracy("plain_accuracy"),
        accuracy("calibrated_accuracy"),
        {name: versions.text(name) for name in versions.members},
        dict(members("notes").members),
        {name: source.text(name) for name in source.members},
    )


def heads_of(fields: Fields, *, keep_order: bool = False) -> dict[int, tuple[int, ...]]:
    """Heads by layer, ascending; with `keep_order` as they stand, because strengths stand in the same order."""
    heads = {_layer(name, fields): fields.wholes(name) for name in fields.members}
    return heads if keep_order else {layer: tuple(sorted(listed)) for layer, listed in heads.items()}


def _layer(name: str, fields: Fields) -> int:
    if not (name.isascii() and name.isdecimal() and len(name) < 10 and str(int(name)) == name):
        raise fields.refused(f'has {shown(name)}, which is no layer; expected {{"layer": [heads]}}')
    return int(name)


def _indent_but_keep_number_lists_on_one_line(document: dict[str, Any]) -> str:
    def render(value: Any, indent: str) -> str:
        if isinstance(value, dict) and value:
            rows = [f"{indent}  {json.dumps(key)}: {render(item, indent + '  ')}" for key, item in value.items()]
            return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
        return json.dumps(value, ensure_ascii=False)

    return render(document, "")
