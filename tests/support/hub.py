"""A local stand-in for the HTTP interface of the Hugging Face hub: repositories of models in memory.

As much as huggingface_hub asks for: a revision, its files, their contents with ranges, and new commits whose large
files go through git-lfs. Point HF_ENDPOINT at `url`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

Files = dict[str, bytes]


def commit_of(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha1()
    for name, data in sorted(files.items()):
        digest.update(f"{name} {len(data)} ".encode() + data)
    return digest.hexdigest()


@dataclass
class Hub:
    """repos: repository -> branch or tag -> files. token: required if set. log: method and path of all requests.

    cut: paths whose next answer ends after half of its bytes.
    """

    url: str = ""
    token: str = ""
    status: int = 0  # answer everything with this status
    repos: dict[str, dict[str, Files]] = field(default_factory=dict)
    large: Files = field(default_factory=dict)
    log: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    cut: set[str] = field(default_factory=set)

    def files(self, repo: str, revision: str) -> tuple[str, Files] | None:
        """The commit and files of a branch, a tag or a commit."""
        for name, files in self.repos.get(repo, {}).items():
            if revision in (name, commit_of(files)):
                return commit_of(files), files
        return None


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: Any = b"", headers: Mapping[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, sentence: str) -> None:
        self.reply(status, {"error": sentence}, {"X-Error-Code": code, "X-Error-Message": sentence})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.log.append((self.command, path, dict(self.headers)))
        body = self.body()
        if self.hub.status:
            return self.reply(self.hub.status, {"error": "out of order"})
        is_signed = path.startswith("/lfs/")  # as the hub's storage, which takes no token
        if self.hub.token and not is_signed and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.refuse(401, "RepoNotFound", "Repository not found")
        for method, pattern, name in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                return getattr(self, name)(body, *match.groups())
        return self.refuse(404, "EntryNotFound", f"no route {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def found(self, repo: str, revision: str) -> tuple[str, Files] | None:
        if repo not in self.hub.repos:
            self.refuse(404, "RepoNotFound", "Repository not found")
            return None
        found = self.hub.files(repo, revision)
        if not found:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def info(self, _: bytes, repo: str, revision: str | None) -> None:
        if found := self.found(repo, revision or "main"):
            siblings = [{"rfilename": name} for name in found[1]]
            self.reply(200, {"id": repo, "modelId": repo, "sha": found[0], "siblings": siblings, "tags": []})

    def tree(self, _: bytes, repo: str, revision: str) -> None:
        if found := self.found(repo, revision):
            entry = {"type": "file", "oid": "0" * 40}
            self.reply(200, [{**entry, "path": name, "size": len(data)} for name, data in found[1].items()])

    def resolve(self, _: bytes, repo: str, revision: str, name: str) -> None:
        found = self.found(repo, revision)
        if not found:
            return None
        if name not in found[1]:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        data = found[1][name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": found[0], "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        rest = data[start:]
        headers["Content-Length"] = str(len(rest))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and name in self.hub.cut:
            self.hub.cut.discard(name)
            self.reply(206 if start else 200, rest[: len(rest) // 2], headers)
            self.close_connection = True
            return None
        return self.reply(206 if start else 200, rest, headers)

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo = f"{wanted['organization']}/{wanted['name']}"
        if repo in self.hub.repos:
            sentence = "You already created this model repo"
            return self.reply(409, {"error": sentence, "url": f"{self.hub.url}/{repo}"})
        self.hub.repos[repo] = {"main": {}}
        return self.reply(200, {"url": f"{self.hub.url}/{repo}", "name": repo, "id": "1"})

    def validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        errors = [] if text.startswith("---\n") else [{"message": "no metadata"}]
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, body: bytes, repo: str) -> None:
        if repo not in self.hub.repos:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".onnx", ".safetensors")) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return self.reply(200, {"files": modes})

    def lfs_batch(self, body: bytes, _: str) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}", "header": {}}}}
            for one in json.loads(body)["objects"]
        ]
        self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self.reply(200)

    def commit(self, body: bytes, repo: str, branch: str) -> None:
        files = dict(self.hub.repos[repo].get(branch, {}))
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        self.hub.repos[repo][branch] = files
        oid = commit_of(files)
        self.reply(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})


REPO, REVISION = r"([^/]+/[^/]+)", r"([^/]+)"
ROUTES = (
    (("GET",), f"/api/models/{REPO}(?:/revision/(.+))?", "info"),
    (("GET",), f"/api/models/{REPO}/tree/{REVISION}/?", "tree"),
    (("GET", "HEAD"), f"/{REPO}/resolve/{REVISION}/(.+)", "resolve"),
    (("POST",), "/api/repos/create", "create"),
    (("POST",), "/api/validate-yaml", "validate"),
    (("POST",), f"/api/models/{REPO}/preupload/.+", "preupload"),
    (("POST",), f"/{REPO}\\.git/info/lfs/objects/batch", "lfs_batch"),
    (("PUT",), "/lfs/([0-9a-f]+)", "lfs_put"),
    (("POST",), f"/api/models/{REPO}/commit/(.+)", "commit"),
)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """The stand-in on a free port of this machine."""
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(hub: Hub, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub in this process use the stand-in, with its cache in a folder. It reads HF_ENDPOINT only when
    it is imported, so its constants are changed."""
    from huggingface_hub import constants

    for name, value in (
        ("ENDPOINT", hub.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_CACHE", str(folder / "cache")),
        ("HF_TOKEN_PATH", str(folder / "token")),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
    ):
        patch.setattr(constants, name, value)
    patch.delenv("HF_TOKEN", raising=False)
