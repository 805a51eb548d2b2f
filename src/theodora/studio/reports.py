"""`theodora compare`'s report as plain blocks of text, tables and pictures: none of its markup reaches the page.

A report may come from anybody. Its text is taken out of the file; its figures are shown as images, in which a browser
runs nothing and loads nothing.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from theodora.safe_text import plain_lines
from theodora.studio.known import NotKnown, folders_in, id_of
from theodora.studio.metrics import read

REPORT = "report.html"  # `compare.store.REPORT`, without its imports
_LARGEST, _MOST_BLOCKS, _MOST_REPORTS = 32 << 20, 5000, 200
_HEADINGS, _TEXTS = ("h1", "h2", "h3", "h4", "summary"), ("p", "li", "figcaption", "pre")
_UNSEEN = ("style", "script", "title", "head", "template")
_SVG = re.compile(rb"<svg\b.*?</svg\s*>", re.DOTALL | re.IGNORECASE)


class Reports:
    """Reports in the folders that are named."""

    def __init__(self, folders: Any) -> None:
        self._folders = folders
        """Gives the folders, each time anew."""

    def found(self) -> list[dict[str, Any]]:
        """All of them, the newest first."""
        known: dict[Path, None] = {}
        for name in self._folders():
            folder = Path(name)
            known.update(dict.fromkeys([folder, *folders_in(folder)]))
        there = [folder for folder in known if (folder / REPORT).is_file()][:_MOST_REPORTS]
        told = [
            {"id": id_of(each), "name": each.name, "folder": str(each), "changed": (each / REPORT).stat().st_mtime}
            for each in there
        ]
        return sorted(told, key=lambda report: (-report["changed"], report["folder"]))

    def one(self, id: str) -> dict[str, Any]:
        """The blocks of a report: headings, texts, items of lists, tables, and the numbers of its figures.

        Raises:
            NotKnown: there is none of that id.
        """
        folder = self._folder_of(id)
        reader = _Blocks()
        page = read(folder / REPORT, _LARGEST)
        # Figures are XML, which is not read here: each leaves its number.
        numbers = iter(range(1 << 20))
        text = _SVG.sub(lambda _: f'<img data-figure="{next(numbers)}">'.encode(), page)
        reader.feed(text.decode("utf-8", errors="replace"))
        reader.close()
        reader.flush()
        return {"name": folder.name, "folder": str(folder), "blocks": reader.blocks[:_MOST_BLOCKS]}

    def figure(self, id: str, number: int) -> bytes:
        """A figure, as SVG; empty where there is none of that number."""
        found = _SVG.findall(read(self._folder_of(id) / REPORT, _LARGEST))
        if not 0 <= number < len(found):
            return b""
        opening = found[number][: found[number].find(b">")]
        named = b"" if b"xmlns=" in opening else b' xmlns="http://www.w3.org/2000/svg"'
        return found[number].replace(b"<svg", b"<svg" + named, 1)

    def _folder_of(self, id: str) -> Path:
        for report in self.found():
            if report["id"] == id:
                return Path(report["folder"])
        raise NotKnown("There is no such report here. Name its folder on the screen Runs, and it appears.")


class _Blocks(HTMLParser):
    """Text by block; what is not known is text of the block that it stands in."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[dict[str, Any]] = []
        self._kind, self._text = "", ""
        self._rows: list[list[str]] | None = None
        self._cell: str | None = None
        self._head, self._hidden = 0, 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a block, or a part of a table."""
        given = dict(attrs)
        if tag in _UNSEEN:
            self._hidden += tag != "head"  # (what it holds, and is seen, is named)
        elif tag == "table":
            self.flush()
            self._rows, self._head = [], 0
        elif tag == "tr" and self._rows is not None:
            self._rows.append([])
        elif tag in ("td", "th") and self._rows is not None:
            self._end_cell()
            self._rows = self._rows or [[]]
            self._head += tag == "th" and len(self._rows) == 1
            self._cell = ""
        elif tag == "img" and str(given.get("data-figure")).isdigit():
            self.flush()
            self.blocks.append({"kind": "figure", "number": int(given["data-figure"] or 0)})
        elif tag in (*_HEADINGS, *_TEXTS) and self._cell is None:
            self.flush()
            self._kind = "note" if "warning" in (given.get("class") or "").split() else tag
        elif tag == "br":
            self.handle_data("\n")

    def handle_endtag(self, tag: str) -> None:
        """End it."""
        if tag in _UNSEEN:
            self._hidden = max(0, self._hidden - (tag != "head"))
        elif tag in ("td", "th"):
            self._end_cell()
        elif tag == "table" and self._rows is not None:
            self._end_cell()
            rows = [row for row in self._rows if row]
            if rows:
                head = bool(self._head) and self._head == len(rows[0])
                self.blocks.append({"kind": "table", "head": rows[0] if head else [], "rows": rows[head:]})
            self._rows = None
        elif tag in (*_HEADINGS, *_TEXTS) and self._cell is None:
            self.flush()

    def handle_data(self, data: str) -> None:
        """Text of the block, or of the cell."""
        if self._hidden:
            return
        if self._cell is not None:
            self._cell += data
        elif self._rows is None:
            self._text += data

    def flush(self) -> None:
        """End the block that is open."""
        text = " ".join(self._text.split()) if self._kind != "pre" else self._text
        if text.strip():
            self.blocks.append({"kind": self._kind or "p", "text": plain_lines(text)})
        self._kind, self._text = "", ""

    def _end_cell(self) -> None:
        if self._cell is not None and self._rows is not None:
            self._rows[-1].append(plain_lines(" ".join(self._cell.split())))
        self._cell = None
