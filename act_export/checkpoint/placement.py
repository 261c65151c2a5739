"""In which precision a checkpoint is loaded, and onto which device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from act_export.checkpoint.low_memory import is_low_memory, low_memory_told
from act_export.errors import ActExportError, first_line

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16", "auto")
_NO_DEVICES = ("", "gpu", "nvidia", "tpu")  # told before torch is imported; it knows the others, which packages add to
_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that accelerate works out


@dataclass(frozen=True)
class Placement:
    """Where a model goes, and as what.

    Attributes:
        dtype: One of `DTYPES`; "auto" is what the checkpoint is stored in.
        device: None for the CPU, or where `device_map` has the say.
        device_map: As accelerate takes it, e.g. "auto" to spread the model over all GPUs; None for one device.
    """

    dtype: str = "float32"
    device: torch.device | str | None = None
    device_map: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Checks all that can be told without the model.

        Raises:
            ActExportError: Naming the value.
        """
        if self.dtype not in DTYPES:
            raise ActExportError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.device is not None and self.device_map is not None:
            raise ActExportError(f"device is {self.device} and device_map is {self.device_map!r}; pass one of them")
        places = self.device_map.values() if isinstance(self.device_map, Mapping) else [self.device_map, self.device]
        for place in places:
            if place is not None and place not in (*_SPREADS, "disk"):
                _check_device(place)

    @property
    def stored_dtype(self) -> torch.dtype | str:
        """What transformers is asked for.

        float16 comes later, by `apply`: it has no room for the smallest weights, and the fingerprint is to be that of
        the weights as they are stored.
        """
        import torch

        return (
            "auto"
            if self.dtype in ("auto", "float16")
            else {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]
        )

    def check_complete(self, model: torch.nn.Module, name: str) -> None:
        """Refuses a model that a device map left weights out of.

        Raises:
            ActExportError: If some weights are on no device.
        """
        left_out = [weight for weight, parameter in model.named_parameters() if parameter.is_meta]
        if left_out:
            raise ActExportError(
                f"{name} doesn't fit on the devices: device_map {self.device_map!r} leaves {len(left_out)} of its "
                f"weights on the disk or in memory, e.g. {left_out[0]}; take a smaller dtype, more devices, or "
                f"device_map 'cpu'"
            )

    def apply(self, model: torch.nn.Module, name: str) -> None:
        """Rounds and moves a loaded model, in place.

        Raises:
            ActExportError: If the device's memory doesn't hold it.
            CheckpointError: If float16 has no room for one of its numbers.
        """
        if self.dtype == "float16":
            import torch

            from act_export.checkpoint.numbers import check_fits

            # Buffers, such as rotary frequencies, keep their precision.
            with low_memory_told(f"load {name} in float16", "take dtype bfloat16, which needs no second copy"):
                for weight, parameter in model.named_parameters():
                    rounded = parameter.data.to(torch.float16)
                    check_fits(weight, parameter.data, rounded, f"of {name}")
                    parameter.data = rounded
        if self.device is not None:
            try:
                model.to(self.device)
            except Exception as error:
                if not is_low_memory(error):
                    raise
                raise ActExportError(
                    f"{name} doesn't fit on {self.device}: {first_line(error)}; take a smaller dtype, or device_map "
                    f"'auto' to use several GPUs"
                ) from error


def _check_device(device: torch.device | str | int) -> None:
    refused = ActExportError(
        f"device is {device!r}; pass e.g. cpu, cuda or cuda:1, or as device_map {' or '.join(_SPREADS)}"
    )
    if isinstance(device, str) and device.partition(":")[0].lower() in _NO_DEVICES:
        raise refused
    import torch

    try:
        place = torch.device(device) if not isinstance(device, int) else torch.device("cuda", device)
    except RuntimeError as error:
        raise refused from error
    if place.type == "meta":
        raise ActExportError("device is meta, which holds no weights; pass e.g. cpu, cuda or cuda:1")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ActExportError(
            f"device is {place}, but PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA GPUs; pass "
            f"another device, or install PyTorch with CUDA"
        )
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ActExportError(f"device is {place}, which PyTorch {torch.__version__} can't use here") from error
