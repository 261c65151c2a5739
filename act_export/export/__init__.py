"""transformers model -> ONNX model with the calibration inside.

The name is imported when first used: what is asked for can be checked first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from act_export.lazy_names import lazy_names

if TYPE_CHECKING:
    from act_export.export.build import build_model as build_model

_HOMES = {"build_model": "act_export.export.build"}
__all__ = list(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
