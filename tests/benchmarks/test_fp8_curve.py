"""The comparison of loss curves in bf16 and fp8, at a size that a CPU bears."""

import json
import subprocess
import sys

import pytest

import scripts


@pytest.mark.long
def test_the_whole_comparison(tiny_model_dir, tmp_path):
    data, output, figure = tmp_path / "sums.jsonl", tmp_path / "curve.json", tmp_path / "curve.png"
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(8) for b in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, scripts.ROOT / "benchmarks" / "fp8_curve.py", "--model", tiny_model_dir()]
    command += ["--data", data, "--seeds", 2, "--steps", 12]
    command += ["--held-out", 8, "--rank", 4, "--output", output, "--figure", figure]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert [(run["seed"], run["way"]) for run in report["runs"]] == [(0, "bf16"), (0, "fp8"), (1, "bf16"), (1, "fp8")]
    assert all(len(run["train"]) == 12 for run in report["runs"])
    assert report["runs"][0]["train"][0] != report["runs"][2]["train"][0]
    assert figure.stat().st_size > 10_000
    assert "the seed-to-seed spread of bf16" in done.stdout
