"""/v1/responses, asked for by the official client."""

import json

import openai
import pydantic
import pytest

from calling import ARGUMENTS, CALL, SCHEMA, SILENT, written
from theodora.errors import ConfigError
from theodora.serve import forms
from theodora.serve.responses import ResponsesRequest, chat_of

TOOLS = [{"type": "function", "name": "look", "parameters": SCHEMA, "strict": True}]
ASKED = {"model": "base", "input": "Hi", "max_output_tokens": 240}


def ask(served, **asked):
    extra = {"seed": 1, **SILENT, **asked.pop("extra_body", {})}
    return served.client.responses.create(**{**ASKED, **asked}, extra_body=extra)


def test_text(served):
    reply = ask(served, max_output_tokens=8)
    chat = served.client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "Hi"}], max_tokens=8, seed=1, extra_body=SILENT
    )
    assert reply.output_text == chat.choices[0].message.content
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (chat.usage.prompt_tokens, 8)
    assert ask(served, extra_body=written("Yes.")).status == "completed"
    with pytest.raises(openai.NotFoundError):
        served.client.responses.retrieve(reply.id)


def test_a_stream_tells_the_same(served):
    events = list(ask(served, stream=True, extra_body=written("Yes, I do.")))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Yes, I do."
    assert events[0].type == "response.created"
    assert (events[-1].type, events[-1].response.output_text) == ("response.completed", "Yes, I do.")
    with served.client.responses.stream(**ASKED, extra_body={**SILENT, **written("Yes.")}) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == "Yes."


def test_reasoning_text_and_calls_are_items(served, monkeypatch):
    monkeypatch.setattr(forms, "thinking_format", lambda *_: None)
    form = {"chat_template_kwargs": {}, **written("<think>Hm.</think>So:" + CALL + CALL)}
    whole = ask(served, tools=TOOLS, extra_body=form)
    with served.client.responses.stream(**ASKED, tools=TOOLS, extra_body=form) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()
    for reply in (whole, streamed):
        assert [item.type for item in reply.output] == ["reasoning", "message", "function_call", "function_call"]
        assert reply.output[0].content[0].text == "Hm."
        assert reply.output_text == "So:"
        assert [(item.name, item.arguments) for item in reply.output[2:]] == [("look", ARGUMENTS)] * 2
        assert len({item.call_id for item in reply.output[2:]}) == 2
        assert reply.status == "completed"
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 4
    assert kinds.count("response.function_call_arguments.done") == 2


def test_a_call_can_be_forced_and_its_result_sent_back(served):
    reply = ask(served, tools=TOOLS, tool_choice={"type": "function", "name": "look"})
    (call,) = reply.output
    assert json.loads(call.arguments)["a"] in "xy"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "seen"}
    again = ask(
        served, input=[{"role": "user", "content": "Hi"}, *reply.output, result], tools=TOOLS, max_output_tokens=2
    )
    assert again.output


class Answer(pydantic.BaseModel):
    right: bool


def test_parsed(served):
    reply = served.client.responses.parse(**ASKED, text_format=Answer, extra_body=SILENT)
    assert isinstance(reply.output_parsed, Answer)


def test_items_are_messages():
    asked = ResponsesRequest.model_validate(
        {
            "model": "m",
            "instructions": "Be good.",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                {
                    "type": "reasoning",
                    "id": "rs",
                    "summary": [],
                    "content": [{"type": "reasoning_text", "text": "Hm."}],
                },
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
                {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
                {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "one"},
                {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
                {"role": "assistant", "content": "Done."},
                {"role": "user", "content": "Thanks"},
            ],
        }
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert [message.plain() for message in chat_of(asked).messages] == [
        {"role": "system", "content": "Be good."},
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {**call, "id": "c1", "function": {"name": "f", "arguments": {"a": 1}}},
                {**call, "id": "c2"},
            ],
        },
        {"role": "tool", "content": "one", "tool_call_id": "c1"},
        {"role": "tool", "content": "two", "tool_call_id": "c2"},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "Thanks"},
    ]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id: not supported .* not stored"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, r"tools\.0: a tool of type 'web_search'"),
        ({"input": [{"type": "item_reference", "id": "m"}]}, "not stored"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"tool_choice": "required"}, "tool_choice: expected with tools"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_what_is_not_done_is_refused_by_name(served, asked, says):
    with pytest.raises(openai.BadRequestError, match=says):
        ask(served, **asked)


def test_half_a_character_in_what_is_looked_at_later_is_refused():
    with pytest.raises(ConfigError, match="half a character"):
        chat_of(ResponsesRequest.model_validate({"model": "m", "input": "a", "tool_choice": {"\ud800": 1}}))


def test_a_request_that_is_no_chat_says_where():
    with pytest.raises(ConfigError, match=r"input\.0\.content: expected a text"):
        chat_of(ResponsesRequest(model="m", input=[{"role": "user", "content": 3}]))
