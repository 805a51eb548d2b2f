"""What a stranger's requests can cost: short answers, bounds before work, an event loop that is free, ends for all."""

import contextlib
import http.client
import json
import logging
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from transformers.generation.continuous_batching import continuous_api

import tiny
from serving import Server, settled
from theodora.serve import connections
from theodora.serve.config import ServeConfig
from theodora.serve.engine import Engine

pytestmark = pytest.mark.usefixtures("_no_collections")

JSON = {"content-type": "application/json"}
HEAD = "Host: localhost\r\nContent-Type: application/json\r\n"
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
HI = '[{"role":"user","content":"Hi"}]'


class Spy:
    """A tokenizer that says what it was asked to read, and in which thread."""

    def __init__(self, tokenizer):
        self.tokenizer, self.texts, self.threads, self.seconds = tokenizer, [], set(), 0.0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __len__(self):
        return len(self.tokenizer)

    def __call__(self, text, **options):
        self.texts.append(text)
        self.threads.add(threading.current_thread())
        return self.tokenizer(text, **options)

    def apply_chat_template(self, *args, **options):
        self.threads.add(threading.current_thread())
        time.sleep(self.seconds)
        return self.tokenizer.apply_chat_template(*args, **options)


@contextlib.contextmanager
def serving_(**config):
    settings = {"model": "base", "kv_tokens": 2048, "max_batch_tokens": 512, "max_batch": 16, **config}
    with Server(Engine(tiny.tiny_model(), ServeConfig(**settings)), Spy(tiny.tiny_tokenizer())) as server:
        yield server


@pytest.fixture(scope="module")
def _no_collections():
    """transformers collects garbage twice when it stops: seconds, after tests of many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuous_api, "gc", SimpleNamespace(collect=lambda: None))
        yield


@pytest.fixture(scope="module")
def server(_no_collections):
    with serving_() as running:
        yield running


@pytest.fixture
def spy(server):
    server.tokenizer.texts.clear()
    server.tokenizer.threads.clear()
    return server.tokenizer


def ask(server, path, body=None, method="POST"):
    """Status and body of a reply."""
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    line.request(method, path, body.encode() if isinstance(body, str) else body, JSON)
    reply = line.getresponse()
    found = reply.status, reply.read()
    line.close()
    return found


def body(**fields):
    return "{" + ",".join(f'"{name}":{value}' for name, value in {"model": '"base"', **fields}.items()) + "}"


def many(entry, count=50_000):
    return f"[{','.join([entry] * count)}]"


def keys(count, value="1"):
    return "{" + ",".join(f'"k{at}":{value}' for at in range(count)) + "}"


HOSTILE = {
    "objects for prompts": (COMPLETIONS, body(prompt=many("{}"))),
    "more objects than anything": (COMPLETIONS, body(prompt=many("{}", 200_000))),
    "nulls for prompts": (COMPLETIONS, body(prompt=many("null"))),
    "negative tokens": (COMPLETIONS, body(prompt=many("-1"))),
    "objects for tokens": (COMPLETIONS, body(prompt=f"[{many('{}')}]")),
    "one number among texts": (COMPLETIONS, body(prompt=many('"a"')[:-1] + ",1]")),
    "fields nobody knows": (COMPLETIONS, '{"model":"base","prompt":"a",' + keys(50_000)[1:]),
    "a long name": (COMPLETIONS, body(prompt='"a"', **{"x" * 500_000: 1})),
    "a long value": (COMPLETIONS, body(prompt='"a"', n=f'"{"x" * 500_000}"')),
    "logit_bias of texts": (COMPLETIONS, body(prompt='"a"', logit_bias=keys(50_000, '"x"'))),
    "a long key of logit_bias": (COMPLETIONS, body(prompt='"a"', logit_bias='{"' + "x" * 500_000 + '":1}')),
    "stops": (COMPLETIONS, body(prompt='"a"', stop=many("{}"))),
    "stop_token_ids": (COMPLETIONS, body(prompt='"a"', stop_token_ids=many('"a"'))),
    "allowed_token_ids": (COMPLETIONS, body(prompt='"a"', allowed_token_ids=many('"a"'))),
    "bad_words": (COMPLETIONS, body(prompt='"a"', bad_words=many("1"))),
    "metadata": (COMPLETIONS, body(prompt='"a"', metadata=keys(50_000))),
    "choices": (COMPLETIONS, body(prompt='"a"', structured_outputs=f'{{"choice":{many("1")}}}')),
    "a number of thousands of digits": (COMPLETIONS, body(prompt='"a"', max_tokens="9" * 50_000)),
    "a number without end": (COMPLETIONS, body(prompt='"a"', temperature="1e999999")),
    "no number": (COMPLETIONS, body(prompt='"a"', temperature="NaN")),
    "depth": (COMPLETIONS, body(prompt="[" * 900 + "]" * 900)),
    "more depth": (COMPLETIONS, body(prompt="[" * 40_000 + "]" * 40_000)),
    "messages": (CHAT, body(messages=many("{}"))),
    "messages of numbers": (CHAT, body(messages=many("1"))),
    "too many messages": (CHAT, body(messages=many('{"role":"user","content":"a"}', 5000))),
    "parts": (CHAT, body(messages=f'[{{"role":"user","content":{many("{}")}}}]')),
    "parts of many messages": (CHAT, body(messages=many(f'{{"role":"user","content":{many("{}", 90)}}}', 90))),
    "a kind of part": (CHAT, body(messages=f'[{{"role":"user","content":[{{"type":"{"x" * 500_000}"}}]}}]')),
    "calls": (CHAT, body(messages=f'[{{"role":"assistant","tool_calls":{many("{}")}}}]')),
    "arguments": (
        CHAT,
        body(
            messages='[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"' + "[" * 9999 + '"}}]}]'
        ),
    ),
    "tools": (CHAT, body(messages=HI, tools=many("{}"))),
    "documents": (CHAT, body(messages=HI, documents=many("1"))),
    "chat_template_kwargs": (CHAT, body(messages=HI, chat_template_kwargs=keys(50_000))),
    "items": (RESPONSES, body(input=many("{}"))),
    "items of numbers": (RESPONSES, body(input=many("1"))),
    "a kind of item": (RESPONSES, body(input=f'[{{"type":"{"x" * 500_000}"}}]')),
    "tools that the reply repeats": (
        RESPONSES,
        body(input='"a"', tools=f'[{{"type":"function","name":"f","description":"{"x" * 1_500_000}"}}]'),
    ),
    "metadata that the reply repeats": (RESPONSES, body(input='"a"', metadata=keys(20_000, '"a"'))),
    "a text that is too long": ("/tokenize", body(prompt=f'"{"a " * 200_000}"')),
    "fields of /tokenize": ("/tokenize", keys(50_000)),
    "tokens to write": ("/detokenize", body(tokens=many("1", 100_000))),
    "tokens that are none": ("/detokenize", body(tokens=many("-1"))),
    "scores": (COMPLETIONS, body(prompt=f"[{','.join([many('5', 100)] * 8)}]", n=16, prompt_logprobs=20)),
    "not allowed": ("/v1/load_lora_adapter", body(lora_name=f'"{"x" * 500_000}"', lora_path='"a"')),
    "nowhere": ("/nowhere", body(prompt=many("{}"))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_has_a_short_answer(server, name):
    status, reply = ask(server, *HOSTILE[name])
    assert status == (404 if name == "nowhere" else 400)
    assert len(reply) < 5000
    assert json.loads(reply)["error"]["message"]
    assert ask(server, "/health", method="GET")[0] == 200


def test_the_misses_of_a_short_list_are_all_told(server):
    reply = ask(server, COMPLETIONS, body(prompt=many("{}", 99)))[1]
    assert b"; and 91 more" in reply


@pytest.mark.parametrize("count", [5000, 100_000])
def test_prompts_are_counted_before_one_is_read(server, spy, count):
    status, reply = ask(server, COMPLETIONS, body(prompt=many('"a"', count)))
    assert status == 400
    assert str(count).encode() in reply
    assert not spy.texts


def test_a_prompt_is_not_read_whole_to_know_that_it_is_too_long(server, spy):
    for path, fields in (
        (COMPLETIONS, {"prompt": f'"{"a " * 500_000}"'}),
        (COMPLETIONS, {"prompt": f'"{"a " * 500_000}"', "truncate_prompt_tokens": -1}),
        (CHAT, {"messages": f'[{{"role":"user","content":"{"a " * 500_000}"}}]'}),
        ("/tokenize", {"prompt": f'"{"a " * 500_000}"'}),
    ):
        spy.texts.clear()
        status, reply = ask(server, path, body(**fields))
        assert status == 400, reply
        assert b"too long" in reply
        assert 0 < sum(map(len, spy.texts)) < 200_000


def test_nothing_long_is_read_on_the_event_loop(server, spy):
    long = "a " * 15_000
    ask(server, COMPLETIONS, body(prompt=json.dumps([long, "a"]), truncate_prompt_tokens=5, max_tokens=1))
    ask(server, COMPLETIONS, body(prompt=many('"a"', 40), max_tokens=1))
    ask(server, CHAT, body(messages=HI, max_tokens=1))
    ask(server, "/tokenize", body(prompt=json.dumps(long)))
    ask(server, "/tokenize", body(messages=HI))
    assert spy.texts
    assert server.thread not in spy.threads


def test_the_timeout_holds_for_what_comes_before_the_answer():
    with serving_(timeout=0.3) as server:
        server.tokenizer.seconds = 3.0  # a template that takes its time
        assert ask(server, CHAT, body(messages=HI))[0] == 504
        assert ask(server, "/health", method="GET")[0] == 200
        server.tokenizer.seconds = 0.0
        assert settled(server.engine)


def unfinished(first, *headers, rest="{"):
    return "\r\n".join([f"{first} HTTP/1.1", HEAD + "\r\n".join(headers), "", rest]).encode()


SLOW = {
    "nothing": b"",
    "half a line": b"GET /hea",
    "half a head": b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n",
    "half a body": unfinished("POST /v1/completions", "Content-Length: 1000"),
    "chunks": unfinished("POST /v1/completions", "Transfer-Encoding: chunked", rest="1\r\n{\r\n"),
    "half a chunk": unfinished("POST /v1/completions", "Transfer-Encoding: chunked", rest="1;a"),
    "to be told to go on": unfinished("POST /v1/completions", "Expect: 100-continue", "Content-Length: 9", rest=""),
    "a path that is none": unfinished("POST /nowhere", "Content-Length: 1000"),
    "the text of no request": unfinished("POST /v1/completions", "Content-Length: 1000").replace(b"json", b"text"),
    "a body for /health": unfinished("GET /health", "Content-Length: 1000"),
    "a body for /ping": unfinished("POST /ping", "Content-Length: 1000"),
    "chunks for OPTIONS": unfinished("OPTIONS /health", "Transfer-Encoding: chunked", rest="1\r\n{\r\n"),
    "a body for HEAD": unfinished("HEAD /health", "Content-Length: 1000"),
    "a body for PUT": unfinished("PUT /v1/completions", "Content-Length: 1000"),
    "a second request": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea",
    "chunks that are none": unfinished("POST /v1/completions", "Transfer-Encoding: chunked", rest="zz\r\n{\r\n"),
    "chunks that are none, for /health": unfinished("GET /health", "Transfer-Encoding: chunked", rest="zz\r\n{\r\n"),
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "a large head": b"GET /health HTTP/1.1\r\nX: " + b"a" * 300_000,
    "many headers": b"GET /health HTTP/1.1\r\n" + b"X: a\r\n" * 50_000,
}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(connections, "_TICK", 0.05)
    monkeypatch.setattr(connections, "_SLACK", 0.3)


def rest_of(line):
    """What comes until the connection is closed."""
    line.settimeout(20)
    found = b""
    with contextlib.suppress(ConnectionError):  # cut
        while piece := line.recv(65_536):
            found += piece
    return found


@pytest.mark.parametrize("keyed", [False, True])
def test_requests_that_never_end_are_ended(quick, tmp_path, caplog, keyed):
    (tmp_path / "keys").write_text("a key that is long enough\n".replace(" ", "-"))
    (tmp_path / "keys").chmod(0o600)
    keys = {"api_key_file": str(tmp_path / "keys")} if keyed else {}
    with serving_(client_timeout=0.3, **keys) as server, contextlib.ExitStack() as stack:
        lines = {name: stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for name in SLOW}
        for name, sent in SLOW.items():
            with contextlib.suppress(ConnectionError):
                lines[name].sendall(sent)
        found = {name: rest_of(line) for name, line in lines.items()}  # each ends
        for name in ("half a body", "chunks", "half a chunk", "a path that is none"):
            assert found[name].startswith(b"HTTP/1.1 401" if keyed else b"HTTP/1.1 408"), name
        assert found["a body for /health"].startswith(b"HTTP/1.1 200")
        assert ask(server, "/health", method="GET")[0] == 200
    assert not caplog.records


def test_those_who_are_still_sending_give_way(quick):
    with serving_(max_connections=8) as server, contextlib.ExitStack() as stack:
        for name in ("nothing", "half a head", "half a body") * 10:
            line = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            line.sendall(SLOW[name])
        assert ask(server, "/health", method="GET")[0] == 200
        assert len(server.server.server_state.connections) <= 8


def test_large_bodies_share_a_room(monkeypatch):
    from theodora.serve import guards

    monkeypatch.setattr(guards, "_BODIES", 1)
    with serving_(max_body=300_000) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.sendall(unfinished("POST /v1/completions", "Content-Length: 300000", rest="{" + " " * 200_000))
            while ask(server, COMPLETIONS, body(prompt='"a"', max_tokens=1) + " " * 200_000)[0] != 429:
                time.sleep(0.01)  # until it has arrived
            assert ask(server, COMPLETIONS, body(prompt='"a"', max_tokens=1))[0] == 200
        while ask(server, COMPLETIONS, body(prompt='"a"', max_tokens=1) + " " * 200_000)[0] != 200:
            time.sleep(0.01)


def test_a_client_that_does_not_read_is_cut(quick, server, monkeypatch):
    limits = server.server.config.http.limits
    monkeypatch.setattr(
        server.server.config.http, "limits", connections.Limits(limits.connections, 0.3, limits.answer, limits.stop)
    )
    asked = body(prompt=json.dumps("é" * 30_000), return_token_strs="true").encode()
    head = f"POST /tokenize HTTP/1.1\r\n{HEAD}Content-Length: {len(asked)}\r\n\r\n".encode()
    before = len(server.server.server_state.connections)
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect(("127.0.0.1", server.port))
        line.settimeout(20)
        with contextlib.suppress(ConnectionError):  # megabytes of replies, of which none is read
            for _ in range(60):
                line.sendall(head + asked)
        deadline = time.monotonic() + 20
        while len(server.server.server_state.connections) > before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(server.server.server_state.connections) <= before


def test_a_stop_does_not_wait_for_bodies_that_never_end(caplog):
    with contextlib.ExitStack() as stack:
        with serving_() as server:
            for name in ("nothing", "half a head", "half a body", "chunks", "a body for /ping") * 3:
                line = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
                line.sendall(SLOW[name])
            ask(server, "/health", method="GET")
        assert not caplog.records  # uvicorn says so where it has to cancel what does not end


def test_a_stop_tells_who_waits_for_work_that_hangs(caplog):
    caplog.set_level(logging.CRITICAL, "uvicorn.error")
    found = []
    with serving_() as server:
        server.tokenizer.seconds = 9.0
        server.server.config.timeout_graceful_shutdown = 0.2
        asking = threading.Thread(target=lambda: found.append(ask(server, CHAT, body(messages=HI))))
        asking.start()
        while not server.tokenizer.threads:
            time.sleep(0.01)
    asking.join(20)
    assert found[0][0] == 503


@pytest.mark.long
@pytest.mark.parametrize(("entry", "count"), [("1", 1_900_000), ('"a"', 900_000)])
def test_health_answers_while_large_bodies_are_read(server, entry, count):
    replies, sent = [], body(prompt=many(entry, count))
    asking = [threading.Thread(target=lambda: replies.append(ask(server, COMPLETIONS, sent))) for _ in range(4)]
    for thread in asking:
        thread.start()
    slowest = 0.0
    while any(thread.is_alive() for thread in asking):
        began = time.monotonic()
        assert ask(server, "/health", method="GET")[0] == 200
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.02)
    assert [status for status, _ in replies] == [400] * 4
    assert slowest < 5
