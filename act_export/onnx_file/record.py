"""What an ONNX file says of itself in its metadata: who wrote it, from which model, and how it is to be run.

Whoever reads a file reads this record, which takes nothing as it comes: a field of another type, or a number out of
range, is refused with its key.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.file import Calibration, ModelIdentity
from act_export.errors import ActExportError, others_errors
from act_export.json_fields import LARGEST, Fields
from act_export.json_file import parse_json
from act_export.onnx_file.packed_state import PROPERTY, PackedState
from act_export.onnx_file.wire import fields as wire_fields

PREFIX = "act_export."
GRAFT, PACKED = PREFIX + "graft", PREFIX + PROPERTY
_ADVICE = "the file was changed after it was written, or is damaged: write it again"
_MOST_LAYERS = 100_000
_GRAFT_FORMAT = 1


@dataclass(frozen=True)
class Limits:
    """What the model can take, and where generation ends.

    Attributes:
        vocabulary: Number of token ids; None if it isn't recorded.
        context: Largest number of tokens of a sequence; None if there is none.
        stop_tokens: Generation ends after one of these.
        placeholders: Tokens that stand for images, videos or sound.
    """

    vocabulary: int | None = None
    context: int | None = None
    stop_tokens: tuple[int, ...] = ()
    placeholders: tuple[int, ...] = ()

    @classmethod
    def of(cls, fields: Fields) -> Limits:
        """Those of a JSON object; what it doesn't say isn't limited."""
        return cls(
            fields.whole("vocabulary", 1) if fields.given("vocabulary") else None,
            fields.whole("context", 1) if fields.given("context") else None,
            fields.wholes("stop_tokens") if fields.given("stop_tokens") else (),
            fields.wholes("placeholders") if fields.given("placeholders") else (),
        )


@dataclass(frozen=True)
class GraftRecord:
    """What a graft changed in a model that somebody else exported.

    Attributes:
        digest: sha256 of the model before, without the weights in other files.
        removed: Index among the nodes, and the node as protobuf writes it, in ascending order.
        inputs: Graph inputs that were added.
        outputs: Graph outputs that were added.
        functions: Functions that were added, by name.
        opsets: Domains that were added.
        metadata: Keys that were added.
        shares_buffers: Whether past and present of every layer may be the same memory, longer than what is in it.
        pads_left: Whether every layer can take padding before a sequence.
        layers: Layers that were calibrated.
        genai_config: Text of the folder's genai_config.json before; None where a file was grafted.
        had_library: Whether the folder had a native library before.
        renamed: Files that weights lie in, and what they were called before.
    """

    digest: str
    removed: tuple[tuple[int, bytes], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    functions: tuple[str, ...]
    opsets: tuple[str, ...]
    metadata: tuple[str, ...]
    shares_buffers: bool
    pads_left: bool
    layers: tuple[int, ...]
    genai_config: str | None = None
    had_library: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text that travels in the file's metadata."""
        left_out = {"removed"} if self.renamed else {"removed", "renamed"}
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in left_out}
        removed = [[index, base64.b64encode(node).decode()] for index, node in self.removed]
        return json.dumps({"format": _GRAFT_FORMAT, **fields, "removed": removed})

    @classmethod
    def from_json(
        cls, text: str, what: str = "the record of the graft", *, error: type[ActExportError] = ActExportError
    ) -> GraftRecord:
        """Reads the text.

        Raises:
            ActExportError: Or `error`, if it isn't such a record, or a later version's.
        """
        fields = Fields(parse_json(text, what, error=error, advice=_ADVICE), what, error=error, advice=_ADVICE)
        if fields.value("format") != _GRAFT_FORMAT:
            raise error(f"{what}: the file was grafted by another version of act-export, which has to undo it")
        fields.only({"format", *cls.__dataclass_fields__})
        return cls(
            digest=fields.text("digest"),
            removed=tuple(_removed(each, fields) for each in fields.items("removed")),
            inputs=fields.texts("inputs"),
            outputs=fields.texts("outputs"),
            functions=fields.texts("functions"),
            opsets=fields.texts("opsets"),
            metadata=fields.texts("metadata"),
            shares_buffers=fields.flag("shares_buffers"),
            pads_left=fields.flag("pads_left"),
            layers=fields.wholes("layers", 0, _MOST_LAYERS),
            genai_config=fields.text("genai_config", 16 << 20) if fields.given("genai_config") else None,
            had_library=fields.flag("had_library") if fields.given("had_library") else False,
            renamed=_texts(fields.inner("renamed")) if fields.given("renamed") else {},
        )


def _texts(fields: Fields) -> dict[str, str]:
    return {name: fields.text(name) for name in fields.members}


def _removed(entry: Any, fields: Fields) -> tuple[int, bytes]:
    if not isinstance(entry, list) or len(entry) != 2:
        raise fields.refused("has something in removed that is no index with a node")
    given = Fields(dict(zip(("index", "node"), entry, strict=True)), f"{fields.what}: removed", error=fields.error)
    with others_errors(f"{fields.what}: a node in removed can't be read", _ADVICE, error=fields.error):
        index, node = given.whole("index"), base64.b64decode(given.text("node", 16 << 20), validate=True)
        for _ in wire_fields(node, [(0, len(node))]):
            pass  # a message, at least: what it says is for who puts it back
        return index, node


@dataclass(frozen=True)
class FileRecord:
    """The record of a file.

    Attributes:
        version: Version of act-export that wrote it; empty where act-export didn't.
        source: What it was made from.
        model: The model that it is, as calibrations name it; None where it doesn't say.
        limits: What the model can take, and where generation ends.
        dtype: How weights, activations and cache are stored; int8 and int4 are of weights.
        family: Of a text tower, the model type of the vision-language model that it is of; else empty.
        revision: Hash of the hub's commit that it was made from; empty where it wasn't from the hub.
        accuracy_level: Of int8 and int4, see `act_export.onnx_file.precision.Quantization`; None of others.
        block_size: The same.
        generation: Fields of the model's generation configuration that aren't transformers' defaults; None where it
            doesn't say, as in files of earlier versions.
        recompute_beyond: Tokens beyond which the whole sequence has to be computed again, because rotary frequencies
            change there; None where they don't.
        calibrations: What it can be calibrated to; None for a plain export.
        graft: Of a model that somebody else exported, what was changed; else None.
        packed: Where the sinks are in a cache that holds them too; None where they have inputs of their own.
    """

    version: str = ""
    source: str = ""
    model: ModelIdentity | None = None
    limits: Limits = field(default_factory=Limits)
    dtype: str = "float32"  # files of earlier versions don't say
    family: str = ""
    revision: str = ""
    accuracy_level: int | None = None
    block_size: int | None = None
    generation: Mapping[str, Any] | None = None
    recompute_beyond: int | None = None
    calibrations: CalibrationSet | None = None
    graft: GraftRecord | None = None
    packed: PackedState | None = None

    @property
    def ours(self) -> bool:
        """Whether act-export wrote the file."""
        return bool(self.version)

    @property
    def calibration(self) -> Calibration | None:
        """That holds where a request doesn't say; None for plain."""
        return self.calibrations.default_calibration if self.calibrations is not None else None

    @classmethod
    def read(
        cls, properties: Mapping[str, str], what: str, *, error: type[ActExportError] = ActExportError
    ) -> FileRecord:
        """The record in a file's metadata; of a file that isn't act-export's an empty one.

        Args:
            properties: The metadata, by key.
            what: The file, for errors.
            error: What is raised.

        Raises:
            ActExportError: Or `error`, naming the key, its value and what to do.
        """
        texts = Fields(properties, f"the metadata of {what}", error=error, advice=_ADVICE)

        def text(name: str, default: str = "") -> str:
            return texts.text(PREFIX + name) if texts.given(PREFIX + name) else default

        def fields(name: str) -> Fields:
            called = f"{PREFIX}{name} of {what}"
            found = parse_json(properties[PREFIX + name], called, error=error, advice=_ADVICE)
            return Fields(found, called, error=error, advice=_ADVICE)

        def number(name: str, highest: int) -> int | None:
            digits = text(name)
            if digits and not (digits.isdecimal() and len(digits) < 10 and int(digits) <= highest):
                raise texts.refused(f"has {PREFIX}{name} = {digits[:20]!r}; it must be a number up to {highest}")
            return int(digits) if digits else None

        if PREFIX + "calibration" in properties:
            raise error(
                f"{what} was written by act-export {text('version')}, which kept its calibration where this one can't "
                f"change it: write it again, or run it with that version"
            )
        return cls(
            version=text("version"),
            source=text("source"),
            model=_identity(fields("model")) if PREFIX + "model" in properties else None,
            limits=Limits.of(fields("limits")) if PREFIX + "limits" in properties else Limits(),
            dtype=text("dtype", "float32"),
            family=text("family"),
            revision=text("revision"),
            accuracy_level=number("accuracy_level", 4),
            block_size=number("block_size", LARGEST),
            generation=fields("generation").members if PREFIX + "generation" in properties else None,
            recompute_beyond=number("recompute_beyond", LARGEST),
            calibrations=CalibrationSet.of_fields(fields("calibrations"))
            if PREFIX + "calibrations" in properties
            else None,
            graft=GraftRecord.from_json(properties[GRAFT], f"{GRAFT} of {what}", error=error)
            if GRAFT in properties
            else None,
            packed=PackedState.of(fields(PROPERTY)) if PACKED in properties else None,
        )

    def write(self) -> dict[str, str]:
        """The metadata, by key; what a file need not say is left out."""
        limits = {name: value for name, value in asdict(self.limits).items() if name != "placeholders" or value}
        texts = {
            "version": self.version,
            "model": json.dumps(asdict(self.model)) if self.model is not None else "",
            "source": self.source,
            "dtype": self.dtype,
            "limits": json.dumps(limits),
            "family": self.family,
            "revision": self.revision,
            "accuracy_level": "" if self.accuracy_level is None else str(self.accuracy_level),
            "block_size": "" if self.block_size is None else str(self.block_size),
            "generation": "" if self.generation is None else json.dumps(self.generation),
            "recompute_beyond": "" if self.recompute_beyond is None else str(self.recompute_beyond),
            "calibrations": self.calibrations.to_json() if self.calibrations is not None else "",
            "graft": self.graft.to_json() if self.graft is not None else "",
            PROPERTY: json.dumps(self.packed.to_fields()) if self.packed is not None else "",
        }
        return {PREFIX + name: text for name, text in texts.items() if text}


def _identity(fields: Fields) -> ModelIdentity:
    fields.only(set(ModelIdentity.__dataclass_fields__))
    return ModelIdentity(
        fields.text("architecture"),
        fields.whole("num_layers", 1, _MOST_LAYERS),
        fields.whole("num_heads", 0, _MOST_LAYERS),
        fields.text("fingerprint") if fields.given("fingerprint") else None,
        fields.text("name") if fields.given("name") else None,
    )
