"""The command's pace beside the bare step's, at a size that a CPU bears."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "train_command.py"
SMALL = "--layers 1 --hidden 32 --vocabulary 256 --batch 1 --length 16 --rank 2 --steps 20"


@pytest.mark.long
def test_it_runs_and_reports(tmp_path):
    command = [sys.executable, BENCHMARK, *shlex.split(SMALL), "--output", tmp_path / "command.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "command.json").read_text(encoding="utf-8"))
    assert len(report["bare_tokens_per_second"]) == 2
    assert report["command_tokens_per_second"] > 0
    assert "theodora train" in done.stdout
