"""Gather what the docs site is built from (`make docs`): docs/, the pages beside it, and a reference of the program.

    python .ci/site/gather.py out/site-source && zensical build --strict

docs/ is written for GitHub: README.md is a folder's first page, and links go to any file of the repository. Here a
README.md becomes index.md, and every other file that a page links to is copied to files/. A link to a file or an anchor
that is not there ends this with 1; zensical looks again at the pages that it makes.
"""

import contextlib
import inspect
import io
import os
import posixpath
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).parents[2]
PROJECT_PAGES = ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")
"""Pages of the repository's root that are on the site. README.md is not: docs/README.md is the site's first page."""
_FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(?P<ticks>`+)[^`].*?(?<!`)(?P=ticks)(?!`)", re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:)([^)\s]+)(?=\))")
_HEADING = re.compile(r"^#{1,6} +(.+?)(?: +#+)?$", re.MULTILINE)


def main() -> None:
    """Write the folder that the site is built from."""
    from theodora.cli.import_notes import without_import_notes

    target = Path(sys.argv[1])
    if problems := dead_links():
        sys.exit("\n".join(["Dead links:", *problems]))
    shutil.rmtree(target, ignore_errors=True)
    for page in pages():
        place = target / on_site(page)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(for_the_site(page, target), encoding="utf-8")
    shutil.copytree(ROOT / "docs/images", target / "images")
    for asset in (*Path(__file__).parent.glob("*.js"), *Path(__file__).parent.glob("*.css")):
        shutil.copyfile(asset, target / asset.name)
    (target / "reference").mkdir()
    with without_import_notes():
        for name, write in (("commands", commands), ("options", options), ("python", public_names)):
            (target / "reference" / f"{name}.md").write_text(write(), encoding="utf-8")


# Pages and their links


def pages() -> list[str]:
    """The pages that people wrote, by path in the repository."""
    return [*sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")), *PROJECT_PAGES]


def on_site(path: str) -> str:
    """Where a file of the repository stands on the site."""
    if path in PROJECT_PAGES:
        return f"project/{path.lower()}"
    if not path.startswith("docs/"):
        return f"files/{path}"
    return re.sub(r"(^|/)README\.md$", r"\1index.md", path.removeprefix("docs/"))


def prose(text: str) -> str:
    """Markdown with its code blanked out, character for character."""
    for code in (_FENCE, _CODE):
        text = code.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    return text


def links(text: str) -> list[tuple[int, int, str]]:
    """Beginning, end and target of the links of a page to what is beside it."""
    return [(match.start(), match.end(), match[1]) for match in _LINK.finditer(prose(text))]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings; headings that are alike get -1, -2, … ."""
    found: set[str] = set()
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        found.add(next(name for i in range(99) if (name := slug + (f"-{i}" if i else "")) not in found))
    return found


def dead_links() -> list[str]:
    """What the pages and the README link to and is not there."""
    problems = list[str]()
    for page in ("README.md", *pages()):
        text = (ROOT / page).read_text(encoding="utf-8")
        for start, _, link in links(text):
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
                problems.append(f"{page}:{text.count(chr(10), 0, start) + 1}: {link}")
    return problems


def for_the_site(page: str, target: Path) -> str:
    """A page with its links as they lead on the site; files that it links to beside the pages are copied there."""
    text = (ROOT / page).read_text(encoding="utf-8")
    there = set(pages())
    for start, end, link in reversed(links(text)):
        path, _, anchor = link.partition("#")
        if not path:
            continue
        linked = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
        if linked == "README.md":
            linked, anchor = "docs/README.md", ""
        place = on_site(linked)
        if linked not in there and not linked.startswith("docs/images/"):
            (target / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / linked, target / place)
        new = posixpath.relpath(place, posixpath.dirname(on_site(page)) or ".")
        text = text[:start] + new + (f"#{anchor}" if anchor else "") + text[end:]
    return text


# The reference


def commands() -> str:
    """Every command with its `--help`."""
    from theodora.cli.main import COMMANDS, main

    os.environ["COLUMNS"] = "100"
    parts = ["# Commands\n\n`theodora COMMAND --help`, as the program prints it."]
    for heading, group in COMMANDS.items():
        parts.append(f"## {heading}")
        for name in group:
            with contextlib.redirect_stdout(io.StringIO()) as output:
                main([name, "--help"])
            parts.append(f"### theodora {name}\n\n```text\n{output.getvalue().rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def options() -> str:
    """Every option of a recipe, and of a comparison's file, from the classes that read them."""
    from theodora.cli.train import GROUPS
    from theodora.compare.config import CompareConfig, DataConfig
    from theodora.train.passed_on import passed_options

    parts = [
        "# Options\n\nOf `theodora train`: each is a name in a YAML file, a flag (`per_device_train_batch_size` is "
        "`--per-device-train-batch-size`) and a field of `TrainConfig` or, under *Adapter*, of `AdapterConfig`. "
        "`theodora schema` writes them as a JSON Schema, with which editors complete a file."
    ]
    parts += [f"## {heading}\n\n{_table(_fields(cls, names))}" for heading, (cls, names) in GROUPS.items()]
    passed = [(o.name, _words(o.hint), o.default, o.description) for o in passed_options() if not o.refused]
    parts.append(
        "## Passed on to TRL\n\nAny other field of `trl.SFTConfig`, and those that an objective's own configuration "
        f"has, as the TRL that this page was made with describes them.\n\n{_table(passed)}"
    )
    parts.append("## The file of theodora compare\n\n" + _table(_fields(CompareConfig)))
    parts.append("### A data set in it\n\n" + _table(_fields(DataConfig)))
    return "\n\n".join(parts) + "\n"


def _fields(config_class: type, names: tuple[str, ...] | None = None) -> list[tuple[str, str, Any, str]]:
    from theodora.cli.arguments import field_docstrings
    from theodora.coerce import type_hints

    texts, hints = field_docstrings(config_class), type_hints(config_class)
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(config_class)
    }
    return [(name, _words(hints[name]), defaults[name], texts.get(name, "")) for name in names or tuple(defaults)]


def _words(hint: Any) -> str:
    """A type in a reader's words."""
    from theodora.coerce import alternatives

    found = dict[str, None]()
    for choice in alternatives(hint):
        kind, inner = get_origin(choice) or choice, get_args(choice)
        if kind is Literal:
            found |= {f"`{word}`": None for word in inner}
        elif kind in (tuple, list):
            found["numbers" if inner and inner[0] in (int, float) else "list"] = None
        elif isinstance(kind, type) and issubclass(kind, Mapping):
            found["mapping"] = None
        elif kind is not type(None):
            name = {bool: "true, false", int: "whole number", float: "number", str: "text"}.get(kind)
            found[name or getattr(kind, "__name__", "any")] = None
    return ", ".join(found)


def _table(rows: list[tuple[str, str, Any, str]]) -> str:
    lines = ["| option | takes | |", "|---|---|---|"]
    for name, kind, default, text in rows:
        plain = isinstance(default, bool | int | float | str | tuple) and default not in ("", ())
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        value = f"; default `{str(shown).lower() if isinstance(default, bool) else shown}`" if plain else ""
        cells = (f"`{name}`", kind + value, " ".join(text.split()))
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
    return "\n".join(lines)


def public_names() -> str:
    """What `import theodora` offers, from the docstrings."""
    import theodora

    parts = ["# Python\n\nThe public names of the package. [From Python](../python.md) shows them at work."]
    for name in theodora.__all__:
        if name.startswith("__"):
            continue
        thing = getattr(theodora, name)
        parts.append(f"## {name}")
        if name.endswith("Config"):
            parts.append(f"Its fields are [the options](options.md{'#adapter' if name == 'AdapterConfig' else ''}).")
        elif not isinstance(thing, type):
            parts.append(f"```python\n{name}{_signature(thing)}\n```")
        parts += _sections(inspect.getdoc(thing) or "")
    return "\n\n".join(parts) + "\n"


def _signature(function: Any) -> str:
    """Its parameters, each in a line of its own where one line would be long."""
    signature = inspect.signature(function)
    shown = list[str]()
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        shown.append(f"{parameter.name}: {parameter.annotation}{default}")
    end = f" -> {signature.return_annotation}"
    line = f"({', '.join(shown)}){end}"
    return line if len(line) < 80 else "(\n" + "".join(f"    {part},\n" for part in shown) + f"){end}"


def _sections(docstring: str) -> Iterator[str]:
    """The paragraphs of a docstring, and its Args, Raises and the rest as Markdown."""
    heading = re.compile(r"^(Args|Returns|Raises|Example|Yields):\n((?:(?:    .*)?(?:\n|$))+)", re.MULTILINE)
    yield heading.split(docstring)[0].strip()
    for title, body in heading.findall(docstring):
        text = textwrap.dedent(body).strip()
        if title in ("Args", "Raises"):
            items = re.sub(r"\n(?=\S)", "\n\n", text).split("\n\n")
            lines = [re.sub(r"^(\w+): ", r"`\1`: ", " ".join(item.split())) for item in items]
            text = "\n".join(f"- {line}" for line in lines)
        yield f"**{title}**\n\n{text}"


if __name__ == "__main__":
    main()
