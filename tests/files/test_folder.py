"""Folders that change under the reader: what was opened is what is read, and links lead nowhere else."""

import os
import shutil
from contextlib import suppress

import pytest

from theodora.errors import CheckpointError
from theodora.files.folder import LeadsOut, OpenFile, Place, read_file


@pytest.fixture
def root(tmp_path):
    """A folder with `a/b/file` ("mine"), beside a folder `out` with `b/file` and `file` ("theirs")."""
    (tmp_path / "root" / "a" / "b").mkdir(parents=True)
    (tmp_path / "root" / "a" / "b" / "file").write_text("mine")
    (tmp_path / "out" / "b").mkdir(parents=True)
    (tmp_path / "out" / "b" / "file").write_text("theirs")
    (tmp_path / "out" / "file").write_text("theirs")
    return tmp_path / "root"


def place(root, *parts):
    return Place(root.joinpath(*parts), within=root)


def test_a_folder_stays_the_one_that_was_opened(root):
    for at in (place(root, "a", "b"), Place(root / "a" / "b")):
        with at.open() as folder:
            (root / "a").rename(root / "was")
            (root / "a").symlink_to(root.parent / "out")
            assert folder.read("file") == b"mine"
            assert folder.seen("nothing") is None
            assert folder.names() == ["file"]
        (root / "a").unlink()
        (root / "was").rename(root / "a")


def test_a_file_stays_the_one_that_was_opened(root):
    with place(root, "a", "b").open() as folder, folder.open("file") as file:
        (root / "a/b/file").unlink()
        (root / "a/b/file").symlink_to(root.parent / "out/file")
        assert file.read() == b"mine"
        with pytest.raises(LeadsOut, match="leads out of"):
            folder.open("file")


@pytest.mark.parametrize(
    "link",
    [
        "../out",
        "a/../../out",
        "a/up/../../../out",
        "{out}",
        "{root}/../out",
        "/proc/self/root{out}",
        "a/b/../../hop",
        "/",
        "..",
    ],
)
def test_links_that_lead_out(root, link):
    (root / "hop").symlink_to("../out")
    (root / "a/up").symlink_to("..")
    (root / "link").symlink_to(link.format(out=root.parent / "out", root=root))
    for name in ("link", "link/b"):
        with pytest.raises(LeadsOut):
            place(root, name).open()
    with place(root).open() as folder, pytest.raises(LeadsOut):
        folder.read("link/file")


@pytest.mark.parametrize("link", ["a", "a/../a", "{root}/a", "second", "a/self", "./a//."])
def test_links_that_stay_inside(root, link):
    (root / "second").symlink_to("a")
    (root / "a/self").symlink_to("../a")
    (root / "link").symlink_to(link.format(root=root))
    with place(root, "link", "b").open() as folder:
        assert folder.read("file") == b"mine"
        assert folder.read("../b/file") == b"mine"
        with pytest.raises(LeadsOut):
            folder.read("../../../out/file")


def test_an_absolute_link_begins_anew_wherever_it_stands(root):
    (root / "a/link").symlink_to(root / "a/b/file")
    with place(root, "a").open() as folder:
        assert folder.read("link") == b"mine"


def test_a_root_that_is_a_link_itself(root):
    (root.parent / "alias").symlink_to(root)
    alias = root.parent / "alias"
    (root / "link").symlink_to(root / "a")
    for at in (Place(alias / "link/b", within=alias), Place(root / "a/b", within=alias)):
        with at.open() as folder:
            assert folder.read("file") == b"mine"


def test_links_in_circles_and_too_many(root):
    (root / "circle").symlink_to("circle")
    for n in range(60):
        (root / f"l{n}").symlink_to(f"l{n + 1}")
    (root / "l60").symlink_to("a")
    for name in ("circle", "l0"):
        with pytest.raises(OSError, match="symbolic links"):
            place(root, name).open()
    with place(root, "l30").open() as folder:
        assert folder.names() == ["b"]


def test_where_folders_have_no_descriptors(root, monkeypatch):
    monkeypatch.setattr("theodora.files.folder._BY_DESCRIPTOR", False)
    with Place(root / "a/b").open() as folder:
        assert folder.read("file") == b"mine"
        assert folder.read("nothing") is None
        assert folder.names() == ["file"]
    with pytest.raises(NotADirectoryError):
        Place(root / "a/b/file").open()
    with pytest.raises(LeadsOut, match="this system cannot"):
        place(root, "a").open()


def test_what_is_no_folder(root):
    for at in (place(root, "a/b/file"), Place(root / "a/b/file"), place(root, "a/b/file/x")):
        with pytest.raises(NotADirectoryError):
            at.open()
    for at in (place(root, "x"), Place(root / "x")):
        with pytest.raises(FileNotFoundError):
            at.open()


@pytest.mark.parametrize("within", [True, False])
def test_what_is_no_file_does_not_hold_up(root, within):
    os.mkfifo(root / "pipe")
    (root / "zero").symlink_to("/dev/zero")
    at = place(root) if within else Place(root)
    with at.open() as folder:
        for name, kind in (("pipe", "a pipe"), ("a", "a folder"), ("zero", "leads out" if within else "a device")):
            with pytest.raises(CheckpointError, match=kind):
                folder.read(name)
    with pytest.raises(CheckpointError, match=r"pipe is a pipe; expected a file"):
        read_file(root / "pipe")


def test_no_descriptor_is_left(root):
    os.mkfifo(root / "pipe")
    (root / "out").symlink_to("../out")
    before = len(os.listdir("/proc/self/fd"))
    with place(root, "a", "b").open() as folder:
        for name in ("file", "nothing", "../../pipe", "../../out/file", "../../../x", ".."):
            with suppress(CheckpointError):
                folder.read(name)
    for name in ("out", "x", "pipe", "a/b/file", "a/b/file/x", "../x"):
        with pytest.raises((OSError, LeadsOut)):
            place(root, name).open()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_written_to_meanwhile(root):
    path = root / "a/b/file"
    for change, told in (
        (lambda: os.truncate(path, 2), "was cut short while it was read: it had 4 bytes, and ends after 2 now"),
        (lambda: path.write_text("longer"), "changed while it was read"),
        (lambda: (path.write_text("mine"), os.utime(path, ns=(5, 5))), "changed while it was read"),
    ):
        path.write_text("mine")
        with OpenFile.at(path) as file:
            change()
            with pytest.raises(CheckpointError, match=told):
                file.read()
    with pytest.raises(CheckpointError, match="has 4 bytes; expected at most 3"):
        read_file(path, most=3)
    shutil.rmtree(root)
    with pytest.raises(FileNotFoundError):
        read_file(path)
