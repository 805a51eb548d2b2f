"""The benchmark runs, compares like with like, and writes what its table shows."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "cpu_step.py"


def test_it_runs_and_reports(tiny_model_dir, tmp_path):
    output = tmp_path / "results" / "cpu_step.json"
    model = tiny_model_dir("llama")
    options = shlex.split("--dtype float32 --rounds 2 --batch 2 --length 16 --rank 4 --variants peft-lora dora")
    command = [sys.executable, BENCHMARK, "--model", model, "--output", output, *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "PEFT LoRA" in result.stdout
    assert "Theodora DoRA" in result.stdout
    report = json.loads(output.read_text(encoding="utf-8"))
    assert {"cpu", "cores", "versions", "command", "commit"} <= report["machine"].keys()
    assert {"rank", "dtype"} <= report["setting"].keys()
    peft, ours = report["rows"]
    assert len(report["seconds"]["dora"]) == 2
    assert ours["peak"] >= ours["model"] > 0
    assert ours["ratios"]["peft-lora"]["min"] <= ours["ratios"]["peft-lora"]["max"]
    # 14 layers, all with magnitudes of their own: 7 in each block, outputs 32+16+16+32+48+48+32
    assert ours["trained_parameters"] - peft["trained_parameters"] == 2 * 224
