"""Signals end a server in order and are told to whoever started it, at whatever moment they come."""

import contextlib
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import uvicorn

from serving import free_port
from theodora.serve import run
from theodora.serve.config import ServeConfig

NUMBERS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture
def handlers():
    """Sets the handlers that a process begins with; those of the tests come back afterwards."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield lambda handler: [signal.signal(number, handler) for number in NUMBERS]
    for number, handler in before.items():
        signal.signal(number, handler)


class Served:
    """`serve` on an engine and an application that do nothing but note what happens, and call `at` with each."""

    def __init__(self, monkeypatch, at):
        self.happened, self.at, self.port = [], at, free_port()
        self.asked, self.running = threading.Event(), False
        config = ServeConfig(model="m", port=self.port, grace=30.0)
        self.engine = SimpleNamespace(config=config, start=self.noting("start"), stop=self.noting("stop"))
        settings = uvicorn.Config(
            self.app, port=self.port, interface="asgi3", log_level="error", timeout_graceful_shutdown=30
        )
        monkeypatch.setattr(run, "server_settings", lambda *_: settings)

    def noting(self, what):
        def note():
            self.happened.append(what)
            self.at(what)
            self.happened.append(f"{what}ed")

        return note

    async def app(self, scope, receive, send):
        if scope["type"] == "lifespan":
            for what in ("startup", "shutdown"):
                await receive()
                self.at(what)
                await send({"type": f"lifespan.{what}.complete"})
        else:
            self.asked.set()
            while (await receive())["type"] != "http.disconnect":
                pass

    def run(self):
        run.serve(self.engine, None, started=self.noting("tell"))


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler], ids=["ignored", "interrupts"])
@pytest.mark.parametrize("number", NUMBERS, ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moment", ["start", "tell", "startup", "shutdown", "stop"])
def test_a_signal_at_any_moment_ends_it_in_order_and_is_told(moment, number, handler, handlers, monkeypatch):
    """A shell starts what runs in the background with SIGINT ignored: an end by it was an end without a reason."""
    handlers(handler)

    moments = {moment, {"shutdown": "startup", "stop": "start"}.get(moment, moment)}  # something has to end it

    def at(what):
        if what in moments:
            moments.remove(what)
            signal.raise_signal(number)

    served = Served(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt) as stopped:
        served.run()
    began = ["start", "started"] + ["tell", "telled"] * (moment not in ("start", "stop"))
    assert served.happened[: len(began) + 1] == [*began, "stop"]
    assert served.happened[-1] == "stoped"
    assert [signal.getsignal(number) for number in NUMBERS] == [handler] * 2
    if handler == signal.SIG_IGN:
        assert stopped.value.exit_code == 128 + number


def test_the_former_handler_is_called_after_all_is_stopped(handlers, monkeypatch):
    called = []
    handlers(lambda number, _: called.append((number, served.happened[-1])))
    served = Served(monkeypatch, lambda what: what == "startup" and signal.raise_signal(signal.SIGTERM))
    with pytest.raises(run.ServerStopped):
        served.run()
    assert called == [(signal.SIGTERM, "stoped")]


def test_a_second_ctrl_c_ends_the_grace(handlers, monkeypatch, caplog):
    """Answers under way are told to end; the grace of the first is half a minute."""
    handlers(signal.default_int_handler)
    ended = threading.Event()
    served = Served(monkeypatch, lambda what: what == "stop" and ended.set())

    def ask():
        while not connected(served.port, b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", lines):
            time.sleep(0.01)
        assert served.asked.wait(60)
        signal.raise_signal(signal.SIGINT)
        while connected(served.port):  # until the first has its effect: two at once are one
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)
        assert ended.wait(20)
        lines.close()

    lines = contextlib.ExitStack()
    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(KeyboardInterrupt):
        served.run()
    asking.join(60)
    assert ended.is_set()
    assert served.happened[-1] == "stoped"
    assert "Traceback" not in caplog.text


def connected(port, request=b"", lines=None):
    """Whether something listens there; sends it a request and keeps the connection if there is one to send."""
    try:
        line = socket.create_connection(("127.0.0.1", port), timeout=60)
    except (ConnectionRefusedError, ConnectionResetError):
        return False
    with contextlib.ExitStack() as stack:
        (lines or stack).enter_context(line).sendall(request)
    return True


def test_a_third_ends_it_at_once(handlers, monkeypatch):
    handlers(signal.default_int_handler)
    served = Served(monkeypatch, lambda what: what == "start" and [signal.raise_signal(signal.SIGINT) for _ in "123"])
    with pytest.raises(KeyboardInterrupt):
        served.run()
    assert "started" not in served.happened
