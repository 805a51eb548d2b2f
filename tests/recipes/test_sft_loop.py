"""The flat recipe runs, learns, and writes an adapter that PEFT reads and that gives the recipe's own answers."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

RECIPE = Path(__file__).parents[2] / "recipes" / "sft_loop.py"
COLOURS = {"sky": "blue", "grass": "green", "coal": "black", "snow": "white"}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Colour of {thing}?", "completion": colour} for thing, colour in COLOURS.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", ["llama", "phi", "gpt_neox"])
def test_it_learns_and_peft_reads_what_it_wrote(family, tiny_model_dir, data, tmp_path, monkeypatch, capsys):
    model_dir, output = tiny_model_dir(family), tmp_path / "adapter"
    options = {"model": model_dir, "data": data, "output": output, "steps": 30, "batch-size": 4, "lr": 1e-2}
    monkeypatch.setattr(sys, "argv", ["sft_loop.py", *(f"--{name}={value}" for name, value in options.items())])
    recipe = runpy.run_path(str(RECIPE))

    losses = [float(loss) for loss in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert len(losses) == 30
    assert losses[-1] < losses[0] / 2

    ids = torch.arange(3, 35)[None]
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, output)(ids).logits
    torch.testing.assert_close(adapted, recipe["model"](ids).logits, atol=1e-5, rtol=0)
    assert (adapted - before).abs().max() > 0.1


def test_it_stays_short():
    source = RECIPE.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 150
    assert "import theodora" not in source
    assert "from theodora" not in source
