"""`train/prepare`: what is counted of the rows before they are trained on."""

import pytest
from datasets import Dataset

from theodora.train.prepare import count_tokens


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_tokens_are_counted_in_the_rows_that_were_chosen(at_once, monkeypatch):
    monkeypatch.setitem(count_tokens.__globals__, "_COUNTED_AT_ONCE", at_once)
    rows = Dataset.from_dict({"labels": [[-100, 5, 6], [9], [], [-100, -100], [7, 0]]})
    assert count_tokens(rows) == (8, 5)
    assert count_tokens(rows.select([4, 0, 0])) == (8, 6)
    assert count_tokens(rows.select([])) == (0, 0)
