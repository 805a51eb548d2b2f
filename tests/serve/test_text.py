"""The text of an answer, token by token: what is given out is never taken back."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from theodora.serve.text import Writer, token_bytes, token_text
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


@pytest.mark.parametrize("first", range(1, 5))
def test_which_stop_text_comes_first_does_not_depend_on_how_many_tokens_come_at_once(first):
    """The stop text c is complete before bcd, which begins earlier."""
    tokenizer = tiny_tokenizer()
    tokens = tokenizer("abcde")["input_ids"]
    writer = Writer(tokenizer, ["c", "bcd"])
    writer.write(tokens[:first])
    writer.write(tokens)
    assert writer.text == "ab"
    assert len(writer.offsets) == 3  # the tokens that it took


@pytest.fixture(scope="module")
def sentencepiece():
    """Llama 2's kind of tokenizer: a word carries its space, which decoding drops at the beginning of a text."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁cat", "s"]
    tokenizer = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, [], byte_fallback=True))
    steps = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(list(steps))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_what_goes_on_from_a_prompt_keeps_its_space(sentencepiece):
    the, cat, s = sentencepiece.convert_tokens_to_ids(["▁the", "▁cat", "s"])
    assert Writer(sentencepiece).write([cat, s, cat], True) == "cats cat"  # a text of its own
    writer = Writer(sentencepiece, prompt=[the])
    assert [writer.write([cat]), writer.write([cat, s, cat], True)] == [" cat", "s cat"]
    assert writer.offsets == [0, 4, 5]
    assert [token_text(sentencepiece, token, before) for token, before in ((cat, []), (cat, [the]), (s, [the]))] == [
        "cat",
        " cat",
        "s",
    ]


def test_a_prompt_that_ends_within_a_character_changes_nothing():
    tokens = tiny_tokenizer()("é€")["input_ids"]
    assert Writer(tiny_tokenizer(), prompt=tokens[:1]).write(tokens[2:], True) == "€"


def test_the_bytes_of_parts_of_characters(sentencepiece):
    tokens = tiny_tokenizer()("€")["input_ids"]
    assert [token_text(tiny_tokenizer(), token, tokens[:at]) for at, token in enumerate(tokens)] == ["�"] * 3
    assert b"".join(token_bytes(tiny_tokenizer(), token) for token in tokens) == "€".encode()
    assert token_bytes(sentencepiece, sentencepiece.convert_tokens_to_ids("<0xE2>")) == b"\xe2"
    assert token_bytes(sentencepiece, sentencepiece.convert_tokens_to_ids("▁cat")) is None


def test_a_long_run_of_bytes_that_are_no_characters_is_decoded_piece_by_piece():
    tokenizer = tiny_tokenizer()
    (half, _) = tokenizer("é")["input_ids"]
    tokens = [half] * 500 + tokenizer("é€😀b")["input_ids"] + [half] * 100
    longest = 0

    class Counted:
        def decode(self, some, **options):
            nonlocal longest
            longest = max(longest, len(some))
            return tokenizer.decode(some, **options)

    writer = Writer(Counted())
    for n in range(1, len(tokens) + 1):
        writer.write(tokens[:n], n == len(tokens))
    assert writer.text == tokenizer.decode(tokens)
    assert longest < 100
