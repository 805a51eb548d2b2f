import hashlib
import io
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from theodora.demo import assets
from theodora.errors import TheodoraError

CONTENT = b"ontology"
ASSET = assets.Asset(
    package="no-such-package",
    version="1.0",
    module="no_such_package",
    member="data/file.txt",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    size="1 MB",
    what="A thing",
    licence="MIT",
)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("THEODORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def pip(monkeypatch):
    """Stands in for `pip download`: writes a wheel with `content`, or fails if that is None."""
    calls = []

    def serve(content):
        def run(command, **kwargs):
            calls.append(command)
            if content is None:
                return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution found\n")
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "no_such_package-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr("no_such_package/data/file.txt", content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(assets.subprocess, "run", run)
        return calls

    return serve


def test_a_file_is_fetched_once_and_said(pip, console, cache):
    calls = pip(CONTENT)
    path = assets.fetch(ASSET, console)
    assert path == cache / "no-such-package-1.0" / "file.txt"
    assert path.read_bytes() == CONTENT
    assert console.file.getvalue() == "Fetching A thing (no-such-package==1.0, 1 MB; MIT)\n"
    assert assets.fetch(ASSET, console) == path
    assert len(calls) == 1
    assert "--no-deps" in calls[0]


def test_another_file_under_the_name_is_refused_and_not_kept(pip, console, cache):
    pip(b"tampered")
    with pytest.raises(TheodoraError, match="not the file that was tested"):
        assets.fetch(ASSET, console)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_damaged_cache_is_fetched_again(pip, console, cache):
    pip(CONTENT)
    path = assets.fetch(ASSET, console)
    path.write_bytes(b"half")
    assert assets.fetch(ASSET, console).read_bytes() == CONTENT


def test_what_pip_says_is_passed_on(pip, console):
    pip(None)
    with pytest.raises(
        TheodoraError, match=r"No matching distribution found\n.*install --no-deps no-such-package==1.0"
    ):
        assets.fetch(ASSET, console)


def test_an_installed_package_is_used_and_never_imported(pip, console, monkeypatch, tmp_path):
    calls = pip(CONTENT)
    package = tmp_path / "site" / "installed_thing"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "data" / "file.txt").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    asset = replace(ASSET, module="installed_thing")
    assert assets.fetch(asset, console) == package / "data" / "file.txt"
    assert calls == []
