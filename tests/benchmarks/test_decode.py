"""The decoding benchmark runs on a tiny model, compares the same work, and writes what its table shows."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "decode.py"


def test_it_runs_and_reports(tmp_path):
    output = tmp_path / "results" / "decode.json"
    options = "--tiny --device cpu --layers 1 --rank 4 --batches 1 2 --prompt 4 --tokens 3 --rounds 2 --modes eager"
    variants = "--variants base merged dora"
    command = [sys.executable, BENCHMARK, "--output", output, *shlex.split(f"{options} {variants}")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "theodora DoRA, merged" in result.stdout
    report = json.loads(output.read_text(encoding="utf-8"))
    assert {"cpu", "versions", "commit"} <= report["machine"].keys()
    assert report["difference of merged and dora"] < 0.1
    assert len(report["seconds"]["eager, batch 2"]["dora"]) == 2
    assert report["rows"][0]["eager, batch 1"]["ratio"] == 1
