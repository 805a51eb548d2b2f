"""The benchmark of chat templates and masks runs, and writes what its table shows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import scripts

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "tokenizing.py"


def test_rows_are_the_same_each_time(tmp_path):
    benchmark = scripts.load("benchmarks/tokenizing.py")
    for kind in benchmark.KINDS:
        for name in ("one", "other"):
            benchmark.write_rows(tmp_path / name, kind, 3)
        assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
        assert len((tmp_path / "one").read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.long
def test_it_runs_and_reports(tmp_path):
    command = [sys.executable, BENCHMARK, "--rows", "20", "--output", tmp_path / "tokenizing.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "tokenizing.json").read_text(encoding="utf-8"))
    for kind in ("text", "pairs-chatml", "chats-qwen3", "chats-llama3", "tools-qwen3"):
        assert report["kinds"][kind]["rows"] == 20
        assert report["kinds"][kind]["rows_a_second_a_core"] > 0
        assert kind in done.stdout
