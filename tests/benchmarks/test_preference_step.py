"""The benchmark of a step of DPO runs, with the same loss in every row, and writes what its table shows."""

import json
import shlex

import pytest

import scripts


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL says transformers' older names
def test_it_runs_and_reports(tmp_path, monkeypatch, capsys):
    output = tmp_path / "results" / "preference_step.json"
    options = shlex.split("--layers 1 --hidden 64 --length 16 --pairs 2 --vocabulary 256 --rounds 1 --steps 1 --rank 2")
    names = shlex.split("--variants floor-eager trl-lora dora dora-beforehand")
    scripts.measure_here(monkeypatch)
    scripts.run(monkeypatch, "benchmarks/preference_step.py", "--output", output, *options, *names)
    assert "TRL + PEFT LoRA" in capsys.readouterr().out
    report = json.loads(output.read_text(encoding="utf-8"))
    assert [row["name"] for row in report["rows"]] == ["floor-eager", "trl-lora", "dora", "dora-beforehand"]
    assert [row["failure"] for row in report["rows"]] == [None] * 4
    assert [row["first_loss"] for row in report["rows"]] == pytest.approx([0.693147] * 4, abs=1e-4)
