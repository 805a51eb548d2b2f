"""The keys that clients must show, read from a file: one on each line."""

from __future__ import annotations

import codecs
import logging
import os
import re
from pathlib import Path

from theodora.errors import ConfigError, bullet_list

log = logging.getLogger("theodora.serve")

_SHORT_KEY = 8  # characters; what has fewer can be guessed


def read_keys(path: str | None) -> frozenset[str]:
    """The keys of a file, one on each line.

    Blank lines, blanks around a key, lines that begin with # and a byte order mark are no part of a key, however the
    lines end.

    Raises:
        ConfigError: it cannot be read, is no UTF-8, holds no key, or a line that no client could send as a key.
    """
    if path is None:
        return frozenset()
    try:
        data = Path(path).expanduser().read_bytes()
    except (OSError, ValueError) as error:
        raise ConfigError(f"api_key_file {path} cannot be read: {error}") from error
    keys, problems = _keys_in(_text_of(path, data))
    if problems:
        raise ConfigError(f"api_key_file {path}:{bullet_list(problems)}")
    if not keys:
        raise ConfigError(f"api_key_file {path} holds no key; expected one on each line")
    if any(len(key) < _SHORT_KEY for key in keys):
        log.warning("%s has a key of less than %d characters, which can be guessed", path, _SHORT_KEY)
    if os.name == "posix" and Path(path).expanduser().stat().st_mode & 0o004:
        log.warning("%s can be read by every user of this machine, keys and all; chmod 600 mends that", path)
    return frozenset(keys)


def _text_of(path: str, data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError(f'api_key_file {path} is UTF-16 (Windows\' "Unicode"); expected UTF-8: save it as that')
    if b"\0" in data:
        raise ConfigError(f"api_key_file {path} holds NUL bytes: it is no text; expected UTF-8, a key on each line")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"api_key_file {path} is no UTF-8: {error.reason} at byte {error.start}") from error


def _keys_in(text: str) -> tuple[list[str], list[str]]:
    """The keys, and what is wrong with lines; no message shows a key."""
    keys: list[str] = []
    problems: list[str] = []
    # Not splitlines(), which also ends lines where a form feed or U+2028 stands: half a key would be a key.
    for number, line in enumerate(re.split("\r\n|\r|\n", text), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if re.search(r"\s#", key):
            problems.append(f"line {number} has a # after a blank; expected one key, comments on lines of their own")
        elif not key.isprintable():
            problems.append(f"line {number} holds characters that are not seen; expected a key alone")
        else:
            keys.append(key)
    return keys, problems
