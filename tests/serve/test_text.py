"""The text of an answer, token by token: what is given out is never taken back."""

import pytest

from theodora.serve.text import Writer
from tiny import tiny_tokenizer


def written(text, stops=(), most=None):
    """The pieces that come with each byte of `text`, and the writer; the last of `most` bytes ends the answer."""
    tokenizer = tiny_tokenizer()
    tokens = tokenizer(text)["input_ids"][:most]
    writer = Writer(tokenizer, stops)
    return [writer.write(tokens[:n], n == len(tokens)) for n in range(1, len(tokens) + 1)], writer


def test_characters_come_whole():
    pieces, writer = written("aé€😀b")
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]
    assert writer.offsets == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4]


def test_half_a_character_at_the_end_is_shown_as_such():
    pieces, _ = written("aé€", most=4)
    assert pieces == ["a", "", "é", "�"]


@pytest.mark.parametrize(
    ("text", "stops", "pieces"),
    [
        ("abEND", ["END"], ["a", "b", "", "", ""]),
        ("abENx", ["END"], ["a", "b", "", "", "ENx"]),
        ("abEN", ["END"], ["a", "b", "", "EN"]),  # over before it became a stop text
        ("aEENDz", ["END"], ["a", "", "E", "", "", ""]),
        ("xENDING", ["ENDING", "END"], ["x", "", "", "", "", "", ""]),  # the first that is complete
        ("a€b", ["€"], ["a", "", "", "", ""]),
        ("ab", ["", "b"], ["a", ""]),
    ],
)
def test_what_could_become_a_stop_text_waits(text, stops, pieces):
    assert written(text, stops)[0] == pieces


def test_several_tokens_at_once():
    tokenizer = tiny_tokenizer()
    tokens = tokenizer("one END two")["input_ids"]
    writer = Writer(tokenizer, ["END"])
    assert writer.write(tokens[:2]) == "on"
    assert writer.write(tokens, True) == "e "
    assert writer.stopped
    assert writer.text == "one "
    assert writer.write(tokens, True) == ""
