"""`cli/imports`: the imports of a command, made shorter."""

import gc
import importlib.metadata
import sys
import weakref

import pytest

from theodora.cli import imports as module
from theodora.cli.imports import imports


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A folder of packages, of which each look is counted in `installed.looks`."""
    monkeypatch.setenv("THEODORA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "site"

    class Installed:
        looks = 0

        def add(self, name):
            told = folder / f"{name}-1.dist-info"
            told.mkdir(parents=True)
            (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
            (told / "top_level.txt").write_text(name)

        def found(self):
            module._once.cache_clear()  # as in a new process
            with imports():
                return importlib.metadata.packages_distributions()

    installed, find = Installed(), module._find

    def look():
        installed.looks += 1
        return find()

    monkeypatch.setattr(module, "_find", look)
    monkeypatch.setattr(module.sys, "path", [str(folder)])
    yield installed
    module._once.cache_clear()


def test_installed_packages_are_read_once(installed):
    installed.add("one")
    expected = {"one": ["one"]}
    assert [installed.found(), installed.found()] == [expected, expected]
    assert installed.looks == 1


def test_a_new_package_is_seen(installed):
    installed.add("one")
    installed.found()
    installed.add("two")
    assert installed.found() == {"one": ["one"], "two": ["two"]}


def test_where_others_find_packages_too_nothing_is_kept(installed, monkeypatch):
    class Finder:
        def find_distributions(self, context=None):
            return []

        def find_spec(self, name, path=None, target=None):
            return None

    monkeypatch.setattr(module.sys, "meta_path", [*module.sys.meta_path, Finder()])
    installed.found()
    installed.found()
    assert installed.looks == 2


def test_nobody_gets_the_same_lists(installed):
    installed.add("one")
    with imports():
        importlib.metadata.packages_distributions()["one"].append("else")
        assert importlib.metadata.packages_distributions() == {"one": ["one"]}


def test_afterwards_all_is_as_it_was(monkeypatch):
    before = importlib.metadata.packages_distributions
    frozen = []
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(module.gc, "freeze", lambda: frozen.append(gc.isenabled()))
    for collects in (True, False):
        monkeypatch.setattr(module.gc, "isenabled", lambda collects=collects: collects)
        enabled = []
        monkeypatch.setattr(module.gc, "enable", lambda enabled=enabled: enabled.append(True))
        with imports():
            pass
        assert bool(enabled) == collects
    assert len(frozen) == 1
    assert importlib.metadata.packages_distributions is before


def test_what_a_process_that_goes_on_holds_is_collected_afterwards(monkeypatch):
    class Model:
        def __init__(self):
            self.me = self

    monkeypatch.setitem(sys.modules, "torch", gc)  # any module
    monkeypatch.setattr(module.gc, "isenabled", lambda: True)
    monkeypatch.setattr(module.gc, "enable", lambda: None)
    gone, held = weakref.ref(Model()), Model()
    goes_later = weakref.ref(held)
    with imports():
        pass
    del held
    gc.collect()
    assert gone() is None
    assert goes_later() is None
