"""Folders and files that others may write to while they are read: opened once, and what is checked is what is read.

    with Place(Path("adapters/law"), within=Path("adapters")).open() as folder:
        text = folder.read("adapter_config.json", most=1 << 20)

A path only says where something was a moment ago. Before it is read, a folder can become a link that leads elsewhere,
and a file a pipe that nobody writes to. So a folder is held by its descriptor, and its files are opened from there. A
file tells its kind and size through its own descriptor, and is copied, not mapped: somebody who writes it anew in place
cuts it short, and reading a mapped file beyond its end kills the process (SIGBUS).
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import TracebackType
from typing import Self

from theodora.errors import CheckpointError

LARGEST_TEXT = 32 << 20
"""Bytes of a JSON file that is read: far more than a configuration has that lists 100,000 modules."""
# Without O_NONBLOCK a pipe would be waited for until somebody writes to it. Not every system has all of these.
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY"))
_FOLDER, _NO_LINK = getattr(os, "O_DIRECTORY", 0), getattr(os, "O_NOFOLLOW", 0)
_BY_DESCRIPTOR = os.open in os.supports_dir_fd
_IS_LINK = (errno.ELOOP, errno.EMLINK)  # what O_NOFOLLOW says of one; the second is FreeBSD's
_MOST_LINKS = 40  # as many as Linux follows
_LARGEST_READ = 1 << 30  # at once; systems stop at 2 GB


class LeadsOut(CheckpointError):
    """A link, or a path, that leads out of the folder that nothing outside of may be read of."""


@dataclass(frozen=True)
class Seen:
    """What tells a file from another one, and from itself after it was written to."""

    device: int
    inode: int
    size: int
    changed: int
    """When it was last written to, in nanoseconds."""

    @classmethod
    def of(cls, status: os.stat_result) -> Seen:
        """What a system call says of a file."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class OpenFile:
    """A regular file, open for reading; closed at the end of a `with` block.

    Args:
        descriptor: of the file; closed here also where it is refused.
        path: where it lies; for messages.

    Raises:
        CheckpointError: it is a folder, a pipe, or something else that is no file.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self.path = path
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise CheckpointError(f"{path} is {_kind(status.st_mode)}; expected a file")
        self.seen, self._file = Seen.of(status), os.fdopen(descriptor, "rb", buffering=0)

    @classmethod
    def at(cls, path: Path) -> OpenFile:
        """The file at a path of the user's own, wherever links in it lead; an OSError if it cannot be opened."""
        return cls(os.open(path, _FLAGS), path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close it, where there is no `with` block to do so."""
        self._file.close()

    @property
    def size(self) -> int:
        """Bytes that it had when it was opened."""
        return self.seen.size

    def fill(self, memory: memoryview, at: int = 0) -> None:
        """Copy the file's bytes from the place `at` on into all of `memory`.

        Raises:
            CheckpointError: it ends before, or cannot be read.
        """
        done = 0
        try:
            self._file.seek(at)
            while done < len(memory):
                count = self._file.readinto(memory[done : done + _LARGEST_READ])
                if not count:
                    raise CheckpointError(
                        f"{self.path} was cut short while it was read: it had {self.size:,} bytes, and ends after "
                        f"{at + done:,} now. Read it again when it is written."
                    )
                done += count
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error

    def read(self, most: int = LARGEST_TEXT) -> bytes:
        """All of it.

        Raises:
            CheckpointError: it has more than `most` bytes, cannot be read, or is written to meanwhile.
        """
        if self.size > most:
            raise CheckpointError(f"{self.path} has {self.size:,} bytes; expected at most {most:,}")
        memory = bytearray(self.size)
        self.fill(memoryview(memory))
        self.check()
        return bytes(memory)

    def check(self) -> None:
        """Raise a CheckpointError if somebody has written to the file since it was opened."""
        if Seen.of(os.fstat(self._file.fileno())) != self.seen:
            raise CheckpointError(f"{self.path} changed while it was read. Read it again when it is written.")


class Folder:
    """A folder that is held open, so that it stays the same one whatever its path leads to by now.

    Args:
        path: where it lies; for messages.
        way: descriptors of the folders that led to it and of itself, the outermost first.
        within: the path of the outermost, out of which no link may lead; None if links may lead anywhere.

    Where the system opens nothing by way of a folder's descriptor (Windows), there is none, and paths are all there is.
    """

    def __init__(self, path: Path, way: list[int], within: Path | None = None) -> None:
        self.path, self._way, self._within = path, way, within

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _close(self._way)

    def open(self, name: str) -> OpenFile | None:
        """A file in the folder, or in a folder of it (`a/b`); None if there is none of that name.

        Raises:
            CheckpointError: it is no file, leads out, or cannot be opened.
        """
        path = self.path / name
        try:
            if not self._way:
                return OpenFile.at(path)
            if self._within is None:
                return OpenFile(os.open(name, _FLAGS, dir_fd=self._way[-1]), path)
            return OpenFile(_end_of(_beneath(self._way, self._within, name)), path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except LeadsOut as error:
            raise LeadsOut(f"{path} is a link that leads out of {self._within}") from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def read(self, name: str, most: int = LARGEST_TEXT) -> bytes | None:
        """The bytes of a file, or None if there is none of that name. Errors as in `open` and `OpenFile.read`."""
        file = self.open(name)
        if file is None:
            return None
        with file:
            return file.read(most)

    def seen(self, name: str) -> Seen | None:
        """What tells the file of that name from another one; None if there is none. Errors as in `open`."""
        file = self.open(name)
        if file is None:
            return None
        with file:
            return file.seen

    def names(self) -> list[str]:
        """Of all that is in it."""
        return sorted(os.listdir(self._way[-1] if self._way else self.path))


@dataclass(frozen=True)
class Place:
    """Where a folder lies, and how far links in it may lead."""

    path: Path
    within: Path | None = None
    """A folder out of which nothing is opened, whatever links say at that moment. None where whoever names `path` may
    read all that it leads to; the hub's cache, say, keeps its files elsewhere and links to them."""

    def open(self) -> Folder:
        """Hold the folder open.

        Raises:
            LeadsOut: it is not within `within`.
            OSError: it is not there, or is no folder.
        """
        if not _BY_DESCRIPTOR:
            if self.within is not None:
                raise LeadsOut(f"{self.path}: this system cannot hold what is read within {self.within}")
            os.listdir(self.path)  # an error if it is no folder
            return Folder(self.path, [])
        if self.within is None:
            return Folder(self.path, [os.open(self.path, _FLAGS | _FOLDER)])
        asked = _below(self.path, self.within)
        if asked is None:
            raise LeadsOut(f"{self.path} is not within {self.within}")
        root = [os.open(self.within, _FLAGS | _FOLDER)]
        try:
            way = _beneath(root, self.within, asked)
        finally:
            _close(root)
        if not stat.S_ISDIR(os.fstat(way[-1]).st_mode):
            _close(way)
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.path))
        return Folder(self.path, way, self.within)


def read_file(path: Path, most: int = LARGEST_TEXT) -> bytes:
    """All bytes of a file of the user's own, which may be no pipe and no larger than `most`.

    Raises:
        OSError: it cannot be opened.
        CheckpointError: it is no file, too large, or is written to meanwhile.
    """
    with OpenFile.at(path) as file:
        return file.read(most)


def _beneath(above: list[int], root: Path, name: str) -> list[int]:
    """Descriptors of the way to `name`: of the folders that lead to it from the root on, and of what it names.

    Links are followed here rather than by the system, each step from a descriptor at hand, so that none leads out of
    the root even if somebody exchanges folders and links meanwhile. (Linux's openat2 can, and Python has no openat2.)

    Args:
        above: descriptors from the root to the folder that `name` is in; they stay open.
        root: the path of the first.
        name: the name, or path, of what is wanted.

    Raises:
        LeadsOut: it is not below the root.
        OSError: it is not there, or cannot be opened.
    """
    way = [os.dup(descriptor) for descriptor in above]
    waiting, links = list(reversed(PurePath(name).parts)), 0
    try:
        while waiting:
            part = waiting.pop()
            if part == "..":
                if len(way) == 1:
                    raise LeadsOut(f"{name} leads out of {root}")
                os.close(way.pop())
                continue
            try:
                way.append(os.open(part, _FLAGS | _NO_LINK, dir_fd=way[-1]))
            except OSError as error:
                if error.errno not in _IS_LINK or links >= _MOST_LINKS:
                    raise
                links += 1
                target = os.readlink(part, dir_fd=way[-1])
                if os.path.isabs(target):
                    target = _below(Path(target), root)
                    if target is None:
                        raise LeadsOut(f"{name} leads out of {root}") from error
                    _close(way[1:])
                    del way[1:]
                waiting += reversed(PurePath(target).parts)
    except BaseException:
        _close(way)
        raise
    return way


def _below(path: Path, root: Path) -> str | None:
    """What has to be added to the root to come to an absolute path, as the paths are written; None if nothing does."""
    for start in (root.absolute(), Path(os.path.realpath(root))):
        with suppress(ValueError):
            return str(path.absolute().relative_to(start))
    return None


def _end_of(way: list[int]) -> int:
    _close(way[:-1])
    return way[-1]


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
