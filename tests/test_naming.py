"""Names of recipes, and paths that no file system has."""

import pytest

from theodora.compare import CompareConfig
from theodora.compare.cells import Cell
from theodora.config import TrainConfig
from theodora.errors import ConfigError
from theodora.naming import name_problem, path_problem

BAD_NAMES = ["", ".", "..", "../x", "a/b", "a\\b", "a.b", "a b", " a", "a\n", "a\x1b[2J", "é", "\u202ea", "a:b", "*"]


@pytest.mark.parametrize("name", [*BAD_NAMES, "x" * 65, "x" * 250, 8, 1.5, None, True, [1]])
def test_what_is_no_name(name):
    assert name_problem(name)


@pytest.mark.parametrize("name", ["a", "lora+", "my-data_2", "x" * 64])
def test_what_is_a_name(name):
    assert name_problem(name) is None


def comparison(**options):
    options = {"model": "m", "output": "o", "data": {"d": "d.jsonl"}, "methods": ["lora"], **options}
    return CompareConfig.from_options(options)


def method(name, method="lora"):
    return {"method": method, "name": name}


@pytest.mark.parametrize("name", [*BAD_NAMES, "x" * 250, 8, True])
def test_data_and_methods_are_named_by_the_same_rules(name):
    for options in ({"data": {name: "d.jsonl"}}, {"methods": ["dora", method(name)]}):
        with pytest.raises(ConfigError, match=r"is no name|is no text|has 250 characters"):
            comparison(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"data": {"med": "a", "Med": "b"}}, "data: med and Med differ in capitals alone"),
        ({"methods": [method("one"), method("One")]}, "methods: one-r8 and One-r8 differ in capitals alone"),
        ({"methods": ["lora", method("LoRA")]}, "differ in capitals alone"),
        ({"methods": ["lora", "lora"]}, "there are two of lora-r8"),
        ({"methods": ["lora", method("dora")]}, "lora is named dora, which is another method"),
        ({"methods": [method("full-r8"), method("full", "full")], "reference": ["full"]}, ""),
        ({"learning_rates": {"default": [1e-3], "lroa": [1e-2]}}, "learning_rates: there is no method 'lroa'"),
        ({"output": " "}, "output is empty"),
        ({"output": "x" * 256}, "a name of 256 bytes"),
        ({"general": "a\0b"}, "general is .* NUL"),
        ({"data": {"d": "d\0"}}, "data.d: train is .* NUL"),
    ],
)
def test_names_that_would_meet_in_one_file_or_label_are_refused(options, says):
    if not says:
        assert comparison(**options).variants
        return
    with pytest.raises(ConfigError, match=says):
        comparison(**options)


def test_learning_rates_that_differ_in_their_seventh_digit_are_two_cells():
    keys = {Cell(phase="tune", data="d", variant="v", learning_rate=rate).key for rate in (0.001, 0.00100000001)}
    assert keys == {"tune.d.v.lr0.001.seed0", "tune.d.v.lr0.00100000001.seed0"}


@pytest.mark.parametrize(
    ("path", "says"),
    [("a\0b", "NUL"), ("\ud800", "lone surrogate"), ("é" * 128, "256 bytes"), ("a/" * 2100, "too long a path")],
)
def test_paths_that_no_file_system_has_are_refused_before_anything_is_loaded(path, says):
    assert says in str(path_problem(path))
    for name in ("model", "data", "output", "eval_data", "replay"):
        with pytest.raises(ConfigError, match=says):
            TrainConfig(**{"model": "m", "data": "d", "output": "o", name: path})


def test_odd_names_that_file_systems_have_are_used():
    for path in ("x" * 255, "a\nb", "-x", " x ", "\udcff", "é", "e\u0301", "[/]", "a" * 200 + "/" + "b" * 255):
        assert path_problem(path, written=True) is None
