"""What is wrong with a comparison's file is said before anything runs, and the option is named."""

import pytest

from theodora.compare import CompareConfig
from theodora.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps is 0; expected at least 1"),
        ({"steps": "many"}, "steps is 'many'"),
        ({"seeds": []}, "seeds is ()"),
        ({"seeds": [1, 1]}, "seeds is (1, 1); expected a number of at least 1, or different whole numbers"),
        ({"tuning_seeds": 0}, "tuning_seeds is 0"),
        ({"methods": []}, "methods is empty"),
        ({"methods": ["gradient descent"]}, "gradient descent"),
        ({"reference": ["full"]}, "reference is full; the methods are"),
        ({"general": None, "methods": [{"method": "dora", "replay": 0.1}]}, "general is missing"),
        ({"speed": 3}, "there is no option speed"),
        ({"model": None}, "model is missing"),
        ({"data": "rows.jsonl"}, "data is 'rows.jsonl'; expected names with a file"),
        ({"data": {"a b": "rows.jsonl"}}, "'a b' is no name"),
        ({"data": {"a": 3}}, "data.a: 3; expected a file or a mapping"),
        ({"data": {"a": {"validation": 8}}}, "data.a: train is missing"),
        ({"data": {"a": {"train": "x", "rows": 8}}}, "data.a: there is no option rows"),
        ({"data": {"a": {"train": "x", "validation": -1}}}, "data.a: validation is -1; expected a file, a number"),
        ({"data": {"a": {"train": "x", "score": "taste"}}}, "data.a: score is 'taste'; expected one of"),
        ({"data": {"a": {"train": "x", "max_new_tokens": 0}}}, "data.a: max_new_tokens is 0"),
        ({"data": {"a": {"train": "x", "max_new_tokens": "few"}}}, "data.a: max_new_tokens is 'few'"),
    ],
    ids=str,
)
def test_the_option_is_named(changes, said, options):
    with pytest.raises(ConfigError) as raised:
        CompareConfig.from_options(options | changes)
    assert said in str(raised.value)


def test_seeds_are_counted_or_named(options):
    counted = CompareConfig.from_options(options | {"seeds": 3, "tuning_seeds": 2})
    named = CompareConfig.from_options(options | {"seeds": [4, 9], "tuning_seeds": [7]})
    assert (counted.final_seeds, counted.choosing_seeds) == ((0, 1, 2), (1000, 1001))
    assert (named.final_seeds, named.choosing_seeds) == ((4, 9), (7,))
