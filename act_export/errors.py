"""The error that a user can mend."""


class ActExportError(Exception):
    """Something the user gave can't be used; the message has the value and what to do. Exit code 2."""


class VerificationError(ActExportError):
    """An export disagrees with PyTorch by more than its precision allows. Exit code 1."""


class SessionError(ActExportError):
    """A file that ONNX Runtime can't run as an act-export model, or an input that doesn't fit it."""


class CheckpointError(ActExportError):
    """A checkpoint that can't be found, downloaded or loaded."""
