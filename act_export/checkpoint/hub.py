"""MODEL by its hub id: which revision is meant, and what of it is downloaded.

Configuration and tokenizer come first, so that a model that can't be used is refused before its weights are fetched.
Files go into the hub client's own cache: what is there isn't asked for again, and after an interruption only files that
weren't whole yet start anew.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from act_export.checkpoint.folder import weight_files
from act_export.checkpoint.small_files import SMALL_FILES
from act_export.checkpoint.stored.index import WEIGHT_INDICES
from act_export.errors import CheckpointError

_CODE_FILES = ("*.py", "*.tiktoken", "*.model", "*.txt")  # and what a tokenizer of its own code reads
_COMMIT = re.compile("[0-9a-f]{40}")
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class HubId:
    """A model on the hub.

    Attributes:
        name: "owner/name".
        revision: Branch, tag or commit; None for the main branch.
    """

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        """As `HubId.parse` reads it."""
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @classmethod
    def parse(cls, source: str) -> HubId | None:
        """Reads "owner/name" or "owner/name@revision"; None for what isn't one, by its looks alone."""
        name, at, revision = source.partition("@")
        if name.count("/") != 1 or name.startswith(("/", ".", "~")) or name.endswith(("/", ".gguf")):
            return None
        return cls(name, revision if at else None)

    def at(self, revision: str | None) -> HubId:
        """The same model at a revision that was given apart; None leaves it.

        Raises:
            CheckpointError: If the two disagree, or a revision is empty.
        """
        if self.revision is not None and revision is not None and revision != self.revision:
            raise CheckpointError(f"{self} names one revision, and {revision!r} is asked for; leave one of them out")
        chosen = revision if revision is not None else self.revision
        if chosen is not None and not chosen.strip():
            raise CheckpointError(f"the revision of {self.name} is empty; give a branch, a tag or a commit")
        return HubId(self.name, chosen)


@dataclass(frozen=True)
class HubAccess:
    """How the hub is asked.

    Attributes:
        token: None for the one in HF_TOKEN or from `hf auth login`, False for none.
        cache_dir: None for the hub's own cache folder (HF_HUB_CACHE, HF_HOME).
    """

    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None

    @property
    def cache(self) -> Path:
        """The cache folder."""
        from huggingface_hub import constants

        return Path(self.cache_dir if self.cache_dir is not None else constants.HF_HUB_CACHE).expanduser()

    def has_token(self) -> bool:
        """Whether requests carry a token."""
        from huggingface_hub import get_token

        return isinstance(self.token, str) or (self.token is not False and get_token() is not None)


def is_on_hub(source: str) -> bool:
    """Whether MODEL is a hub id, and nothing of that name is on this machine."""
    return HubId.parse(source) is not None and not Path(source).expanduser().exists()


def fetch_small_files(model: HubId, access: HubAccess, *, code: bool = False) -> Path:
    """Gets configuration and tokenizer, or finds them in the cache where the hub can't be reached.

    Args:
        model: Which, and at what revision.
        access: How the hub is asked.
        code: Also get files of code, which nobody runs here.

    Returns:
        The folder of the revision in the cache; its name is the commit's hash.

    Raises:
        CheckpointError: If there is no such model or revision, it may not be read, or the hub can't be reached and
            nothing is cached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with _readable_errors(model, access):
        try:
            folder = Path(
                snapshot_download(
                    model.name,
                    revision=model.revision,
                    token=access.token,
                    cache_dir=access.cache,
                    allow_patterns=[*SMALL_FILES, *WEIGHT_INDICES, *(_CODE_FILES if code else ())],
                )
            )
        except LocalEntryNotFoundError as error:
            # Out of reach, and some files aren't cached that the hub once listed. They need not matter: other tools
            # fetch a tokenizer in one of its forms only. What does matter is missed on loading.
            found = getattr(error, "snapshot_path", None)
            if found is None or not (Path(found) / "config.json").is_file():
                raise
            folder = Path(found)
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise CheckpointError(_missing_configuration_message(model, folder, access))
    return folder


def fetch_weights(model: HubId, folder: Path, access: HubAccess) -> None:
    """Gets the weights, of one format, beside the small files.

    Args:
        model: Which.
        folder: What `fetch_small_files` gave.
        access: How the hub is asked.

    Raises:
        CheckpointError: As `fetch_small_files`, or if there are no weights that transformers reads.
    """
    from huggingface_hub import hf_hub_download

    if _has_weights(folder, str(model)):
        return
    commit = HubId(model.name, folder.name)
    with _readable_errors(model, access):
        wanted = weight_files(_files_of(commit, access), folder, str(model))
        for file in wanted:  # in turn and in this thread, so that Ctrl-C ends it at once
            hf_hub_download(model.name, file, revision=commit.revision, token=access.token, cache_dir=access.cache)


def commit_of(folder: Path) -> str:
    """Hash of the commit that a folder of the hub's cache holds; empty for other folders."""
    parts = folder.resolve().parts[-3:]
    is_snapshot = len(parts) == 3 and parts[0].startswith("models--") and parts[1] == "snapshots"
    return parts[2] if is_snapshot and _COMMIT.fullmatch(parts[2]) else ""


def _has_weights(folder: Path, name: str) -> bool:
    """Whether a folder has all weights in one of the formats; names in an index are of small files."""
    try:
        found = weight_files([path.name for path in folder.iterdir()], folder, name)
    except CheckpointError:
        return False
    return all((folder / file).is_file() for file in found)


def _files_of(model: HubId, access: HubAccess) -> list[str]:
    from huggingface_hub import HfApi

    return HfApi(token=access.token).list_repo_files(model.name, revision=model.revision)


def _missing_configuration_message(model: HubId, folder: Path, access: HubAccess) -> str:
    with _readable_errors(model, access):
        names = _files_of(HubId(model.name, folder.name), access)
    for suffix, advice in (
        (".gguf", "get one file with `hf download {name} {file}` and pass the path that it prints"),
        (".onnx", "it is exported already: get it with `hf download {name}` and calibrate it with act-export graft"),
    ):
        for file in names:
            if file.endswith(suffix):
                return f"{model} has no config.json but {file}: {advice.format(name=model.name, file=file)}"
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{model} has no config.json, so it isn't a checkpoint of transformers; it has {shown or 'no files'}"


@contextmanager
def _readable_errors(model: HubId, access: HubAccess) -> Iterator[None]:
    """Turns what the hub's client raises into one error that says what to do."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(_message(error, model, access)) from error


def _message(error: Exception, model: HubId, access: HubAccess) -> str:
    from huggingface_hub import constants, errors

    chain = _chain(error)
    answers = [each for each in chain if isinstance(each, errors.HfHubHTTPError)]
    status = answers[0].response.status_code if answers else None
    if any(isinstance(each, errors.GatedRepoError) for each in chain):
        page = f"{constants.ENDPOINT}/{model.name}"
        if access.has_token():
            return f"{model} is gated, and the token in use has no access to it; ask for access at {page}"
        return f"{model} is gated: ask for access at {page}, then {_LOG_IN}"
    missing = next((each for each in chain if isinstance(each, errors.RemoteEntryNotFoundError)), None)
    if missing is not None:
        file = str(missing.response.url).rpartition("/")[2]
        return f"{model} lacks {file}, which the index of its weights names; tell its owner, or try another revision"
    if any(isinstance(each, errors.RevisionNotFoundError) for each in chain):
        return f"{model.name} has no revision {model.revision or 'main'!r}; give a branch, a tag or a whole commit hash"
    if status == 401 and access.has_token():
        return (
            f"the hub refuses {model} with the token in use: the token is invalid, or there is no such model, or it is "
            f"private; check the name, and {_LOG_IN}"
        )
    if any(isinstance(each, errors.RepositoryNotFoundError) for each in chain) or status == 401:
        private = (
            "or the token in use has no access to it" if access.has_token() else f"or it is private: then {_LOG_IN}"
        )
        return f"there is no model {model.name} on the hub, nor a folder of that name; check the spelling, {private}"
    if any(isinstance(each, errors.OfflineModeIsEnabled) for each in chain):
        return (
            f"{model} isn't in the cache {access.cache}, or not whole, and HF_HUB_OFFLINE forbids to download it; "
            f"unset that, or copy the model there"
        )
    if status is not None:
        return f"the hub {constants.ENDPOINT} answers {status} for {model}; try again later"
    if isinstance(error, errors.HFValidationError):
        return f"{model.name!r} is no hub id (owner/name): {_first_line(error)}"
    if any(_is_of_network(each) for each in chain):
        return (
            f"can't reach the hub {constants.ENDPOINT} for {model}, and it isn't in the cache {access.cache}, or not "
            f"whole: {_first_line(chain[-1])}; check the network and try again: files that came whole are kept"
        )
    return f"can't download {model} to {access.cache}: {_first_line(error)}"


def _chain(error: BaseException | None) -> list[BaseException]:
    """An exception and what it was raised from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _is_of_network(error: BaseException) -> bool:
    """The hub client's HTTP library has been another in each of its major versions."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or library in ("httpx", "httpx2", "httpcore", "requests")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
