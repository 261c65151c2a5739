"""Models whose attention doesn't pass through transformers' attention interface, made to call the hook.

Each module here has one `forward`, which stands in for that of a model's attention modules: it makes query, key and
value as the model does, and calls `act_export.attention.call.attend` instead of computing the attention itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from act_export.attention.adapters import bloom, falcon, gpt_neo, mpt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ADAPTERS", "Adapter", "adapted"]


@dataclass(frozen=True)
class Adapter:
    """How a model's attention is replaced.

    Attributes:
        module: Name of the class of its attention modules.
        forward: Stands in for their forward; called with the module and its forward's arguments.
    """

    module: str
    forward: Callable[..., Any]


ADAPTERS = {
    "bloom": Adapter("BloomAttention", bloom.forward),
    "falcon": Adapter("FalconAttention", falcon.forward),
    "gpt_neo": Adapter("GPTNeoSelfAttention", gpt_neo.forward),
    "mpt": Adapter("MptAttention", mpt.forward),
}
"""By model type."""


@contextmanager
def adapted(model: PreTrainedModel, adapter: Adapter, attention: str) -> Iterator[None]:
    """The model's attention modules call the hook for the duration of the block.

    Args:
        model: Of the adapter's type.
        adapter: The one of `ADAPTERS` for it.
        attention: Name that the model's masks are made by, see `transformers.AttentionMaskInterface`.
    """
    modules = [
        module for module in model.modules() if adapter.module in {base.__name__ for base in type(module).__mro__}
    ]
    forwards = [module.__dict__.get("forward") for module in modules]
    before = model.config._attn_implementation
    try:
        model.config._attn_implementation = attention
        for module in modules:
            module.__dict__["forward"] = partial(adapter.forward, module)
        yield
    finally:
        model.config._attn_implementation = before
        for module, own in zip(modules, forwards, strict=True):
            module.__dict__.pop("forward", None)
            if own is not None:
                module.__dict__["forward"] = own
