"""One tenant's numbers are nobody else's affair: what is not finite ends its own requests, and only they."""

import json
import shutil
import threading
import urllib.error
import urllib.request

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from serving import Server, settled
from theodora import AdapterConfig, inject_adapter, save_adapter
from theodora.adapters.state import trained_tensors
from theodora.serve.config import ServeConfig
from theodora.serve.engine import Engine

(ODD,) = tiny.tiny_tokenizer()("f")["input_ids"]  # a token that one adapter cannot stand


@pytest.fixture(scope="module")
def adapters(adapter, tmp_path_factory):
    """A folder with adapters: good, and copies of others whose values are finite and too large."""
    root = tmp_path_factory.mktemp("adapters")
    shutil.copytree(adapter("lora8"), root / "good")

    def ruin(name, source, change):
        shutil.copytree(adapter(source), root / name)
        file = root / name / "adapter_model.safetensors"
        save_file({key: change(key, value) for key, value in load_file(file).items()}, file)

    ruin("overflows", "lora8", lambda key, value: torch.full_like(value, 1e38) if "lora_B" in key else value)
    ruin("large", "lora8", lambda key, value: torch.full_like(value, 1e5) if "lora_B" in key else value)
    ruin("nan", "dora4", lambda key, value: value * torch.nan if "magnitude" in key else value)
    model = inject_adapter(tiny.tiny_model(), AdapterConfig(method="lora", rank=1, targets=r".*embed_tokens"))
    for name, tensor in trained_tensors(model).items():
        tensor.data.fill_(1e10 if "lora_B" in name else 1e-12)
        if "lora_A" in name:
            tensor.data[0, ODD] = 1e30
    save_adapter(model, root / "odd")
    return root


@pytest.fixture(scope="module")
def server(adapters):
    config = ServeConfig(model="base", kv_tokens=4096, max_batch_tokens=512, max_batch=16, adapter_folder=str(adapters))
    engine = Engine(tiny.tiny_model(), config)
    for name in ("good", "overflows", "odd"):
        engine.load(name, adapters / name)
    with Server(engine, tiny.tiny_tokenizer()) as running:
        yield running


def post(server, path, **body):
    """Status and body; JSON without NaN and infinities, as the standard has it, or events."""

    def refuse(word):
        raise AssertionError(f"{word} in JSON")

    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            status, text = reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    parts = [part.removeprefix("data: ") for part in text.split("\n\n") if part.startswith("data: ")] or [text]
    return status, [json.loads(part, parse_constant=refuse) for part in parts if part != "[DONE]"]


def text_of(server, model, prompt="Hello there, and on", count=24):
    status, (reply,) = post(
        server, "/v1/completions", model=model, prompt=prompt, max_tokens=count, temperature=0, ignore_eos=True
    )
    assert status == 200
    return reply["choices"][0]["text"]


def test_answers_beside_an_adapter_that_overflows_are_right(server):
    right = {model: text_of(server, model) for model in ("base", "good")}
    stop, statuses = threading.Event(), []

    def ask():
        while not stop.is_set():
            body = {"model": "overflows", "prompt": "Hello there", "max_tokens": 50}
            statuses.append(post(server, "/v1/completions", **body)[0])

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    try:
        found = [(model, text_of(server, model)) for _ in range(3) for model in right]
    finally:
        stop.set()
        for thread in asking:
            thread.join()
    assert found == list(right.items()) * 3
    assert set(statuses) == {500}
    assert settled(server.engine)


MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Hello"}),
        ("/v1/completions", {"prompt": "Hello", "logprobs": 3, "echo": True, "max_tokens": 0}),
        ("/v1/completions", {"prompt": "Hello", "prompt_logprobs": 2, "n": 2, "temperature": 0.7}),
        ("/v1/completions", {"prompt": ["Hello", "There"], "top_p": 0.5, "repetition_penalty": 1.2}),
        ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True, "top_logprobs": 5}),
        ("/v1/chat/completions", {"messages": MESSAGES, "response_format": {"type": "json_object"}}),
        ("/v1/responses", {"input": "Hello"}),
    ],
)
def test_every_kind_of_answer_that_is_not_finite_is_an_error(server, path, body):
    status, (reply,) = post(server, path, model="overflows", **body)
    assert status == 500
    assert reply["error"]["type"] == "server_error"
    assert "The output of 'overflows' is not finite" in reply["error"]["message"]
    if body.get("n") != 2:
        _, events = post(server, path, model="overflows", stream=True, **body)
        assert events[-1]["error"]["type"] == "server_error"
        assert not any(
            "logprobs" in choice for event in events for choice in event.get("choices", ()) if choice.get("text")
        )
    assert settled(server.engine)


def test_an_answer_ends_where_it_stops_being_finite_and_its_beginning_is_used_again_only_where_it_was(server):
    long = "A beginning that takes more than one page, keys and values, up to here: "
    right = {model: text_of(server, model, long) for model in ("base", "odd")}
    for _ in range(2):
        status, (reply,) = post(server, "/v1/completions", model="odd", prompt=long + "f" + long, max_tokens=5)
        assert status == 500, reply
        assert {model: text_of(server, model, long) for model in right} == right
    body = {"model": "odd", "prompt": long, "allowed_token_ids": [ODD], "max_tokens": 9, "stream": True}
    _, events = post(server, "/v1/completions", **body, logprobs=2)
    assert all("choices" in event for event in events[:-1])  # its beginning, if it was read before the end had come
    assert "'odd'" in events[-1]["error"]["message"]
    # Without that token it answers as it did.
    assert text_of(server, "odd", long) == right["odd"]


def test_what_is_not_finite_in_the_dtype_that_runs_is_not_loaded(adapters, server):
    status, (reply,) = post(server, "/v1/load_lora_adapter", lora_name="nan", lora_path="nan")
    assert status == 400, reply
    assert "NaN" in reply["error"]["message"]
    config = ServeConfig(model="base", kv_tokens=512, max_batch_tokens=64, max_batch=4, adapter_folder=str(adapters))
    with Server(Engine(tiny.tiny_model().half(), config), tiny.tiny_tokenizer()) as half:
        for name in ("large", "overflows"):
            status, (reply,) = post(half, "/v1/load_lora_adapter", lora_name=name, lora_path=name)
            assert status == 400, reply
            assert "s·B is not finite on this model's weights, in float16" in reply["error"]["message"]
        assert post(half, "/v1/load_lora_adapter", lora_name="good", lora_path="good")[0] == 200
        assert text_of(half, "good")


def test_a_base_model_whose_row_is_not_finite_ends_the_prompts_that_have_it():
    model = tiny.tiny_model()
    model.get_input_embeddings().weight.data[ODD] = torch.nan
    config = ServeConfig(model="base", kv_tokens=512, max_batch_tokens=64, max_batch=4)
    with Server(Engine(model, config), tiny.tiny_tokenizer()) as server:
        status, (reply,) = post(server, "/v1/completions", model="base", prompt="a few", logprobs=2, echo=True)
        assert status == 500
        assert "The base model's output is not finite" in reply["error"]["message"]
        assert text_of(server, "base", "another")
