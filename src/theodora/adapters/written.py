"""Which folder we wrote, and has stayed as we wrote it: what `--overwrite` may replace.

Names of files do not tell: a model that was downloaded, an adapter and a training run have the same. So what is written
as a whole lists its files in `theodora_files.json`, the last of them, and is not ours any more once others lie beside
them or one was written to.
"""

from __future__ import annotations

import json
from pathlib import Path

from theodora.errors import shown

MARK = "theodora_files.json"
_SHOWN = 5


def mark_written(folder: Path, form: str) -> None:
    """Write into a folder that is finished what it is and which files it consists of."""
    fields = {"form": form, "files": [name for name in _files(folder) if name != MARK]}
    (folder / MARK).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


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
