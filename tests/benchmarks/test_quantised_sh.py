"""What benchmarks/quantised.sh asks for is what the benchmarks understand: a misspelt option shows on a GPU alone."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import scripts

SCRIPT = Path(scripts.ROOT, "benchmarks", "quantised.sh")


def sh(folder, *parts, answer=0, **environment):
    """Run it with a `python` that notes its arguments, and gives that exit code."""
    python, noted = folder / "python", folder / "noted"
    python.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >> {noted}\nprintf "\\n" >> {noted}\nexit {answer}\n')
    python.chmod(0o755)
    search = f"{folder}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", str(SCRIPT), *parts],
        env=os.environ | environment | {"PATH": search, "OUT": str(folder / "out")},
        capture_output=True,
        text=True,
    )
    lines = noted.read_text().split("\0\n")[:-1] if noted.exists() else []
    return run, [line.split("\0") for line in lines]


def test_every_part_is_understood(tmp_path, monkeypatch):
    run, commands = sh(tmp_path, "all", MODEL="model", DATA="rows.jsonl", COMMIT="abc1234", UNSLOTH="unsloth")
    assert (run.returncode, run.stderr) == (0, "")
    assert Counter(command[0].removeprefix("benchmarks/") for command in commands) == {
        "train_step.py": 9,
        "decode.py": 1,
        "quantised_curve.py": 1,
    }
    monkeypatch.syspath_prepend(SCRIPT.parent)
    for script, *words in commands:
        monkeypatch.setattr(sys, "argv", [script, *words])
        args = scripts.load(script).parse_args()
        assert args.output.parent == tmp_path / "out"


def test_what_fails_is_said_at_the_end(tmp_path):
    run, commands = sh(tmp_path, "memory", "decode", answer=1)
    assert len(commands) == 2
    assert run.returncode == 1
    assert run.stderr == "failed: memory decode\n"


def test_names_of_parts_are_checked_first(tmp_path):
    run, commands = sh(tmp_path, "memory", "tabel")
    assert run.returncode == 2
    assert "tabel is none of: table decode" in run.stderr
    assert not commands
