"""Unfinished work of a profile on disk: the sums so far, and how many steps they are of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from act_export.errors import ActExportError
from act_export.files import check_writable, write_whole
from act_export.profile.tally import Tally
from act_export.staging import sweep


class PartialTally:
    """The tallies of one profile, in a file named by what the profile is of."""

    def __init__(self, folder: Path, digest: str, tallies: Sequence[Tally]) -> None:
        """Takes the folder, what names this profile among others, and the tallies that `resume` fills."""
        self.path = folder / f"{digest}.safetensors"
        self.tallies = tallies

    def resume(self) -> int:
        """Takes the sums over from the file, if there is one.

        Returns:
            Number of steps that they are of.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            done = int(metadata["done"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return 0  # there is none, or nothing that can be gone on from
        wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in self._sums().items()}
        if {name: (tensor.shape, tensor.dtype) for name, tensor in sums.items()} != wanted:
            return 0
        if done < 0 or metadata.get("sha256") != _digest(sums, done) or not all(map(_is_finite, sums.values())):
            return 0  # of another version, or damaged
        for name, tensor in self._sums().items():
            tensor.copy_(sums[name])
        return done

    def check(self) -> None:
        """Refuses, before any work, a folder that can't be written to.

        Raises:
            ActExportError: With the folder, and what to do.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        check_writable(self.path.parent, advice="set XDG_CACHE_HOME to another folder")
        sweep(self.path.parent)

    def save(self, done: int) -> None:
        """Writes the sums of the first `done` steps, whole or not at all.

        Raises:
            ActExportError: If they can't be written.
        """
        try:
            sums = self._sums()
            write_whole(self.path, save(sums, {"done": str(done), "sha256": _digest(sums, done)}))
        except OSError as error:
            raise self._unwritable(error) from error

    def discard(self) -> None:
        """Removes the file: the work is finished."""
        self.path.unlink(missing_ok=True)

    def _unwritable(self, error: OSError) -> ActExportError:
        return ActExportError(
            f"can't keep unfinished work in {self.path.parent}: {error.strerror}; make room there, or set "
            f"XDG_CACHE_HOME to another folder"
        )

    def _sums(self) -> dict[str, torch.Tensor]:
        return {
            f"{index}/{name}": sums for index, tally in enumerate(self.tallies) for name, sums in tally.sums.items()
        }


def _digest(sums: Mapping[str, torch.Tensor], done: int) -> str:
    """Different for other sums, or of other steps."""
    found = hashlib.sha256(str(done).encode())
    for name, tensor in sorted(sums.items()):
        found.update(f" {name} {tensor.dtype} {list(tensor.shape)} ".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
