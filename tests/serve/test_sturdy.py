"""Clients that misbehave, strangers, and hostile adapters: each gets its answer, and the others go on."""

import asyncio
import http.client
import json
import shutil
import socket
import time

import openai
import pytest

from serving import alone, expected, settled
from tiny import tiny_tokenizer

SLOW = {"model": "dora4", "prompt": "Hello", "max_tokens": 400, "temperature": 0}


def post(server, path, body, **headers):
    """Status and body of a bare request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"content-type": "application/json", **headers})
    reply = connection.getresponse()
    found = reply.status, reply.read().decode(), dict(reply.getheaders())
    connection.close()
    return found


def test_clients_that_hang_up_leave_nothing_behind(server):
    for stream in (True, False):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port)) as line:
                body = json.dumps({**SLOW, "stream": stream}).encode()
                head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                if stream:
                    assert line.recv(10)
                else:
                    time.sleep(0.02)
    assert server.client.completions.create(model="base", prompt="a", max_tokens=2).choices
    assert settled(server.engine)


def test_a_client_that_closes_its_stream_ends_it(server):
    stream = server.client.completions.create(**SLOW, stream=True)
    next(iter(stream))
    stream.close()
    assert settled(server.engine)


def test_hundreds_of_clients_at_once(server_of, adapter_dir):
    server = server_of("dora4", "lora8", max_queue=40)
    names = ("base", "dora4", "lora8")
    tokenizer = tiny_tokenizer()
    models = {name: alone("llama", name, None if name == "base" else adapter_dir(name)) for name in names}
    prompt = tokenizer("Hi")["input_ids"]
    texts = {name: tokenizer.decode(expected(model, prompt, 6)[0]) for name, model in models.items()}

    async def everybody():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0, timeout=120) as client:

            async def one(index):
                name = names[index % 3]
                try:
                    reply = await client.completions.create(model=name, prompt="Hi", max_tokens=6, temperature=0)
                except openai.RateLimitError as error:
                    return 429 if error.response.headers["retry-after"] == "1" else 0
                assert reply.choices[0].text == texts[name]
                return 200

            return await asyncio.gather(*map(one, range(300)))

    found = asyncio.run(everybody())
    assert set(found) <= {200, 429}
    assert found.count(200) >= 56
    assert settled(server.engine)


def test_a_full_queue_is_429_and_empties(server_of):
    server = server_of("dora4", max_batch=1, max_queue=1)
    streams = [server.client.completions.create(**SLOW, stream=True) for _ in range(2)]
    with pytest.raises(openai.RateLimitError):
        server.client.completions.create(model="base", prompt="a")
    for stream in streams:
        stream.close()
    assert settled(server.engine)
    assert server.client.completions.create(model="base", prompt="a", max_tokens=1).choices


def test_an_answer_that_takes_too_long_is_ended(server_of):
    server = server_of("dora4", timeout=0.05)
    with pytest.raises(openai.APIStatusError) as error:
        server.client.completions.create(**SLOW)
    assert error.value.status_code == 504
    with pytest.raises(openai.APIError, match="more than 0"):
        list(server.client.completions.create(**SLOW, stream=True))
    assert settled(server.engine)


def test_a_failed_worker_is_503_and_the_next_request_is_answered(server_of):
    server = server_of("dora4")
    fail = [True]

    def once(*_):
        if fail:
            fail.pop()
            raise RuntimeError("out of memory, say")

    server.engine.model.model.layers[0].register_forward_pre_hook(once)
    with pytest.raises(openai.APIStatusError) as error:
        server.client.completions.create(**SLOW)
    assert error.value.status_code == 503
    deadline = time.monotonic() + 60
    while not server.engine.ready() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.client.completions.create(model="dora4", prompt="a", max_tokens=2).choices
    assert 'status="503"} 1.0' in fetch(server, "/metrics")
    assert "theodora_worker_restarts_total 1.0" in fetch(server, "/metrics")


def fetch(server, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", path, headers=headers)
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def test_bodies_that_are_no_requests(server):
    odd = (b"", b"{", b"[]", b"null", b'{"model": 3}', b"\xff\xfe", b"[" * 5000, b'{"model":"base","prompt":1e999}')
    half = rb'{"model":"base","prompt":"half a character: \ud83d"}'  # what JavaScript sends of a text that it cut there
    name = rb'{"model":"base","prompt":"a","\ud83d":1}'
    for body in (*odd, half, name):
        status, text, _ = post(server, "/v1/completions", body)
        assert status == 400, text
        assert json.loads(text)["error"]["message"]
    chat = rb'{"model":"base","messages":[{"role":"user","content":"\ud83d"}],"stream":true}'
    assert post(server, "/v1/chat/completions", chat)[0] == 400
    assert post(server, "/v1/nothing", {})[0] == 404
    assert post(server, "/v1/completions", {"model": "base", "prompt": "a"}, **{"content-type": "text/plain"})[0] == 415
    assert post(server, "/v1/completions", {"model": "base", "prompt": "a"}, host="evil.example")[0] == 403


def test_a_body_that_is_too_large(server_of):
    server = server_of(max_body=2000)
    assert post(server, "/v1/completions", {"model": "base", "prompt": "a" * 3000})[0] == 413
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    chunks = (b"a" * 500 for _ in range(100))  # of unknown length
    try:
        connection.request("POST", "/v1/completions", chunks, {"content-type": "application/json"}, encode_chunked=True)
        assert connection.getresponse().status == 413
    except ConnectionError:  # closed before all was sent
        pass
    connection.close()
    assert server.client.completions.create(model="base", prompt="a", max_tokens=1).choices


def test_keys(server_of, tmp_path):
    (tmp_path / "keys").write_text("first\nzweiter Schlüssel\n", encoding="utf-8")
    server = server_of(api_key_file=str(tmp_path / "keys"))
    second = "zweiter Schlüssel"
    as_utf8 = second.encode().decode("latin-1")  # how Python's client is given bytes
    for key, status in ((None, 401), ("", 401), ("third", 401), ("first", 200), (second, 200), (as_utf8, 200)):
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        asked = {"model": "base", "prompt": "a", "max_tokens": 1}
        assert post(server, "/v1/completions", asked, **headers)[0] == status
    assert "key" in fetch(server, "/metrics")
    assert json.loads(fetch(server, "/health")) == {"status": "ok"}


def test_loading_at_run_time_is_off_unless_allowed(server):
    for path in ("load", "unload"):
        asked = {"lora_name": "dora4"} | ({"lora_path": "x"} if path == "load" else {})
        status, text, _ = post(server, f"/v1/{path}_lora_adapter", asked)
        assert status == 403
        assert "--adapter-folder" in text
    assert "dora4" in [model.id for model in server.client.models.list()]


@pytest.fixture
def folder(adapter_dir, tmp_path):
    """A folder with adapters: one that is good, and others."""
    root = tmp_path / "adapters"
    for name in ("good", "truncated", "no-config", "odd-config"):
        shutil.copytree(adapter_dir("lora8"), root / name)
    weights = root / "truncated" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (root / "no-config" / "adapter_config.json").unlink()
    (root / "odd-config" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 99999}')
    shutil.copytree(adapter_dir("dora4"), tmp_path / "outside")
    (root / "leads-out").symlink_to(tmp_path / "outside")
    shutil.copytree(adapter_dir("dora4"), root / "file-leads-out")
    (root / "file-leads-out" / "adapter_model.safetensors").unlink()
    (root / "file-leads-out" / "adapter_model.safetensors").symlink_to(tmp_path / "outside/adapter_model.safetensors")
    shutil.copytree(adapter_dir("dora4", "qwen2"), root / "other-model")
    return root


def test_loading_and_unloading_at_run_time(server_of, folder, adapter_dir):
    server = server_of("dora4", adapter_folder=str(folder))

    def load(name, path):
        return post(server, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    for path in ("../outside", str(folder.parent / "outside"), "leads-out", "file-leads-out", "/etc", "nothing", ".."):
        status, text, _ = load("new", path)
        assert status == 400
        assert "There is no adapter" in text, path  # the same for what is there and what is not
    for path in ("truncated", "no-config", "odd-config", "other-model", "."):
        status, text, _ = load("new", path)
        assert status == 400, (path, text)
    for name in ("", "a/b", "../x", "x" * 200):
        assert load(name, "good")[0] == 400
    assert load("dora4", "good")[0] == load("base", "good")[0] == 400  # taken
    status, text, _ = load("new", "good")
    assert status == 200, text
    assert load("other", str(folder / "good"))[0] == 200
    assert [model.id for model in server.client.models.list()] == ["base", "dora4", "new", "other"]
    tokenizer = tiny_tokenizer()
    tokens, _ = expected(alone("llama", "lora8", adapter_dir("lora8")), tokenizer("Hi")["input_ids"], 5)
    for name in ("new", "other"):
        reply = server.client.completions.create(model=name, prompt="Hi", max_tokens=5, temperature=0)
        assert reply.choices[0].text == tokenizer.decode(tokens)
    assert post(server, "/v1/unload_lora_adapter", {"lora_name": "new"})[0] == 200
    assert post(server, "/v1/unload_lora_adapter", {"lora_name": "new"})[0] == 404
    with pytest.raises(openai.NotFoundError):
        server.client.completions.create(model="new", prompt="Hi")
    assert settled(server.engine)
