"""What is wrong with a comparison's file is said before anything runs, and the option is named."""

import json

import pytest

from theodora.compare import CompareConfig
from theodora.compare.material import read_splits
from theodora.errors import ConfigError, DataError


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
        ({"methods": [{"method": "lora", "speed": 2}]}, "methods: lora: there is no option speed"),
        ({"methods": [{"method": "full", "rank_pattern": {"q_proj": 2}}]}, "full fine-tuning has no adapter"),
        ({"methods": [{"method": "lora", "replay": 1}]}, "replay is 1; expected a share of at least 0 and below 1"),
        ({"methods": [{"method": "lora", "b_ratio": 0}]}, "b_ratio is 0; expected a positive number"),
        ({"methods": [{"method": "lora", "ranks": [2, 0]}]}, "ranks are [2, 0]; expected whole numbers of at least 1"),
        ({"methods": [{"method": "lora", "learning_rates": ["fast"]}]}, "['fast']; expected positive numbers"),
        ({"methods": [{"method": "lora", "learning_rates": []}]}, "[]; expected positive numbers"),
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


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answers(*found):
    return [{"prompt": f"{n}?", "completion": answer} for n, answer in enumerate(found)]


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        (answers(*["yes"] * 30), {}, "all 30 rows have the same answer; a choice needs at least two labels"),
        (answers(*map(str, range(80))), {}, "80 rows have 80 different answers: that is no closed set of labels"),
        (
            answers(*["odd", "even", "perhaps"] * 10),
            {"labels": ["odd", "even"]},
            "answers that are none of the labels: perhaps",
        ),
        ([{"text": f"row {n}"} for n in range(30)], {}, "is plain text, which has no answers: score='labels'"),
    ],
    ids=["one", "many", "strange", "text"],
)
def test_data_that_has_no_labels_is_refused_before_anything_runs(rows, changes, said, options, tmp_path):
    train = write(tmp_path / "odd.jsonl", rows)
    data = {"mine": {"train": train, "validation": 8, "test": 8, "score": "labels", **changes}}
    config = CompareConfig.from_options(options | {"data": data})
    with pytest.raises(DataError) as raised:
        read_splits(config)
    assert said in str(raised.value)


def test_general_texts_are_texts_and_enough_of_them(options, tmp_path):
    rows = write(tmp_path / "rows.jsonl", answers("a", "b", "c"))
    with pytest.raises(DataError, match=r"general: .*rows\.jsonl is .*; expected plain text \(a column `text`\)"):
        read_splits(CompareConfig.from_options(options | {"general": rows}))
    replayed = options | {"methods": [{"method": "dora", "replay": 0.1}], "general_rows": 12}
    with pytest.raises(DataError, match="has 12 texts, and general_rows takes 12: none is left"):
        read_splits(CompareConfig.from_options(replayed))
