"""The report of a sink profile: a page to explore it with, and figures for a paper.

Names are imported when first used: what a profile says in words needs no plotting library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from act_export.profile.report.accuracy import TaskAccuracy as TaskAccuracy
    from act_export.profile.report.accuracy import accuracies_of as accuracies_of
    from act_export.profile.report.page import write_report as write_report
    from act_export.profile.report.paper import write_figures as write_figures

_HOMES = {
    "TaskAccuracy": "accuracy",
    "accuracies_of": "accuracy",
    "write_figures": "paper",
    "write_report": "page",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Imports a public name from its module."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
