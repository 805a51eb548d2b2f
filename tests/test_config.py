"""Configurations that make no sense: every miss is named, with what was found and what was expected."""

import dataclasses

import pytest

from theodora import AdapterConfig, TrainConfig
from theodora.errors import ConfigError
from theodora.parse import parse_json, parse_yaml

GIVEN = {"model": "m", "data": "d", "output": "o"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"targets": ["q_proj", ""]}, "targets holds ''; expected names"),
        ({"targets": []}, "targets is empty; expected 'all-linear', module names, or a regular expression"),
        ({"rank_pattern": {5: 4}}, "rank_pattern has the key 5; expected names or regular expressions"),
        ({"rank": "many"}, "rank is 'many'"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"rank": 10**400}, "expected a whole number of at least 1, at most 9,007,199,254,740,992"),
        ({"rank_pattern": {"q": 2**53 + 1}}, "rank_pattern['q'] is 9007199254740993"),
        ({"init": "zeros"}, "init is 'zeros'"),
    ],
)
def test_adapters(given, says):
    with pytest.raises(ConfigError) as error:
        AdapterConfig(**given)
    assert says in str(error.value)


def test_null_stands_for_the_default_and_whole_floats_for_integers():
    """As PEFT's files and YAML write them."""
    assert AdapterConfig(targets=None, rank=8.0, exclude=None) == AdapterConfig(rank=8)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"model": ""}, "model is empty"),
        ({"output": "a\0b"}, "expected text without NUL characters"),
        ({"data": "\ud800"}, "text without halves of characters"),
        ({"max_steps": 0}, "max_steps is 0; expected at least 1"),
        ({"learning_rate": 0}, "learning_rate is 0.0; expected more than 0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; expected a finite number"),
        ({"seed": 10**12}, "seed is 1000000000000; expected at most"),
        ({"held_out": 1.5}, "held_out is 1.5; expected a share below 1, or a whole number of rows"),
        ({"eval_data": "e", "held_out": 3}, "eval_data and held_out=3 are both given"),
        ({"replay": "r", "replay_share": 1.0}, "replay_share is 1.0; expected at least 0 and below 1"),
        ({"early_stopping_patience": 2, "held_out": 0}, "early_stopping_patience needs held-out rows"),
        ({"resume": True, "overwrite": True}, "resume and overwrite are both given"),
        ({"bf16": True, "trainer": {"fp16": True}}, "bf16 and fp16 are both on"),
        ({"trainer": {1: 2}}, "trainer has the key 1; expected names of options"),
        ({"trainer": [1]}, "trainer is [1]; expected a mapping"),
        ({"output_dir": "p"}, "output_dir and output are both given; expected output alone"),
    ],
)
def test_runs(given, says):
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_options(GIVEN | given)
    assert says in str(error.value)


@pytest.mark.parametrize("name", ["max_steps", "rank"])
def test_an_option_of_ours_is_none_of_the_trainers(name):
    with pytest.raises(ConfigError, match=f"trainer holds {name}, which is an option of its own; expected it outside"):
        TrainConfig.from_options(GIVEN | {"trainer": {name: 2}})


def test_other_ways_to_say_none():
    config = TrainConfig.from_options(GIVEN | {"max_steps": -1, "report_to": "none", "resume": "False"})
    assert (config.max_steps, config.report_to, config.resume) == (None, (), None)
    assert dataclasses.replace(config, report_to=("",)).report_to == ()


@pytest.mark.parametrize(
    ("parse", "text", "says"),
    [
        (parse_json, '{"a": 1, "b": 2, "a": 3}', "it has the key 'a' twice"),
        (parse_json, "[" * 100_000, "nested too deeply"),
        (parse_yaml, "a: 1\nb: {c: 1, c: 2}\n", "it has the key 'c' twice in the mapping that begins in line 2"),
        (parse_yaml, "[" * 3000, "nested too deeply"),
        (parse_yaml, '!!int ""', "IndexError"),
    ],
)
def test_texts_that_could_be_read_in_two_ways_or_not_at_all(parse, text, says):
    with pytest.raises(ValueError, match=says):
        parse(text)


def test_a_small_text_cannot_stand_for_a_large_value():
    bomb = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
    with pytest.raises(ValueError, match="its aliases stand for more than"):
        parse_yaml(bomb)


def test_a_recipe_of_trls_that_does_not_push_is_read():
    options = {"model": "base", "data": "rows.jsonl", "output": "out", "push_to_hub": False}
    assert TrainConfig.from_options(options).push_to_hub is None
