"""A stand-in for the HTTP API of the Hugging Face hub: uploads, downloads and refusals.

Source: huggingface_hub, hf_api.py, _commit_api.py, lfs.py and file_download.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "standInSecret" * 2
Files = dict[str, bytes]


@dataclass
class Repo:
    """A repository: commits of whole trees, and branches that point to commits."""

    private: bool = False
    commits: list[Files] = field(default_factory=lambda: [{".gitattributes": b""}])
    branches: dict[str, int] = field(default_factory=lambda: {"main": 0})
    messages: list[str] = field(default_factory=list)

    def find(self, revision: str) -> int | None:
        """Return the index of the commit of a branch or commit id."""
        ids = {commit_id(i): i for i in range(len(self.commits))}
        return self.branches.get(revision, ids.get(revision))

    def files(self, branch: str = "main") -> Files:
        """Return the files on a branch."""
        return self.commits[self.branches[branch]]

    def commit(self, branch: str, files: Files) -> None:
        """Commit files to a branch."""
        self.commits.append(files)
        self.branches[branch] = len(self.commits) - 1


def commit_id(index: int) -> str:
    return hashlib.sha1(str(index).encode()).hexdigest()


@dataclass
class Hub:
    """The repositories of the stand-in, its faults, and the requests it received."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and Authorization of each request."""
    ignored: tuple[str, ...] = ()
    """File names in the .gitignore of every repository."""
    failing: dict[str, int] = field(default_factory=dict)
    """Part of a path -> HTTP status of the answer."""

    def environment(self, cache: Path, token: str | None = TOKEN, **more: str) -> dict[str, str]:
        """Return the environment of a program that uses this stand-in as the hub."""
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_HUB_OFFLINE": "0",
            # Without Xet, large files use the documented protocol of LFS.
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE"))}
        return kept | ours | ({} if token is None else {"HF_TOKEN": token}) | more

    def run(
        self, cache: Path, arguments: Sequence[str | Path], **changes: str | None
    ) -> subprocess.CompletedProcess[str]:
        """Run phi3-lora in another process, since huggingface_hub reads HF_ENDPOINT at import."""
        return subprocess.run(
            [sys.executable, "-m", "phi3_lora_cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env=self.environment(cache, **changes),
        )


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a hub on this machine until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        held = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    held: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._read_chunks()
        authorization = self.headers.get("Authorization")
        path = unquote(urlsplit(self.path).path)
        self.held.requests.append((self.command, path, authorization))
        for part, status in self.held.failing.items():
            if part in path:
                return self._send(status, {"error": "said by the hub"})
        if authorization not in (None, f"Bearer {TOKEN}"):
            message = "Invalid credentials in Authorization header"
            return self._send(401, {"error": message}, {"X-Error-Message": message})
        if path.startswith("/blobs/"):
            return self._blob(path.removeprefix("/blobs/"))
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(authorization)
        repo_id, rest = self._split(path)
        repo = self.held.repos.get(repo_id)
        if repo is None or (repo.private and authorization is None):
            return self._send(404, {"error": "no repo"}, {"X-Error-Code": "RepoNotFound"})
        return self._of_repo(repo_id, repo, rest)

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _split(self, path: str) -> tuple[str, list[str]]:
        parts = path.strip("/").removeprefix("api/models/").split("/")
        return "/".join(parts[:2]).removesuffix(".git"), parts[2:] or ["revision", "main"]

    def _create(self, authorization: str | None) -> None:
        if authorization is None:
            return self._send(401, {"error": "who are you"})
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] == "stranger":
            return self._send(403, {"error": "not yours"}, {"X-Error-Message": "not yours"})
        if name in self.held.repos:
            return self._send(409, {"error": "exists", "url": f"{self.held.url}/{name}"})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.held.repos[name] = Repo(private=private)
        return self._send(200, {"url": f"{self.held.url}/{name}", "name": name})

    def _of_repo(self, name: str, repo: Repo, rest: list[str]) -> None:
        kind, *more = rest
        if kind == "info":
            return self._lfs_batch()
        revision = more[0]
        if kind == "branch":
            repo.branches[revision] = repo.branches["main"]
            return self._send(200, {})
        index = repo.find(revision)
        if index is None:
            return self._send(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
        files = repo.commits[index]
        if kind == "resolve":
            return self._resolve(files, "/".join(more[1:]), commit_id(index))
        answers: dict[str, Callable[[], object]] = {
            "revision": lambda: {
                "id": name,
                "sha": commit_id(index),
                "private": repo.private,
                "siblings": [{"rfilename": path} for path in files],
            },
            "tree": lambda: [_entry(path, content) for path, content in files.items()],
            "preupload": lambda: {"files": [self._mode(f) for f in json.loads(self.body)["files"]]},
            "commit": lambda: self._commit(name, repo, revision),
        }
        return self._send(200, answers[kind]())

    def _mode(self, file: dict[str, str]) -> dict[str, object]:
        path = file["path"]
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": path in self.held.ignored}

    def _lfs_batch(self) -> None:
        wanted = json.loads(self.body)["objects"]
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.held.url}/blobs/{o['oid']}"}}}
            for o in wanted
        ]
        self._send(200, {"transfer": "basic", "objects": objects}, kind="application/json")

    def _blob(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.held.blobs[oid] = self.body
        self._send(200, {})

    def _commit(self, name: str, repo: Repo, branch: str) -> dict[str, str]:
        files = dict(repo.files(branch))
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.held.blobs[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        repo.commit(branch, files)
        oid = commit_id(repo.branches[branch])
        return {"commitUrl": f"{self.held.url}/{name}/commit/{oid}", "commitOid": oid}

    def _resolve(self, files: Files, path: str, commit: str) -> None:
        if path not in files:
            return self._send(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
        content = files[path]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        return self._send(200, content, headers)

    def _send(
        self,
        status: int,
        content: object,
        headers: dict[str, str] | None = None,
        kind: str = "application/json",
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(path: str, content: bytes) -> dict[str, object]:
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": oid}
