"""What of a JSON schema is kept to, what is said more narrowly, and what is refused."""

import json
import re

import pytest
import xgrammar
from xgrammar.testing import _is_grammar_accept_string

from theodora.errors import ConfigError
from theodora.serve.grammar import format_of
from theodora.serve.messages import StructuredOutputs
from theodora.serve.schemas import check_size, enforceable, narrowed


def takes(schema, text):
    return _is_grammar_accept_string(xgrammar.Grammar.from_json_schema(json.dumps(enforceable(schema))), text)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"minLength": 2}, '"ab"', '"a"'),
        ({"minLength": 2}, '"ab"', "1"),
        ({"type": "string", "maxLength": 2}, '"ab"', '"a\x0c"'),  # a control character is no JSON
        ({"type": "string", "minLength": 1, "maxLength": 2}, '"é"', '""'),
        ({"maximum": 3}, "3", "4"),
        ({"type": "object", "required": ["a"]}, '{"a":1}', "{}"),
        ({"type": "object", "required": ["a"], "additionalProperties": {"type": "null"}}, '{"a":null}', '{"a":1}'),
        ({"items": {"type": "null"}}, "[null]", "[1]"),
        ({"type": "string", "enum": ["a"]}, '"a"', '"b"'),
        ({"type": ["string", "null"], "enum": ["a", None]}, "null", '"b"'),
        ({"allOf": [{"type": "null"}]}, "null", "1"),
        ({"type": "integer", "multipleOf": 5}, "10", "11"),
        ({"type": "string", "pattern": "^[^\"\\\\]+$"}, '"ab"', '"a\x0cb"'),
        ({"$defs": {"n": {"type": "null"}}, "$ref": "#/$defs/n"}, "null", "1"),
    ],
)  # fmt: skip
def test_what_is_kept_to(schema, good, bad):
    assert takes(schema, good)
    assert not takes(schema, bad)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"not": {}}, "the schema itself: 'not'"),
        ({"properties": {"a": {"items": {"if": {}}}}}, "properties.a.items: 'if'"),
        ({"anyOf": [{}, {"uniqueItems": True}]}, "anyOf.1: 'uniqueItems'"),
        ({"$defs": {"a": {"contains": {}}}}, "$defs.a: 'contains'"),
        ({"dependentRequired": {}}, "'dependentRequired'"),
        ({"allOf": [{}, {}]}, "'allOf' of several"),
        ({"$ref": "https://example.org/x"}, "is not within the schema"),
        ({"$ref": "#/$defs/a", "minimum": 3}, "'minimum' beside '$ref'"),
        ({"anyOf": [{}], "properties": {}}, "'properties' beside 'anyOf'"),
        ({"enum": [1, 2], "minimum": 2}, "'minimum' beside 'enum'"),
        ({"type": "string", "enum": ["a", 1]}, "'type' beside 'enum'"),
        ({"type": "integer", "enum": [True]}, "'type' beside 'enum'"),
        ({"type": "number", "multipleOf": 0.5}, "'multipleOf'"),
        ({"type": "integer", "multipleOf": 5, "minimum": 3}, "'multipleOf'"),
        ({"pattern": "^a+$", "maxLength": 3}, "a length beside"),
        ({"pattern": "(?!a)."}, "looking ahead"),
        ({"pattern": 'a"b'}, "a quote"),
        ({"pattern": "a\\\\b"}, "a quote, a backslash"),
        ({"pattern": "a\\nb"}, "control character"),
        ({"patternProperties": {'"': {}}}, "a quote"),
    ],
)
def test_what_would_not_be_kept_to_is_refused(schema, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        enforceable(schema)


def test_words_that_say_nothing_are_let_through():
    schema = {
        "$schema": "x",
        "title": "T",
        "type": "object",
        "properties": {"a": {"anyOf": [{"type": "null"}], "default": 1}},
    }
    assert narrowed(schema) == enforceable(schema) == schema
    assert enforceable(True) is True


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("a" * 200_001, "200001 characters"),
        ({"enum": ["a" * 200_001]}, "characters"),
        (json.loads('{"items":' * 70 + "{}" + "}" * 70), "nested 70 deep"),
        ({f"a{n}": {"$ref": "#"} for n in range(501)}, "501 references"),
    ],
)
def test_limits(value, says):
    with pytest.raises(ConfigError, match=says):
        check_size(value, "The schema")


@pytest.mark.parametrize(
    "asked",
    [
        {"regex": "a?" * 6000},
        {"grammar": "root ::= " + '"a"? ' * 6000},
        {"json": {"type": "string", "pattern": "a?" * 6000}},
        {"json": {"properties": {f"k{at}": {"type": "string", "pattern": "a?" * 1500} for at in range(20)}}},
        {"json": {"patternProperties": {"a?" * 6000: {}}}},
        {"structural_tag": json.dumps({"format": {"type": "regex", "pattern": "a?" * 6000}})},
        {"structural_tag": json.dumps({"structures": [{}] * 2000})},
    ],
)
def test_what_takes_memory_by_its_square_is_short(asked):
    with pytest.raises(ConfigError, match="expected at most"):
        format_of(StructuredOutputs.model_validate(asked))
