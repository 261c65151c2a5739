"""bfloat16 for a search, where the processor multiplies it faster than float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import Parameter
from transformers import PreTrainedModel

_WORTH_IT = 50_000_000  # parameters: smaller models spend their time elsewhere


def bfloat16_is_fast(model: PreTrainedModel) -> bool:
    """Whether the model is in float32, and its processor or GPU has products of bfloat16."""
    spread = getattr(model, "hf_device_map", None) is not None  # whose parameters come and go
    if spread or model.dtype != torch.float32 or model.num_parameters() < _WORTH_IT:
        return False
    if model.device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if model.device.type != "cpu":
        return False
    has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch don't say
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


@contextmanager
def precision_for_search(model: PreTrainedModel, precision: str) -> Iterator[None]:
    """Has the model's weights in bfloat16 for the duration of the block, where that is faster; then as they were.

    Buffers, such as rotary frequencies, and weights that the architecture wants in float32 stay so. It takes half as
    much memory again as the weights.

    Args:
        model: In float32 for anything to change.
        precision: "own" leaves it as it is.
    """
    if precision == "own" or not bfloat16_is_fast(model):
        yield
        return
    exact = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    rounded: list[tuple[Parameter, torch.Tensor]] = []
    try:
        for name, parameter in model.named_parameters():
            if parameter.dtype == torch.float32 and not any(part in name for part in exact):
                rounded.append((parameter, parameter.data))
                parameter.data = parameter.data.to(torch.bfloat16)
        yield
    finally:
        for parameter, before in rounded:
            parameter.data = before
