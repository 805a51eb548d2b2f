"""The recipe runs an untouched TRL script before and after the one added line, with the same losses."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "accelerate_trl.py"


# transformers renames gradient checkpointing; torch's loader complains of a pinned memory that no CPU has.
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:torch")
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_losses_are_the_same(method, tiny_model_dir, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Twice {i}?", "completion": f"{2 * i}"} for i in range(32)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {"model": tiny_model_dir(), "data": data, "method": method, "steps": 6, "rank": 4, "lr": 1e-2}
    monkeypatch.setattr(sys, "argv", ["accelerate_trl.py", *(f"--{name}={value}" for name, value in options.items())])
    runpy.run_path(str(RECIPE))

    said = capsys.readouterr().out
    assert "14 of 14 PEFT layers run on Theodora's kernels." in said
    losses = [(float(peft), float(ours)) for peft, ours in re.findall(r"^ +\d+ +(\d\S*) +(\d\S*)$", said, re.M)]
    assert len(losses) == 6
    assert losses[-1][0] < losses[0][0] - 0.1
    assert all(abs(peft - ours) < 1e-3 for peft, ours in losses)
    assert re.search(r"with theodora\.accelerate_peft +\d", said)


def test_it_adds_one_line():
    source = RECIPE.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 130
    assert source.count("theodora.accelerate_peft(trainer.model)") == 2  # once in words, once in code
