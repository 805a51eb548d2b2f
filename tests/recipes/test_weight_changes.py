"""The recipe trains all three methods and leaves runs that `theodora inspect` reads."""

import json
import runpy
import sys
from pathlib import Path

from theodora.cli.main import main

RECIPE = Path(__file__).parents[2] / "recipes" / "weight_changes.py"


def test_three_runs(tiny_model_dir, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Twice {i}?", "completion": f"{2 * i}"} for i in range(8)]
    rows.append({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {"model": tiny_model_dir(), "data": data, "output": tmp_path / "runs", "steps": 4, "checkpoints": 2}
    monkeypatch.setattr(sys, "argv", ["weight_changes.py", *(f"--{name}={value}" for name, value in options.items())])
    runpy.run_path(str(RECIPE))
    capsys.readouterr()
    runs = [str(tmp_path / "runs" / name) for name in ("full", "lora", "dora")]
    assert main(["inspect", *runs, "--base-model", str(tiny_model_dir()), "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)["runs"]
    assert [report["method"] for report in reports] == ["full", "lora", "dora"]
    assert all([c["step"] for c in report["checkpoints"]] == [2, 4] for report in reports)
    assert not any(report["warnings"] for report in reports)
