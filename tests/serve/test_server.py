"""The HTTP server, asked by the official client."""

import asyncio
import re

import openai
import pytest

from serving import alone, expected, settled
from theodora.errors import ConfigError
from theodora.serve.intake import Intake
from theodora.serve.protocol import ChatRequest
from tiny import tiny_tokenizer

PROMPT = "Hello there"


def text_of(name, folder, count=10):
    tokenizer = tiny_tokenizer()
    tokens, logprobs = expected(alone("llama", name, folder), tokenizer(PROMPT)["input_ids"], count)
    return tokenizer.decode(tokens), logprobs


def test_completions_of_the_base_and_of_each_adapter(server, adapter_dir):
    assert [model.id for model in server.client.models.list()] == ["base", "dora4", "lora8"]
    assert server.client.models.retrieve("dora4").id == "dora4"
    for name in ("base", "dora4", "lora8"):
        text, logprobs = text_of(name, None if name == "base" else adapter_dir(name))
        reply = server.client.completions.create(model=name, prompt=PROMPT, max_tokens=10, temperature=0, logprobs=3)
        (choice,) = reply.choices
        assert (choice.text, choice.finish_reason, reply.model) == (text, "length", name)
        assert choice.logprobs.token_logprobs == pytest.approx(logprobs, abs=1e-4)
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (11, 10)


def test_a_stream_brings_the_same_text(server, adapter_dir):
    text, _ = text_of("dora4", adapter_dir("dora4"))
    stream = server.client.completions.create(model="dora4", prompt=PROMPT, max_tokens=10, temperature=0, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"


def test_a_chat_streamed_and_not(server):
    asked = {
        "model": "lora8",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 8,
        "seed": 3,
        "temperature": 0.8,
    }
    whole = server.client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    stream = server.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert last.usage == whole.usage
    for entry in whole.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob


@pytest.mark.parametrize(
    ("asked", "status", "says"),
    [
        ({"model": "other"}, 404, "no model 'other'"),
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": []}, 400, "empty"),
        ({"prompt": "a" * 600}, 400, "600 tokens"),
        ({"prompt": [3, 999]}, 400, "outside 0 to 271"),
        ({"prompt": ["a"] * 100, "n": 3}, 400, "300 requests; expected at most 272"),
        ({"max_tokens": 600}, 400, "at most 512"),
        ({"presence_penalty": 3.0}, 400, "presence_penalty"),
        ({"temperature": -1}, 400, "temperature"),
        ({"best_of": 2, "n": 3}, 400, "best_of is 2; expected at least n"),
        ({"stop": ["x"] * 17}, 400, "at most 16 stop texts"),
        ({"stop": "x" * 257}, 400, "at most 256 characters"),
        ({"prompt": [PROMPT, "a" * 600]}, 400, "600 tokens"),  # the first runs already
        ({"extra_body": {"made_up": 1}}, 400, "made_up"),
    ],
)
def test_what_cannot_be_answered_says_so(server, asked, status, says):
    with pytest.raises(openai.APIStatusError, match=says) as error:
        server.client.completions.create(**{"model": "base", "prompt": PROMPT, **asked})
    assert error.value.status_code == status
    assert server.client.completions.create(model="base", prompt=PROMPT, max_tokens=1).choices
    assert settled(server.engine)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, "role"),
        ({"top_logprobs": 2}, "needs logprobs: true"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
    ],
)
def test_a_chat_that_cannot_be_answered_says_so(server, asked, says):
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(openai.BadRequestError, match=says):
        server.client.chat.completions.create(**{"model": "base", "messages": messages, **asked})


@pytest.mark.parametrize(
    ("template", "says"),
    [(None, "no chat template; use /v1/completions"), ("{{ raise_exception('who is system?') }}", "who is system?")],
)
def test_a_template_that_cannot_write_a_chat_says_so(engine_of, template, says):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    asked = ChatRequest(model="base", messages=[{"role": "system", "content": "Hi"}])
    with pytest.raises(ConfigError, match=re.escape(says)):
        asyncio.run(Intake(engine_of("llama"), tokenizer).chat(asked, None))


def test_content_in_parts_and_null_for_defaults(server):
    create, asked = server.client.chat.completions.create, {"model": "lora8", "max_tokens": 4, "seed": 1}
    whole = create(messages=[{"role": "user", "content": "Hi there"}], **asked)
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    found = create(messages=[{"role": "user", "content": parts}], temperature=None, top_p=None, n=None, **asked)
    assert found.choices == whole.choices
    assert found.usage == whole.usage


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_text(server, adapter_dir, stream):
    text, _ = text_of("dora4", adapter_dir("dora4"), 30)
    stop = text[2:4]
    assert "\ufffd" not in text[:4]  # bytes of no character could not be counted below
    asked = {"model": "dora4", "prompt": PROMPT, "max_tokens": 400, "temperature": 0, "logprobs": 0}
    found = server.client.completions.create(**asked, stop=["never said", stop], stream=stream)
    choices = [reply.choices[0] for reply in (found if stream else [found])]
    assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
    assert choices[-1].finish_reason == "stop"
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    assert len(tokens) == len(text[: text.index(stop)].encode())  # a token is a byte, and none of them the stop's
    assert settled(server.engine)  # the rest of the 400 tokens is not generated


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_after_a_stop_text_are_not_counted(server, adapter_dir, stream):
    text, _ = text_of("dora4", adapter_dir("dora4"), 30)
    asked = {"model": "dora4", "prompt": PROMPT, "max_tokens": 400, "temperature": 0, "stop": [text[2:4]]}
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    for _ in range(3):
        found = server.client.completions.create(**asked, **options)
        assert (list(found)[-1] if stream else found).usage.completion_tokens == len(text[:4].encode())


def test_log_probabilities_tell_the_bytes_of_parts_of_characters(server, adapter_dir):
    """The tiny model's answers are bytes, and many of them no characters."""
    asked = {"model": "dora4", "max_tokens": 20, "temperature": 0}
    legacy = server.client.completions.create(prompt=PROMPT, logprobs=5, **asked).choices[0].logprobs
    assert any(token.startswith("bytes:\\x") for token in legacy.tokens)
    assert all(len(top) in (5, 6) for top in legacy.top_logprobs)  # none fell on another's key
    by_number = {"extra_body": {"return_tokens_as_token_ids": True}}
    found = server.client.completions.create(prompt=PROMPT, logprobs=5, **asked, **by_number).choices[0].logprobs
    assert all(token.startswith("token_id:") for token in found.tokens)
    assert found.token_logprobs == pytest.approx(legacy.token_logprobs, abs=1e-5)
    messages = [{"role": "user", "content": PROMPT}]
    reply = server.client.chat.completions.create(messages=messages, logprobs=True, **asked).choices[0]
    told = b"".join(bytes(entry.bytes) for entry in reply.logprobs.content)
    assert told.decode(errors="replace") == reply.message.content


def test_a_model_that_is_not_there(server):
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        server.client.models.retrieve("other")


def test_a_failure_of_ours_is_500_and_tells_nothing(server_of, monkeypatch):
    server = server_of()
    monkeypatch.setattr(server.engine.adapters, "adapters", lambda: 1 / 0)
    with pytest.raises(openai.InternalServerError, match="The server failed on this request") as error:
        server.client.models.list()
    assert "zero" not in str(error.value)
