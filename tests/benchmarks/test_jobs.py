"""The benchmark of whole jobs: its clock, its table, and that a small one runs."""

import argparse
import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

import scripts

SCRIPT = "benchmarks/jobs.py"


def test_the_clock_notes_every_step():
    clock = scripts.load("benchmarks/jobs_clock.py")

    class Handler:
        def on_step_begin(self, *args):
            return "begun"

        def on_step_end(self, *args):
            return "ended"

    steps = []
    clock._put_clock_into(Handler, steps)
    handler, state = Handler(), SimpleNamespace(global_step=2, max_steps=2)
    for _ in range(2):
        assert handler.on_step_begin(None, state, None) == "begun"
        assert handler.on_step_end(None, state, None) == "ended"
    (begun, ended), (again, last) = steps
    assert begun <= ended <= again <= last


def test_rows_and_table(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(scripts.ROOT / "benchmarks")
    script = importlib.import_module("jobs")
    args = argparse.Namespace(rows=7, tokenizer=None)
    assert 32 <= script.write_rows(tmp_path / "rows.jsonl", script.JOBS["a"], args) <= 96
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "completion"}] * 7
    runs = [script.Run(first_step=9.0, step=0.02, whole=30.0, busy=0.9), script.Run(11.0, 0.04, 40.0, None)]
    ways = {"dora": script.summary(runs, 300.0), "evaluate": script.summary([12.0], 300.0)}
    text = script.table({"imports": 4.0, "jobs": {"a": ways}})
    assert "| a | dora | 6.0 s | 30.0 ms | 10,000 | 90% | 35.0 s |" in text
    assert "| a | evaluate | | | | | 12.0 s |" in text


@pytest.mark.long
def test_it_runs_and_reports(tmp_path):
    output = tmp_path / "jobs.json"
    words = ["--tiny", "--jobs", "a", "d", "--steps", "3", "--rows", "20", "--ways", "dora", "peft-lora"]
    command = [sys.executable, scripts.ROOT / SCRIPT, "--output", output, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())["jobs"]
    assert {name: [*ways] for name, ways in found.items()} == {"a": ["dora", "peft-lora"], "d": ["evaluate"]}
    assert all(way["whole"] > 0 for ways in found.values() for way in ways.values())
