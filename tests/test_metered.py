"""Chat templates with a meter: what works for ever or writes without end is stopped, and nothing else changes."""

import time

import pytest
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from theodora import metered
from theodora.errors import ConfigError
from theodora.metered import MeteredEnvironment, meter_templates, whole_job

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]


def render(template: str, messages=MESSAGES, **more) -> str:
    meter_templates()
    return render_jinja_template(conversations=[messages], chat_template=template, **more)[0][0]


DOUBLED = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = TWICE %}{% endfor %}"
BOMBS = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop of text": "{% for i in range(99999) %}" + "a" * 90_000 + "{% endfor %}",
    "times": "{{ 'a' * 10 ** 10 }}",
    "times, the other way": "{% set n = 10 ** 10 %}{% set x = n * 'a' %}",
    "a list": "{% set x = [0] * 10 ** 10 %}",
    "numbers": "{{ 9 ** 999999999 }}",
    "numbers squared": "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "plus": DOUBLED.replace("START", "'ab'").replace("TWICE", "ns.x + ns.x"),
    "tilde": DOUBLED.replace("START", "'ab'").replace("TWICE", "ns.x ~ ns.x"),
    "replace": DOUBLED.replace("START", "'aa'").replace("TWICE", "ns.x.replace('a', ns.x)"),
    "|replace": DOUBLED.replace("START", "'aa'").replace("TWICE", "ns.x|replace('a', ns.x)"),
    "join": DOUBLED.replace("START", "'aa'").replace("TWICE", "ns.x.join(ns.x)"),
    "|join": DOUBLED.replace("START", "'aa'").replace("TWICE", "[ns.x, ns.x, ns.x]|join(ns.x)"),
    "join of what is to come": "{% set x = 'a' * 9999999 %}{{ ([x] * 99999)|map('upper')|join }}",
    "join of batches": "{% set x = 'a' * 9999999 %}{{ ([x] * 99999)|batch(9)|join }}",
    "nested lists": DOUBLED.replace("START", "[1]").replace("TWICE", "[ns.x, ns.x]") + "{{ ns.x }}",
    "nested lists as JSON": DOUBLED.replace("START", "[1]").replace("TWICE", "[ns.x, ns.x]") + "{{ ns.x|tojson }}",
    "nested lists as text": DOUBLED.replace("START", "[1]").replace("TWICE", "[ns.x, ns.x]")
    + "{% set y = ns.x|string %}",
    "nested objects": DOUBLED.replace("START", "{}").replace("TWICE", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x.items() }}",
    "nested namespaces": DOUBLED.replace("START", "1").replace("TWICE", "namespace(a=ns.x, b=ns.x)") + "{{ ns.x }}",
    "compared lists": DOUBLED.replace("START", "[1]").replace("TWICE", "[ns.x, ns.x]")
    + DOUBLED.replace("ns ", "nt ").replace("ns.", "nt.").replace("START", "[1]").replace("TWICE", "[nt.x, nt.x]")
    + "{{ ns.x == nt.x }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "macros of text": "{% macro f(n) %}abc{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loops": ("{% for m in [1] * 9 recursive %}{{ loop([1] * 9) if loop.depth < 60 else '' }}{% endfor %}"),
    "format": "{{ '%9999999999d' % 1 }}",
    "|format": "{{ '%*d'|format(9999999999, 1) }}",
    "|format of names": "{{ ('%(a)s' * 99999)|format(a='a' * 99999) }}",
    ".format": "{{ '{:>9999999999}'.format(1) }}",
    ".format of widths": "{{ '{:>{}}'.format(1, 9999999999) }}",
    ".format_map": "{{ ('{a}' * 99999).format_map({'a': 'a' * 99999}) }}",
    "center": "{{ 'a'.center(9999999999) }}",
    "|center": "{{ 'a'|center(9999999999) }}",
    "zfill": "{{ 'a'.zfill(9999999999) }}",
    "expandtabs": "{{ ('\\t' * 9999999).expandtabs(999) }}",
    "translate": "{{ ('a' * 999999).translate({97: 'b' * 999999}) }}",
    "indent": "{{ ('\\n' * 999999)|indent(9999999) }}",
    "indented JSON": "{{ ([1] * 99999)|tojson(indent=999) }}",
    "batch": "{{ [1]|batch(9999999999, 1)|list }}",
    "slice": "{{ [1]|slice(9999999999)|list }}",
    "sum of lists": "{{ ([[1] * 99] * 9999)|sum(start=[]) }}",
    "copies": "{% set ns = namespace(x=[]) %}{% set t = 'a' * 9999999 %}{% for i in range(9999) %}"
    "{% set ns.x = ns.x + [t[1:]] %}{% endfor %}",
    "markup": "{{ ('<!---->' * 999999)|striptags }}",
    "lipsum": "{{ lipsum(n=999999999) }}",
    "a set block": "{% for i in range(99999) %}{% set x %}" + "a" * 90_000 + "{% endset %}{% endfor %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_does_not_work_for_ever(name, monkeypatch):
    monkeypatch.setattr(metered, "ALLOWED", 32 << 20)
    began = time.thread_time()
    with pytest.raises((ConfigError, TemplateError, OverflowError, RecursionError)):
        render(BOMBS[name])
    assert time.thread_time() - began < 20


def test_what_is_refused_is_said(monkeypatch):
    monkeypatch.setattr(metered, "ALLOWED", 1 << 20)
    with pytest.raises(ConfigError, match=r"does far more than a conversation of this size needs .*chat_template_path"):
        render(BOMBS["macros"])


def test_all_rows_of_a_file_are_bounded_together(monkeypatch):
    """Each is far from its own limit."""
    monkeypatch.setattr(metered, "WHOLE", 64 << 20)
    template = "{% for i in range(90000) %}{% endfor %}"
    render(template)
    with whole_job():
        render(template)
        with pytest.raises(ConfigError, match="far more than a conversation"):
            render(template)
    with whole_job():
        for _ in range(100):  # an honest pace costs nothing
            render("{% for m in messages %}{{ m.content }}{% endfor %}")


HONEST = {
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ '!' if loop.last }}{{ m.content }} {% endfor %}": (
        "1/2hello 2/2!there "
    ),
    "{% for k, v in messages[0].items() %}{{ k ~ '=' ~ v }};{% endfor %}": "role=user;content=hello;",
    "{% for m in messages if m.role == 'user' %}{{ m['content']|upper }}{% else %}none{% endfor %}": "HELLO",
    "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|join(', ') }}": "hello",
    "{{ messages|map(attribute='role')|list|tojson }}": '["user", "assistant"]',
    "{{ '%s-%03d' % (messages[0].role, 7) }}{{ '{:>4}'.format('a') }}": "user-007   a",
    "{{ (messages[1:] + [{'content': 'x'}])|length }}{{ messages[::-1][0].content }}": "2there",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}": "2",
    "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') * 2 }}{{ none is none }}{{ x is defined }}": "<a><a>TrueFalse",
    "{% for m in [1, [2, [3]]] recursive %}{{ loop(m) if m is iterable else m }}{% endfor %}": "123",
    "{% for i in nothing %}{% else %}empty{% endfor %}{{ nothing }}{{ messages is sequence }}": "emptyTrue",
    "{{ messages[0].content.replace('l', 'L').strip().split('e')[1] }}{{ 'l' in 'hello' }}": "LLoTrue",
    "{% for g in messages|groupby('role') %}{{ g.grouper }}{{ g.list|length }}{% endfor %}": "assistant1user1",
    "{{ {'a': [1, none]}|tojson(indent=2) }}": '{\n  "a": [\n    1,\n    null\n  ]\n}',
}


@pytest.mark.parametrize("template", HONEST)
def test_what_templates_do_is_as_before(template):
    assert render(template) == HONEST[template]
    environment = MeteredEnvironment.__mro__[1](trim_blocks=True, lstrip_blocks=True)  # Jinja's own
    if "tojson" not in template:
        assert environment.from_string(template).render(messages=MESSAGES) == HONEST[template]


def test_a_long_conversation_is_no_bomb():
    messages = [{"role": "user", "content": f"turn {n} " + "word " * 200} for n in range(3000)]
    template = (
        "{% set ns = namespace(text='', last=0) %}{% for m in messages %}{% if m.role == 'user' and not "
        "m.content.startswith('<tool_response>') %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content|trim + ('!' if loop.last else '') }}{% endfor %}"
    )
    with whole_job():
        assert len(render(template, messages)) > 3_000_000


def test_generation_marks_are_found():
    meter_templates()
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    texts, spans = render_jinja_template(
        conversations=[MESSAGES], chat_template=template, return_assistant_tokens_mask=True
    )
    assert (texts, spans) == (["hellothere"], [[(0, 5), (5, 10)]])
