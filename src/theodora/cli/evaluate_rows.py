"""The file of `theodora evaluate --rows`: a line of JSON for each row, with what it asks, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from theodora.errors import UsageError

if TYPE_CHECKING:
    from theodora.data import Examples
    from theodora.evaluate import Scores

_TENTHS = 10


def check_free(file: str) -> None:
    """See before long work that the file can be written.

    Raises:
        UsageError: something is there, or there is no folder for it.
    """
    path = Path(file).expanduser()
    if path.exists():
        raise UsageError(f"--rows {file}: there is such a file already; expected a name that is free")
    if not path.parent.is_dir():
        raise UsageError(f"--rows {file}: there is no folder {path.parent}")


def write_rows(file: str, examples: Examples, scores: Scores, base: Scores | None) -> None:
    """Write the rows.

    A line holds `row` (from 1 on), `prompt` (a text, or the messages before the answer; of plain text the text), and
    the fields of `RowScore`; with a base also its `answer`, `right` and `loss` under `base`.
    """
    from theodora.files.atomic import atomic_write
    from theodora.parse import to_json

    with atomic_write(Path(file).expanduser(), overwrite=False) as partial:
        partial.write_text("".join(to_json(line) + "\n" for line in _lines(examples, scores, base)), encoding="utf-8")


def _lines(examples: Examples, scores: Scores, base: Scores | None) -> Iterator[dict[str, Any]]:
    from theodora.data.prompts import question_and_answer

    for at, (example, own) in enumerate(zip(examples.dataset, scores.each, strict=True)):
        line = {"row": at + 1, "prompt": _prompt(example, question_and_answer), **asdict(own)}
        if base is not None:
            before = asdict(base.each[at])
            line["base"] = {name: before[name] for name in ("loss", "answer", "right")}
        yield line


def _prompt(example: Any, question_and_answer: Callable[[Any], Any]) -> Any:
    for name in ("text", "prompt"):
        if isinstance(example.get(name), str):
            return example[name]
    messages, _ = question_and_answer(example)
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def tells(say: Callable[[str], object], whose: str) -> Callable[[str, int, int], None]:
    """Whom `evaluate` may tell what is done, where no terminal shows a bar: it says so at each tenth."""
    said: dict[str, int] = {}

    def tell(what: str, done: int, of: int) -> None:
        tenths = _TENTHS * done // max(of, 1)
        if tenths > said.get(what, 0):
            said[what] = tenths
            say(f"{whose}: {what.lower()} {done}/{of}")

    return tell
