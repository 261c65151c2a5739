"""The report of a sink profile: a page to explore it with, and figures for a paper.

Names are imported when first used: what a profile says in words needs no plotting library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from act_export.lazy_names import lazy_names

if TYPE_CHECKING:
    from act_export.profile.report.accuracy import TaskAccuracy as TaskAccuracy
    from act_export.profile.report.accuracy import accuracies_of as accuracies_of
    from act_export.profile.report.page import write_report as write_report
    from act_export.profile.report.paper import write_figures as write_figures

_HOMES = {
    "TaskAccuracy": "act_export.profile.report.accuracy",
    "accuracies_of": "act_export.profile.report.accuracy",
    "write_figures": "act_export.profile.report.paper",
    "write_report": "act_export.profile.report.page",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
