"""Which heads to calibrate."""

from act_export.search.choose import HEAD_COUNTS
from act_export.search.fast_attention import FastAttention
from act_export.search.gates import GatedAttention, gate_gradients
from act_export.search.search import Progress, search_heads

__all__ = ["HEAD_COUNTS", "FastAttention", "GatedAttention", "Progress", "gate_gradients", "search_heads"]
