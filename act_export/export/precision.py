"""The types that a model can be exported in."""

from __future__ import annotations
