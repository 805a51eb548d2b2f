"""Foreign text made fit for a terminal, for streams that lack characters, and for Markdown."""

import unicodedata

import pytest

from theodora.safe_text import for_stream, markdown, markdown_code, plain, plain_lines


def test_what_a_terminal_obeys_or_nobody_sees_is_an_escape():
    controls = {chr(c) for c in range(0x2100) if unicodedata.category(chr(c))[0] == "C"}
    controls -= {"\u200c", "\u200d"}  # a test of their own
    shown = {character: plain(f"a{character}b") for character in controls}
    assert shown == {character: f"a{ascii(character)[1:-1]}b" for character in controls}


@pytest.mark.parametrize("text", ["\u2028", "\u2029", "\u2066", "\u2069", "\ufeff", "\U000e0041", "\ud800", "\ufff9"])
def test_separators_marks_tags_and_half_characters_are_escapes(text):
    assert plain(text) == plain_lines(text) == ascii(text)[1:-1]


def test_ordinary_text_of_all_scripts_stays():
    for text in (
        "Füße",
        "日本語",
        "می\u200cخواهم",
        "👨\u200d👩\u200d👧",
        "क\u200dष",
        "a\u00a0b",
        "x\u3000y",
        "❤\ufe0f",
    ):
        assert plain(text) == plain_lines(text) == text


def test_a_joiner_that_joins_nothing_is_shown():
    assert plain("ad\u200dmin") == "ad\\u200dmin"
    assert plain("\u200cx") == "\\u200cx"


def test_lines_stay_in_text_and_not_in_names():
    assert plain_lines("a\n\tb\r\n") == "a\n\tb\\r\n"
    assert plain("a\n\tb") == "a\\n\\tb"


def test_a_stream_gets_what_it_has_characters_for():
    assert "".join(for_stream("‖ΔW‖ … ж", "ascii")) == "||dW|| ... \\u0436"
    assert "".join(for_stream("ü ‖", "cp1252")) == "ü ||"
    assert "".join(for_stream("ü ‖", "no such encoding")) == "ü ‖"
    assert "".join(for_stream("\x1b…", "ascii")) == "\\x1b..."


@pytest.mark.parametrize("name", ["a|b", "*x*", "<script>", "[a](b)", "a\n# b", "`c`", "_", "~~x~~", "![](x)"])
def test_a_name_is_only_text_in_markdown(name):
    told = markdown(name)
    assert "\n" not in told
    assert not any(c in told.replace(f"\\{c}", "") for c in "|*<>[]`_~")


@pytest.mark.parametrize("name", ["a`b", "``", "`", " ", "a``b`c"])
def test_code_in_markdown_ends_where_it_should(name):
    code = markdown_code(name)
    fence = code[: len(code) - len(code.lstrip("`"))]
    assert code.endswith(fence)
    assert fence not in code[len(fence) : -len(fence)].replace("`" * (len(fence) + 1), "")
    assert name in code
