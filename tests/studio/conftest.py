"""A studio to ask over HTTP, whose runs come from the fork server: a new Python would import for seconds."""

import json
from contextlib import ExitStack

import pytest

import dying
from crash.killing import fork_server
from studios import Studio
from theodora.studio import chats, works
from theodora.studio import runs as runs_module
from theodora.studio.processes import started_at


@pytest.fixture
def _runs_of_fork_server(monkeypatch):
    """Runs come from there, and are ended after the test."""
    begun = []
    ready = fork_server().Process(target=int)  # its imports take seconds, for which no request should wait
    ready.start()
    ready.join()

    def begin(words, log, folder):
        process = fork_server().Process(target=dying.studio_run, args=(words, log, folder))
        process.start()
        begun.append(process)
        return process.pid, started_at(process.pid)

    for module in (runs_module, chats, works):
        monkeypatch.setattr(module, "begin", begin)
    yield
    for process in begun:
        process.kill()
        process.join()


@pytest.fixture
def studio_of(_runs_of_fork_server, tmp_path):
    """`studio_of(named)`: an open studio."""
    with ExitStack() as stack:

        def make(*named, worker=None):
            return stack.enter_context(Studio(tmp_path / "studio", named, worker))

        yield make


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "completion": str(2 * i)}) + "\n" for i in range(24)))
    return path


@pytest.fixture
def options(rows, tiny_model_dir, tmp_path):
    """What is typed into the form."""
    return {
        "model": str(tiny_model_dir()),
        "data": str(rows),
        "output": str(tmp_path / "runs" / "first"),
        "rank": "2",
        "max_steps": "4",
        "held_out": "4",
    }
