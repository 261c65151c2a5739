"""What a search's journal is recognised by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from act_export.checkpoint.identity import fingerprint
from act_export.checkpoint.load import Checkpoint
from act_export.search.answers import EncodedTask
from act_export.search.provenance import package_versions
from act_export.search.request import SearchOptions

_JOURNAL_VERSION = 3  # another one where the same key may stand for another result


def describe_search(checkpoint: Checkpoint, tasks: Sequence[EncodedTask], options: SearchOptions) -> dict[str, Any]:
    """What a journal is recognised by: all that a unit's result depends on and its key doesn't say.

    Method, betas, thresholds and numbers of heads are in the keys, so a search with others goes on from the same
    journal.
    """
    own = {"weights": fingerprint(checkpoint.model)} if checkpoint.weights else {}
    return {
        "journal": _JOURNAL_VERSION,
        "model": checkpoint.identity.fingerprint,
        **own,
        "configuration": _configuration_digest(checkpoint),
        "dtype": str(checkpoint.model.dtype).removeprefix("torch."),
        "questions": {task.name: task.digest for task in tasks},
        "batch_tokens": options.batch_tokens,
        "versions": package_versions(),
    }


def _configuration_digest(checkpoint: Checkpoint) -> str:
    """Different where the same weights compute something else: other windows, rotary scaling, tokens that end."""
    settings = checkpoint.model.config.to_dict()
    for name in ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache"):
        settings.pop(name, None)
    generation = checkpoint.model.generation_config
    ends = generation.eos_token_id if generation is not None else None
    return hashlib.sha256(json.dumps([settings, ends], sort_keys=True, default=str).encode()).hexdigest()[:16]
