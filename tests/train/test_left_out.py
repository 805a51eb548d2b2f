"""What rows hold and nothing is learned from: named before training, in the result and in the model card."""

import io
import json

import pytest
from rich.console import Console

from theodora.config import AdapterConfig, TrainConfig
from theodora.data.left_out import LeftOut
from theodora.train import train
from theodora.train.report import counted, describe_modules, left_out_lines


@pytest.fixture
def files(tmp_path):
    """Rows to train on, of which half have an id; others to evaluate on and to replay."""
    rows = {
        "train.jsonl": [{"prompt": f"{n}?", "completion": "a", "id": n if n % 2 else None} for n in range(10)],
        "eval.jsonl": [{"prompt": "b?", "completion": "b", "topic": "b"}],
        "replay.jsonl": [{"text": "some text", "source": "x"}] * 3,
    }
    for name, lines in rows.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return tmp_path


def test_it_is_named_in_the_panel_the_result_and_the_card(files, options):
    shown = io.StringIO()
    paths = {"data": "train.jsonl", "eval_data": "eval.jsonl", "replay": "replay.jsonl"}
    given = options | {name: str(files / file) for name, file in paths.items()} | {"max_steps": 1}
    result = train(TrainConfig.from_options(given), console=Console(file=shown, width=400))
    assert result.left_out == (
        LeftOut("the column 'id'", 5, "not used"),
        LeftOut(f"the column 'source' of {files / 'replay.jsonl'}", 3, "not used"),
        LeftOut(f"the column 'topic' of {files / 'eval.jsonl'}", 1, "not used"),
    )
    assert result.to_dict()["left_out"][0] == {"what": "the column 'id'", "rows": 5, "why": "not used"}
    json.dumps(result.to_dict(), allow_nan=False)
    panel = shown.getvalue().split("╰")[0]
    card = (files / "run" / "README.md").read_text(encoding="utf-8")
    for part in result.left_out:
        assert f"Left out       {part} " in panel
        assert f"\n- Left out: {part}." in card


def test_rows_held_out_of_one_file_do_not_name_it_twice(files, options):
    result = train(
        TrainConfig.from_options(options | {"data": str(files / "train.jsonl"), "max_steps": 1}),
        console=Console(quiet=True),
    )
    assert [str(part) for part in result.left_out] == ["the column 'id': not used (5 rows)"]


def test_of_many_the_panel_names_the_first():
    parts = [LeftOut(f"the column {n}", n, "not used") for n in range(30)]
    lines = left_out_lines(parts)
    assert len(lines) == 13
    assert lines[-1] == "and 18 more, which the model card names"
    hidden = LeftOut("tool calls", 8, "left out by the chat template in 8 turns")
    assert left_out_lines([*parts, hidden])[:2] == [str(hidden), str(parts[0])]
    assert left_out_lines(parts[:13])[-1] == "the column 12: not used (12 rows)"


def test_one_is_not_several():
    assert [counted(n, "row") for n in (0, 1, 1200)] == ["0 rows", "1 row", "1,200 rows"]
    assert describe_modules(["model.layers.0.q_proj"]) == "1 module: q_proj"
    assert describe_modules([f"layers.{i}.m{i}" for i in range(9)]) == "9 modules"


def test_rows_of_single_tokens_are_named_before_training_and_in_the_card(files, tiny_model_dir, tmp_path):
    shown, output = io.StringIO(), tmp_path / "run"
    config = TrainConfig(
        model=str(tiny_model_dir()),
        data=str(files / "train.jsonl"),
        output=str(output),
        max_steps=1,
        adapter=AdapterConfig(targets=("q_proj",), trainable_token_indices=(3, 4)),
    )
    train(config, console=Console(file=shown, width=200))
    said = "the rows of 2 tokens in model.embed_tokens"
    assert said in shown.getvalue()
    assert said in (output / "README.md").read_text(encoding="utf-8")
