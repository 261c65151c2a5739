"""MODEL, fetched and loaded while the user sees what is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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


def check_model(
    model: str,
    *,
    dtype: str = "float32",
    device: str | None = None,
    device_map: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Refuses, before torch is imported, a MODEL that isn't there, or can't be loaded as it is asked for."""
    from act_export.checkpoint.fetch import check_source
    from act_export.checkpoint.placement import Placement

    Placement(dtype, device, device_map)
    check_source(model, revision=revision, trust_remote_code=trust_remote_code)


def load_model(
    model: str,
    *,
    dtype: str = "float32",
    device: str | None = None,
    device_map: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    stream: bool | None = False,
    fits: Sequence[Calibration] = (),
) -> Checkpoint:
    """Loads MODEL, saying so; see `act_export.checkpoint.load_checkpoint`."""
    from act_export.checkpoint.hub import is_on_hub
    from act_export.checkpoint.placement import Placement

    Placement(dtype, device, device_map)  # before a download; whether MODEL is there, fetching asks first
    fetched = None
    if is_on_hub(model):
        fetched = fetch_model(model, revision=revision, trust_remote_code=trust_remote_code, fits=fits)
    with status() as step:
        step(f"loading {model}")
        from act_export.checkpoint.load import load_checkpoint, load_fetched

        if fetched is not None:
            return load_fetched(fetched, dtype=dtype, device=device, device_map=device_map, stream=stream)
        loaded = load_checkpoint(
            model,
            dtype=dtype,
            device=device,
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
            stream=stream,
            fits=fits,
        )
    from act_export.checkpoint.gguf.convert import remarks_of

    for remark in remarks_of(Path(loaded.model.name_or_path or model)):
        note(f"note: {remark}")
    return loaded


def fetch_model(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    fits: Sequence[Calibration] = (),
) -> Fetched:
    """Gets MODEL's files, while the hub client shows its own bars; see `act_export.checkpoint.fetch_checkpoint`."""
    from act_export.checkpoint.hub import is_on_hub

    if is_on_hub(model):
        note(f"looking for {model} on the hub, or in its cache")
    from act_export.checkpoint.fetch import fetch_checkpoint

    return fetch_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code, fits=fits)
