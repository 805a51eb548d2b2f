import math

import pytest
from datasets import Dataset

from theodora.data import Examples
from theodora.errors import ConfigError, DataError
from theodora.evaluate import evaluate
from theodora.evaluate.metrics import load_metric, mean_score, token_f1


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The cat, sat!", "the cat sat", 1.0),
        ("cat", "the cat sat", 0.5),  # precision 1, recall 1/3
        ("cat cat", "cat dog", 0.5),  # a word counts as often as both have it
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("", "", 1.0),
        ("Größe 3", "größe 3", 1.0),
    ],
)
def test_f1_of_words(answer, reference, expected):
    assert token_f1(answer, reference) == pytest.approx(expected)


def test_a_metric_comes_from_a_file(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("def same(answer, reference):\n    return answer == reference\n")
    assert mean_score(load_metric(f"{file}:same"), "same", ["a", "b"], ["a", "c"]) == 0.5
    for wrong, message in {
        f"{file}:other": "has no function other; it has same",
        f"{tmp_path / 'none.py'}:same": "there is no file",
        "exact": "expected path/to/file.py:function",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_metric(wrong)
    file.write_text("1 / 0")
    with pytest.raises(ConfigError, match="fails when it is run: ZeroDivisionError"):
        load_metric(f"{file}:same")


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "much"])
def test_what_is_no_number_is_an_error_that_shows_the_row(value):
    with pytest.raises(DataError, match=r"own gave .* at row 2 \(answer 'b', reference 'c'\)"):
        mean_score(lambda a, r: 1.0 if a == r else value, "own", ["a", "b"], ["a", "c"])


def test_a_metric_that_fails_is_an_error_that_shows_the_row():
    with pytest.raises(DataError, match=r"own fails at row 1 .*ZeroDivisionError"):
        mean_score(lambda a, r: 1 / 0, "own", ["a"], ["b"])


def test_scores_hold_f1_and_own_metrics(tiny_model, tiny_tokenizer):
    rows = Examples(Dataset.from_list([{"prompt": "q", "completion": "one two"}]), "prompt-completion", "rows")
    seen = []
    scores = evaluate(
        tiny_model(),
        tiny_tokenizer,
        rows,
        max_new_tokens=8,
        f1=True,
        metrics={"length": lambda answer, reference: seen.append((answer, reference)) or len(reference)},
    )
    assert scores.token_f1 is not None
    assert scores.metrics == {"length": 7.0}
    assert seen[0][1] == "one two"
    text = Examples(Dataset.from_list([{"text": "t"}]), "text", "texts")
    with pytest.raises(DataError, match="plain text, which has no answers"):
        evaluate(tiny_model(), tiny_tokenizer, text, f1=True)
