"""Names, expressions and patterns: what they match, as PEFT reads them, and that they end."""

import re
import time

import pytest

from theodora.config import AdapterConfig
from theodora.errors import ConfigError
from theodora.paths import Expressions, PathPattern, matches

PATHS = ["q_proj", "model.layers.1.q_proj", "model.layers.11.q_proj", "model.layersX1.q_proj", "lm_head"]
KEYS = ["q_proj", "1.q_proj", r"layers\.1\.q_proj", "layers.1.q_proj", r".*\.q_proj", "proj", "x|lm_head", "model"]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_matches_as_in_peft(key):
    asked = PathPattern({key: True})
    for path in PATHS:
        assert asked.get(path, False) == bool(re.match(rf"(.*\.)?({key})$", path)), path
    assert asked.idle(PATHS) == ([] if any(asked.get(path, False) for path in PATHS) else [key])


def test_the_first_key_counts():
    assert PathPattern({"layers.1.q_proj": 1, ".*q_proj": 2}).get("model.layers.1.q_proj", 0) == 1
    assert PathPattern({".*q_proj": 2, "layers.1.q_proj": 1}).get("model.layers.1.q_proj", 0) == 2


def test_names_match_endings():
    assert [matches(("1.q_proj", "head"), path) for path in PATHS] == [False, True, False, False, False]


def test_the_ranks_of_many_experts_are_looked_up():
    """One rank for each of 50,000 modules: what an exported adapter of a mixture of experts has."""
    ranks = {f"model.layers.{at}.mlp.experts.{n}.up_proj": 1 + n % 7 for at in range(50) for n in range(1000)}
    config = AdapterConfig(rank_pattern=ranks)
    assert [config.rank_of(path) for path in ranks] == list(ranks.values())


def test_all_expressions_share_one_budget():
    """Ten thousand of them, each not slow enough to be stopped by itself."""
    expressions = Expressions(seconds=0.2)
    pattern = PathPattern({rf"(?:.{{1,9}}){{1,4}}[!#]{n}": n for n in range(10_000)}, expressions)
    began = time.thread_time()
    with pytest.raises(ConfigError, match=r"more than 0\.2 s together"):
        sum(pattern.get(f"model.layers.{layer}.self_attn.q_proj", 0) for layer in range(1000))
    assert time.thread_time() - began < 10  # 0.2 s, and a busy machine
    with pytest.raises(ConfigError, match="together"):
        expressions.match("another|(expression)", "q_proj")


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("((((((a{10}){10}){10}){10}){10}){10}){10}", "repeats more than 100,000 times"),
        ("a{4000000}", "repeats more than 100,000 times"),
        ("(a{1000}){1000}", "repeats more than 100,000 times"),
        ("(" + "a|" * 10_000 + ")", "has 20,002 characters; expected at most 10,000"),
        ("(" * 900 + ")" * 900, "no regular expression"),
    ],
)
def test_what_takes_for_ever_to_compile_is_not_compiled(expression, told):
    for field in ({"targets": expression}, {"exclude": expression}, {"rank_pattern": {expression: 2}}):
        with pytest.raises(ConfigError, match=told):
            AdapterConfig(**field)


def test_a_file_of_expressions_is_bounded():
    many = {f"(layers|blocks).{n}.({'q' * 90}|v)": 2 for n in range(1000)}
    with pytest.raises(ConfigError, match=r"alpha_pattern have 1.*,.* characters together; expected at most 100,000"):
        AdapterConfig(alpha_pattern=many)
    with pytest.raises(ConfigError, match=r"have 100,002 names together"):
        AdapterConfig(rank_pattern={f"n{n}": 2 for n in range(100_001)})
