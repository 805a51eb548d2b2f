"""Tables on narrow terminals: whole figures, in several pieces if need be."""

import io

import pytest
from rich import box
from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from theodora.cli.tables import print_table

FIGURES = ("14", "12.3 °", "99.1 °", "0.0012 %", "55.5 %")


def wide(name="self_attn.q_proj"):
    table = Table(box=box.SIMPLE_HEAD, title="changes", caption="means over all rows")
    table.add_column("layers", no_wrap=True)
    for heading in ("modules", "direction", "largest", "magnitude", "largest"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row(name, *FIGURES)
    return table


def printed(table, width):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_table(console, table)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 50, 60, 80, 200])
def test_no_figure_is_cut_at_any_width(width):
    text = printed(wide(), width)
    assert all(figure in text for figure in FIGURES)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert text.count("changes") == text.count("means over all rows") == 1


def test_a_table_that_fits_is_printed_as_it_is():
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    console.print(wide())
    assert printed(wide(), 100) == console.file.getvalue()


def test_every_piece_names_its_rows_and_a_long_name_gives_way_to_figures():
    pieces = printed(wide(), 60).split("layers")[1:]
    assert len(pieces) == 2
    assert all("self_attn.q_proj" in piece for piece in pieces)
    narrow = printed(wide("model.layers.10.self_attn." * 2), 40)
    assert all(figure in narrow for figure in FIGURES)


def test_a_bar_and_its_figure_stay_together():
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layer")
    for name in ("direction", "magnitude"):
        table.add_column(name, width=20)
        table.add_column("", justify="right", no_wrap=True)
    table.add_row("0", Bar(1, 0, 1, width=20), "11.1 °", Bar(1, 0, 1, width=20), "22.2 %")
    first, second = printed(table, 60).split("magnitude")
    assert "11.1 °" in first
    assert "22.2 %" in second
