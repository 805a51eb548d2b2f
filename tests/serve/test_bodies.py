"""From bytes to what was asked: JSON of a bounded shape, and lists whose misses are few."""

import json
from typing import Annotated

import pytest
from pydantic import TypeAdapter, ValidationError

from theodora.errors import ConfigError
from theodora.serve.bodies import parsed, validated
from theodora.serve.lists import AtMost, keys_at_most
from theodora.serve.misses import describe_misses, few


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "The body is empty"),
        (b"{", "The body is no JSON: Expecting"),
        (b'{"a":NaN}', "NaN is no number"),
        (b'{"a":-Infinity}', "-Infinity is no number"),
        (b'{"a":1e999}', "1e999 is too large"),
        (b"1" * 5000, "The body is no JSON: Exceeds the limit"),
        (b"\xff\xfe\x00", "The body is no JSON"),
        (b'{"a":[{"\\ud800":1}]}', "half a character"),
        (b"[" * 129 + b"]" * 129, "nested too deeply; expected at most 128"),
        (b"[" * 20_000, "nested too deeply"),
        (b"[" + b"[]," * 100_000 + b"1]", "more than 100000 lists, objects and keys"),
        (b"{" + b'"a":1,' * 100_001 + b'"b":2}', "more than 100000 lists, objects and keys"),
    ],
)
def test_what_is_no_body(body, says):
    with pytest.raises(ConfigError) as error:
        parsed(body)
    assert says in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_what_is_one(encoding):
    sent = {"a": [1, 2.5, "é", None, {"b": True}], "face": "\U0001f600", "deep": eval("[" * 120 + "]" * 120)}
    assert parsed(json.dumps(sent, ensure_ascii=False).encode(encoding)) == sent


def test_brackets_within_texts_are_not_counted():
    text = '[{"a":' * 50_000 + '\\"'
    assert parsed(json.dumps({"prompt": text}).encode()) == {"prompt": text}


def test_a_text_that_never_ends_is_read_once():
    # Searched anew from each of its quotes, it took a minute, in which no thread ran: as long as a test may take.
    with pytest.raises(ConfigError, match="Unterminated string"):
        parsed(b'{"a":"' + b":" * 100_001 + b'\\"' * 1_900_000)


def test_of_a_long_list_the_first_miss_is_told():
    short = TypeAdapter(Annotated[list[int], AtMost(100)])
    with pytest.raises(ValidationError) as error:
        short.validate_python(["a"] * 10)
    assert error.value.error_count() == 10
    with pytest.raises(ValidationError) as error:
        short.validate_python([1] * 50 + ["a"] * 50)
    assert describe_misses(error.value.errors()) == '50: expected a whole number, found "a"'
    with pytest.raises(ConfigError, match="at most 100 entries, found a list of 101"):
        validated(short, [1] * 101)
    assert short.validate_python([1] * 100) == [1] * 100


def test_the_entries_of_an_object_are_counted_first():
    keys = TypeAdapter(Annotated[dict[int, int], keys_at_most(3)])
    with pytest.raises(ValidationError) as error:
        keys.validate_python({f"k{at}": "x" for at in range(1000)})
    assert error.value.error_count() == 1
    assert keys.validate_python({"1": 2}) == {1: 2}


def test_few():
    assert few(["a", "b"]) == "a; b"
    assert few([str(at) for at in range(10)], 2) == "0; 1; and 8 more"
