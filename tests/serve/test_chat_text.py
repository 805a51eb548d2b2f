"""A chat reaches the template in the form in which training gave it conversations."""

from chat_shapes import TRL_TEMPLATES, tokenizer_for
from theodora.serve.chats import chat_text
from theodora.serve.protocol import ChatRequest

ASKED = {
    "model": "m",
    "messages": [
        {"role": "user", "content": "U1?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "RESULT"},
    ],
}


def text_of(template, messages):
    asked = ChatRequest.model_validate({**ASKED, "messages": messages})
    return chat_text(tokenizer_for(TRL_TEMPLATES[template].read_text(encoding="utf-8")), asked)[0]


def test_a_template_that_takes_content_in_parts_alone():
    assert "U1?" in text_of("idefics3", ASKED["messages"][:1])


def test_templates_that_take_arguments_as_objects_or_as_text():
    assert '{"name": "add", "arguments": {"a": 1}}' in text_of("qwen2_5", ASKED["messages"])
    assert 'add\n```json\n{"a": 1}\n```' in text_of("deepseekv3", ASKED["messages"])
