"""`train/prepare`: what is counted of the rows before they are trained on, and what is said of them."""

import json

import pytest
from datasets import Dataset

from theodora.config import TrainConfig
from theodora.train.arguments import sft_arguments
from theodora.train.prepare import count_tokens, read_data


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_tokens_are_counted_in_the_rows_that_were_chosen(at_once, monkeypatch):
    monkeypatch.setitem(count_tokens.__globals__, "_COUNTED_AT_ONCE", at_once)
    rows = Dataset.from_dict({"labels": [[-100, 5, 6], [9], [], [-100, -100], [7, 0]]})
    assert count_tokens(rows) == (8, 5)
    assert count_tokens(rows.select([4, 0, 0])) == (8, 6)
    assert count_tokens(rows.select([])) == (0, 0)


@pytest.mark.parametrize("apart", [True, False])
def test_near_copies_are_said_before_training_and_no_row_is_dropped(apart, tmp_path, tiny_model_dir):
    def row(number, last):
        words = " ".join(f"{word}{number}" for word in ("when", "the", "tide", "is", "low", "boats", "lie", "aground"))
        return json.dumps({"prompt": "Go on.", "completion": f"{words} {words[::-1]} {last}"}) + "\n"

    rows = [row(number, last) for number in range(20) for last in ("here", "there")]
    data, held_out = tmp_path / "data.jsonl", tmp_path / "held_out.jsonl"
    data.write_text("".join(rows[:-1] if apart else rows))
    held_out.write_text(row(50, "here") + rows[-1])
    more = {"eval_data": str(held_out)} if apart else {"held_out": 2}
    options = {"model": str(tiny_model_dir()), "data": str(data), "output": str(tmp_path / "run"), **more}
    config = TrainConfig.from_options(options)
    found = read_data(config, sft_arguments(config, tmp_path / "checkpoints"))
    (note,) = [note for note in found.notes if "near copies" in note]
    assert (len(found.train_rows), len(found.held_out_rows)) == (39 if apart else 38, 2)
    if apart:
        assert "1 of 2 held-out rows is nearly in what is trained on" in note
        assert f"row 2 of {held_out} is 94% row 39 of {data}" in note
    else:
        assert "2 of 2 held-out rows are nearly" in note
