"""Tokens of a stretch of characters, by offsets and without, held against each other."""

from hypothesis import given
from hypothesis import strategies as st

from theodora.data.masks import are_sound, extents, learned_by_extent, learned_by_prefix, places_of, straddles

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
    places = places_of(offsets)
    assert are_sound(places, text)
    assert extents(places).tolist() == places.tolist()
    assert learned_by_extent([(start, end)], places).tolist() == expected
    assert straddles([(start, end)], places) == any(left < start < right for left, right in offsets)


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
    assert learned.tolist() == [first <= i < last for i in ids]


def test_trimmed_spaces_belong_to_their_tokens():
    # As byte-level tokenizers report "a b " with trim_offsets: BOS, "a", " b", " ", EOS.
    offsets = places_of([(0, 0), (0, 1), (2, 3), (4, 4), (0, 0)])
    assert extents(offsets)[:4].tolist() == [[0, 0], [0, 1], [1, 3], [3, 4]]
    assert are_sound(offsets, "a b ")
    assert learned_by_extent([(1, 4)], extents(offsets))[:4].tolist() == [False, False, True, True]
    assert straddles([(2, 4)], extents(offsets))


def test_characters_of_several_tokens_are_whole():
    places = extents(places_of([(0, 1), (1, 2), (1, 2), (2, 3)]))
    assert learned_by_extent([(1, 2)], places).tolist() == [False, True, True, False]


def test_missing_offsets_are_not_sound():
    assert not are_sound(places_of([]), "abc")
    assert not are_sound(places_of([(0, 0), (0, 0)]), "abc")
    assert not are_sound(places_of([(0, 2), (0, 1), (1, 3)]), "abc")
    assert not are_sound(places_of([(0, 2)]), "abc")
    assert are_sound(places_of([(0, 3)]), "abc \n")
