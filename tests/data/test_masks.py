"""Tokens of a stretch of characters, by offsets and without, held against each other."""

from hypothesis import given
from hypothesis import strategies as st

from theodora.data.masks import are_sound, extents, learned_by_extent, learned_by_prefix, straddles

PIECES = st.lists(st.text("ab \né", min_size=1, max_size=3), min_size=1, max_size=12)


@given(PIECES, st.data())
def test_every_token_that_has_a_character_of_the_stretch_is_learned(pieces, data):
    text = "".join(pieces)
    offsets, position = [], 0
    for piece in pieces:
        offsets.append((position, position + len(piece)))
        position += len(piece)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    expected = [left < end and right > start for left, right in offsets]
    assert are_sound(offsets, text)
    assert extents(offsets) == offsets
    assert learned_by_extent([(start, end)], offsets) == expected
    assert straddles([(start, end)], offsets) == any(left < start < right for left, right in offsets)


@given(PIECES, st.data())
def test_without_offsets_the_same_tokens_are_found_at_token_borders(pieces, data):
    text = "".join(pieces)
    borders = [len("".join(pieces[:i])) for i in range(len(pieces) + 1)]
    first = data.draw(st.integers(0, len(pieces) - 1))
    last = data.draw(st.integers(first + 1, len(pieces)))

    def encode(prefix):
        return list(range(borders.index(len(prefix))))

    ids = list(range(len(pieces)))
    learned = learned_by_prefix([(borders[first], borders[last])], text, ids, encode)
    assert learned == [first <= i < last for i in ids]


def test_trimmed_spaces_belong_to_their_tokens():
    # As byte-level tokenizers report "a b " with trim_offsets: BOS, "a", " b", " ", EOS.
    offsets = [(0, 0), (0, 1), (2, 3), (4, 4), (0, 0)]
    assert extents(offsets)[:4] == [(0, 0), (0, 1), (1, 3), (3, 4)]
    assert are_sound(offsets, "a b ")
    assert learned_by_extent([(1, 4)], extents(offsets))[:4] == [False, False, True, True]
    assert straddles([(2, 4)], extents(offsets))


def test_characters_of_several_tokens_are_whole():
    assert learned_by_extent([(1, 2)], extents([(0, 1), (1, 2), (1, 2), (2, 3)])) == [False, True, True, False]


def test_missing_offsets_are_not_sound():
    assert not are_sound([], "abc")
    assert not are_sound([(0, 0), (0, 0)], "abc")
    assert not are_sound([(0, 2), (0, 1), (1, 3)], "abc")
    assert not are_sound([(0, 2)], "abc")
    assert are_sound([(0, 3)], "abc \n")
