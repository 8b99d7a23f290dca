"""A small hub on the loopback: the routes of huggingface_hub that `perception_rt.hub` uses."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"
LARGE = 10_000  # bytes; larger files are uploaded on their own, as with Git LFS


@dataclass
class Repo:
    """Commits with their files, and branches; `gated` refuses every file."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Adds a commit with exactly these files; returns its hash."""
        number = f"{len(self.commits)} {branch}".encode()
        sha = hashlib.sha1(number, usedforsecurity=False).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


@dataclass
class Hub:
    """State of the server.

    Attributes:
        repos: repositories by "org/name".
        objects: large files by SHA-256.
        requests: "METHOD path" of every request.
        damage: changes the bytes of a file that is downloaded, given its name.
        ignored: names that uploads leave out, as a .gitignore does.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    damage: Callable[[str, bytes], bytes] = lambda name, data: data
    ignored: tuple[str, ...] = ()

    def downloads(self) -> list[str]:
        """Names of files that were downloaded since the last call; forgets all requests."""
        found = [r.rpartition("/")[2] for r in self.requests if re.match("GET .*/resolve/", r)]
        self.requests.clear()
        return found


class Refusal(Exception):  # noqa: N818 - an answer, not an error
    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(status, code)
        self.status, self.code = status, code


@contextmanager
def serve() -> Iterator[Hub]:
    """Runs a hub; yields its state."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
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
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self._body()
        try:
            if self.command in ("POST", "PUT") and "/lfs/" not in path:
                self._check_token()
            for pattern, method in _ROUTES:
                match = re.fullmatch(pattern, f"{self.command} {path}")
                if match:
                    method(self, body, *match.groups())
                    return
            raise Refusal(404)
        except Refusal as refusal:
            self._send(refusal.status, b"{}", {"X-Error-Code": refusal.code})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _check_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401)

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _repo(self, name: str) -> Repo:
        if name not in self.hub.repos:
            raise Refusal(404, "RepoNotFound")
        repo = self.hub.repos[name]
        if repo.private:
            self._check_token()
        return repo

    def _find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self._repo(name)
        sha = repo.find(revision)
        if sha is None:
            raise Refusal(404, "RevisionNotFound")
        return sha, repo.commits[sha]

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        status = 409 if name in self.hub.repos else 200
        if status == 200:
            self.hub.repos[name] = Repo(
                private=wanted.get("private") or wanted.get("visibility") == "private"
            )
            self.hub.repos[name].commit({".gitattributes": b"*.data filter=lfs\n"})
        self._json({"url": f"{self.hub.url}/{name}"}, status)

    def branch(self, body: bytes, name: str, branch: str) -> None:
        repo = self._repo(name)
        status = 409 if branch in repo.branches else 200
        repo.branches.setdefault(branch, repo.branches["main"])
        self._json({}, status)

    def validate_card(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        self._find(name, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] > LARGE else "regular",
                "shouldIgnore": file["path"] in self.hub.ignored,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def batch(self, body: bytes, name: str) -> None:
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.objects:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400)
        self.hub.objects[oid] = body
        self._json({})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        files = dict(self._find(name, revision)[1])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        sha = self.hub.repos[name].commit(files, revision)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def info(self, body: bytes, name: str, revision: str | None) -> None:
        sha, files = self._find(name, revision or "main")
        siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
        self._json({"id": name, "sha": sha, "siblings": siblings})

    def file(self, body: bytes, name: str, revision: str, path: str) -> None:
        sha, files = self._find(name, revision)
        if self._repo(name).gated:
            raise Refusal(403, "GatedRepo")
        if path not in files:
            raise Refusal(404, "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"'}
        self._send(200, self.hub.damage(path, files[path]), headers)


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"POST /api/repos/create", _Handler.create),
    (rf"POST /api/models/{_REPO}/branch/(.+)", _Handler.branch),
    (r"POST /api/validate-yaml", _Handler.validate_card),
    (rf"POST /api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/([0-9a-f]{64})", _Handler.put),
    (rf"POST /api/models/{_REPO}/commit/(.+)", _Handler.commit),
    (rf"GET /api/models/{_REPO}(?:/revision/(.+))?", _Handler.info),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)", _Handler.file),
]
