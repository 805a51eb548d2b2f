"""A studio that tests ask over HTTP, as its page does and as strangers do."""

import time

import uvicorn
from starlette.testclient import TestClient

from serving import Running, free_port
from theodora.studio.app import create_app
from theodora.studio.known import Memory
from theodora.studio.runs import Runs
from theodora.studio.worker import Worker

PORT, TOKEN = 7860, "the-token"
ORIGIN = f"http://127.0.0.1:{PORT}"


class Studio:
    """`.get`, `.post` ask as the page does; `.client` as anybody."""

    def __init__(self, folder, named=(), worker=None):
        self.folder, self.runs = folder, Runs(Memory(folder), [str(each) for each in named])
        self.worker = worker or Worker()
        app = create_app(self.runs, self.worker, folder, token=TOKEN, port=PORT)
        self.client = TestClient(app, base_url=ORIGIN, follow_redirects=False)
        self.app, self.closed = app, False

    def __enter__(self):
        self.client.__enter__()
        assert self.client.get(f"/?token={TOKEN}").status_code == 303
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End the server, as Ctrl-C does."""
        if not self.closed:
            self.closed = True
            self.client.__exit__(None, None, None)

    def get(self, path, status=200):
        reply = self.client.get(path)
        assert reply.status_code == status, reply.text
        return reply.json()

    def post(self, path, body=None, status=200):
        reply = self.client.post(path, json=body or {}, headers={"origin": ORIGIN})
        assert reply.status_code == status, reply.text
        return reply.json()

    def state(self, id):
        return next(run for run in self.get("/api/runs")["runs"] if run["id"] == id)

    def until(self, id, *words, step=0):
        """The run, as soon as its state is one of these and it has come so far."""
        deadline = time.monotonic() + 120  # that it comes there is what counts
        while time.monotonic() < deadline:
            run = self.state(id)
            if run["state"] in words and (run["step"] or 0) >= step:
                return run
            time.sleep(0.05)
        raise AssertionError(f"{run}\n{self.get(f'/api/runs/{id}/texts')['log']}")

    def until_ended(self, works, id):
        """One of the `answers` or `jobs` of Look, as soon as it is no longer running."""
        deadline = time.monotonic() + 240  # that it ends is what counts
        while (found := self.get(f"/api/look/{works}/{id}"))["state"]["state"] == "running":
            assert time.monotonic() < deadline, found["log"]
            time.sleep(0.05)
        return found


class Served(Running):
    """A studio on a port of this machine, for a browser."""

    def __init__(self, folder, port=0):
        self.port, self.token = port or free_port(), f"token-{time.monotonic_ns()}"  # a new one each time, as served
        app = create_app(Runs(Memory(folder), ["runs"]), Worker(), folder, token=self.token, port=self.port)
        super().__init__(uvicorn.Config(app, port=self.port, log_level="error", timeout_graceful_shutdown=1))
        self.base = f"http://127.0.0.1:{self.port}/"
        self.address = f"{self.base}?token={self.token}"
