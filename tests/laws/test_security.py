"""SECURITY.md promises nothing that no test holds: every test that its table names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = [line for line in (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]


def test_every_promise_names_tests_that_are_there():
    missing = []
    for row in ROWS:
        promise, whom, held = (cell.strip() for cell in row.strip("|").split("|"))
        if not whom:
            continue  # a heading
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", held)
        assert named, f"no test holds: {promise}"
        for file, test in named:
            paths = [path for folder in ("attacks", ".") if (path := ROOT / "tests" / folder / file).is_file()]
            if not any(re.search(rf"^(async )?def {test}\(", path.read_text(encoding="utf-8"), re.M) for path in paths):
                missing.append(f"{file}::{test}")
    assert not missing


def test_every_attack_is_named():
    """An attack that no promise needs is one that was forgotten in the table: each file of them holds some."""
    named = {file for row in ROWS for file in re.findall(r"`(test_\w+\.py)::", row)}
    assert {path.name for path in (ROOT / "tests" / "attacks").glob("test_*.py")} <= named
