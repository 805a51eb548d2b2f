"""A data file of any size passes through a memory that does not grow with it."""

import json
import os
import sys
from pathlib import Path

import pytest

from apart import apart, reading_grows


def write_rows(path: Path, megabytes: int, characters: int = 1000) -> Path:
    with path.open("w") as file:
        for number in range((megabytes << 20) // (characters + 40)):
            row = {"prompt": f"question {number}", "completion": f"{number} " * (characters // (len(str(number)) + 1))}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_however_large_the_file(tmp_path):
    """40 MB of rows are read, checked, stored and split with less memory than that beside the imports."""
    assert apart(reading_grows, write_rows(tmp_path / "large.jsonl", 40, characters=4000), False) < 28


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(not os.environ.get("FUZZ_EXAMPLES"), reason="writes gigabytes: runs under make fuzz")
def test_memory_over_gigabytes(tmp_path):
    grown = [apart(reading_grows, write_rows(tmp_path / f"{size}.jsonl", size), False) for size in (128, 512, 2048)]
    print("MB of rows read: 128, 512, 2048; memory grew by MB:", grown)
    assert grown[-1] < grown[0] + 64
    assert apart(reading_grows, tmp_path / "512.jsonl", True) < 96
    assert apart(reading_grows, write_rows(tmp_path / "books.jsonl", 1024, 8 << 20), False) < 512  # rows of 8 MB
