"""A bias of the logits that depends on the key alone, in key dimensions of its own.

ALiBi (Press et al., 2022, arXiv 2108.12409) lowers a logit by a slope times the distance between query and key. What
all keys of a row share, softmax ignores, so adding slope times the key's position does the same. With query' =
[query, u] and key' = [key, bias / u] no operator needs an input for it: query' . key' = query . key + bias.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLE = 16  # of head sizes, as kernels like them


def with_key_bias(query: Tensor, key: Tensor, bias: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Query and key whose products are those of the given ones plus a bias.

    The bias is given as the sum of its rounding to bfloat16, which float16 holds too, and what is left: half types keep
    16 bits of it.

    Args:
        query: (batch, heads, sequence, head_size).
        key: As `query`.
        bias: (batch, sequence, heads), of the new keys; joins the product of query and key before the scale.
        scale: Of the attention. The bias is stored about as large as it is after the scale.

    Returns:
        Both with more dimensions, (batch, heads, sequence, a multiple of 16).
    """
    unit = 2.0 ** round(-math.log2(scale))
    stored = (bias.to(torch.promote_types(bias.dtype, torch.float32)) / unit).unsqueeze(-1)
    high = stored.bfloat16().to(stored.dtype)
    unused = -(key.shape[-1] + 2) % _MULTIPLE
    columns = torch.nn.functional.pad(torch.cat([high, stored - high], -1), (0, unused))
    units = query.new_tensor([unit, unit] + [0.0] * unused)
    return _joined(query, units), _joined(key, columns.to(key.dtype))


def _joined(heads: Tensor, columns: Tensor) -> Tensor:
    by_token = heads.transpose(1, 2)
    return torch.cat([by_token, columns.expand(*by_token.shape[:-1], -1)], -1).transpose(1, 2)
