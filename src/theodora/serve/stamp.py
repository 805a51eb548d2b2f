"""Which bytes an adapter was read from: to notice a folder that changed under its name."""

from __future__ import annotations

from dataclasses import dataclass

from theodora.errors import CheckpointError
from theodora.files.adapter_folder import Stamp as AdapterStamp
from theodora.files.adapter_folder import stamp_of
from theodora.files.folder import LeadsOut, Place


class Changed(CheckpointError):
    """An adapter's files are not those that were loaded: to try again does not help."""


@dataclass(frozen=True)
class FolderStamp:
    """What tells an adapter's files, as they were read, from changed ones."""

    place: Place
    files: AdapterStamp
    """Of the configuration and of the tensors; None for a file that is not there."""

    @classmethod
    def of(cls, place: Place) -> FolderStamp:
        """The stamp of a folder as it is now.

        Raises:
            CheckpointError: it cannot be asked.
        """
        try:
            with place.open() as folder:
                return cls(place, stamp_of(folder))
        except (FileNotFoundError, NotADirectoryError, LeadsOut):
            return cls(place, (None, None))
        except OSError as error:
            raise CheckpointError(f"{place.path} cannot be read: {error}") from error

    def check(self) -> None:
        """Raise `Changed` if the files are others now."""
        self.compare(FolderStamp.of(self.place).files)

    def compare(self, files: AdapterStamp) -> None:
        """Raise `Changed` if these are other files."""
        if files != self.files:
            raise Changed(
                f"{self.place.path} has changed since it was loaded, or is gone; unload the adapter, and load it again."
            )
