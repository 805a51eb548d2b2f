"""Two ranks of tensor parallelism, which hold parts of every layer, and compiled graphs: PEFT's tokens all the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("family", "mode"), [("qwen2", "tp"), ("phi3", "tp"), ("qwen2", "compile")])
def test_a_mixed_batch_gives_pefts_tokens(family, mode, tmp_path):
    if mode == "tp" and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two ranks want two cores")
    cores = sorted(os.sched_getaffinity(0))
    threads = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[1]}"} if mode == "tp" else {}
    command = [sys.executable, Path(__file__).with_name("batch.py"), tmp_path, family, mode]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | threads | {"VLLM_CACHE_ROOT": str(tmp_path / "cache")},
        timeout=800,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert len(answers) == 12, done.stdout[-2000:] + done.stderr[-2000:]
    assert all("as PEFT" in line for line in answers), "\n".join(answers)
