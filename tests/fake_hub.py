"""A hub on this machine: the routes that huggingface_hub asks, for repositories that are folders."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_of_a_member"
_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """A repository, with a commit for each of its folders.

    Attributes:
        revisions: Folders by branch or tag; "main" is the one that counts where none is given.
        access: "open", "gated" or "private": the last two want `TOKEN`.
    """

    revisions: dict[str, Path]
    access: str = "open"

    def commit(self, revision: str) -> str | None:
        """Hash of the commit that a branch, a tag or a commit's hash stands for."""
        commits = {
            name: hashlib.sha1(f"{name} {folder}".encode()).hexdigest() for name, folder in self.revisions.items()
        }
        return revision if revision in commits.values() else commits.get(revision)

    def folder(self, commit: str) -> Path:
        """The files of a commit."""
        return next(folder for name, folder in self.revisions.items() if self.commit(name) == commit)

    def files(self, commit: str) -> dict[str, bytes]:
        """What is in a commit, by path."""
        folder = self.folder(commit)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass
class FakeHub:
    """What is served, and what was asked.

    Attributes:
        endpoint: Where it listens.
        repositories: By "owner/name"; may be changed while it runs.
        requests: "GET /path" of each request, in order.
        tokens: That came with requests.
        status: Answered to everything, if not 0.
        breaks_in: Name of the file whose next download breaks off.
        breaks_after: After so many bytes, if not 0.
        stalls: Whether it then stays silent, rather than to hang up.
        ranges: Parts of files that were asked for.
        over: Set when it ends.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    status: int = 0
    breaks_in: str = "model.safetensors"
    breaks_after: int = 0
    stalls: bool = False
    ranges: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def downloaded(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return [
            request.rpartition("/resolve/")[2].partition("/")[2] for request in self.requests if _is_download(request)
        ]


def _is_download(request: str) -> bool:
    return request.startswith("GET ") and "/resolve/" in request


@contextmanager
def in_place_of_the_hub(patch: pytest.MonkeyPatch, home: Path) -> Iterator[FakeHub]:
    """Serves what this process asks the hub for, to somebody who isn't logged in; the cache is `home`/cache."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        patch.delenv(name, raising=False)
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving() as hub:
        use_endpoint(patch, hub.endpoint)
        yield hub


def use_endpoint(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Where this process looks for the hub; its client reads HF_ENDPOINT once."""
    patch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@contextmanager
def serving() -> Iterator[FakeHub]:
    """Runs a hub without any repository."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            hub.tokens |= {token} - {""}
            if hub.status:
                return self.send(hub.status)
            api, file = _API.fullmatch(path), _FILE.fullmatch(path)
            name = (api or file)[1] if api or file else ""
            repository = hub.repositories.get(name)
            if token not in ("", TOKEN):
                return self.send(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
            if repository is None or (repository.access == "private" and token != TOKEN):
                return self.send(404 if token else 401, {"X-Error-Code": "RepoNotFound"})
            asked = (api[3] if api else file[2]) or "main"
            commit = repository.commit(asked)
            if commit is None:
                return self.send(404, {"X-Error-Code": "RevisionNotFound"})
            files = repository.files(commit)
            if api:
                return self.send(200, {}, json.dumps(_described(name, commit, files, tree=api[2] == "tree")).encode())
            if repository.access == "gated" and token != TOKEN:
                return self.send(403 if token else 401, {"X-Error-Code": "GatedRepo"})
            if file[3] not in files:
                return self.send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            content = files[file[3]]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            self.send_file(content, headers, breaks=file[3] == hub.breaks_in, with_body=with_body)

        def send_file(self, content: bytes, headers: dict[str, str], *, breaks: bool, with_body: bool) -> None:
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
            if start:
                hub.ranges.append(self.headers["Range"])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            body = content[start:]
            self.head(206 if start else 200, headers, len(body))
            if with_body and breaks and hub.breaks_after:
                body, hub.breaks_after, self.close_connection = body[: hub.breaks_after], 0, True
                self.wfile.write(body)
                self.wfile.flush()
                if hub.stalls:
                    hub.over.wait()
            elif with_body:
                self.wfile.write(body)

        def send(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
            self.head(status, headers or {}, len(body))
            if self.command != "HEAD":
                self.wfile.write(body)

        def head(self, status: int, headers: dict[str, str], length: int) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(length)}.items():
                self.send_header(key, value)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _described(name: str, commit: str, files: dict[str, bytes], *, tree: bool) -> object:
    if tree:
        return [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]
    return {"id": name, "modelId": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]}
