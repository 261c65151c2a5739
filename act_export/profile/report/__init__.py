"""The report of a sink profile: a page to explore it with, and figures for a paper."""

from act_export.profile.report.accuracy import TaskAccuracy, accuracies_of
from act_export.profile.report.page import write_report
from act_export.profile.report.paper import write_figures

__all__ = ["TaskAccuracy", "accuracies_of", "write_figures", "write_report"]
