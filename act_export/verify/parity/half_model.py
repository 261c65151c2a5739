"""PyTorch in a half type, and on another device, beside the loaded model."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPARE = 1.75  # the weights, half of them again, and what a prompt needs
_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def half_model(model: PreTrainedModel, precision: str) -> PreTrainedModel:
    """A copy with the parameters rounded to "float16" or "bfloat16"; buffers, such as rotary frequencies, stay.

    As transformers loads it with that dtype. Takes half the memory of the float32 model beside it.
    """
    dtype = _TYPES[precision]
    # What deepcopy finds in its memo it takes instead of copying: tied weights stay tied, no float32 copy is made.
    memo = {
        id(parameter): torch.nn.Parameter(parameter.to(dtype), requires_grad=False) for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


@contextmanager
def placed(model: PreTrainedModel, device: str) -> Iterator[None]:
    """Moves a model to a GPU for the duration of the block, if PyTorch can use it and a half copy fits beside it.

    Otherwise it stays where it is: the results are the same, they take longer.

    Args:
        model: In float32.
        device: "cpu", which leaves it where it is, "cuda" or "cuda:N".
    """
    if device == "cpu" or not torch.cuda.is_available() or not _fits(model, torch.device(device)):
        yield
        return
    before = model.device
    torch.nn.Module.to(model, torch.device(device))
    try:
        yield
    finally:
        torch.nn.Module.to(model, before)
        gc.collect()
        torch.cuda.empty_cache()  # for ONNX Runtime, which comes next


def _fits(model: PreTrainedModel, device: torch.device) -> bool:
    weights_bytes = sum(parameter.nbytes for parameter in model.parameters())
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return bool(_SPARE * weights_bytes < free_bytes)
