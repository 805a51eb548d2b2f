"""What clients send: every field has its effect, asks for nothing, or is refused by name."""

import re
from pathlib import Path

import openai
import pytest
from openai.types.chat import ParsedChatCompletionMessage
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from pydantic import BaseModel

from serving import alone, expected, settled
from theodora.serve import fields
from theodora.serve.messages import Message, StructuredOutputs
from theodora.serve.protocol import ChatRequest, CompletionRequest
from tiny import tiny_tokenizer

PROMPT = "Hello there"
HI = [{"role": "user", "content": "Hi"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def chat(server, messages=HI, **asked):
    asked = {"model": "base", "max_tokens": 3, "temperature": 0, **asked}
    return server.client.chat.completions.create(messages=messages, **asked)


def complete(server, prompt=PROMPT, **asked):
    return server.client.completions.create(
        **{"model": "base", "max_tokens": 8, "temperature": 0, **asked}, prompt=prompt
    )


def greedy(count=8, prompt=PROMPT):
    return expected(alone("llama", None, None), tiny_tokenizer()(prompt)["input_ids"], count)


def text(tokens):
    return tiny_tokenizer().decode(tokens)


def test_the_servers_own_reply_is_a_message(server):
    reply = chat(server).choices[0].message
    for own in (reply, reply.model_dump(), {**reply.model_dump(), "annotations": [], "audio": None}):
        assert chat(server, [*HI, own, {"role": "user", "content": "More"}]).choices
    called = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL], "function_call": None}
    assert chat(server, [*HI, called, {"role": "tool", "tool_call_id": "c1", "content": "blue"}]).choices


@pytest.mark.parametrize(
    ("sent", "plain"),
    [
        ({"role": "assistant", "content": None, "tool_calls": []}, {"role": "assistant", "content": ""}),
        ({"role": "assistant", "content": None, "refusal": "No."}, {"role": "assistant", "content": "No."}),
        ({"role": "user", "content": ["a", {"type": "text", "text": "b"}]}, {"role": "user", "content": "ab"}),
        (
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "blue"}]},
            {"role": "tool", "content": "blue", "tool_call_id": "c1"},
        ),
        (
            {"role": "assistant", "content": "", "reasoning": "hm", "tool_calls": [CALL | {"index": 0}]},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "hm",
                "tool_calls": [CALL | {"function": {"name": "look", "arguments": {"at": "sky"}}}],
            },
        ),
        (
            {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": ""}},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}],
            },
        ),
        ({"role": "function", "name": "look", "content": "blue"}, {"role": "tool", "content": "blue", "name": "look"}),
    ],
)
def test_messages_as_chat_templates_want_them(sent, plain):
    assert Message.model_validate(sent).plain() == plain


def test_what_the_client_has_parsed_comes_back(server):
    class Sky(BaseModel):
        colour: str

    parsed = ParsedChatCompletionMessage[Sky](role="assistant", content='{"colour": "blue"}', parsed=Sky(colour="blue"))
    assert chat(server, [*HI, parsed, *HI]).choices
    function = CALL["function"] | {"parsed_arguments": {"at": "sky"}}
    message = Message.model_validate({"role": "assistant", "tool_calls": [CALL | {"function": function}]})
    assert message.plain()["tool_calls"][0]["function"] == {"name": "look", "arguments": {"at": "sky"}}


def test_every_field_of_openais_is_accepted_where_it_asks_for_nothing(server):
    neutral = {
        "chat": {
            "functions": [],
            "function_call": "none",
            "logit_bias": {},
            "logprobs": False,
            "metadata": {"a": "b"},
            "modalities": ["text"],
            "n": 1,
            "parallel_tool_calls": True,
            "response_format": {"type": "text"},
            "service_tier": "auto",
            "store": False,
            "tool_choice": "auto",
            "tools": [],
            "user": "me",
            "verbosity": "medium",
            "safety_identifier": "x",
            "prompt_cache_key": "x",
            "reasoning_effort": "none",
        },
        "completions": {"best_of": 1, "echo": False, "logit_bias": {}, "n": 1, "suffix": "", "user": "me"},
    }
    vllm = {
        "min_p": 0,
        "repetition_penalty": 1.0,
        "length_penalty": 1.0,
        "use_beam_search": False,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "allowed_token_ids": None,
        "bad_words": [],
        "stop_token_ids": [],
        "priority": 0,
        "vllm_xargs": {},
        "truncate_prompt_tokens": None,
        "structured_outputs": None,
        "guided_json": None,
        "made_up": None,
    }
    alone_ = chat(server).choices, complete(server).choices
    assert chat(server, **neutral["chat"], extra_body=vllm | {"chat_template_kwargs": {}}).choices == alone_[0]
    assert complete(server, **neutral["completions"], extra_body=vllm).choices == alone_[1]
    given = {"model", "messages", "prompt", "max_tokens", "temperature"}
    nulls = [dict.fromkeys(params.__annotations__.keys() - given) for params in (ChatParams, CompletionParams)]
    assert chat(server, extra_body=nulls[0]).choices == alone_[0]
    assert complete(server, extra_body=nulls[1]).choices == alone_[1]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"audio": {"voice": "x", "format": "wav"}}, "audio: not supported by this server"),
        ({"functions": [{"name": "f"}]}, "functions: not supported by this server; send tools"),
        ({"use_beam_search": True}, "use_beam_search: not supported by this server; n or best_of"),
        ({"chat_template": "{{ x }}"}, "chat_template: not supported by this server; the model's or adapter's own"),
        ({"made_up": 1}, "made_up: not supported by this server, which knows no such field"),
        ({"made_up": 1, "priority": 3}, "made_up: .*; priority: not supported by this server"),
        ({"stream_options": {"include_usage": True}}, "stream_options: expected with stream: true only"),
        ({"stream_options": {}}, "stream_options: expected with stream: true only"),
        ({"min_tokens": 9}, "min_tokens is 9; expected at most max_tokens, which is 3"),
        ({"logit_bias": {"999": 1}}, "logit_bias holds token ids outside 0 to 271"),
        ({"logit_bias": {"1": 101}}, "logit_bias.*less than or equal to 100"),
        ({"allowed_token_ids": [3, 999]}, "allowed_token_ids holds token ids outside"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"tool_choice": "required"}, "tool_choice: expected with tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "b"}}}, "no tool 'b'"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools.0"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0: content: expected the user's text"),
        ({"messages": [{"role": "user", "content": "a", "audio": {"id": "x"}}]}, "audio: not supported"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}]}
                ]
            },
            "JSON",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0: a content part of type 'image_url': not supported",
        ),
        ({"continue_final_message": True, "add_generation_prompt": True}, "expected without add_generation_prompt"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs: not supported in a stream"),
        ({"chat_template_kwargs": {"tools": []}}, "expected as fields of the request"),
        ({"response_format": {"type": "json_schema"}}, "json_schema: expected with type json_schema"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "regex and choice: expected one of them"),
    ],
)
def test_what_is_not_done_is_refused_by_name(server, asked, says):
    with pytest.raises(openai.BadRequestError, match=says) as error:
        chat(server, asked.pop("messages", HI), extra_body=asked)
    assert "Extra inputs" not in str(error.value)


def test_forms_of_answers_are_one_form():
    def form(**asked):
        return CompletionRequest(model="m", prompt="a", **asked).form

    schema = {"type": "object"}
    assert form() is form(response_format={"type": "text"}) is None
    assert form(guided_json=schema) == form(structured_outputs={"json": schema}) == StructuredOutputs(json_=schema)
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    assert form(response_format=asked) == StructuredOutputs(json_=schema)
    assert form(response_format={"type": "json_object"}).form == "json_object"
    assert form(guided_choice=["a", "b"]).choice == ["a", "b"]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_tokens_and_stop_texts_stay_or_go(server, stream):
    letters = tiny_tokenizer()("abcdefghijklmnopqrstuvwxyz")["input_ids"]

    def answer(**asked):
        more = {"allowed_token_ids": letters, **asked.pop("extra_body", {})}
        found = complete(server, stream=stream, temperature=1, seed=2, extra_body=more, **asked)
        choices = [reply.choices[0] for reply in (found if stream else [found])]
        return "".join(choice.text for choice in choices), choices[-1].stop_reason

    whole, reason = answer()
    assert (len(whole), reason) == (8, None)
    at = next(at for at in range(2, 8) if whole[at] not in whole[:at])
    token = letters[ord(whole[at]) - ord("a")]
    stop = {"stop_token_ids": [token]}
    assert answer(extra_body=stop) == (whole[:at], token)
    assert answer(extra_body=stop | {"include_stop_str_in_output": True}) == (whole[: at + 1], token)
    assert answer(extra_body=stop | {"min_tokens": 8})[1] is None
    said = whole[at - 1 : at + 1]
    assert answer(stop=said) == (whole[: at - 1], said)
    assert answer(stop=said, extra_body={"include_stop_str_in_output": True}) == (whole[: at + 1], said)
    assert answer(stop=said, extra_body={"min_tokens": 8}) == (whole, None)
    assert settled(server.engine)


def test_special_tokens_are_shown_where_that_is_asked(server):
    asked = {"logit_bias": {"0": 100}, "max_tokens": 2}
    assert complete(server, **asked).choices[0].text == ""
    found = complete(server, **asked, extra_body={"skip_special_tokens": False}).choices[0].text
    assert found == "<|endoftext|>" * 2


def test_the_best_of_several_answers(server):
    asked = {"temperature": 1.2, "seed": 5, "logprobs": 0}
    drawn = complete(server, **asked, n=4).choices
    best = complete(server, **asked, n=2, best_of=4)

    def mean(choice):
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    expected_ = [choice.text for choice in sorted(drawn, key=mean, reverse=True)[:2]]
    assert [choice.text for choice in best.choices] == expected_
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.usage.completion_tokens == 32


def test_a_stream_of_several_answers_brings_one_choice_a_chunk(server):
    asked = {"n": 3, "temperature": 1.0, "seed": 4, "max_tokens": 6}
    options = {"include_usage": True, "include_obfuscation": True, "continuous_usage_stats": True}
    whole = chat(server, **asked)
    *chunks, last = list(chat(server, **asked, stream=True, stream_options=options))
    assert all(len(chunk.choices) == 1 for chunk in chunks)
    assert all(chunk.usage.total_tokens >= 1 for chunk in chunks)
    assert all(chunk.obfuscation for chunk in chunks)
    assert last.choices == []
    assert last.usage == whole.usage
    for index, choice in enumerate(whole.choices):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert all(one.delta.role is None for one in mine[1:])
        assert "".join(one.delta.content or "" for one in mine) == choice.message.content
        assert [one.finish_reason for one in mine][-1] == choice.finish_reason
    prompts = ["Hello", "there", "you"]
    whole = complete(server, prompts)
    chunks = list(complete(server, prompts, stream=True))
    assert all(len(chunk.choices) == 1 for chunk in chunks)
    for choice in whole.choices:
        mine = [chunk.choices[0].text for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(mine) == choice.text


def test_what_goes_to_the_chat_template(server_of):
    server, template = (
        server_of(),
        (
            "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}<{{ m.role }}>"
            "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.at }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{{ mood }}{{ reasoning_effort }}{% endif %}"
        ),
    )
    server.tokenizer.chat_template = template

    def prompt(messages=HI, **asked):
        found = chat(server, messages, max_tokens=1, extra_body={"return_token_ids": True, **asked})
        return server.tokenizer.decode(found.prompt_token_ids)

    assert prompt() == "<user>Hi<assistant>"
    assert prompt(tools=[TOOL]) == "[look]<user>Hi<assistant>"
    assert prompt(tools=[TOOL], tool_choice="none") == "<user>Hi<assistant>"
    assert prompt(chat_template_kwargs={"mood": "glad"}, reasoning_effort="low") == "<user>Hi<assistant>gladlow"
    assert prompt(add_generation_prompt=False) == "<user>Hi"
    begun = [*HI, {"role": "assistant", "content": "I "}]
    assert prompt(begun, continue_final_message=True) == "<user>Hi<assistant>I "
    assert (
        prompt([*HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}])
        == "<user>Hi<assistant>sky<assistant>"
    )
    assert prompt([{"role": "developer", "content": "Be"}, *HI]) == "<system>Be<user>Hi<assistant>"
    assert prompt(truncate_prompt_tokens=4) == "ant>"
    assert chat(server, begun, extra_body={"echo": True}).choices[0].message.content.startswith("I ")


def test_what_a_template_does_not_show_is_said(server):
    asked = {"model": "base", "messages": HI, "max_tokens": 1, "tools": [TOOL]}
    asked["extra_body"] = {"chat_template_kwargs": {"enable_thinking": False}}
    found = server.client.chat.completions.with_raw_response.create(**asked)
    note = "the chat template does not show tools; the chat template does not know enable_thinking"
    assert found.headers["x-theodora-note"] == note
    assert (
        "x-theodora-note"
        not in server.client.chat.completions.with_raw_response.create(model="base", messages=HI, max_tokens=1).headers
    )


def test_words_that_are_not_to_come(server):
    tokens, _ = greedy(8)
    word = tiny_tokenizer().decode(tokens[:1])
    if "\ufffd" in word:
        word = "a"
    found = complete(server, extra_body={"bad_words": [word], "return_token_ids": True}).choices[0].token_ids
    assert not set(tiny_tokenizer()(word)["input_ids"]) & set(found)


def test_the_docs_say_what_happens_to_every_field():
    docs = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`(\w+)`", docs))
    assert not {*ChatRequest.model_fields, *CompletionRequest.model_fields, *fields._NEUTRAL} - told


def test_fields_are_one_list():
    """A field that a chat knows is known to completions, except what only a chat has, and the other way."""
    chats, completions = set(ChatRequest.model_fields), set(CompletionRequest.model_fields)
    assert completions - chats == {"prompt", "best_of"}
    assert {"messages", "tools", "tool_choice"} <= chats - completions
