"""`theodora serve`: what it is given, what it says, and that Ctrl-C ends it."""

import http.client
import json
import re
import signal
import sys
import threading
import time

import pytest

from serving import free_port
from theodora import AdapterConfig, inject_adapter, save_adapter
from theodora.cli.main import main
from tiny import tiny_model


@pytest.fixture
def adapter(tmp_path):
    save_adapter(inject_adapter(tiny_model(), AdapterConfig(method="dora", rank=4)), tmp_path / "adapter")
    return tmp_path / "adapter"


def when_it_serves(port, act, ended):
    """Call `act` when the server answers; then Ctrl-C, also if that fails, unless the command has ended by itself."""

    def ask(path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(
            "POST" if body else "GET", path, body and json.dumps(body), {"content-type": "application/json"}
        )
        reply = connection.getresponse().read().decode()
        connection.close()
        return reply

    def wait():
        while not ended.is_set():
            try:
                ask("/health")
                break
            except OSError:
                time.sleep(0.02)
        else:
            return
        try:
            act(ask)
        finally:
            signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.fixture
def as_in_the_background():
    """A shell starts what runs in the background with SIGINT ignored, which all that is started there inherits."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_command_serves_until_ctrl_c(as_in_the_background, tiny_model_dir, adapter, capsys):
    port, replies, ended = free_port(), [], threading.Event()

    def act(ask):
        replies.append(json.loads(ask("/v1/models")))
        asked = {"model": "law", "prompt": "Hi", "max_tokens": 2, "temperature": 0}
        replies.append(json.loads(ask("/v1/completions", asked)))

    thread = when_it_serves(port, act, ended)
    model = str(tiny_model_dir("llama"))
    flags = ("--served-name", "tiny", "--adapter", f"law={adapter}", "--port", str(port), "--kv-tokens", "512")
    try:
        code = main(["serve", model, *flags, "--device", "cpu"])
    finally:
        ended.set()
        thread.join(30)
    told = capsys.readouterr().err
    assert code == 130, told
    models, answer = replies
    assert [entry["id"] for entry in models["data"]] == ["tiny", "law"]
    assert answer["usage"]["completion_tokens"] == 2
    assert f"http://127.0.0.1:{port}/v1" in told
    assert "base, cpu, float32" in told
    assert "DoRA" in told


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_outlast_the_grace_are_told_so(stream, tiny_model_dir, capsys):
    port, told, ended = free_port(), [], threading.Event()
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 480, "ignore_eos": True, "n": 16, "stream": stream}

    def ask_for_much():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(asked), {"content-type": "application/json"})
        reply = connection.getresponse()
        answering.set()
        told.append((reply.status, reply.read().decode()))
        connection.close()

    def act(ask):
        asking = threading.Thread(target=ask_for_much)
        asking.start()
        asked_for.append(asking)
        if stream:
            assert answering.wait(60)
        else:
            while not re.search(r"running_requests [1-9]", ask("/metrics")):
                time.sleep(0.02)

    asked_for, answering = [], threading.Event()
    thread = when_it_serves(port, act, ended)
    flags = ("--served-name", "tiny", "--port", str(port), "--device", "cpu", "--grace", "0.1", "--max-batch", "2")
    try:
        main(["serve", str(tiny_model_dir("llama")), *flags])
    finally:
        ended.set()
        thread.join(30)
    asked_for[0].join(30)
    ((status, text),) = told
    assert status == (200 if stream else 503)
    assert "The server is stopping." in text
    assert "Traceback" not in capsys.readouterr().err


def test_a_model_that_cannot_be_served_is_refused(tiny_model_dir, capsys):
    assert main(["serve", str(tiny_model_dir("bloom")), "--device", "cpu", "--port", "0"]) == 1
    told = capsys.readouterr().err
    assert re.search(r"cannot be served in batches: (beside another request|.* no attribute 'get_seq_length')", told)
    assert "Traceback" not in told
    assert "http://" not in told  # where nobody listens


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--adapter", "runs/law"), "--adapter runs/law: expected NAME=FOLDER"),
        (("--adapter", "=runs/law"), "expected NAME=FOLDER"),
        (("--adapter", "law=a", "--adapter", "law=b"), "--adapter law is given twice"),
        (("--slots", "0"), "slots is 0; expected more than 0"),
        (("--port", "65536"), "port is 65536; expected at most 65535"),
        (("--host", "no.such.host.invalid"), "host is no.such.host.invalid, which is no address of this machine"),
    ],
)
def test_what_makes_no_sense_is_told_before_anything_is_loaded(flags, says, capsys):
    assert main(["serve", "no-such-model", *flags]) == 2
    assert says in capsys.readouterr().err


def test_an_adapter_named_as_the_base_is_refused(tiny_model_dir, adapter, capsys):
    model = str(tiny_model_dir("llama"))
    flags = ("--served-name", "law", "--adapter", f"law={adapter}", "--device", "cpu", "--port", "0")
    assert main(["serve", model, *flags]) == 2
    assert "'law' is taken" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert main(["serve", "model"]) == 2
    assert "prometheus_client is missing: pip install 'theodora[serve]'" in capsys.readouterr().err
