"""Scores of an answer beside its reference: words in common, or whatever a user's own function says."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from theodora.errors import ConfigError, DataError

Metric = Callable[[str, str], float]
"""(answer, reference) -> score, of one row."""


def same_text(answer: str, reference: str) -> float:
    """1 if the two are the same text, apart from blanks around them, else 0."""
    return float(answer.strip() == reference.strip())


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words in common, 0 to 1, as in SQuAD (arXiv 1606.05250) but for articles, which count as words.

    Words are runs of letters and digits, whatever their case.
    """
    given, wanted = Counter(re.findall(r"\w+", answer.lower())), Counter(re.findall(r"\w+", reference.lower()))
    if not given or not wanted:
        return float(given == wanted)
    shared = sum((given & wanted).values())
    return 2 * shared / (given.total() + wanted.total())


def load_metric(where: str) -> Metric:
    """A function of the user's own, from `path/to/file.py:name`. The file is run.

    Raises:
        ConfigError: there is no such file or function, or the file fails.
    """
    return load_functions([where], "metric")[0]


def load_functions(places: Sequence[str], what: str) -> list[Callable[..., Any]]:
    """Functions of the user's own, each from `path/to/file.py:name`. Each file is run, once.

    Args:
        places: of the functions.
        what: one of them is called in messages.

    Raises:
        ConfigError: there is no such file or function, or the file fails.
    """
    modules: dict[Path, ModuleType] = {}
    found: list[Callable[..., Any]] = []
    for where in places:
        path, _, name = where.rpartition(":")
        file = Path(path)
        if not path or not name.isidentifier() or file.suffix != ".py":
            raise ConfigError(f"{where!r} is no {what}; expected path/to/file.py:function")
        if not file.is_file():
            raise ConfigError(f"{where!r}: there is no file {path}")
        module = modules.get(file.resolve())
        if module is None:
            module = modules[file.resolve()] = _run_file(file)
        function = getattr(module, name, None)
        if not callable(function):
            names = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
            raise ConfigError(f"{path} has no function {name}; it has {', '.join(names) or 'none'}")
        found.append(function)
    return found


def _run_file(file: Path) -> ModuleType:
    unique = f"theodora_metric_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(unique, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{file} fails when it is run: {type(error).__name__}: {error}") from error
    return module


def mean_score(metric: Metric, name: str, answers: Sequence[str], references: Sequence[str]) -> float:
    """The mean of a metric over rows.

    Raises:
        DataError: it gave something that is no finite number, or failed; the message shows the row.
    """
    return sum(
        score_of(metric, name, row, answer, reference)
        for row, (answer, reference) in enumerate(zip(answers, references, strict=True), start=1)
    ) / len(answers)


def score_of(metric: Metric, name: str, row: int, answer: str, reference: str) -> float:
    """A metric of one row, whose number (from 1) is for the message.

    Raises:
        DataError: it gave something that is no finite number, or failed.
    """
    shown = f"row {row} (answer {answer[:60]!r}, reference {reference[:60]!r})"
    try:
        value: Any = metric(answer, reference)
    except Exception as error:
        raise DataError(f"The metric {name} fails at {shown}: {type(error).__name__}: {error}") from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"The metric {name} gave {value!r} at {shown}; expected a finite number")
    return number
