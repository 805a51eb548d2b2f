"""`theodora verify`: do two forms of one model predict the same?

example:
  theodora verify runs/first merged
  theodora verify runs/first model.gguf --text my_domain.txt
  theodora verify runs/first http://localhost:8000/v1#first --json

A form is a model folder or hub name, an adapter folder, a .gguf file (of a model or a LoRA), or a running
OpenAI-compatible server, the model's name after a # (its key, if it wants one, in THEODORA_API_KEY). Both are computed
in float32, so that what differs is what the files hold. Exit code 1: they differ by more than the bounds.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from theodora.cli.arguments import not_negative, positive

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from theodora.export import Verification
    from theodora.export.predictions import Difference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `theodora verify`."""
    parser.add_argument("a", metavar="A", help="the form to trust")
    parser.add_argument("b", metavar="B", help="the form to check")
    parser.add_argument("--base-model", metavar="MODEL", help="base of an adapter that does not name the right one")
    add_probe_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on standard output")


def add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is compared, and within which bounds."""
    parser.add_argument(
        "--text", metavar="FILE", help="a text to compare on, one of your domain. Default: a built-in page"
    )
    parser.add_argument(
        "--tokens", type=positive, metavar="N", help="tokens of it. Default: 256; 64 with a server, each a request"
    )
    parser.add_argument(
        "--bound",
        type=not_negative,
        metavar="X",
        help="largest difference of a logit. Default: by the stored precision",
    )
    parser.add_argument(
        "--kl-bound",
        type=not_negative,
        metavar="X",
        help="largest mean KL divergence, in nats. Default: by the precision",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def run(args: argparse.Namespace) -> int:
    """Compare and report."""
    from theodora.cli.console import print_json, stderr, stdout
    from theodora.export import verify

    with stderr().status("Comparing ...") as status:
        result = verify(
            args.a,
            args.b,
            base_model=args.base_model,
            text=read_text(args.text),
            tokens=args.tokens,
            bound=args.bound,
            kl_bound=args.kl_bound,
            trust_remote_code=args.trust_remote_code,
            progress=status.update,
        )
    if args.json:
        print_json(result.to_dict())
    else:
        show(result, stdout())
    return 0 if result.passed else 1


def read_text(path: str | None) -> str | None:
    """The user's text, or None.

    Raises:
        UsageError: the file cannot be read as text.
    """
    from theodora.errors import UsageError

    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {path} cannot be read: {error}") from error


def show(result: Verification, console: Console, *, verdict: bool = True) -> None:
    """Print the table, the first token that differs, and the verdict."""
    from rich.text import Text

    from theodora.cli.tables import print_table

    names = result.a, result.b
    for side, name, *facts in zip("AB", names, result.kinds, result.precisions, result.written, strict=True):
        told = ", ".join(fact for fact in facts if fact)
        console.print(Text.assemble(f"{side}  {name}  ", (f"({told})", "dim")), soft_wrap=True)
    print_table(console, _table(result))
    difference = result.difference
    if difference.first is None:
        console.print(f"The likeliest next token is the same after each of {difference.positions} tokens.")
    elif result.first_text is not None:
        before, mine, theirs = (repr(text) for text in result.first_text)
        tie = "" if difference.margin is None else f" ({difference.margin:.2g} nats apart in A)"
        console.print(
            f"First choice that differs: after token {difference.first}, {before}: A {mine}, B {theirs}{tie}.",
            markup=False,
            soft_wrap=True,
        )
    for note in result.notes:
        console.print("Note: " + note, markup=False, style="yellow", soft_wrap=True)
    if not verdict:
        return
    if result.passed:
        console.print("The two forms agree.", style="green")
    else:
        why = "by about what the adapter does: it is not in both" if result.lost else "by more than the bounds"
        console.print(f"The two forms differ {why}.", style="red")


def _table(result: Verification) -> Table:
    from rich import box
    from rich.table import Table

    difference, effect = result.difference, result.effect
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("over the probe text", no_wrap=True)
    for heading in ("A to B", "bound", *(("adapter to base",) if effect else ())):
        table.add_column(heading, justify="right", no_wrap=True)

    def row(label: str, value: str, bound: str, field: str) -> None:
        theirs = () if effect is None else (_cell(effect, field),)
        table.add_row(label, value, bound, *theirs)

    row(f"largest {difference.measure} difference", _cell(difference, "largest"), _limit(result.bound), "largest")
    row("mean KL divergence, nats", _cell(difference, "kl_mean"), _limit(result.kl_bound), "kl_mean")
    row("largest KL divergence", _cell(difference, "kl_max"), "", "kl_max")
    row("same likeliest token", _cell(difference, "agreeing"), "", "agreeing")
    return table


def _cell(difference: Difference, field: str) -> str:
    value = getattr(difference, field)
    return f"{value:.1%}" if field == "agreeing" else _number(value)


def _limit(bound: float) -> str:
    return "-" if math.isinf(bound) else _number(bound)


def _number(value: float) -> str:
    return (
        "0"
        if value == 0
        else f"{value:.2g}"
        if 1e-3 <= abs(value) < 1e4 or not math.isfinite(value)
        else f"{value:.1e}"
    )
