"""What an export that takes embeddings is given beside tokens: made-up images between words."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from act_export.checkpoint.text_tower import placeholders_of, position_axes
from act_export.onnx_file.names import EMBEDDING_FILE
from act_export.runtime.image_positions import image_positions
from act_export.runtime.sampling import left_pad
from act_export.runtime.session import Session
from act_export.verify.parity.cases import Case

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROMPTS = ((9, (4, 5), 6), (3, (2, 3), 4))  # words, rows and columns of an image, words
_DECODE_STEPS = 4


def embedded_case(model: PreTrainedModel, *, seed: int = 0) -> Case:
    """Two prompts with embeddings of no token inside, the shorter one padded, and decode steps after them.

    With M-RoPE the positions are those that images have.
    """
    random = np.random.default_rng(seed)
    words = np.setdiff1d(np.arange(int(model.config.vocab_size)), placeholders_of(model))
    image_token = -1
    prompts = [
        [*random.choice(words, before), *[image_token] * (rows * columns), *random.choice(words, after)]
        for before, (rows, columns), after in _PROMPTS
    ]
    ids, mask = left_pad(prompts, pad_token=int(words[0]))
    is_image = ids == image_token
    of_words = _looked_up(model, np.where(is_image, words[0], ids))
    made_up = random.permutation(of_words.reshape(-1, of_words.shape[-1]), axis=1).reshape(of_words.shape)
    embeddings = np.where(is_image[..., None], made_up, of_words).astype(np.float32)
    grids = [(1, *size) for _, size, _ in _PROMPTS]
    positions = (
        image_positions(ids, mask, grids, image_token=image_token, merge=1) if position_axes(model) > 1 else None
    )
    return Case("embeddings of no token", (embeddings,), mask, decode_steps=_DECODE_STEPS, position_ids=positions)


def look_up_tokens(session: Session, model: PreTrainedModel) -> None:
    """Lets a session take token ids, by the model's embedding, if it takes embeddings and has nothing beside it."""
    given = session.token_input
    if given.takes_embeddings and not (given.path.parent / EMBEDDING_FILE).is_file():
        given.lookup = partial(_looked_up, model)


def _looked_up(model: PreTrainedModel, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Token ids (batch, sequence) -> embeddings (batch, sequence, hidden size)."""
    with torch.no_grad():
        found: NDArray[np.float32] = (
            model.get_input_embeddings()(torch.from_numpy(input_ids).to(model.device)).float().cpu().numpy()
        )
    return found
