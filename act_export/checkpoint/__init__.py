"""MODEL -> a loaded model: finding its files, and loading them as what they are.

The names are looked up when they are used: what a hub id is can be asked without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from act_export.checkpoint.fetch import Fetched as Fetched
    from act_export.checkpoint.fetch import fetch_checkpoint as fetch_checkpoint
    from act_export.checkpoint.fetch import public_name as public_name
    from act_export.checkpoint.gguf.built_in import BUILT_IN as BUILT_IN
    from act_export.checkpoint.identity import fingerprint as fingerprint
    from act_export.checkpoint.identity import identify as identify
    from act_export.checkpoint.identity import layers_and_heads as layers_and_heads
    from act_export.checkpoint.load import Checkpoint as Checkpoint
    from act_export.checkpoint.load import load_checkpoint as load_checkpoint
    from act_export.checkpoint.load import load_fetched as load_fetched
    from act_export.checkpoint.tokenizer import load_tokenizer_of as load_tokenizer_of
    from act_export.errors import CheckpointError as CheckpointError

_HOMES = {
    "BUILT_IN": "checkpoint.gguf.built_in",
    "Checkpoint": "checkpoint.load",
    "CheckpointError": "errors",
    "Fetched": "checkpoint.fetch",
    "fetch_checkpoint": "checkpoint.fetch",
    "fingerprint": "checkpoint.identity",
    "identify": "checkpoint.identity",
    "layers_and_heads": "checkpoint.identity",
    "load_checkpoint": "checkpoint.load",
    "load_fetched": "checkpoint.load",
    "load_tokenizer_of": "checkpoint.tokenizer",
    "public_name": "checkpoint.fetch",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"act_export.{_HOMES[name]}"), name)
