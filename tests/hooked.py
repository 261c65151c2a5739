"""A model under the hook, against itself."""

from __future__ import annotations

import torch
from close import assert_logits_close
from tiny import VOCABULARY

from act_export.attention.call import positions
from act_export.attention.hook import attention_hook
from act_export.attention.reference_attention import ReferenceAttention


def padded_batch(length=25, seed=0):
    """Ids and mask of two sequences, one with 9 tokens of padding before it."""
    torch.manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (2, length))
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :9] = 0
    return ids, mask


def assert_same_model(model, tolerance):
    """Whole prompts, prompts in pieces, and tokens one at a time give the logits of the model's own attention."""
    ids, mask = padded_batch()
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
        with attention_hook(model, ReferenceAttention(None)) as hooked:
            whole = hooked(ids, mask)
            first = hooked(ids[:, :12], mask[:, :12])
            second = hooked(ids[:, 12:13], mask[:, :13], first.state)
            third = hooked(ids[:, 13:], mask, second.state)
            at_once = hooked(ids[:, 13:], mask, second.state, one_at_a_time=True)
    real = mask.bool()
    assert_logits_close(whole.logits[real], own[real], tolerance)
    assert_logits_close(third.logits, own[:, 13:], tolerance)
    assert_logits_close(at_once.logits, own[:, 13:], tolerance)
