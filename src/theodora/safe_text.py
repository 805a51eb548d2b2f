"""Foreign text made fit to be shown: names and answers come from files and models, and a terminal obeys what it reads.

`plain` is for a name or a value, which stands on one line; `plain_lines` for text that may have several. Both show as
an escape (`\\x1b`, `\\u202e`) what would move the cursor, turn the direction of the text, or not be seen at all.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from unicodedata import category

_JOINERS = ("\u200c", "\u200d")
# How our own messages are spelt on streams that lack a character (ASCII, Windows' code pages).
_SPELLINGS = {
    **{"…": "...", "×": "x", "→": "->", "‖": "||", "−": "-", "–": "-", "—": "-", "±": "+-", "°": " deg", "·": ";"},
    **{"‘": "'", "’": "'", "“": '"', "”": '"', "′": "'", "Δ": "d", "α": "alpha", "≤": "<=", "≥": ">=", "√": "sqrt "},
    **{"━": "-", "─": "-", "│": "|", "╸": "-", "╺": "-", "▌": "|"},
    **dict.fromkeys("█▉▊▋▍▎▏▐▕", "#"),
}
# Where a Markdown reader would see more than text. Underscores within words are only that.
_MARKDOWN = re.compile(r"([\\`*\[\]<>|~&$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=:)//)")


def plain(text: object) -> str:
    """A name or value on one line, with everything that a terminal would obey, and that cannot be seen, as escapes."""
    return "".join(_characters(str(text), ""))


def plain_lines(text: str) -> str:
    """The same for text of several lines, which stay: line feeds and tabs are kept."""
    return "".join(_characters(text, "\n\t"))


def for_stream(text: str, encoding: str) -> list[str]:
    """Each character of `plain_lines`, as a stream of this encoding takes it: `…` may be `...`, or an escape."""
    parts = _characters(text, "\n\t")
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return [part if _has(encoding, part) else _SPELLINGS.get(part) or ascii(part)[1:-1] for part in parts]
    except LookupError:  # a stream of somebody's own may call its encoding anything
        pass
    return list(parts)


def in_figure(text: object) -> str:
    """A name as matplotlib draws it: a dollar sign would begin a formula."""
    return plain(text).replace("$", r"\$")


def quoted(text: object) -> str:
    """A word of a shell's command line, as `shlex.quote` gives it; with escapes where `plain` has some."""
    text = str(text)
    if plain(text) == text:
        return shlex.quote(text)
    parts = {"\\": "\\\\", "'": "\\'"}
    return "$'" + "".join(parts.get(c) or _for_shell(c) for c in text) + "'"


def markdown(text: object) -> str:
    """A name or value within a line or table of Markdown, where it is text and nothing else."""
    return _MARKDOWN.sub(r"\\\1", plain(text))


def markdown_code(text: object) -> str:
    """A name or value as code within a line or table of Markdown."""
    text = plain(text).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{space}{text}{space}{fence}"


def _characters(text: str, allowed: str) -> Sequence[str]:
    if text.isprintable():
        return text
    return [
        c if c.isprintable() or c in allowed or category(c) == "Zs" or _joins(text, at) else ascii(c)[1:-1]
        for at, c in enumerate(text)
    ]


def _for_shell(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a file's name that is no text
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character if character.isprintable() else ascii(character)[1:-1]


def _joins(text: str, at: int) -> bool:
    """Whether a zero-width joiner stands where a script or an emoji needs it: between characters beyond ASCII."""
    around = text[max(0, at - 1) : at + 2]
    return text[at] in _JOINERS and len(around) == 3 and not (around[0].isascii() or around[2].isascii())


def _has(encoding: str, character: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
