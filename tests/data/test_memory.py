"""A data file of any size passes through a memory that does not grow with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Read, split and tokenise a file; print by how many MB the process's own memory (not the files mapped into it) grew.
SCRIPT = """
import re, sys, threading, time
from pathlib import Path
import tiny
from theodora.data import load_examples, split_examples, tokenize

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

tokenizer = tiny.tiny_tokenizer()
tokenizer("warm")
peak = before = own()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.01):
        peak = max(peak, own())

watcher = threading.Thread(target=watch)
watcher.start()
try:
    examples = load_examples(sys.argv[1])
    training, held_out = split_examples(examples, 0.05, 0)
    if sys.argv[2] == "tokenise":
        tokenize(held_out, tokenizer, max_length=512)
    assert len(training) + len(held_out) == len(examples)
finally:
    done.set()
    watcher.join()
print(round(peak - before))
"""


def growth(path: Path, *arguments: str) -> int:
    """MB that a fresh process grew by while it read `path`."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=3000,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), *sys.path]))},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return int(result.stdout.split()[-1])


def write_rows(path: Path, megabytes: int, characters: int = 1000) -> Path:
    with path.open("w") as file:
        for number in range((megabytes << 20) // (characters + 40)):
            row = {"prompt": f"question {number}", "completion": f"{number} " * (characters // (len(str(number)) + 1))}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_however_large_the_file(tmp_path):
    """40 MB of rows are read, checked, stored and split with less memory than that beside the imports."""
    assert growth(write_rows(tmp_path / "large.jsonl", 40, characters=4000), "read") < 28


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(not os.environ.get("FUZZ_EXAMPLES"), reason="writes gigabytes: runs under make fuzz")
def test_memory_over_gigabytes(tmp_path):
    grown = [growth(write_rows(tmp_path / f"{size}.jsonl", size), "read") for size in (128, 512, 2048)]
    print("MB of rows read: 128, 512, 2048; memory grew by MB:", grown)
    assert grown[-1] < grown[0] + 64
    assert growth(tmp_path / "512.jsonl", "tokenise") < 96
    assert growth(write_rows(tmp_path / "books.jsonl", 1024, 8 << 20), "read") < 512  # rows of 8 MB
