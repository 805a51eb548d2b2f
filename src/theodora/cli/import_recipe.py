"""`theodora import`: a recipe of Axolotl or LLaMA-Factory, or a script of Unsloth's -> our YAML. Nothing of it is run.

example:
  theodora import qlora.yaml --output recipe.yaml
  theodora import examples/train_lora/qwen_lora_sft.yaml > recipe.yaml
  theodora import Llama3_finetune.ipynb --from unsloth

Every field is translated, or told with what it would have meant: nothing is dropped in silence. What the tool does by
default, and ours does otherwise, is written too. Read what is said to be without counterpart before the run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from theodora.errors import ConfigError

if TYPE_CHECKING:
    from theodora.foreign import Note, Translation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `theodora import`."""
    parser.add_argument("file", metavar="FILE", help="a .yaml, .json, .py or .ipynb file")
    parser.add_argument(
        "--from",
        dest="tool",
        choices=["axolotl", "llama-factory", "unsloth"],
        help="whose it is. Default: what its fields say",
    )
    parser.add_argument("--output", metavar="FILE", help="the recipe to write. Default: standard output")
    parser.add_argument("--overwrite", action="store_true", help="replace that file")
    parser.add_argument("--json", action="store_true", help="print options and notes as JSON, instead of the recipe")


def run(args: argparse.Namespace) -> int:
    """Translate, write, and say what became of each field."""
    from theodora.cli.console import print_json, stderr, stdout
    from theodora.cli.imports import imports
    from theodora.foreign import translate
    from theodora.foreign.written import as_yaml

    output = None if args.output is None else Path(args.output)
    if output is not None and output.exists() and not args.overwrite:
        raise ConfigError(f"{output} is there already; --overwrite replaces it.")
    with imports():
        from theodora.train.passed_on import checks
    translation = translate(Path(args.file), args.tool, checks())
    recipe = as_yaml(translation, args.file)
    if output is not None:
        from theodora.files.atomic import atomic_write

        with atomic_write(output) as partial:
            partial.write_text(recipe, encoding="utf-8")
    if args.json:
        print_json(_as_json(translation))
    elif output is None:
        stdout().print(recipe.rstrip("\n"), soft_wrap=True)
        stdout().file.flush()  # before what is said of it
    report = stdout() if output is not None and not args.json else stderr()
    _say(report, translation, args.output or "FILE")
    return 0


def _as_json(translation: Translation) -> dict[str, Any]:
    notes = [
        {"kind": note.kind, "field": note.field, "value": _plain(note.value), "text": note.text}
        for note in translation.notes
    ]
    return {"tool": translation.tool, "options": translation.options, "notes": notes}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _say(console: Any, translation: Translation, output: str) -> None:
    """What is to be read before the run first; what went through, as a number."""
    from theodora.foreign.written import HEADINGS, said
    from theodora.safe_text import quoted

    by_kind: dict[str, list[Note]] = {
        kind: [note for note in translation.notes if note.kind == kind] for kind in HEADINGS
    }
    console.print(f"{translation.tool}: {len(by_kind['translated'])} fields translated.", style="bold")
    for kind, heading in HEADINGS.items():
        notes = by_kind[kind]
        if kind == "translated" or not notes:
            continue
        console.print(f"{heading}:", style="yellow" if kind == "missing" else "bold")
        if kind == "unset":
            console.print("  " + ", ".join(note.field for note in notes))
            continue
        for note in notes:
            console.print(f"  {said(note)}", soft_wrap=True)
    words = [word for note in by_kind["flag"] for word in note.text.partition(": ")[0].split(" --")]
    environment = [word for word in words if not word.startswith("--") and "=" in word.partition(" ")[0]]
    flags = ["--" + word.removeprefix("--") for word in words if word not in environment]
    console.print(
        " ".join([*environment, "theodora train --config", quoted(output), *dict.fromkeys(flags)]), soft_wrap=True
    )
