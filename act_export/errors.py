"""The errors that a user can mend, and how what other libraries raise becomes one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST_SHOWN = 100
_EXTRAS = {  # by imported package, the extra of act-export that installs it
    **dict.fromkeys(("accelerate", "gguf", "huggingface_hub", "onnx", "onnx_ir", "onnxscript"), "export"),
    **dict.fromkeys(("optimum", "safetensors", "tokenizers", "torch", "transformers"), "export"),
    **dict.fromkeys(("altair", "vl_convert"), "report"),
    **dict.fromkeys(("datasets", "pyarrow"), "tasks"),
    "lm_eval": "lm-eval",
}


class ActExportError(Exception):
    """Something the user gave can't be used; the message has the value and what to do. Exit code 2."""


class VerificationError(ActExportError):
    """An export disagrees with PyTorch by more than its precision allows. Exit code 1."""


class SessionError(ActExportError):
    """A file that ONNX Runtime can't run as an act-export model, or an input that doesn't fit it."""


class CheckpointError(ActExportError):
    """A checkpoint that can't be found, downloaded or loaded."""


@contextmanager
def others_errors(message: str, advice: str = "", *, error: type[ActExportError] = ActExportError) -> Iterator[None]:
    """Turns whatever another library raises in the block about what the user gave it into one readable error.

    For calls into libraries whose errors have no common base, such as tokenizers, jinja2, onnx or safetensors, and for
    nothing else: a defect of act-export's own within the block would look like the user's.

    Args:
        message: What can't be done, e.g. "can't read a.onnx"; the library's first line follows.
        advice: What to do, at the end.
        error: What is raised.
    """
    try:
        yield
    except (ActExportError, MemoryError):
        raise
    except Exception as cause:
        if type(cause).__name__ == "OutOfMemoryError":
            raise
        raise error(f"{message}: {first_line(cause)}" + (f"; {advice}" if advice else "")) from cause


@contextmanager
def needs_extras(what: str, *, error: type[ActExportError] = ActExportError) -> Iterator[None]:
    """Turns a package of one of act-export's extras that isn't installed into an error that says what to install.

    Args:
        what: What needs it, e.g. "this command".
        error: What is raised.
    """
    try:
        yield
    except ModuleNotFoundError as cause:
        package = (cause.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        raise error(
            f"{what} needs {package}, which isn't installed: pip install 'act-export[{_EXTRAS[package]}]'"
        ) from cause


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, shortened; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shortened(lines[0], 300) if lines else type(error).__name__


def shown(value: object) -> str:
    """A value that somebody else chose, fit for a message: quoted, without control characters, and short."""
    return shortened(ascii(value) if isinstance(value, bytes) else repr(value), _LONGEST_SHOWN)


def shortened(text: str, longest: int) -> str:
    """A text, cut with "..." where it is longer."""
    return text if len(text) <= longest else f"{text[:longest]}..."
