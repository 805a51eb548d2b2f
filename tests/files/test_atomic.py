"""Files and folders that are whole or absent, whatever goes wrong while they are written."""

import errno
import glob
import os
import stat
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from theodora.errors import CheckpointError, UsageError
from theodora.files import atomic
from theodora.files.atomic import (
    atomic_directory,
    atomic_files,
    atomic_write,
    clear_leftovers,
    partial_name,
    remove_folder,
    scratch_directory,
)
from theodora.locks import SECONDS_TO_LOCK

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux swaps two names at one moment")


def umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=[pytest.param(True, marks=linux), False], ids=["exchanged", "renamed"])
def exchange(request, monkeypatch):
    """With the system's way to swap two names, and where there is none."""
    if not request.param:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    return request.param


def test_what_a_file_holds_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    flushed = []

    def fsync(descriptor):
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        flushed.append(("folder" if folder else "file", (tmp_path / "a").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_write(tmp_path / "a") as partial:
        partial.write_text("whole")
    assert flushed == [("file", False), ("folder", True)]


@linux
def test_names_are_swapped_at_one_moment(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("of a")
    (tmp_path / "b").write_text("b")
    assert atomic._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "file").read_text() == "of a"
    assert (tmp_path / "a").read_text() == "b"
    assert not atomic._exchange(tmp_path / "a", tmp_path / "nothing")


def test_a_folder_is_replaced_as_a_whole(exchange, tmp_path):
    for version in ("old", "new"):
        with atomic_directory(tmp_path / "out", overwrite=version == "new") as folder:
            (folder / "in").mkdir()
            (folder / "in" / version).write_text(version)
            assert names(tmp_path) == sorted([folder.name, *(["out"] if version == "new" else [])])
            assert folder.name.startswith(".out.partial-")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out" / "in") == ["new"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask()


def test_an_empty_folder_may_be_taken_and_a_full_one_not(exchange, tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "file").touch()
    with pytest.raises(UsageError, match="out already exists"), atomic_directory(tmp_path / "out"):
        raise AssertionError
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file already exists"), atomic_directory(tmp_path / "file"):
        raise AssertionError
    assert names(tmp_path) == ["file", "out"]


@pytest.mark.parametrize("way", [atomic_directory, atomic_files, atomic_write])
def test_what_fails_leaves_the_old_and_nothing_else(way, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    target = tmp_path / "folder" / ("file" if way is atomic_write else "")
    context = way(target, overwrite=True) if way is atomic_directory else way(target)
    with pytest.raises(KeyError), context as partial:
        _write_half_and_fail(partial if way is atomic_write else partial / "file")
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["file"]
    assert (tmp_path / "folder" / "file").read_text() == "old"


def _write_half_and_fail(file: Path) -> None:
    file.write_text("half")
    raise KeyError


def test_a_name_that_cannot_be_taken_goes_back_to_the_old(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    rename = Path.rename

    def fail(self, target):
        if self.name.startswith(".") and Path(target).name == "out":
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    with pytest.raises(CheckpointError, match=r"out cannot be written"), atomic_directory(tmp_path / "out", True):
        monkeypatch.setattr(Path, "rename", fail)
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_files_move_into_a_folder_and_others_stay(tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("kept", "replaced"):
        (tmp_path / "out" / name).write_text("old")
    with atomic_files(tmp_path / "out") as folder:
        (folder / "replaced").write_text("new")
        (folder / "deep" / "er").mkdir(parents=True)
        (folder / "deep" / "er" / "file").write_text("new")
        assert (tmp_path / "out" / "replaced").read_text() == "old"
    assert names(tmp_path / "out") == ["deep", "kept", "replaced"]
    texts = [(tmp_path / "out" / name).read_text() for name in ("kept", "replaced", "deep/er/file")]
    assert texts == ["old", "new", "new"]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("theirs")
    (tmp_path / "file").symlink_to(tmp_path / "elsewhere")
    with atomic_write(tmp_path / "file") as file:
        file.write_text("ours")
    assert (tmp_path / "elsewhere").read_text() == "theirs"
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask()


def test_a_link_to_a_folder_is_replaced_and_what_it_points_to_stays(exchange, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("theirs")
    for target in ("theirs", "nowhere"):
        (tmp_path / "out").symlink_to(tmp_path / target)
        with pytest.raises(UsageError, match="out already exists"), atomic_directory(tmp_path / "out"):
            raise AssertionError
        with atomic_directory(tmp_path / "out", overwrite=True) as folder:
            (folder / "file").write_text("ours")
        assert names(tmp_path) == ["out", "theirs"]
        assert not (tmp_path / "out").is_symlink()
        assert (tmp_path / "theirs" / "file").read_text() == "theirs"
        remove_folder(tmp_path / "out")


@pytest.mark.parametrize("way", [atomic_directory, atomic_files, atomic_write, scratch_directory])
def test_below_a_file_there_is_no_place(way, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"file is a file; expected a folder"), way(tmp_path / "file" / "in" / "out"):
        raise AssertionError
    with pytest.raises(UsageError, match=r"link is a link to .*nowhere, where"), way(tmp_path / "link" / "out"):
        raise AssertionError
    assert names(tmp_path) == ["file", "link"]


@pytest.mark.parametrize("way", [atomic_directory, atomic_files])
def test_files_for_their_owner_alone_follow_the_umask(way, tmp_path):
    """safetensors 0.8 makes such files."""
    (tmp_path / "elsewhere").touch(mode=0o600)
    with way(tmp_path / "out") as folder:
        (folder / "weights").touch(mode=0o600)
        (folder / "script").touch(mode=0o700)
        if way is atomic_directory:
            (folder / "link").symlink_to(tmp_path / "elsewhere")
    modes = [(tmp_path / "out" / name).stat().st_mode & 0o777 for name in ("weights", "script")]
    assert modes == [0o600 | 0o666 & ~umask(), 0o700 | 0o666 & ~umask()]
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o600


def test_a_scratch_folder_goes_and_so_does_one_of_a_killed_process(tmp_path):
    (tmp_path / ".out.partial-dead").mkdir()
    with atomic_write(tmp_path / "out") as file, scratch_directory(tmp_path / "out") as folder:
        (folder / "in").mkdir()
        assert names(tmp_path) == sorted([file.name, folder.name])
    assert names(tmp_path) == ["out"]
    with pytest.raises(KeyError), scratch_directory(tmp_path / "out") as folder:
        _write_half_and_fail(folder / "file")
    assert names(tmp_path) == ["out"]


def test_a_folder_goes_at_one_moment(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    seen = []
    remove = atomic.shutil.rmtree
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda path, **o: (seen.append(names(tmp_path)), remove(path, **o)))
    remove_folder(tmp_path / "out")
    assert all("out" not in found for found in seen)
    assert seen
    assert names(tmp_path) == []
    remove_folder(tmp_path / "out")  # it may be gone
    (tmp_path / "file").touch()
    remove_folder(tmp_path / "file")
    assert names(tmp_path) == ["file"]


def test_leftovers_go_and_what_is_being_written_stays(tmp_path):
    (tmp_path / ".out.partial-dead").mkdir()
    (tmp_path / ".out.partial-dead" / "file").touch()
    (tmp_path / ".file.partial-dead").touch()
    (tmp_path / ".out.begun-young").mkdir()
    (tmp_path / ".out.begun-old").mkdir()
    long_ago = time.time() - SECONDS_TO_LOCK - 5
    os.utime(tmp_path / ".out.begun-old", (long_ago, long_ago))
    (tmp_path / ".hidden").touch()
    with atomic_directory(tmp_path / "other") as living:
        clear_leftovers(tmp_path, "out")
        assert names(tmp_path) == sorted([".file.partial-dead", ".hidden", ".out.begun-young", living.name])
        clear_leftovers(tmp_path)
        assert names(tmp_path) == sorted([".hidden", ".out.begun-young", living.name])
    assert names(tmp_path) == [".hidden", ".out.begun-young", "other"]


def test_names_with_signs_of_patterns_are_names(tmp_path):
    (tmp_path / ".out1.partial-other").mkdir()
    with atomic_directory(tmp_path / "out[1]") as folder:
        assert folder.is_dir()
        (tmp_path / ".out[1].partial-dead").mkdir()
    with atomic_write(tmp_path / "out[1]" / "file"):
        pass
    with atomic_directory(tmp_path / "out[1]", overwrite=True):
        assert not (tmp_path / ".out[1].partial-dead").exists()
    assert names(tmp_path) == [".out1.partial-other", "out[1]"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "full"), r"No space left on the disk of .*out; nothing was changed"),
        (OSError(errno.EDQUOT, "full"), r"No space left on the disk of .*out; nothing was changed"),
        (OSError(errno.EROFS, "no"), r"out cannot be written \(Read-only file system\); nothing was changed"),
        (PermissionError(errno.EACCES, "no"), r"out cannot be written \(Permission denied\)"),
        (SafetensorError("Error while serializing: I/O error (os error 28)"), "No space left"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "Input/output error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_of_the_disk_are_explained(error, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as caught, atomic_write(tmp_path / "out"):
        raise error
    assert caught.value.__cause__ is error
    assert names(tmp_path) == []


def test_torch_does_not_say_that_a_disk_is_full(tmp_path, monkeypatch):
    usage = atomic.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage._replace(free=4096))
    with pytest.raises(CheckpointError, match="No space left"), atomic_write(tmp_path / "out"):
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "no file"), RuntimeError("other"), OSError("plain")])
def test_other_errors_stay_what_they_are(error, tmp_path):
    with pytest.raises(type(error)) as caught, atomic_directory(tmp_path / "out"):
        raise error
    assert caught.value is error
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_another_process_wrote_meanwhile_is_not_written_over(kind, tmp_path):
    place = tmp_path / "out"

    def write_late():
        with atomic_directory(place) if kind == "folder" else atomic_write(place, overwrite=False) as partial:
            (partial / "mine" if kind == "folder" else partial).write_text("late")
            if kind == "folder":
                place.mkdir()
            (place / "theirs" if kind == "folder" else place).write_text("first")

    with pytest.raises(UsageError, match="by another process meanwhile"):
        write_late()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (place / "theirs" if kind == "folder" else place).read_text() == "first"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_of_two_that_may_overwrite_the_last_one_stays_whole(kind, tmp_path):
    place = tmp_path / "out"
    write = atomic_directory if kind == "folder" else atomic_write
    with write(place, overwrite=True) as slow:
        (slow / "a" if kind == "folder" else slow).write_text("slow")
        with write(place, overwrite=True) as fast:
            (fast / "b" if kind == "folder" else fast).write_text("fast")
    assert (place / "a" if kind == "folder" else place).read_text() == "slow"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_kill_left_moved_away_gets_its_name_back(tmp_path, monkeypatch):
    """Where names cannot be swapped, the old folder has none for a moment."""
    with atomic_directory(tmp_path / "out") as partial:
        (partial / "old").write_text("whole")
    (reading, writing), (ready, tell) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with scratch_directory(tmp_path / "out") as away:
            (tmp_path / "out").rename(away / "replaced")
            os.write(tell, b"x")
            os.read(reading, 1)
            os._exit(0)
    os.read(ready, 1)
    clear_leftovers(tmp_path)  # its process lives
    assert not (tmp_path / "out").exists()
    os.write(writing, b"x")
    assert os.waitpid(child, 0)[1] == 0
    for end in (reading, writing, ready, tell):
        os.close(end)
    with pytest.raises(UsageError, match="already exists"), atomic_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "old").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "[" * 255, "\udcff" * 255, "日" * 85, "x\n" * 127])
def test_a_name_as_long_as_file_systems_take_is_written(name, tmp_path):
    with atomic_write(tmp_path / name) as file:
        file.write_text("whole")
    assert (tmp_path / name).read_text() == "whole"
    (tmp_path / name).unlink()
    with atomic_directory(tmp_path / name) as folder:
        (folder / "file").write_text("whole")
    with atomic_directory(tmp_path / name, overwrite=True) as folder:
        (folder / "file").write_text("again")
    with atomic_files(tmp_path / name) as folder, scratch_directory(tmp_path / name):
        (folder / "other").write_text("more")
    assert (tmp_path / name / "file").read_text() == "again"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_leftovers_of_long_names_go_with_their_own_name_alone(tmp_path):
    names = ["[" * 199 + end for end in ("a", "b", "a" * 56)]
    for name in names:
        (tmp_path / (partial_name(tmp_path / name) + "x")).write_text("left")
    for name in names:
        with atomic_write(tmp_path / name) as file:
            file.write_text("whole")
        assert not list(tmp_path.glob(glob.escape(partial_name(tmp_path / name)) + "*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
