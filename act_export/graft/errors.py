"""What can be wrong with a model that should be calibrated."""

from act_export.errors import ActExportError


class GraftError(ActExportError):
    """A model or folder that can't be calibrated as it is; the message names the part and says what to do."""


class UnsupportedPatternError(GraftError):
    """An attention that the operator can't stand in for; the message names the node."""
