"""A hub on loopback that knows as much of the protocol as pushing needs, and remembers what it was sent."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN, READ_TOKEN = "hf_write", "hf_read"


class FakeHub(ThreadingHTTPServer):
    """Repositories by name: `private`, `files` (path -> bytes) by branch."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.refuses_commits = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, *, private: bool) -> None:
        self.repos[name] = {"private": private, "branches": {"main": {}}}

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[name]["branches"][branch]


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(f"GET {self.path}")
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "whoami-v2"]:
            if token not in (TOKEN, READ_TOKEN):
                return self._answer(401, {"error": "Invalid username or password."})
            role = "write" if token == TOKEN else "read"
            return self._answer(
                200, {"name": "me", "orgs": [{"name": "team"}], "auth": {"accessToken": {"role": role}}}
            )
        name = "/".join(parts[2:4])
        if name not in self.server.repos:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if parts[4:] == ["auth-check", "write"]:
            mine = name.startswith(("me/", "team/"))
            return self._answer(200 if mine else 403, {} if mine else {"error": "Forbidden"})
        return self._answer(
            200, {"id": name, "private": self.server.repos[name]["private"], "tags": [], "downloads": 0}
        )

    def do_POST(self) -> None:
        self.server.asked.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers["content-length"]))
        parts = self.path.strip("/").split("/")
        if parts[1:3] == ["repos", "create"]:
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            hidden = wanted.get("private") or wanted.get("visibility") == "private"
            self.server.add(name, private=bool(hidden))
            return self._answer(200, {"url": f"{self.server.url}/{name}"})
        if parts[1:] == ["validate-yaml"]:  # of the model card, which the client asks for by itself
            return self._answer(200, {"errors": [], "warnings": []})
        name, what, branch = "/".join(parts[2:4]), parts[4], parts[5] if len(parts) > 5 else "main"
        if what == "branch":
            self.server.repos[name]["branches"].setdefault(branch, {})
            return self._answer(200, {})
        if what == "preupload":
            wanted = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in wanted]
            return self._answer(200, {"files": files})
        if self.server.refuses_commits:
            return self._answer(403, {"error": "Storage is full"})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files(name, branch)[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self._answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/abc", "commitOid": "abc"})

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"content-type": "application/json", "content-length": str(len(data))}.items():
            self.send_header(key, value)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def running() -> Iterator[FakeHub]:
    """A hub that answers within the block."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
