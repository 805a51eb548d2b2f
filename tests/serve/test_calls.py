"""Text, reasoning and calls of tools in what models write, whole and in pieces."""
# ruff: noqa: E501

import json

import pytest

from theodora.serve.calls.families import BY_NAME, FAMILIES, THINKING_BY_NAME, Parser, family_of, gather, thinking_of
from theodora.serve.calls.source import Arguments, Call, Text

SCHEMAS = {
    "f": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}},
    "g": {"type": "object", "properties": {}},
}
BOTH = [("f", {"a": 'x} "y", é', "b": 3}), ("g", {})]
ONE = [("g", {})]
_F = '"a": "x} \\"y\\", é", "b": 3'
_DS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)

# family -> how it writes BOTH, and ONE
WRITTEN = {
    "hermes": (
        f'<tool_call>\n{{"name": "f", "arguments": {{{_F}}}}}\n</tool_call>\n<tool_call>\n{{"name": "g", "arguments": {{}}}}\n</tool_call>',
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
    ),
    "qwen3_xml": (
        '<tool_call>\n<function=f>\n<parameter=a>\nx} "y", é\n</parameter>\n<parameter=b>\n3\n</parameter>\n</function>\n'
        "</tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call>",
        "<tool_call>\n<function=g>\n</function>\n</tool_call>",
    ),
    "glm4": (
        '<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x} "y", é</arg_value>\n<arg_key>b</arg_key>\n'
        "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>g\n</tool_call>",
        "<tool_call>g\n</tool_call>",
    ),
    "llama3_json": (
        f'{{"name": "f", "parameters": {{{_F}}}}}; {{"name": "g", "parameters": {{}}}}',
        '{"name": "g", "parameters": {}}',
    ),
    "llama4_pythonic": ("""[f(a='x} "y", é', b=3), g()]""", "[g()]"),
    "lfm2": (
        """<|tool_call_start|>[f(a="x} \\"y\\", é", b=3), g()]<|tool_call_end|>""",
        "<|tool_call_start|>[g()]<|tool_call_end|>",
    ),
    "mistral": (
        f'[TOOL_CALLS][{{"name": "f", "arguments": {{{_F}}}}}, {{"name": "g", "arguments": {{}}}}]',
        "[TOOL_CALLS]g[ARGS]{}",
    ),
    "mistral_v11": (
        f"[TOOL_CALLS]f[ARGS]{{{_F}}}[TOOL_CALLS]g[ARGS]{{}}",
        "[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{}",
    ),
    "gemma4": (
        '<|tool_call>call:f{a:<|"|>x} "y", é<|"|>,b:3}<tool_call|><|tool_call>call:g{}<tool_call|>',
        "<|tool_call>call:g{}<tool_call|>",
    ),
    "harmony": (
        f"<|channel|>commentary to=functions.f <|constrain|>json<|message|>{{{_F}}}<|call|>"
        "<|start|>assistant to=functions.g<|channel|>commentary json<|message|>{}",
        "<|channel|>commentary to=functions.g <|constrain|>json<|message|>{}<|call|>",
    ),
    "deepseek_v3": (
        f"{_DS[0]}{_DS[1]}function{_DS[2]}f\n```json\n{{{_F}}}\n```{_DS[3]}\n"
        f"{_DS[1]}function{_DS[2]}g\n```json\n{{}}\n```{_DS[3]}{_DS[4]}",
        f"{_DS[0]}{_DS[1]}function{_DS[2]}g\n```json\n{{}}\n```{_DS[3]}{_DS[4]}",
    ),
    "deepseek_v3_1": (
        f"{_DS[0]}{_DS[1]}f{_DS[2]}{{{_F}}}{_DS[3]}{_DS[1]}g{_DS[2]}{{}}{_DS[3]}{_DS[4]}",
        f"{_DS[0]}{_DS[1]}g{_DS[2]}{{}}{_DS[3]}{_DS[4]}",
    ),
    "deepseek_v3_2": (
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="true">x} "y", é'
        '</｜DSML｜parameter>\n<｜DSML｜parameter name="b" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="g">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="g">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
    ),
    "minimax": (
        '<minimax:tool_call>\n<invoke name="f">\n<parameter name="a">x} "y", é</parameter>\n'
        '<parameter name="b">3</parameter>\n</invoke>\n<invoke name="g">\n</invoke>\n</minimax:tool_call>',
        '<minimax:tool_call>\n<invoke name="g">\n</invoke>\n</minimax:tool_call>',
    ),
    "granite": (
        f'<|tool_call|>[{{"name": "f", "arguments": {{{_F}}}}}, {{"name": "g", "arguments": {{}}}}]',
        '<tool_call>[{"name": "g", "arguments": {}}]</tool_call>',
    ),
    "phi4": (
        f'<|tool_call|>[{{"name": "f", "arguments": {{{_F}}}}}, {{"name": "g", "arguments": {{}}}}]<|/tool_call|>',
        'functools[{"name": "g", "arguments": {}}]',
    ),
    "kimi_k2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
        f"{{{_F}}}<|tool_call_end|><|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.g:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
    ),
    "cohere": (
        f'<|START_ACTION|>[\n    {{"tool_call_id": "0", "tool_name": "f", "parameters": {{{_F}}}}},\n'
        '    {"tool_call_id": "1", "tool_name": "g", "parameters": {}}\n]<|END_ACTION|>',
        '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "g", "parameters": {}}]<|END_ACTION|>',
    ),
    "json": (f'[{{"name": "f", "arguments": {{{_F}}}}}, {{"name": "g"}}]', '{"name": "g", "arguments": {}}'),
}
BARE = [family.name for family in FAMILIES if family.bare]


def parse(family, text, step=None, schemas=SCHEMAS, thinking=None, opened=False):
    parser = Parser(BY_NAME[family], schemas, thinking and THINKING_BY_NAME[thinking], opened)
    pieces = [text] if step is None else [text[at : at + step] for at in range(0, len(text), step)]
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.feed("", ended=True)
    return events


def read(*args, **options):
    """The whole answer, which is the same however its text is cut."""
    found = gather(parse(*args, **options))
    for step in (1, 2, 3, 5, 7, 11):
        assert gather(parse(*args, step=step, **options)) == found
    text = args[1]
    for cut in range(1, len(text)):  # in two, at every place
        options_ = {name: value for name, value in options.items() if name != "thinking"}
        thinking = options.get("thinking")
        parser = Parser(
            BY_NAME[args[0]],
            options_.get("schemas", SCHEMAS),
            thinking and THINKING_BY_NAME[thinking],
            options.get("opened", False),
        )
        assert gather(parser.feed(text[:cut]) + parser.feed(text[cut:], ended=True)) == found
    return found


def calls(found):
    return [(name, json.loads(arguments)) for name, arguments, _ in found.calls]


def test_every_family_is_in_the_table():
    assert WRITTEN.keys() == {family.name for family in FAMILIES}


@pytest.mark.parametrize("family", WRITTEN)
def test_several_calls(family):
    found = read(family, WRITTEN[family][0])
    assert (calls(found), found.content, found.reasoning) == (BOTH, "", "")


@pytest.mark.parametrize("family", WRITTEN)
def test_one_call(family):
    found = read(family, WRITTEN[family][1])
    assert (calls(found), found.content) == (ONE, "")


@pytest.mark.parametrize("family", [name for name in WRITTEN if name not in BARE and name != "harmony"])
def test_text_before_a_call(family):
    found = read(family, "Let me < look [that] up.\n\n" + WRITTEN[family][0])
    assert (calls(found), found.content) == (BOTH, "Let me < look [that] up.")


@pytest.mark.parametrize("family", WRITTEN)
@pytest.mark.parametrize(
    "text", ["", "Hello", "  a < b\n", '{"a": 1}', "[1, 2]", "f(1)", "<tool", "<tool_call> is a tag"]
)
def test_plain_text_stays_as_it_is(family, text):
    found = read(family, text)
    assert (found.content, found.calls) == (text, [])


@pytest.mark.parametrize("family", WRITTEN)
def test_the_arguments_of_a_call_that_is_cut_are_no_whole_json(family):
    text = WRITTEN[family][0]
    for stop in range(1, text.index("3") - 1):
        found = gather(parse(family, text[:stop]))
        for _, arguments, _ in found.calls:
            assert not _is_json(arguments), (text[:stop], arguments)


def _is_json(text):
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("family", WRITTEN)
def test_without_tools_a_call_is_text(family):
    if family == "harmony":
        return
    text = WRITTEN[family][0]
    assert read(family, text, schemas=None).content == text


def test_arguments_go_out_while_they_are_written():
    events = parse("hermes", WRITTEN["hermes"][0], step=4)
    begin = events.index(Call("f"))
    assert sum(isinstance(event, Arguments) for event in events[begin : events.index(Call("g"))]) > 5


def test_text_is_not_held_back():
    parser = Parser(BY_NAME["hermes"], SCHEMAS)
    assert parser.feed("Hello the") == [Text("Hello the")]
    assert parser.feed("re <") == [Text("re")]
    assert parser.feed("b>") == [Text(" <b>")]


@pytest.mark.parametrize(
    ("family", "text", "expected", "content"),
    [
        ("hermes", '<tool_call>{"arguments": {"a": "x"}, "name": "f"}</tool_call>', [("f", {"a": "x"})], ""),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", {"a": 1})], ""),
        ("hermes", '<tool_call>{"name": "g"}</tool_call>', ONE, ""),
        ("hermes", '<tool_call>{"name": 3}</tool_call>', [], '<tool_call>{"name": 3}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x"}, "id": 1}</tool_call>', [("f", {"a": "x"})], ""),
        ("hermes", '<tool_call>{"name": "g"}\n{"name": "g"}</tool_call>', ONE * 2, ""),
        ("hermes", '<tool_call>{"name": "g"}</tool_call>\nThere.', ONE, "There."),
        ("qwen3_xml", "<function=f>\n<parameter=a>\nx\n</function>", [("f", {"a": "x"})], ""),  # tags forgotten
        (
            "qwen3_xml",
            "<tool_call><function=f><parameter=a>12</parameter></function></tool_call>",
            [("f", {"a": "12"})],
            "",
        ),
        ("qwen3_xml", "<function=h><parameter=n>[1, 2]</parameter></function>", [("h", {"n": [1, 2]})], ""),
        ("llama3_json", '<|python_tag|>{"name": "g", "parameters": {}}', ONE, ""),
        ("llama3_json", '<|python_tag|>f.call(a="x")', [("f", {"a": "x"})], ""),
        ("llama3_json", '{"type": "function", "name": "g", "parameters": {}}', ONE, ""),
        ("llama3_json", '{"name": "Ann", "parameters": {}}', [], '{"name": "Ann", "parameters": {}}'),
        ("llama3_json", '{"name": "Ann", "age": 3} is', [], '{"name": "Ann", "age": 3} is'),
        (
            "llama4_pythonic",
            '<|python_start|>[f("x", b=[1, {"z": true}])]<|python_end|>',
            [("f", {"a": "x", "b": [1, {"z": True}]})],
            "",
        ),
        ("llama4_pythonic", "[h(1)]", [], "[h(1)]"),
        ("llama4_pythonic", "[g(__import__('os'))]", [], "[g(__import__('os'))]"),
        ("mistral", "[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}[TOOL_CALLS]g{}", [("f", {}), ("g", {})], ""),
        (
            "gemma4",
            '<|tool_call>call:f{a:[<|"|>x<|"|>,{k:null}],b:-1.5e3}<tool_call|>',
            [("f", {"a": ["x", {"k": None}], "b": -1500.0})],
            "",
        ),
    ],
)
def test_what_models_write_instead(family, text, expected, content):
    found = read(family, text)
    assert (calls(found), found.content) == (expected, content)


def test_ids_of_the_format_are_kept():
    assert [id for *_, id in read("kimi_k2", WRITTEN["kimi_k2"][0]).calls] == ["functions.f:0", "functions.g:1"]
    assert [id for *_, id in read("mistral", "[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}").calls] == ["abcdefghi"]


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>\nHm.\n</think>\n\nHi", False, "Hm.", "Hi"),
        ("\n<think>Hm", False, "Hm", ""),
        ("Hm.\n</think>\n\nHi\n", True, "Hm.", "Hi\n"),
        ("<think>Hm.</think>Hi", True, "Hm.", "Hi"),  # some write it although the prompt has
        ("Hm.", True, "Hm.", ""),
        ("Hi <think>", False, "", "Hi <think>"),
        ("<think>\n\n</think>\n\nHi", False, "", "Hi"),
        (" Hi", False, "", " Hi"),
    ],
)
def test_reasoning(text, opened, reasoning, content):
    for schemas in (None, SCHEMAS):
        found = read("hermes", text, schemas=schemas, thinking="think", opened=opened)
        assert (found.reasoning, found.content) == (reasoning, content)


def test_reasoning_before_a_call():
    found = read("hermes", "Hm <tool_call>?</think>\n" + WRITTEN["hermes"][0], thinking="think", opened=True)
    assert (found.reasoning, found.content, calls(found)) == ("Hm <tool_call>?", "", BOTH)


def test_messages_of_harmony():
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi there"
    found = read("harmony", text, schemas=None)
    assert (found.reasoning, found.content) == ("Hm.", "Hi there")
    preamble = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + WRITTEN["harmony"][0]
    found = read("harmony", preamble)
    assert (found.content, calls(found)) == ("I look.", BOTH)


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("qwen2_5", "hermes"),
        ("qwen3", "hermes"),
        ("qwen3_instruct_2507", "hermes"),
        ("qwen3_5_think", "qwen3_xml"),
        ("qwen3_6", "qwen3_xml"),
        ("nemotron_3_nano", "qwen3_xml"),
        ("glm4moe", "glm4"),
        ("gptoss", "harmony"),
        ("gemma4", "gemma4"),
        ("deepseekv3", "deepseek_v3"),
        ("llama3_1", "llama3_json"),
        ("llama3_2", "llama3_json"),
        ("lfm2_2_5", "lfm2"),
        ("gemma3", "json"),
    ],
)
def test_families_are_known_by_their_templates(template, family):
    from pathlib import Path

    import trl

    text = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")
    assert family_of(text).name == family
    thinks = {"qwen3", "qwen3_5_think", "qwen3_6", "glm4moe", "nemotron_3_nano", "lfm2_2_5", "deepseekv3"}
    assert (thinking_of(text) is not None) == (template in thinks or template == "gemma4")
