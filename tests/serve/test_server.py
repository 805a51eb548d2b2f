"""The HTTP server, asked by the official client."""

import openai
import pytest

from serving import alone, expected
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
        ({"max_tokens": 600}, 400, "at most 512"),
        ({"presence_penalty": 1.0}, 400, "presence_penalty"),
        ({"temperature": -1}, 400, "temperature"),
        ({"extra_body": {"made_up": 1}}, 400, "made_up"),
    ],
)
def test_what_cannot_be_answered_says_so(server, asked, status, says):
    with pytest.raises(openai.APIStatusError, match=says) as error:
        server.client.completions.create(**{"model": "base", "prompt": PROMPT, **asked})
    assert error.value.status_code == status
    assert server.client.completions.create(model="base", prompt=PROMPT, max_tokens=1).choices
