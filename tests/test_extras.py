"""The table of what is needed for what is pyproject.toml's, and what messages ask for is in it."""

import re
import tomllib
from pathlib import Path

import theodora
from theodora import extras
from theodora.extras import CORE, EXTRAS, OTHERS, Package, missing_in, packages, pip_line

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOR_DEVELOPING = {"test", "dev", "fuzz", "mutants", "docs", "audit"}


def test_the_table_is_pyprojects():
    assert sorted(CORE) == sorted(PROJECT["dependencies"])
    told = {name: sorted(needs) for name, needs in PROJECT["optional-dependencies"].items()}
    assert {name: sorted(extra.needs) for name, extra in EXTRAS.items()} == {
        name: needs for name, needs in told.items() if name not in FOR_DEVELOPING
    }


def test_messages_ask_for_extras_that_there_are():
    source = "".join(path.read_text(encoding="utf-8") for path in Path(theodora.__file__).parent.rglob("*.py"))
    asked = set(re.findall(r"theodora\[([a-z]+)\]", source))
    assert asked
    assert asked <= EXTRAS.keys()
    assert all(pip_line(name) == f"pip install 'theodora[{name}]'" for name in EXTRAS)


def test_messages_name_the_extra_and_not_its_packages():
    """A version that a message asks for would be another than the table's one day."""
    brought = {re.split(r"[\[>=]", need)[0] for extra in EXTRAS.values() for need in extra.needs}
    for path in Path(theodora.__file__).parent.rglob("*.py"):
        asked = set(re.findall(r"pip install '?([a-z_-]+)", path.read_text(encoding="utf-8")))
        assert not asked & brought, path


def test_what_an_extra_brings_is_not_told_twice():
    brought = {re.split(r"[\[>=]", need)[0] for extra in EXTRAS.values() for need in extra.needs}
    assert brought.isdisjoint(OTHERS)


def test_versions_are_held_to_their_bounds(monkeypatch):
    there = {"torch": "2.10.1", "gguf": "0.19.0", "trl": "1.16.0.dev0"}
    monkeypatch.setattr(extras, "installed", there.get)
    torch, gguf, trl, rich = packages(("torch>=2.11", "gguf>=0.19", "trl>=1.15", "rich>=14"))
    assert torch == Package(name="torch", needs=">=2.11", installed="2.10.1", fits=False)
    assert gguf.fits
    assert trl.fits
    assert rich == Package(name="rich", needs=">=14", installed=None, fits=False)
    assert missing_in("demo") == []
    assert [package.name for package in missing_in("serve")] == ["fastapi", "uvicorn", "prometheus-client", "xgrammar"]


def test_what_another_system_needs_is_left_out():
    assert packages(("liger-kernel>=0.8; platform_system == 'Plan9'",)) == []


def test_the_documented_table_is_this_one():
    text = (ROOT / "docs" / "setup.md").read_text(encoding="utf-8").replace("`", "")
    for name, extra in EXTRAS.items():
        assert f"| theodora[{name}] | {extra.gives} |" in text
