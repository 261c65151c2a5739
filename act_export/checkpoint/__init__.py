"""MODEL -> a loaded model: finding its files, and loading them as what they are.

The names are looked up when they are used: what a hub id is can be asked without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from act_export.lazy_names import lazy_names

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
    "BUILT_IN": "act_export.checkpoint.gguf.built_in",
    "Checkpoint": "act_export.checkpoint.load",
    "CheckpointError": "act_export.errors",
    "Fetched": "act_export.checkpoint.fetch",
    "fetch_checkpoint": "act_export.checkpoint.fetch",
    "fingerprint": "act_export.checkpoint.identity",
    "identify": "act_export.checkpoint.identity",
    "layers_and_heads": "act_export.checkpoint.identity",
    "load_checkpoint": "act_export.checkpoint.load",
    "load_fetched": "act_export.checkpoint.load",
    "load_tokenizer_of": "act_export.checkpoint.tokenizer",
    "public_name": "act_export.checkpoint.fetch",
}
__all__ = list(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
