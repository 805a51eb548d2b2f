"""What the package needs is pinned, and the pins are good on any machine."""

import re
import tomllib
from pathlib import Path

import theodora

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINES = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]


def canonical(requirement: str) -> str:
    """`PyYAML>=6` -> `pyyaml`, as PEP 503 compares names."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def test_every_dependency_is_pinned():
    extras = PROJECT["optional-dependencies"].values()
    needed = {canonical(r) for group in (PROJECT["dependencies"], *extras) for r in group} - {"theodora"}
    assert needed <= {canonical(line) for line in LINES}


def test_pins_are_plain_versions():
    # A local version (+cpu), a path or a URL would fit one machine only.
    assert [line for line in LINES if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line)] == []


def test_the_version_is_one():
    assert PROJECT["version"] == theodora.__version__
    assert f"## {theodora.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
