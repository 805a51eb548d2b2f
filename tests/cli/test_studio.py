"""`theodora studio`: it prints the one address that opens, is open once, and ends with Ctrl-C."""

import builtins
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest

from serving import free_port
from theodora.cli.main import main
from theodora.errors import UsageError
from theodora.studio.serving import serve


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("THEODORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def status(address):
    try:
        with urllib.request.urlopen(address, timeout=60) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def test_it_prints_an_address_that_opens_and_ends_with_ctrl_c(monkeypatch, capsys):
    port, found, ended, opened = free_port(), [], threading.Event(), []
    monkeypatch.setattr("webbrowser.open", opened.append)

    def act():
        while not ended.is_set() and not opened:
            time.sleep(0.02)
        try:
            found.append(status(f"http://127.0.0.1:{port}/"))
            opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
            found.append(opener.open(opened[0], timeout=60).status)
            with pytest.raises(UsageError, match="in use by process"):
                serve([], 0, lambda _: None)
        finally:
            if not ended.is_set():
                signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=act)
    thread.start()
    try:
        code = main(["studio", "--port", str(port)])
    finally:
        ended.set()
        thread.join(60)
        signal.signal(signal.SIGINT, before)
    assert code == 130
    assert found == [403, 200]
    (address,) = re.findall(rf"http://127\.0\.0\.1:{port}/\?token=\S{{40,}}", capsys.readouterr().out)
    assert opened == [address]


def test_ports_that_are_taken(capsys, monkeypatch):
    assert main(["studio", "--port", "70000"]) == 2
    monkeypatch.setattr("theodora.studio.serving._TRIED", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["studio", "--no-browser", "--port", str(taken.getsockname()[1])]) == 2
    assert "--port 0 takes any that is free" in capsys.readouterr().err


def test_what_is_missing_is_named(monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *rest):
        if name == "fastapi":
            raise ImportError(name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["studio"]) == 2
    assert "pip install 'theodora[studio]'" in capsys.readouterr().err
