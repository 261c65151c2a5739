"""MODEL, fetched and loaded while the user sees what is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from act_export.commands.console import note, status

if TYPE_CHECKING:
    from act_export.calibration.file import Calibration
    from act_export.checkpoint.fetch import Fetched
    from act_export.checkpoint.load import Checkpoint


def check_device(device: str | None) -> None:
    """Raises ActExportError early where ONNX Runtime can't run on a device (None: the CPU)."""
    from act_export.runtime.cuda import prepare_cuda
    from act_export.runtime.device import Device, import_onnxruntime

    place = Device.parse(device or "cpu")
    onnxruntime = import_onnxruntime()
    if place.is_cuda:
        prepare_cuda(onnxruntime, place.index, native=True)


@dataclass(frozen=True)
class AskedModel:
    """MODEL, and how it is to be loaded; see `act_export.checkpoint.load_checkpoint`."""

    name: str
    dtype: str = "float32"
    device: str | None = None
    device_map: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def check(self) -> None:
        """Refuses, before torch is imported, a model that isn't there, or can't be loaded as it is asked for."""
        from act_export.checkpoint.fetch import check_source
        from act_export.checkpoint.placement import Placement

        Placement(self.dtype, self.device, self.device_map)
        check_source(self.name, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def fetch(self, *, fits: Sequence[Calibration] = ()) -> Fetched:
        """Gets its files, while the hub client shows its own bars; see `act_export.checkpoint.fetch_checkpoint`."""
        from act_export.checkpoint.hub import is_on_hub

        if is_on_hub(self.name):
            note(f"looking for {self.name} on the hub, or in its cache")
        from act_export.checkpoint.fetch import fetch_checkpoint

        return fetch_checkpoint(self.name, revision=self.revision, trust_remote_code=self.trust_remote_code, fits=fits)

    def load(self, *, stream: bool | None = False, fits: Sequence[Calibration] = ()) -> Checkpoint:
        """Loads it, saying so."""
        from act_export.checkpoint.hub import is_on_hub
        from act_export.checkpoint.placement import Placement

        Placement(self.dtype, self.device, self.device_map)  # before a download; whether it is there, that asks first
        fetched = self.fetch(fits=fits) if is_on_hub(self.name) else None
        placed: dict[str, Any] = {
            "dtype": self.dtype,
            "device": self.device,
            "device_map": self.device_map,
            "stream": stream,
        }
        with status() as step:
            step(f"loading {self.name}")
            from act_export.checkpoint.load import load_checkpoint, load_fetched

            if fetched is not None:
                return load_fetched(fetched, **placed)
            loaded = load_checkpoint(
                self.name, revision=self.revision, trust_remote_code=self.trust_remote_code, fits=fits, **placed
            )
        from act_export.checkpoint.gguf.convert import remarks_of

        for remark in remarks_of(Path(loaded.model.name_or_path or self.name)):
            note(f"note: {remark}")
        return loaded
