"""The one console: names are text, nothing in them is obeyed, and a reader that goes away ends nothing."""

import io
import os

import pytest
from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from theodora.terminal import Terminal

HOSTILE = "[/]\x1b[2J\u202e[bold]x[/bold]:smile:"
SHOWN = "[/]\\x1b[2J\\u202e[bold]x[/bold]:smile:"


def shown(renderable: object, encoding: str = "utf-8", **options: object) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Terminal(file=stream, **{"width": 100, **options}).print(renderable)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def a_table() -> Table:
    table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(Text.assemble((HOSTILE, "red")))
    return table


@pytest.mark.parametrize(
    "renderable",
    [HOSTILE, Text(HOSTILE), Text.assemble("a ", (HOSTILE, "bold")), a_table(), Panel(HOSTILE, title=Text(HOSTILE))],
    ids=lambda renderable: type(renderable).__name__,
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_names_are_text_wherever_they_stand(renderable, encoding):
    told = shown(renderable, encoding)
    assert SHOWN in told
    assert "\x1b" not in told
    assert "\u202e" not in told


def test_a_line_of_a_table_is_as_long_as_the_others_whatever_a_cell_holds():
    for encoding in ("utf-8", "ascii"):
        lines = shown(a_table(), encoding).splitlines()[1:-1]
        assert len({len(line) for line in lines}) == 1


def test_own_styles_reach_the_terminal_and_foreign_ones_do_not():
    told = shown(Text.assemble(("\x1b[31mred", "bold")), force_terminal=True, color_system="standard", no_color=False)
    assert "\x1b[1m" in told
    assert "\x1b[31m" not in told
    assert "\\x1b" in told


def test_spinners_and_bars_show_names_as_they_are():
    stream = io.StringIO()
    console = Terminal(file=stream, force_terminal=True, width=100)
    with console.status(HOSTILE) as status:
        status.update(HOSTILE)
    with Progress(TextColumn("{task.description}", markup=False), console=console) as bar:
        bar.add_task(HOSTILE)
    assert SHOWN in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()


def test_a_users_own_console_keeps_its_stream_and_its_record():
    theirs = Console(file=io.StringIO(), record=True, width=100)
    ours = Terminal.over(theirs)
    ours.print(HOSTILE)
    assert SHOWN in theirs.export_text()
    assert Terminal.over(ours) is ours
    theirs.print("[bold]x[/bold]")
    assert "[bold]" not in theirs.export_text()  # with it they write as they like


def test_a_pipe_that_nobody_reads_ends_nothing():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        console = Terminal(file=stream)
        console.print("lost")
        console.print("lost as well")
        assert console.quiet
