"""`theodora import`: what is written, what is said, and that the result is a recipe."""

import json

import pytest
import yaml

from theodora.cli.main import main
from theodora.config import TrainConfig

AXOLOTL = """
base_model: gpt2
adapter: lora
lora_r: 8
lora_target_linear: true
datasets: [{path: rows.jsonl, type: chat_template}]
learning_rate: 2e-4
wandb_project: mine
loraplus_lr_ratio: 16
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "qlora.yaml"
    path.write_text(AXOLOTL)
    return path


def test_standard_output_is_the_recipe_and_nothing_else(recipe, capsys):
    assert main(["import", str(recipe)]) == 0
    out, err = capsys.readouterr()
    assert TrainConfig.from_options(yaml.safe_load(out)).adapter.rank == 8
    assert "Without counterpart:\n  loraplus_lr_ratio: 16 → would let B learn faster" in err
    assert "theodora train --config FILE WANDB_PROJECT=mine --report-to wandb" not in err
    assert "WANDB_PROJECT=mine theodora train --config FILE --report-to wandb" in err


def test_a_file_is_written_and_not_overwritten_unasked(recipe, tmp_path, capsys):
    written = tmp_path / "ours.yaml"
    assert main(["import", str(recipe), "--output", str(written)]) == 0
    assert "Without counterpart" in capsys.readouterr().out
    assert "# Without counterpart:\n#   loraplus_lr_ratio: 16" in written.read_text()
    assert main(["import", str(recipe), "--output", str(written)]) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert main(["import", str(recipe), "--output", str(written), "--overwrite"]) == 0


def test_json_holds_options_and_notes(recipe, capsys):
    assert main(["import", str(recipe), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tool"] == "Axolotl"
    assert found["options"]["rank"] == 8
    assert {"kind": "missing", "field": "loraplus_lr_ratio", "value": 16}.items() <= next(
        note for note in found["notes"] if note["kind"] == "missing"
    ).items()


def test_what_cannot_be_read_is_an_error(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("other: 1")
    assert main(["import", str(tmp_path / "a.yaml")]) == 2
    assert "--from axolotl or llama-factory" in capsys.readouterr().err
