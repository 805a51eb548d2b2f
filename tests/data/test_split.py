"""The held-out split: deterministic, of the size asked for, and without copies of training rows."""

import pytest

from theodora.data import load_examples, split_examples
from theodora.errors import ConfigError


@pytest.fixture
def examples(write):
    return lambda texts: load_examples(write([{"text": text} for text in texts]))


def texts(examples):
    return [row["text"] for row in examples.dataset]


def test_sizes_and_order(examples):
    rows = examples([f"row {i:02d}" for i in range(50)])
    for held_out, size in ((0.2, 10), (7, 7), (0.001, 1), (0, 0), (0.0, 0), (49, 49), (0.999, 49)):
        training, held = split_examples(rows, held_out, 0)
        assert (len(training), len(held)) == (50 - size, size)
        assert sorted(texts(training) + texts(held)) == texts(rows)
        assert texts(training) == sorted(texts(training))
        assert (held.format, held.source) == (rows.format, rows.source)


def test_the_seed_decides(examples):
    rows = examples([f"row {i}" for i in range(50)])
    assert texts(split_examples(rows, 0.2, 3)[1]) == texts(split_examples(rows, 0.2, 3)[1])
    assert texts(split_examples(rows, 0.2, 3)[1]) != texts(split_examples(rows, 0.2, 4)[1])


def test_copies_stay_together(examples):
    rows = examples([f"Row {i % 10}" if i % 2 else f" row\n{i % 10} " for i in range(40)])
    for seed in range(10):
        training, held = split_examples(rows, 0.3, seed)
        assert 0 < len(held) <= 12
        left, right = ({"".join(text.lower().split()) for text in texts(side)} for side in (training, held))
        assert not left & right


def test_copies_that_leave_nothing_to_hold_out(examples):
    with pytest.raises(ConfigError, match="identical rows have to stay together"):
        split_examples(examples(["a", "A "]), 1, 0)


@pytest.mark.parametrize("held_out", [3, 4, -1, 1.0, -0.5, True, float("nan")])
def test_impossible_sizes(examples, held_out):
    with pytest.raises(ConfigError, match="held_out is"):
        split_examples(examples(["a", "b", "c"]), held_out, 0)


def test_one_row_is_never_taken_from_training(examples):
    with pytest.raises(ConfigError, match="less than the 1 there are"):
        split_examples(examples(["a"]), 0.5, 0)
    assert len(split_examples(examples(["a"]), 0, 0)[0]) == 1
