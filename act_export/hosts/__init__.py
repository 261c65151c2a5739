"""Serving an exported model in other programs."""

from act_export.hosts.signature import HostError
from act_export.hosts.triton import write_repository

__all__ = ["HostError", "write_repository"]
