"""Conversations of a known build, whose words are put in, beside the same ones rendered for themselves."""

import json
import random
import time

import pytest

from chat_shapes import SHAPES, TRL_TEMPLATES, tokenizer_for, tools_for
from theodora import metered
from theodora.data.chat import ChatRenderer
from theodora.data.templates import TEMPLATE_ERRORS
from theodora.data.tracing import PLAIN, Trace, Untraceable, render_traced, tracing

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
USUAL = ["blue", "a<b", "two\nlines", "x", "é", "日本", '{"q": 1}', 'say "hi"', "a, b: c", "42", "end.", "\\"]
# What templates ask about, what ends turns, halves of that, and what marks are made of.
ODD = ["<tool_response>", "</think>", "<|im_end|>", "</s>", "<|im", "im_end|>", "\U00020001", "\U0010c000", "[/INST]"]
ARGUMENTS = ({"city": "Oslo", "n": 4}, {"k": ["a", True], "z": {"y": "b"}}, {"n": 4}, {})


def words(chance):
    return " ".join(chance.choices(USUAL if chance.random() < 0.85 else USUAL + ODD, k=chance.randint(1, 4)))


def varied(messages, chance):
    """The same turns with other words, and at times with white space around them."""

    def text(old):
        if old.startswith("<think>"):
            return f"<think>\n{words(chance)}\n</think>\n\n{words(chance)}"
        return old and words(chance) + chance.choice(["", "", "", "", "", "", "\n"])

    turns = [{key: text(v) if key in ("content", "reasoning_content") else v for key, v in m.items()} for m in messages]
    for turn in turns:
        if "tool_calls" in turn:
            functions = [{"name": f"f{chance.randrange(9)}", "arguments": chance.choice(ARGUMENTS)} for _ in range(2)]
            calls = zip(turn["tool_calls"], functions, strict=False)
            turn["tool_calls"] = [{**call, "function": function} for call, function in calls]
    return turns


def varied_tools(shape, chance):
    tools = json.loads(json.dumps(tools_for(shape)))
    for tool in tools or []:
        tool["function"] |= {"name": f"f{chance.randrange(9)}", "description": words(chance)}
    return tools


class Counting(ChatRenderer):
    """Counts conversations that are rendered for themselves."""

    alone = 0

    def _rendered_alone(self, *given):
        self.alone += 1
        return super()._rendered_alone(*given)


def outcome(render):
    try:
        return render()
    except TEMPLATE_ERRORS as error:
        return type(error), str(error)


def compare(template, shapes, rows, seed=0):
    """How many of the conversations were rendered for themselves, once all are the same as those that always are."""
    chance, tokenizer = random.Random(seed), tokenizer_for(template)
    fast, thorough = Counting(tokenizer), ChatRenderer(tokenizer)
    for shape in shapes:
        for _ in range(rows):
            messages, tools = varied(SHAPES[shape], chance), varied_tools(shape, chance)
            expected = outcome(lambda m=messages, t=tools: thorough._rendered_alone(thorough._for(t), m, t))
            assert outcome(lambda m=messages, t=tools: fast.render_for_training(m, t)) == expected
    return fast.alone


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3", "llama3_training", "gptoss", "deepseekv3"])
def test_texts_and_labels_are_the_same(name):
    template = CHATML if name == "chatml" else TRL_TEMPLATES[name].read_text(encoding="utf-8")
    compare(template, ["text", "thought"], 20)


@pytest.mark.parametrize("name", ["qwen3", "llama3_1"])
def test_calls_are_the_same(name):
    compare(TRL_TEMPLATES[name].read_text(encoding="utf-8"), ["last call", "reasoning+call"], 12)


@pytest.mark.long
@pytest.mark.parametrize("name", TRL_TEMPLATES)
def test_all_shapes_are_the_same(name):
    compare(TRL_TEMPLATES[name].read_text(encoding="utf-8"), SHAPES, 20, seed=1)


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3", "gemma4", "nemotron_3_nano", "phi3"])
def test_rows_of_one_build_are_rendered_once(name):
    tokenizer = tokenizer_for(CHATML if name == "chatml" else TRL_TEMPLATES[name].read_text(encoding="utf-8"))
    renderer = Counting(tokenizer)
    chats = [renderer.render_for_training(chat(f"Is it {i}?", f"It is {i}.")) for i in range(8)]
    assert renderer.alone == 3  # the first, and the second with its placeholders
    assert [f"It is {i}." in c.answers[0] for i, c in enumerate(chats) if c] == [True] * 8


def test_calls_with_any_arguments_are_rendered_once():
    renderer, tool = Counting(tokenizer_for(TRL_TEMPLATES["qwen3"].read_text(encoding="utf-8"))), tools_for("call")
    for i in range(8):
        turns = [chat(f"Is it {i}?", "")[0], {"role": "assistant", "content": "", "tool_calls": [called(i)]}]
        found = renderer.render_for_training(turns, tool)
        assert json.dumps(called(i)["function"]["arguments"]) in found.answers[0]
    assert renderer.alone == 3


# A template that looks at words, and an answer that gives it away if words are put in all the same.
LOOKING = {
    "in": ("{{ 'secret' if 'blue' in m.content else 'open' }}", "blue"),
    "equal": ("{{ 'secret' if m.content == 'blue' else 'open' }}", "blue"),
    "starts": ("{{ 'secret' if m.content.startswith('blu') else 'open' }}", "blue"),
    "ends": ("{{ 'secret' if m.content.endswith('lue') else 'open' }}", "blue"),
    "length": ("{{ m.content | length }}", "a longer one"),
    "longer": ("{{ 'secret' if m.content | length > 3 else 'open' }}", "a longer one"),
    "cut": ("{{ m.content[:3] }}", "blue"),
    "first": ("{{ m.content | first }}", "blue"),
    "upper": ("{{ m.content | upper }}", "blue"),
    "replaced": ("{{ m.content.replace('l', 'k') }}", "blue"),
    "split": ("{{ m.content.split('lu')[0] }}", "blue"),
    "each": ("{% for c in m.content %}{{ c }}-{% endfor %}", "blue"),
    "list": ("{{ [m.content] }}", "it's"),
    "number": ("{{ m.content | int }}", "42"),
    "captured": ("{% set x %}{{ m.content }}{% endset %}{{ 'secret' if 'blue' in x else x }}", "blue"),
    "macro": ("{% macro f(x) %}{{ x }}{% endmacro %}{{ f(m.content) | length }}", "blue"),
    "tilde": ("{{ ('<' ~ m.content) | length }}", "blue"),
    "format": ("{{ '%5s' % m.content }}", "blue"),
    ".format": ("{{ '{:>5}'.format(m.content) }}", "blue"),
    "key": ("{{ {'blue': 'secret'}.get(m.content, 'open') }}", "blue"),
    "any": ("{{ 'secret' if m.content in ['blue', 'red'] else 'open' }}", "blue"),
    "joined": ("{{ [m.content, 'x'] | join('-') | length }}", "blue"),
    "sorted": ("{{ messages | map(attribute='content') | sort | join }}", "blue"),
    "json": ("{{ m.content | tojson }}", 'say "hi"'),
    "asked": ("{{ 'secret' if messages[0].content == m.content else 'open' }}", "Is it?"),
}


@pytest.mark.parametrize("name", LOOKING)
def test_what_templates_ask_about_words_is_asked_of_each_row(name):
    part, answer = LOOKING[name]
    template = CHATML.replace("{% endfor %}", part + "\n{% endfor %}", 1)
    tokenizer = tokenizer_for(template)
    fast, thorough = ChatRenderer(tokenizer), ChatRenderer(tokenizer)
    for words_of_answer in ["red", "ash", "tan", answer, "red"]:
        turns = chat("Is it?", words_of_answer)
        assert fast.render_for_training(turns) == thorough._rendered_alone(thorough.template, turns, None)


def test_words_that_are_no_string_while_traced_are_no_refusal():
    asked = "{% if m.role == 'user' and loop.last and 'What?'.index(m.content) %}{% endif %}"
    tokenizer = tokenizer_for(CHATML.replace("{{ '<|im_start|>'", asked + "{{ '<|im_start|>'", 1))
    fast, thorough = ChatRenderer(tokenizer), ChatRenderer(tokenizer)
    for question in ["So?", "So?", "So?", "What?"]:
        turns = chat(question, "Yes")
        assert fast.render_for_training(turns) == thorough._rendered_alone(thorough.template, turns, None)
    assert not fast._skeletons._built


def test_a_name_that_the_answer_holds_is_shown():
    fast, thorough = Counting(tokenizer_for(CHATML)), ChatRenderer(tokenizer_for(CHATML))
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    for words_of_answer in ["Hm.", "So.", "Ah.", "Let me look."]:
        turns = [chat("Is it?", "")[0], {"role": "assistant", "content": words_of_answer, "tool_calls": [call]}]
        assert fast.render_for_training(turns) == thorough._rendered_alone(thorough.template, turns, None)
    assert fast.alone == 4


def test_a_clock_is_read_for_each_row(monkeypatch):
    template = "{{ strftime_now('%Y') + '\\n' }}" + CHATML
    renderer = Counting(tokenizer_for(template))
    for i in range(4):
        renderer.render_for_training(chat("Is it?", f"Yes {i}"))
    assert renderer.alone == 3
    known = next(iter(renderer._skeletons._known.values()))
    assert [asked.ask for asked in known.asked] == ["clock"]


BOMB = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = (
    "{% set ns = namespace(x=messages[0].content) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
)


@pytest.mark.parametrize("work", [BOMB, DOUBLED])
def test_a_template_that_works_for_ever_only_while_it_is_traced_is_stopped(work, monkeypatch):
    monkeypatch.setattr(metered, "ALLOWED", 1 << 20)
    template = "{% if 'render_jinja' not in raise_exception | string and '_raise' in raise_exception | string %}" + work
    tokenizer = tokenizer_for(CHATML + template + "{% endif %}")
    fast, thorough = ChatRenderer(tokenizer), ChatRenderer(tokenizer)
    began = time.thread_time()
    for i in range(3):
        turns = chat("Is it?", f"Yes {i}")
        assert fast.render_for_training(turns) == thorough._rendered_alone(thorough.template, turns, None)
    assert not fast._skeletons._built
    assert time.thread_time() - began < 20


def test_a_template_that_looks_is_given_up():
    renderer = Counting(tokenizer_for(CHATML.replace("{% endfor %}", "{{ m.content | upper }}{% endfor %}", 1)))
    for i in range(40):
        for _ in range(2):
            renderer.render_for_training([{"role": "user", "content": "\n" * i + "Hm?"}, chat("", "Yes")[1]])
    assert renderer.alone == 80 + 16


@pytest.mark.parametrize(
    "part", ["{{ tools[0] }}", "{% for k in tools[0] %}{{ k }}{% endfor %}", "{{ tools[0].type }}"]
)
def test_objects_are_taken_as_a_whole_or_not_at_all(part):
    tool = {"type": "function", "function": {"name": chr(PLAIN + 0x3000)}}
    trace = Trace()
    with tracing(trace), pytest.raises((Untraceable, *TEMPLATE_ERRORS)):
        render_traced(part, [], [tool], {}, prompt=False)


def chat(asked, answered):
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def called(number):
    return {
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": f"C{number}", f"n{number}": number}},
    }
