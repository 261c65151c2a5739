"""The calibration file: which heads to calibrate, how strongly, and where that came from."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from act_export.errors import ActExportError

FORMAT = "act-export calibration"
FORMAT_VERSION = 1
_FIELDS = {"format", "version", "model", "heads", "beta", "threshold", "threshold_mode", "provenance"}
_MODEL_FIELDS = {"architecture", "layers", "heads", "fingerprint", "name"}
DEFAULT_BETA = 0.4  # of the paper
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
        beta: One value per head.
        threshold: tau, or alpha where the mode is "relative".
        threshold_mode: "absolute" or "relative".
    """

    heads: tuple[int, ...]
    beta: tuple[float, ...]
    threshold: float
    threshold_mode: str


@dataclass(frozen=True)
class Calibration:
    """The offline result: calibrated heads, beta, threshold, and where they came from.

    Attributes:
        heads: Calibrated query heads by layer; layers without any are left out.
        beta: One value for all heads, or one per head in the order of `heads`.
        threshold: tau, or alpha where the mode is "relative".
        threshold_mode: "absolute" or "relative".
        model: The model it belongs to; None fits any model that has the layers and heads.
        provenance: Where it came from.
    """

    heads: Mapping[int, tuple[int, ...]]
    beta: float | Mapping[int, tuple[float, ...]] = DEFAULT_BETA
    threshold: float = DEFAULT_THRESHOLD["absolute"]
    threshold_mode: str = "absolute"
    model: ModelIdentity | None = None
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        """Checks every value that can be checked without the model.

        Raises:
            CalibrationError: Naming the value.
        """
        object.__setattr__(self, "heads", {layer: tuple(heads) for layer, heads in sorted(self.heads.items()) if heads})
        for layer, heads in self.heads.items():
            if layer < 0 or any(head < 0 for head in heads):
                raise CalibrationError(f"layer {layer} has heads {list(heads)}; layers and heads count from 0")
            if list(heads) != sorted(set(heads)):
                raise CalibrationError(f"layer {layer} has heads {list(heads)}; list each once, in ascending order")
        if isinstance(self.beta, Mapping):
            object.__setattr__(self, "beta", {layer: tuple(self.beta[layer]) for layer in sorted(self.beta)})
            counts = {layer: len(values) for layer, values in self.beta.items()}
            if counts != {layer: len(heads) for layer, heads in self.heads.items()}:
                raise CalibrationError("beta by layer must have one value for each calibrated head of each layer")
        for value in self._betas():
            if not 0 <= value <= 2:
                raise CalibrationError(f"beta is {value}; it must lie in [0, 2]")
        if not 0 <= self.threshold < float("inf"):
            raise CalibrationError(f"threshold is {self.threshold}; it must be a number that is not negative")
        if self.threshold_mode not in DEFAULT_THRESHOLD:
            raise CalibrationError(
                f"threshold_mode is {self.threshold_mode!r}; it must be {' or '.join(map(repr, DEFAULT_THRESHOLD))}"
            )

    def _betas(self) -> Iterable[float]:
        if isinstance(self.beta, Mapping):
            return [value for values in self.beta.values() for value in values]
        return [self.beta]

    @property
    def num_calibrated_heads(self) -> int:
        """Number of calibrated heads over all layers."""
        return sum(len(heads) for heads in self.heads.values())

    def layer(self, index: int) -> LayerCalibration | None:
        """The share of layer `index`, or None where it has no calibrated head."""
        heads = self.heads.get(index)
        if not heads:
            return None
        beta = self.beta[index] if isinstance(self.beta, Mapping) else (self.beta,) * len(heads)
        return LayerCalibration(heads, beta, self.threshold, self.threshold_mode)

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
        document["beta"] = (
            {str(layer): list(values) for layer, values in self.beta.items()}
            if isinstance(self.beta, Mapping)
            else self.beta
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
            OSError: If the folder can't be written to.
        """
        path = Path(path)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        partial = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.to_json())
            partial.chmod(0o644)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def from_json(cls, text: str, *, source: str = "calibration") -> Calibration:
        """Parses a calibration file's text, or a bare `{"layer": [heads]}` mapping.

        Args:
            text: JSON.
            source: What to call it in errors, e.g. the file's path.

        Raises:
            CalibrationError: If it isn't JSON or not of that form.
        """
        try:
            document = json.loads(text, object_pairs_hook=_without_duplicates)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{source} is not JSON: {error}") from error
        except CalibrationError as error:
            raise CalibrationError(f"{source}: {error}") from error
        if not isinstance(document, dict):
            raise CalibrationError(f"{source} holds a {type(document).__name__}; expected a JSON object")
        try:
            if "format" not in document and "heads" not in document:
                return cls(heads=_heads_from_json(document))
            return cls._from_document(document)
        except CalibrationError as error:
            raise CalibrationError(f"{source}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"{source}: missing or malformed field: {error!r}") from error

    @classmethod
    def _from_document(cls, document: dict[str, Any]) -> Calibration:
        unknown = sorted(set(document) - _FIELDS)
        if unknown:
            raise CalibrationError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(_FIELDS))}")
        if document.get("format", FORMAT) != FORMAT:
            raise CalibrationError(f"format is {document['format']!r}; expected {FORMAT!r}")
        version = document.get("version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise CalibrationError(f"version is {version!r}; this act-export reads version {FORMAT_VERSION}")
        model = document.get("model")
        provenance = document.get("provenance")
        mode = document.get("threshold_mode", "absolute")
        beta = document.get("beta", DEFAULT_BETA)
        return cls(
            heads=_heads_from_json(document["heads"], keep_order=isinstance(beta, dict)),
            beta={int(k): tuple(map(float, v)) for k, v in beta.items()} if isinstance(beta, dict) else float(beta),
            threshold=float(document.get("threshold", DEFAULT_THRESHOLD.get(mode, 0.0))),
            threshold_mode=mode,
            model=None if model is None else _model_from_json(model),
            provenance=None
            if provenance is None
            else Provenance(**{**provenance, "tasks": tuple(provenance.get("tasks", ()))}),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Reads a calibration file.

        Raises:
            CalibrationError: If it can't be read or isn't a calibration.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"can't read the calibration {path}: {error}") from error
        return cls.from_json(text, source=str(path))


def _model_from_json(model: dict[str, Any]) -> ModelIdentity:
    unknown = sorted(set(model) - _MODEL_FIELDS)
    if unknown:
        raise CalibrationError(
            f"model has an unknown field {unknown[0]!r}; known are {', '.join(sorted(_MODEL_FIELDS))}"
        )
    return ModelIdentity(
        model["architecture"], model["layers"], model["heads"], model.get("fingerprint"), model.get("name")
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CalibrationError(f'"{twice}" occurs twice')
    return dict(pairs)


def _heads_from_json(mapping: Any, *, keep_order: bool = False) -> dict[int, tuple[int, ...]]:
    """Heads by layer, ascending; with `keep_order` as they stand, because betas stand in the same order."""
    if not isinstance(mapping, dict):
        raise CalibrationError(f'heads are {mapping!r}; expected {{"layer": [heads]}}')
    heads: dict[int, tuple[int, ...]] = {}
    for layer, values in mapping.items():
        if not layer.lstrip("-").isdigit() or str(int(layer)) != layer or not isinstance(values, list):
            raise CalibrationError(f'found "{layer}": {values!r}; expected {{"layer": [heads]}}')
        if not all(type(value) is int for value in values):
            raise CalibrationError(f"layer {layer} has heads {values!r}; expected integers")
        heads[int(layer)] = tuple(values if keep_order else sorted(values))
    return heads


def _indent_but_keep_number_lists_on_one_line(document: dict[str, Any]) -> str:
    def render(value: Any, indent: str) -> str:
        if isinstance(value, dict) and value:
            rows = [f"{indent}  {json.dumps(key)}: {render(item, indent + '  ')}" for key, item in value.items()]
            return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
        return json.dumps(value, ensure_ascii=False)

    return render(document, "")
