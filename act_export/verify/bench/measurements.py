"""What a benchmark is asked for, and what it measured."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from act_export.errors import ActExportError
from act_export.files import write_whole
from act_export.runtime.device import Device
from act_export.runtime.node_placement import NodePlacement
from act_export.verify.bench.child import Memory, Turn
from act_export.verify.bench.contenders import Contender
from act_export.verify.bench.machine import Machine

PYTORCH_TOKENS = 16
_LEAST_TOKENS = 2  # the first comes with the prompt, the second is decoded


@dataclass(frozen=True)
class BenchRequest:
    """What to measure.

    Attributes:
        file: The exported model, or its folder.
        against: Other files of the same model.
        pytorch: MODEL that PyTorch runs with the file's calibration; None for no such contender.
        revision: Of that model on the hub; None for the main branch.
        trust_remote_code: Whether code that comes with that model may run.
        portable: Run the portable functions of files of act-export, instead of the native library.
        device: "cpu", "cuda" or "cuda:N", of all contenders.
        prompt_tokens: Of each sequence.
        new_tokens: Generated after each prompt, the first of them from the prompt.
        batch: Number of sequences.
        threads: Within an operator; None leaves their number to ONNX Runtime.
        rounds: Turns of each contender.
        pytorch_rounds: Turns of PyTorch, at the most `rounds`; None for as many.
        pytorch_tokens: New tokens of PyTorch in a turn, at the most `new_tokens`: it is slow.
        seed: Of the prompt's tokens.
        calibrations: Of the file, each in turn: names, calibration files or adapters; none for the file's default.
    """

    file: Path
    against: tuple[Path, ...] = ()
    pytorch: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    portable: bool = False
    device: str = "cpu"
    prompt_tokens: int = 1024
    new_tokens: int = 128
    batch: int = 1
    threads: int | None = None
    rounds: int = 5
    pytorch_rounds: int | None = None
    pytorch_tokens: int = PYTORCH_TOKENS
    seed: int = 0
    calibrations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ActExportError for a number out of range, SessionError for a device that isn't one."""
        Device.parse(self.device)
        least = {
            "prompt_tokens": 1,
            "new_tokens": _LEAST_TOKENS,
            "batch": 1,
            "rounds": 1,
            "threads": 1,
            "pytorch_rounds": 1,
            "pytorch_tokens": _LEAST_TOKENS,
            "seed": 0,
        }
        for name, smallest in least.items():
            number = getattr(self, name)
            if number is not None and number < smallest:
                raise ActExportError(f"{name.replace('_', ' ')} is {number}; give {smallest} or more")


@dataclass(frozen=True)
class Measured:
    """One contender's numbers.

    Attributes:
        contender: Which, and how it was run.
        turns: One per round.
        memory: Of a process of its own.
        prompt_ms: Of the prompt's forward pass, median.
        prompt_tokens_per_s: Tokens of the whole batch by that time.
        first_token_ms: Time to first token, median: the prompt with reserving the cache and choosing the token.
        decode_ms: Of a further token of each sequence: the mean of a turn's steps, median.
        decode_tokens_per_s: Tokens of the whole batch by that time.
        same_tokens: Greedy tokens that are those of the file, up to the first that isn't, in the worst sequence.
        placement: Where its nodes run; None on the CPU, and for PyTorch.
    """

    contender: Contender
    turns: tuple[Turn, ...]
    memory: Memory
    prompt_ms: float
    prompt_tokens_per_s: float
    first_token_ms: float
    decode_ms: float
    decode_tokens_per_s: float
    same_tokens: int
    placement: NodePlacement | None = None


@dataclass(frozen=True)
class Ratio:
    """The file's number by another contender's: below 1 it takes less time, or less memory.

    Attributes:
        of_medians: Over the rounds, and for decoding the steps, that both have.
        quartiles: Lower and upper, of the rounds' own ratios; None for memory, which is measured once.
    """

    of_medians: float
    quartiles: tuple[float, float] | None

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles."""
        return (self.quartiles[1] - self.quartiles[0]) / 2 if self.quartiles is not None else 0.0


@dataclass(frozen=True)
class Ratios:
    """The file by one other contender.

    Attributes:
        against: The other's name.
        prompt: Of the prompt's forward pass.
        first_token: Of the time to first token.
        decode: Of the time of a decoded token.
        memory: Of the largest resident size.
        memory_beyond_weights: Of that without the weights; None where that isn't more than they are.
        gpu_memory: Of what they take of the GPU; None on the CPU.
        rounds: That both have.
        steps: Decoded tokens of a turn that both have.
        file_prompt_ms: The file's prompt over those rounds, median.
        file_decode_ms: The file's decoded token over those rounds and steps, median.
    """

    against: str
    prompt: Ratio
    first_token: Ratio
    decode: Ratio
    memory: Ratio
    memory_beyond_weights: Ratio | None
    gpu_memory: Ratio | None
    rounds: int
    steps: int
    file_prompt_ms: float
    file_decode_ms: float


@dataclass(frozen=True)
class BenchReport:
    """Everything that was measured; the file is the first contender.

    Attributes:
        request: What was asked for.
        contenders: The file, then the others.
        ratios: One for each of the others.
        threads: That each contender had within an operator.
        machine: That it was measured on.
        load_before: Load average of the last minute, before.
        load_after: And after.
    """

    request: BenchRequest
    contenders: tuple[Measured, ...]
    ratios: tuple[Ratios, ...]
    threads: int
    machine: Machine
    load_before: float
    load_after: float

    def to_json(self) -> str:
        """Every number, those of each round too."""
        return json.dumps(asdict(self), indent=2, default=str) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_json`, whole or not at all.

        Raises:
            ActExportError: If the folder can't be written to, or something other than a file is there.
        """
        try:
            write_whole(Path(path), self.to_json())
        except OSError as error:
            raise ActExportError(f"can't write {path}: {error.strerror}") from error
