"""Tools, reasoning and structured outputs, asked for by the official client."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import openai
import pydantic
import pytest

import tiny
from calling import ARGUMENTS, CALL, SCHEMA, SILENT, written
from serving import settled
from theodora.errors import ConfigError
from theodora.serve import forms
from theodora.serve.config import ServeConfig

TOOLS = [
    {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}},
]
ASKED = {"model": "base", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 240, "seed": 1}


def ask(served, **asked):
    return served.client.chat.completions.create(**silent(asked))


def silent(asked):
    """A request whose answer has no reasoning, if it does not say otherwise."""
    return {**ASKED, **asked, "extra_body": {**SILENT, **asked.get("extra_body", {})}}


def streamed(served, **asked):
    """What the official client makes of a stream."""
    with served.client.chat.completions.stream(**silent(asked)) as stream:
        for _ in stream:
            pass
        return stream.get_final_completion().choices[0]


@pytest.mark.parametrize("seed", range(3))
def test_answers_are_json_that_fits(served, seed):
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, "strict": True}}
    choice = ask(served, seed=seed, response_format=form).choices[0]
    found = json.loads(choice.message.content)
    assert (choice.finish_reason, found.keys(), found["a"] in "xy") == ("stop", {"a", "b"}, True)


def test_any_json_object(served):
    for seed in range(3):
        choice = ask(served, seed=seed, response_format={"type": "json_object"}, max_tokens=400).choices[0]
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        else:
            assert choice.message.content.startswith("{")


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"structured_outputs": {"regex": "[ab]{3}c"}}, r"[ab]{3}c"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, r"yes|no"),
        ({"structured_outputs": {"grammar": 'root ::= "p" | "q" "r"'}}, r"p|qr"),
        ({"structured_outputs": {"json": {"type": "boolean"}}}, r"true|false"),
        ({"guided_regex": "z{2}"}, r"zz"),
        ({"guided_choice": ["up"]}, r"up"),
        ({"guided_json": '{"const": 3}'}, r"3"),
        ({"guided_grammar": 'start: "k"'}, r"k"),
        ({"response_format": {"type": "structural_tag", "format": {"type": "const_string", "value": "tag"}}}, r"tag"),
    ],
)
def test_structured_outputs(served, form, expected):
    for temperature in (0, 1.5):
        (chat,) = ask(served, temperature=temperature, extra_body=form).choices
        assert chat.finish_reason == "stop"
        assert re.fullmatch(expected, chat.message.content)
    if "response_format" not in form:
        reply = served.client.completions.create(model="base", prompt="Hi", max_tokens=9, extra_body=form)
        assert re.fullmatch(expected, reply.choices[0].text)


def test_an_answer_that_is_too_long_for_its_form_ends_as_too_long(served):
    choice = ask(served, max_tokens=3, extra_body={"guided_regex": "[a-z]{9}"}).choices[0]
    assert (choice.finish_reason, len(choice.message.content)) == ("length", 3)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"guided_regex": "(a"}, "parenthesis is not closed"),
        ({"guided_grammar": "root ::= nothing"}, "is not defined"),
        ({"guided_json": "{"}, "no JSON"),
        ({"guided_json": {"type": "strin"}}, "Unsupported type"),
        ({"guided_json": {"not": {"type": "string"}}}, "'not' is not supported"),
        (
            {"guided_json": {"properties": {"a": {"type": "string", "pattern": "(?=a)"}}}},
            r"properties\.a: looking ahead",
        ),
        ({"guided_regex": "a" * 200_001}, "at most 200000"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "expected one of them"),
        ({"structured_outputs": {"choice": []}}, "choice"),
    ],
)
def test_forms_that_make_no_sense_say_why(served, asked, says):
    with pytest.raises(openai.BadRequestError, match=says):
        ask(served, extra_body=asked)
    assert settled(served.engine)


def test_log_probabilities_under_a_grammar_are_the_models_own(served):
    free = (
        served.client.completions.create(model="base", prompt="Hi", max_tokens=1, temperature=0, logprobs=5)
        .choices[0]
        .logprobs
    )
    forced = (
        served.client.completions.create(
            model="base", prompt="Hi", max_tokens=1, temperature=0, logprobs=5, extra_body={"guided_regex": "[A-Z]+"}
        )
        .choices[0]
        .logprobs
    )
    assert {name: value for name, value in forced.top_logprobs[0].items() if name in free.top_logprobs[0]}.items() <= {
        **free.top_logprobs[0]
    }.items()
    assert forced.token_logprobs[0] < 0


def test_beside_grammars_others_answer_as_alone(served):
    plain = [{"seed": seed, "logprobs": True, "temperature": 0.7} for seed in range(3)]
    grammars = [{"extra_body": {"guided_regex": "[a-f]{20}"}, "seed": seed} for seed in range(3)]

    def run(asked):
        with ThreadPoolExecutor(len(asked)) as pool:
            return list(pool.map(lambda one: ask(served, **{**one, "max_tokens": 20}).choices[0], asked))

    alone = [run([one])[0] for one in plain]
    mixed = run(plain + grammars)
    assert [choice.message.content for choice in mixed[:3]] == [choice.message.content for choice in alone]
    for one, other in zip(mixed[:3], alone, strict=True):
        values = [[entry.logprob for entry in choice.logprobs.content] for choice in (one, other)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)
    for choice, one in zip(mixed[3:], grammars, strict=True):
        assert re.fullmatch("[a-f]{20}", choice.message.content)
        assert choice.message.content == run([one])[0].message.content


@pytest.mark.parametrize("tool_choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_call_can_be_forced(served, tool_choice):
    choice = ask(served, tools=TOOLS, tool_choice=tool_choice, parallel_tool_calls=False).choices[0]
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert (choice.finish_reason, choice.message.content, call.type) == ("tool_calls", None, "function")
    assert call.function.name in {"look", "stop"} if tool_choice == "required" else call.function.name == "look"
    if call.function.name == "look":
        assert arguments["a"] in "xy"
    stream = streamed(served, tools=TOOLS, tool_choice=tool_choice, parallel_tool_calls=False)
    assert [(c.function.name, c.function.arguments) for c in stream.message.tool_calls] == [
        (call.function.name, call.function.arguments)
    ]
    assert stream.finish_reason == "tool_calls"


@pytest.mark.parametrize("text", ["", "I look.\n"])
def test_calls_are_parsed(served, text):
    choice = ask(served, tools=TOOLS, extra_body=written(text + CALL + "\n" + CALL)).choices[0]
    assert choice.message.content == (text.strip() or None)
    assert [(call.function.name, call.function.arguments) for call in choice.message.tool_calls] == [
        ("look", ARGUMENTS)
    ] * 2
    assert len({call.id for call in choice.message.tool_calls}) == 2
    stream = streamed(served, tools=TOOLS, extra_body=written(text + CALL + "\n" + CALL))
    assert (stream.message.content or None) == choice.message.content
    assert [(call.function.name, call.function.arguments) for call in stream.message.tool_calls] == [
        ("look", ARGUMENTS)
    ] * 2
    assert stream.finish_reason == choice.finish_reason == "tool_calls"


def test_deltas_of_a_call_begin_with_its_name(served):
    chunks = list(ask(served, tools=TOOLS, stream=True, extra_body=written("So:" + CALL)))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert (calls[0].index, calls[0].type, calls[0].function.name) == (0, "function", "look")
    assert calls[0].id
    assert not any(call.id or call.function.name for call in calls[1:])
    assert len(calls) > 5
    assert "".join(call.function.arguments for call in calls) == ARGUMENTS
    assert "".join(delta.content or "" for delta in deltas) == "So:"


@pytest.mark.parametrize("text", [CALL, "a  b\n\n<tool", " \n", f"Hm. \n{CALL}"])
def test_a_stream_tells_every_token_by_number(served, text):
    """Also those of markup, and of blanks that wait for what follows."""
    asked = silent({"tools": TOOLS, "extra_body": written(text) | {"return_token_ids": True}})
    whole = served.client.chat.completions.create(**asked).choices[0]
    chunks = served.client.chat.completions.create(**asked, stream=True)
    told = [token for chunk in chunks for token in getattr(chunk.choices[0], "token_ids", None) or []]
    assert told == whole.token_ids


def test_a_call_and_its_result_can_be_sent_back(served):
    message = ask(served, tools=TOOLS, extra_body=written(CALL)).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "seen"}
    reply = ask(served, tools=TOOLS, messages=[*ASKED["messages"], message, result], max_tokens=3)
    assert reply.choices


def test_tools_that_may_not_be_called_are_not_looked_for(served):
    choice = ask(served, tools=TOOLS, tool_choice="none", extra_body=written(CALL)).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")


def test_strict_tools_and_single_calls_leave_text_free(served):
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    assert ask(served, tools=strict, max_tokens=5).choices[0].finish_reason in ("length", "stop")
    assert ask(served, tools=TOOLS, parallel_tool_calls=False, max_tokens=5).choices


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_told_apart(served, monkeypatch, stream):
    monkeypatch.setattr(forms, "thinking_format", lambda *_: None)  # else it thinks by itself, before what is forced
    form = {"chat_template_kwargs": {}, **written("<think>\nHm.\n</think>\n\nYes." + CALL)}
    reply = (streamed if stream else ask)(served, tools=TOOLS, extra_body=form)
    message = reply.message if stream else reply.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("Yes.", "Hm.", "Hm.")
    assert message.tool_calls[0].function.arguments == ARGUMENTS
    opened = {"chat_template_kwargs": {"thinking": True}, **written("Hm.</think>Yes.")}
    assert ask(served, extra_body=opened).choices[0].message.reasoning_content == "Hm."


def test_a_form_is_of_what_comes_after_the_reasoning(served):
    for thinking in (True, None):
        kwargs = {} if thinking is None else {"thinking": True}
        form = {"chat_template_kwargs": kwargs, "guided_regex": "yes"}
        message = ask(served, max_tokens=40, extra_body=form).choices[0].message
        # Random weights think until there are no tokens left, or not at all.
        assert message.content == "yes" or (message.content is None and message.reasoning_content)
    assert ask(served, max_tokens=40, extra_body={"guided_regex": "yes"}).choices[0].message.content == "yes"


class Colour(pydantic.BaseModel):
    name: Literal["red", "blue"]
    dark: bool


class Paint(pydantic.BaseModel):
    """Paint it."""

    colour: Literal["red", "blue"]


def test_parsed_models(served):
    reply = served.client.chat.completions.parse(**silent({}), response_format=Colour)
    assert isinstance(reply.choices[0].message.parsed, Colour)


def test_parsed_tools(served):
    reply = served.client.chat.completions.parse(
        **silent({}), tools=[openai.pydantic_function_tool(Paint)], tool_choice="required", parallel_tool_calls=False
    )
    assert isinstance(reply.choices[0].message.tool_calls[0].function.parsed_arguments, Paint)


def test_special_tokens_that_a_format_is_made_of_stay_in_the_text():
    tokenizer = tiny.tiny_tokenizer()
    ids = [tiny.BOS_ID, *tokenizer("a")["input_ids"], tiny.PAD_ID]
    kept = forms.with_visible(tokenizer, ["<|im_start|>", "<tool_call>"])
    assert kept.decode(ids, skip_special_tokens=True) == "<|im_start|>a"
    assert kept.decode(ids, skip_special_tokens=False) == "<|im_start|>a<|endoftext|>"
    assert kept.eos_token_id == tiny.EOS_ID
    assert forms.with_visible(tokenizer, ["<tool_call>"]) is tokenizer


def test_parsers_can_be_named():
    assert ServeConfig(model="m", tool_call_parser="qwen3_coder", reasoning_parser="none").tool_call_parser
    with pytest.raises(ConfigError, match="tool_call_parser is 'x'; expected auto, none, harmony"):
        ServeConfig(model="m", tool_call_parser="x")
    with pytest.raises(ConfigError, match="reasoning_parser"):
        ServeConfig(model="m", reasoning_parser="x")
