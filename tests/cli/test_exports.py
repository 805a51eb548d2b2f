"""`cli/exports`: what the files of transformers' models export is read out of them once."""

import importlib.util
import sys
from importlib import import_module
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_file_location

import pytest
from transformers.utils import import_utils

from theodora.cli import exports
from theodora.cli.exports import exports_kept


def _forget():
    """As in a new process."""
    exports._stamp.cache_clear()
    for name in ("create_import_structure_from_path", "define_import_structure"):
        getattr(getattr(import_utils, name), "cache_clear", lambda: None)()


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A library of transformers' form, with one model; `library()` imports it anew, and gives its reading function."""
    monkeypatch.setenv("THEODORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "lib" / "utils").mkdir(parents=True)
    (tmp_path / "lib" / "models" / "one").mkdir(parents=True)
    (tmp_path / "lib" / "__init__.py").touch()
    (tmp_path / "lib" / "utils" / "__init__.py").touch()
    (tmp_path / "lib" / "models" / "__init__.py").touch()
    (tmp_path / "lib" / "utils" / "import_utils.py").write_text(
        "from transformers.utils.import_utils import define_import_structure as read\n"
        "READ = []\n"
        "def define_import_structure(module_path, prefix=None):\n"
        "    READ.append(module_path)\n"
        "    return read(module_path, prefix)\n"
    )
    (tmp_path / "lib" / "models" / "one" / "modeling_one.py").write_text('__all__ = ["One"]\n')
    monkeypatch.setattr(exports, "_WHERE", "lib.utils.import_utils")
    monkeypatch.syspath_prepend(str(tmp_path))

    def start():
        for name in [name for name in sys.modules if name.partition(".")[0] == "lib"]:
            del sys.modules[name]
        _forget()
        with exports_kept():
            return import_module("lib.utils.import_utils")

    start.models = tmp_path / "lib" / "models"
    yield start
    _forget()


@pytest.mark.parametrize("prefix", [None, "models"])
def test_models_are_read_once(library, prefix):
    found = [library().define_import_structure(library.models, prefix) for _ in range(2)]
    name = "one.modeling_one" if prefix is None else "models.one.modeling_one"
    assert found == [{frozenset({"torch"}): {name: {"One"}}}] * 2
    module = library()
    assert module.define_import_structure(library.models, prefix) == found[0]
    assert module.READ == []


def test_a_change_of_a_file_is_seen(library):
    path = library.models / "one" / "modeling_one.py"
    library().define_import_structure(library.models / "__init__.py")
    path.write_text('__all__ = ["One", "Other"]\n')
    found = library().define_import_structure(library.models / "__init__.py")
    assert found == {frozenset({"torch"}): {"one.modeling_one": {"One", "Other"}}}


def test_the_folder_of_one_model_is_not_kept(library):
    for _ in range(2):
        module = library()
        module.define_import_structure(library.models / "one")
        assert len(module.READ) == 1


def test_a_version_without_the_function_is_imported_all_the_same(library):
    (library.models.parent / "utils" / "import_utils.py").write_text("OTHER = 1\n")
    assert library().OTHER == 1


def test_a_loader_that_cannot_be_watched_imports_it_all_the_same(library, monkeypatch):
    class Fixed(SourceFileLoader):
        def __setattr__(self, name, value):
            if name == "exec_module":
                raise AttributeError(name)
            super().__setattr__(name, value)

    find = importlib.util.find_spec
    loaded = library.models.parent / "utils" / "import_utils.py"
    fixed = lambda name: spec_from_file_location(name, loaded, loader=Fixed(name, str(loaded)))  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: fixed(name) if name == exports._WHERE else find(name))
    assert library().READ == []


def test_nothing_stays_where_nothing_was_imported():
    before = list(sys.meta_path)
    with exports_kept():
        pass
    assert sys.meta_path == before


def test_what_is_kept_is_what_transformers_finds():
    found = import_utils.define_import_structure(import_module("transformers.models").__file__)
    assert exports._structure(exports._plain(found)) == found
