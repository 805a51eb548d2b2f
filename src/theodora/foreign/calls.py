"""The calls in a Python script or notebook, and their keyword arguments as far as they are literal. Nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from theodora.errors import ConfigError
from theodora.parse import parse_json


@dataclass(frozen=True)
class Computed:
    """A value that is known only when the script runs."""

    source: str

    def __repr__(self) -> str:
        return self.source


@dataclass(frozen=True)
class Call:
    """One call."""

    name: str
    """What is called, without what stands before its last dot."""
    owner: str
    """What stands before it: `FastLanguageModel` of `FastLanguageModel.from_pretrained`."""
    line: int
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    """By keyword (`**options` under that name); a value is `Computed` where it is no literal."""
    positional: tuple[Any, ...] = ()


def calls_in(path: Path) -> list[Call]:
    """Every call in a .py or .ipynb file, from top to bottom.

    Raises:
        ConfigError: the file cannot be read, or is no Python.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(_cells(text) if path.suffix == ".ipynb" else text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{path} is no Python that can be read: {error}") from error
    known = dict(_constants(tree))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [_call(node, known) for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset))]


def _cells(text: str) -> str:
    """The code of a notebook; lines for the shell and for the notebook are left out."""
    notebook = parse_json(text)
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(cells, list):
        raise ValueError("it has no cells")
    lines: list[str] = []
    for cell in cells:
        if isinstance(cell, dict) and cell.get("cell_type") == "code":
            source = cell.get("source", "")
            code = "".join(map(str, source)) if isinstance(source, list) else str(source)
            if not code.lstrip().startswith("%%"):
                lines += ["pass" if line.lstrip()[:1] in ("!", "%") else line for line in code.splitlines()]
    return "\n".join(lines)


def _constants(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """Names that are given one literal, once."""
    given: dict[str, list[ast.expr | None]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            given.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            given.setdefault(node.target.id, []).append(node.value)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            given.setdefault(node.id, [])
    stores: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            stores[node.id] = stores.get(node.id, 0) + 1
    for name, values in given.items():
        if len(values) == 1 and stores.get(name) == 1 and values[0] is not None:
            try:
                yield name, ast.literal_eval(values[0])
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                continue


def _call(node: ast.Call, known: dict[str, Any]) -> Call:
    owner, _, name = ast.unparse(node.func).rpartition(".")
    arguments = {
        keyword.arg or f"**{ast.unparse(keyword.value)}": _value(keyword.value, known) for keyword in node.keywords
    }
    return Call(name, owner, node.lineno, arguments, tuple(_value(argument, known) for argument in node.args))


def _value(node: ast.expr, known: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return Computed(ast.unparse(node))
