"""Which folder we wrote, and has stayed as we wrote it: what `--overwrite` may replace.

Names of files do not tell: a model that was downloaded, an adapter and a training run have the same. So what is written
as a whole lists its files in `theodora_files.json`, the last of them, and is not ours any more once others lie beside
them or one was written to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from theodora.errors import UsageError, shown

MARK = "theodora_files.json"
_SHOWN = 5


def mark_written(folder: Path, form: str) -> None:
    """Write into a folder that is finished what it is and which files it consists of."""
    fields = {"form": form, "files": [name for name in _files(folder) if name != MARK]}
    (folder / MARK).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def check_apart(output: Path, inputs: Mapping[str, Path]) -> None:
    """Raise a UsageError if `output` is, or contains, one of the `inputs`, given by what they are called."""
    for what, folder in inputs.items():
        if folder.resolve().is_relative_to(output.resolve()):
            raise UsageError(f"The output {output} is, or contains, the {what} ({folder}). Choose another place.")


def check_replaceable(output: Path, overwrite: bool, kind: str, why_not: str | None) -> None:
    """Raise a UsageError if what stands at `output` may not be replaced.

    Args:
        output: what stands there.
        overwrite: whether anything may be.
        kind: what may be: an earlier merge, say.
        why_not: why it is none, if it is none.
    """
    if not overwrite:
        raise UsageError(f"{output} already exists. Choose another --output, or allow --overwrite.")
    if why_not is not None:
        raise UsageError(
            f"{output} is no earlier {kind} ({why_not}), so --overwrite does not delete it. Choose another --output, "
            "or remove it yourself."
        )


def why_not_ours(folder: Path) -> str | None:
    """Why a folder is not one that `mark_written` finished, as it was then; None for one."""
    try:
        written = json.loads((folder / MARK).read_text(encoding="utf-8"))["files"]
        last = (folder / MARK).stat().st_mtime_ns
        known = {MARK, *written}
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no {MARK} that lists its files"
    found = _files(folder)
    if others := [name for name in found if name not in known]:
        more = ", …" if len(others) > _SHOWN else ""
        return f"it also holds {', '.join(shown(name) for name in others[:_SHOWN])}{more}"
    changed = [name for name in found if (folder / name).lstat().st_mtime_ns > last]
    return f"{shown(changed[0])} was written to since" if changed else None


def _files(folder: Path) -> list[str]:
    """What lies in a folder, however deep: files, and links to whatever."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in paths)
