"""The soak's clients and checks, for a few seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from serving import free_port

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.long
def test_a_short_soak_finds_nothing(tmp_path):
    port, output = str(free_port()), tmp_path / "found.json"
    command = [sys.executable, SCRIPT, "--minutes", "0.08", "--pause", "0.05", "--port", port, "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert found["wrong"] == []
    assert {name.rsplit(" ", 1)[0] for name in found["answers"]} >= {"completion", "stream", "hang up", "unknown"}
    assert len(found["samples"]) >= 8
