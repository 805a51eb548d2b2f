"""`theodora.kept`: what was found out once is not asked again, and nothing fails for want of it."""

import json

import pytest

import theodora.kept as kept_module
from theodora.kept import kept


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """`ask(conditions, answer)` gives what is kept, or `answer`; `ask.found` are those that had to be found."""
    monkeypatch.setenv("THEODORA_CACHE", str(tmp_path))

    def ask(conditions, answer):
        def find():
            ask.found.append(answer)
            return answer

        return kept("question", conditions, find, lambda value: isinstance(value, str))

    ask.found, ask.file = [], tmp_path / "kept" / "question.json"
    return ask


def test_an_answer_is_found_once_for_the_same_conditions(ask):
    assert ask({"torch": "2", "gpu": "A"}, "first") == "first"
    assert ask({"gpu": "A", "torch": "2"}, "again") == "first"
    assert ask({"torch": "2", "gpu": "B"}, "other") == "other"
    assert ask.found == ["first", "other"]


def test_what_is_not_of_the_form_is_neither_kept_nor_believed(ask):
    assert ask(1, None) is None
    assert ask(1, "yes") == "yes"
    ask.file.write_text(ask.file.read_text().replace('"yes"', '["yes"]'))
    assert ask(1, "anew") == "anew"
    assert ask.found == [None, "yes", "anew"]


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_a_damaged_file_is_written_anew(ask, text):
    ask.file.parent.mkdir()
    ask.file.write_text(text)
    assert [ask(1, "a"), ask(1, "b")] == ["a", "a"]


def test_only_the_newest_answers_are_kept(ask, monkeypatch):
    monkeypatch.setattr(kept_module, "_MOST", 2)
    for name in "abc":
        ask(name, name)
    assert list(json.loads(ask.file.read_text()).values()) == ["b", "c"]


def test_nothing_fails_where_nothing_can_be_kept(ask):
    ask.file.parent.write_text("a file where the folder should be")
    assert [ask(1, "a"), ask(1, "b")] == ["a", "b"]


def test_nothing_is_left_beside_the_file(ask):
    ask(1, "a")
    assert list(ask.file.parent.iterdir()) == [ask.file]


@pytest.mark.parametrize(
    ("platform", "variable", "expected"),
    [("linux", "XDG_CACHE_HOME", "theodora"), ("win32", "LOCALAPPDATA", "theodora")],
)
def test_the_cache_is_where_the_platform_keeps_caches(platform, variable, expected, monkeypatch, tmp_path):
    monkeypatch.delenv("THEODORA_CACHE")
    monkeypatch.setattr(kept_module.sys, "platform", platform)
    monkeypatch.setenv(variable, str(tmp_path))
    assert kept_module.cache_folder() == tmp_path / expected
