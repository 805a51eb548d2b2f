"""The server's benchmark on a tiny model: every batch is answered, PEFT's as well."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "serve.py"
SMALL = "--shape tiny --dtype fp32 --rank 4 --adapters 1 3 --peft-adapters 3 --batch 4 --prompt 5 --tokens 4 --rounds 1"


def test_the_table(tmp_path):
    command = [sys.executable, BENCHMARK, *shlex.split(SMALL), "--output", tmp_path / "serve.json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "serve.json").read_text(encoding="utf-8"))["rows"]
    assert [row["adapters"] for row in rows] == ["base", "1", "3"]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert rows[2]["peft_tokens_per_second"] > 0
