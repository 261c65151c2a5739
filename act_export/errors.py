"""The error that a user can mend."""


class ActExportError(Exception):
    """Something the user gave can't be used; the message has the value and what to do. The command line exits with 2."""


class VerificationError(ActExportError):
    """An export disagrees with PyTorch by more than its precision allows. The command line exits with 1."""
