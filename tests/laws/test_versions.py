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
    unpinned = ("fuzz", "mutants", "docs", "audit", "ray")
    tools = {canonical(r) for name in unpinned for r in PROJECT["optional-dependencies"][name]}
    needed = {canonical(r) for group in (PROJECT["dependencies"], *extras) for r in group} - {"theodora"} - tools
    assert needed <= {canonical(line) for line in LINES}


def test_every_pin_has_its_hashes():
    """`make lock` writes them; torch's builds differ from machine to machine."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    locked = {canonical(line): line.split()[0].split("==")[1] for line in lock.splitlines() if re.match(r"\w", line)}
    assert locked == {canonical(line): line.split("==")[1] for line in LINES if canonical(line) != "torch"}
    assert len(re.findall(r"^\S.* \\\n    --hash=sha256:[0-9a-f]{64}", lock, re.M)) == len(locked)


def test_pins_are_plain_versions():
    # A local version (+cpu), a path or a URL would fit one machine only.
    assert [line for line in LINES if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line)] == []


def test_the_version_is_one():
    assert PROJECT["version"] == theodora.__version__
    assert f"## {theodora.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
