"""What is wrong with a body is said in the body's own words."""

import pytest
from pydantic import ValidationError

from theodora.errors import ConfigError
from theodora.serve.misses import describe_misses
from theodora.serve.protocol import ChatRequest, CompletionRequest
from theodora.serve.responses import ResponsesRequest, chat_of

HI = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "look"}}]


def chat(**asked):
    return ChatRequest.model_validate({"model": "m", "messages": HI} | asked)


def complete(**asked):
    return CompletionRequest.model_validate({"model": "m", "prompt": "Hi"} | asked)


def respond(**asked):
    return chat_of(ResponsesRequest.model_validate({"model": "m", "input": "Hi"} | asked))


@pytest.mark.parametrize(
    ("ask", "asked", "says"),
    [
        (chat, {"messages": "Hi"}, 'messages: expected a list, found "Hi"'),
        (chat, {"messages": []}, "messages: expected at least 1 entry, found []"),
        (chat, {"messages": [{"content": "a"}]}, "messages.0.role: expected, and not there"),
        (
            chat,
            {"messages": [{"role": "user", "content": 5}]},
            "messages.0.content: expected a text or a list, found 5",
        ),
        (
            chat,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages.0.content.0.text: expected a text, found 5",
        ),
        (
            chat,
            {"tools": TOOLS, "tool_choice": "any"},
            "tool_choice: expected 'none', 'auto' or 'required' or an object",
        ),
        (chat, {"top_p": 5}, "top_p: expected at most 1, found 5"),
        (chat, {"n": 1.5}, "n: expected a whole number, found 1.5"),
        (chat, {"logit_bias": {"a": 1}}, 'logit_bias.a: expected a whole number, found "a"'),
        (chat, {"stream": "perhaps"}, 'stream: expected true or false, found "perhaps"'),
        (chat, {"structured_outputs": {"json": 5}}, "structured_outputs.json: expected an object or a text, found 5"),
        (
            chat,
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            "response_format.json_schema.schema: expected an object or true or false, found 5",
        ),
        (complete, {"prompt": None}, "prompt: expected a text or a list, found null"),
        (complete, {"prompt": ["a", [1]]}, 'prompt.0: expected a whole number or a list, found "a"; prompt.1: '),
        (complete, {"prompt": [{}] * 99}, "; and 91 more"),
        (complete, {"prompt": {str(at): 1 for at in range(99)}}, "found an object of 99"),
        (
            respond,
            {"tools": [{"type": "function", **TOOLS[0]["function"]}], "tool_choice": "any"},
            "tool_choice: expected",
        ),
        (respond, {"input": [{"role": "robot", "content": "a"}]}, "input.role: expected 'system'"),
        (respond, {"text": {"format": {"type": "yaml"}}}, "text.format.type: expected 'text'"),
        (respond, {"input": []}, "input: expected at least 1 entry"),
    ],
)
def test_places_and_kinds(ask, asked, says):
    with pytest.raises((ValidationError, ConfigError)) as error:
        ask(**asked)
    said = describe_misses(error.value.errors()) if isinstance(error.value, ValidationError) else str(error.value)
    assert says in said
    for word in (
        "Input should",
        "valid dictionary",
        "literal[",
        "NamedTool",
        ".str",
        ".bool",
        "_:",
        "after validation",
    ):
        assert word not in said


def test_a_body_that_is_none():
    for body in (None, [], "a"):
        with pytest.raises(ValidationError) as error:
            ChatRequest.model_validate(body)
        assert describe_misses(error.value.errors()).startswith("The body: expected an object, found")
    with pytest.raises(ValidationError) as error:
        ChatRequest.model_validate_json("{")
    assert describe_misses(error.value.errors()).startswith("The body is no JSON: EOF")


def test_fields_of_other_routes_may_ask_for_nothing():
    nothing = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "top_logprobs": 0}
    assert complete(**nothing, chat_template_kwargs={}) == complete()
    more = {
        "n": 1,
        "logprobs": False,
        "echo": False,
        "presence_penalty": 0,
        "logit_bias": {},
        "skip_special_tokens": True,
    }
    assert respond(**more, top_logprobs=0) == respond()
    assert respond(presence_penalty=1.5, logit_bias={"3": 2}).presence_penalty == 1.5
    with pytest.raises(ValidationError, match="n: not supported by this server"):
        respond(n=2)
