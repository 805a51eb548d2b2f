"""The comparison of loss curves at a size that a CPU bears, and its judgement on made-up curves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import scripts

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "fp8_curve.py"


@pytest.fixture(scope="module")
def script():
    return scripts.load("benchmarks/fp8_curve.py")


def made_up(offset):
    """Three bf16 seeds that lie 0.1 apart, and fp8 at `offset` from each."""
    seeds = {seed: [3.0 - 0.01 * step + 0.1 * seed for step in range(24)] for seed in range(3)}
    return [
        {"seed": seed, "dtype": dtype, name: [[step, loss + change] for step, loss in enumerate(losses)]}
        for name in ("train",)
        for seed, losses in seeds.items()
        for dtype, change in (("bf16", 0.0), ("fp8", offset))
    ]


@pytest.mark.parametrize(("offset", "within"), [(0.02, True), (0.15, False), (-0.5, False)])
def test_the_judgement(script, offset, within):
    judged = script.judge(made_up(offset), "train")
    assert judged["within_the_spread"] is within
    assert judged["same_seed_difference"] == pytest.approx(abs(offset))
    assert judged["difference_between_seeds"] == pytest.approx(((0.01 + 0.01 + 0.04) / 3) ** 0.5)
    assert judged["final_mean_difference"] == pytest.approx(offset)


@pytest.mark.long
def test_the_whole_comparison(tiny_model_dir, tmp_path):
    data, output, figure = tmp_path / "sums.jsonl", tmp_path / "curve.json", tmp_path / "curve.png"
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(8) for b in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, BENCHMARK, "--model", tiny_model_dir(), "--data", data, "--seeds", 2, "--steps", 12]
    command += ["--held-out", 8, "--rank", 4, "--output", output, "--figure", figure]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert [(run["seed"], run["dtype"]) for run in report["runs"]] == [(0, "bf16"), (0, "fp8"), (1, "bf16"), (1, "fp8")]
    assert all(len(run["train"]) == 12 for run in report["runs"])
    assert report["runs"][0]["train"][0] != report["runs"][2]["train"][0]
    assert figure.stat().st_size > 10_000
    assert "the seed-to-seed spread of bf16" in done.stdout
