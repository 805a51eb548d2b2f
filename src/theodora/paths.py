"""Which module paths a name, an expression or a pattern of them means, in bounded time.

Names and patterns match as in PEFT, so that files mean the same. They come from strangers' files: a few characters
(`(a+)+$`, `((a{10}){10}){10}`) can keep an engine busy for years, and ten thousand harmless ones for as long. So all
expressions of one file share one budget, compiling included, and plain names are looked up rather than compiled.
"""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Generic, TypeVar

import regex

from theodora.errors import ConfigError, shown

T = TypeVar("T")

PATIENCE = 5.0
"""Seconds of computing for all expressions of one file on all module paths."""
LONGEST = 10_000
"""Characters of the longest expression; plain names are none."""
LONGEST_TOGETHER = 100_000
"""Characters of all expressions of a file."""
MOST_NAMES = 100_000
"""Names and keys of one file."""
_MOST_REPEATED = 100_000
"""Product of all counts in an expression (`{10}`): `regex` writes repetitions out, and nested ones multiply."""

_PLAIN = re.compile(r"(?:\w|\\?[.-])+", re.ASCII)
_COUNTED = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")


class Expressions:
    """The regular expressions of one file, and the time that is left for them.

    Args:
        seconds: for all of them.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = PATIENCE if seconds is None else seconds
        self._left = self._seconds
        self._compiled: dict[str, Any] = {}
        self._matched: dict[tuple[str, str], bool] = {}

    def match(self, expression: str, path: str) -> bool:
        """Whether an expression matches a whole path.

        Raises:
            ConfigError: it is none, or the time is over.
        """
        known = self._matched.get((expression, path))
        if known is not None:
            return known
        if self._left <= 0:
            raise self._too_long(expression)
        began = time.thread_time()
        try:
            # `regex` measures on a clock of its own; the least it takes for a limit is not nothing.
            matched = self._compile(expression).fullmatch(path, timeout=max(self._left, 0.001)) is not None
        except TimeoutError as error:
            raise self._too_long(expression) from error
        finally:
            self._left -= time.thread_time() - began
        self._matched[expression, path] = matched
        return matched

    def _compile(self, expression: str) -> Any:
        compiled = self._compiled.get(expression)
        if compiled is None:
            if problem := why_not(expression):
                raise ConfigError(f"{shown(expression)} {problem}")
            try:
                compiled = self._compiled[expression] = regex.compile(expression, regex.VERSION0)
            except (regex.error, OverflowError, RecursionError, MemoryError) as error:
                raise ConfigError(f"{shown(expression)} is no regular expression ({error})") from error
        return compiled

    def _too_long(self, expression: str) -> ConfigError:
        return ConfigError(
            f"The expressions take more than {self._seconds:g} s together to compare with the module paths (the last: "
            f"{shown(expression)}); expected some without nested repetitions, or names"
        )


class PathPattern(Generic[T]):
    """Values by names or expressions that paths end with after a dot (PEFT's `rank_pattern`), ready to be asked.

    Args:
        pattern: the values; the first key that matches counts.
        expressions: of the same file.
    """

    def __init__(self, pattern: Mapping[str, T], expressions: Expressions | None = None) -> None:
        self._expressions = expressions or Expressions()
        self._keys, self._values = list(pattern), list(pattern.values())
        # A bare dot in a name stands for any character, as PEFT reads it: names by length and where such dots stand.
        self._names: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._others: list[tuple[int, str]] = []
        self._known: dict[str, int] = {}
        for place, key in enumerate(pattern):
            if _PLAIN.fullmatch(key):
                name = key.replace("\\", "")
                dots = _bare_dots(key)
                self._names.setdefault(len(name), {}).setdefault(dots, {}).setdefault(name, place)
            else:
                self._others.append((place, rf"(.*\.)?({key})$"))

    def get(self, path: str, otherwise: T) -> T:
        """The value of the first key that matches a path."""
        place = self._known.get(path)
        if place is None:
            place = self._known[path] = self._place(path)
        return otherwise if place < 0 else self._values[place]

    def idle(self, paths: list[str]) -> list[str]:
        """The keys that match none of these paths. (One that matches, but after another key, is not idle.)"""
        used = {place for path in paths for place in self._named(path)}
        used |= {place for place, expression in self._others if any(self._ends(expression, path) for path in paths)}
        return [key for place, key in enumerate(self._keys) if place not in used]

    def _place(self, path: str) -> int:
        first = min(self._named(path), default=len(self._values))
        earlier = (place for place, expression in self._others if place < first and self._ends(expression, path))
        first = next(earlier, first)
        return first if first < len(self._values) else -1

    def _ends(self, expression: str, path: str) -> bool:
        return self._expressions.match(expression, path)

    def _named(self, path: str) -> list[int]:
        places: list[int] = []
        for ending in endings(path):
            for dots, names in self._names.get(len(ending), {}).items():
                letters = list(ending)
                for at in dots:
                    letters[at] = "."
                if (place := names.get("".join(letters))) is not None:
                    places.append(place)
        return places


def _bare_dots(key: str) -> tuple[int, ...]:
    return tuple(match.start() for match in re.finditer(r"\.", re.sub(r"\\.", "_", key)))


def why_not(expression: str) -> str:
    """What is wrong with an expression that would take too long to compile; empty if nothing is."""
    if len(expression) > LONGEST:
        return f"has {len(expression):,} characters; expected at most {LONGEST:,} in one expression"
    times = 1
    for least, most in _COUNTED.findall(expression):
        digits = max(least, most, key=len)
        times *= max(1, int(digits[:9] or 1))
        if times > _MOST_REPEATED:
            return f"repeats more than {_MOST_REPEATED:,} times what it repeats; expected smaller counts"
    return ""


def problems_of(expressions: Mapping[str, list[str]]) -> list[str]:
    """What is wrong with a file's expressions, by where they stand, without running them."""
    problems: list[str] = []
    real = {where: [one for one in keys if not _PLAIN.fullmatch(one)] for where, keys in expressions.items()}
    if (count := sum(map(len, expressions.values()))) > MOST_NAMES:
        return [f"{' and '.join(expressions)} have {count:,} names together; expected at most {MOST_NAMES:,}"]
    if (length := sum(len(one) for keys in real.values() for one in keys)) > LONGEST_TOGETHER:
        where = " and ".join(where for where, keys in real.items() if keys)
        return [
            f"the expressions in {where} have {length:,} characters together; expected at most {LONGEST_TOGETHER:,} "
            "(names, which are no expressions, do not count)"
        ]
    for where, keys in real.items():
        for key in keys:
            if problem := why_not(key):
                problems.append(f"{where}: {shown(key)} {problem}")
                continue
            try:
                re.compile(key)
            except (re.error, OverflowError, RecursionError) as error:
                problems.append(f"{where}: {shown(key)} is no regular expression ({error})")
    return problems


def matches(wanted: str | tuple[str, ...], path: str, expressions: Expressions | None = None) -> bool:
    """A name matches the path or its ending after a dot; a regular expression matches the whole path.

    Args:
        wanted: names, or one regular expression.
        path: of a module.
        expressions: of the file that `wanted` stands in. Default: it stands alone.
    """
    if isinstance(wanted, str):
        return (expressions or Expressions()).match(wanted, path)
    names = _as_set(wanted)
    return any(ending in names for ending in endings(path))


def endings(path: str) -> list[str]:
    """A path, and what stands behind each of its dots."""
    return [path, *(path[at + 1 :] for at, letter in enumerate(path) if letter == ".")]


@lru_cache(maxsize=64)
def _as_set(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(names)


_LONGEST_NAME = 300


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Up to three of `names` that look like `name`, best first."""
    if len(name) > _LONGEST_NAME:  # comparing takes time in the square of the length
        return []
    return difflib.get_close_matches(name, list(dict.fromkeys(names)), n=3, cutoff=0.5)


def layer_kinds(paths: Iterable[str]) -> dict[str, str]:
    """Module path -> kind: its last name, and the one before where that alone is not enough.

    Example:
        `h.0.attn.c_proj` and `h.0.mlp.c_proj` are of the kinds attn.c_proj and mlp.c_proj; `layers.0.mlp.up_proj`
        beside them is of the kind up_proj.
    """
    names = {path: [part for part in path.split(".") if not part.isdigit()] for path in paths}
    parents: dict[str, set[str]] = {}
    for parts in names.values():
        parents.setdefault(parts[-1], set()).add(".".join(parts[-2:-1]))
    return {path: ".".join(parts[-2:] if len(parents[parts[-1]]) > 1 else parts[-1:]) for path, parts in names.items()}


def layer_index(path: str) -> int | None:
    """Number of the block that a module stands in; None for embeddings, heads and other modules outside."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(number.group(1)) if number else None
