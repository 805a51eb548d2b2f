"""The page around a report: its style, its notes, and how figures are written into tables."""

from __future__ import annotations

import html
from collections.abc import Sequence

from theodora.compare.cells import Record
from theodora.compare.stats import Estimate
from theodora.safe_text import plain_lines

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light; --ink: #222; --soft: #666; --line: #ddd; --accent: #1f7a5c; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem 1.2rem 4rem; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .8rem 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; border-bottom: 2px solid var(--accent); padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; }
p, li { max-width: 46rem; }
p { margin: .4rem 0; color: var(--soft); } li { margin: .15rem 0; } ul { padding-left: 1.2rem; }
.warning { background: #fff4d6; color: #5c4300; padding: .5rem .8rem; border-radius: 4px; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .28rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td.text { text-align: left; white-space: normal; min-width: 14rem; }
table.facts th, table.facts td { text-align: left; white-space: normal; vertical-align: top; }
small { color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
figure { margin: 0; max-width: 34rem; } figcaption { font-weight: 600; font-size: .9rem; }
figure svg { height: auto; display: block; }
summary { cursor: pointer; color: var(--accent); }
@media print {
  body { font-size: 10px; max-width: none; padding: 0; } table { font-size: 7.5px; } .wide { overflow: visible; }
  th, td { padding: .1rem .25rem; } th:first-child, td:first-child { position: static; } td.text { min-width: 0; }
  section, figure, tr { break-inside: avoid; } section:has(table) { break-inside: auto; } h2, h3 { break-after: avoid; }
  .figures { grid-template-columns: 1fr 1fr; } }
</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""

NOTES = """
<ul>
<li>The learning rate of each method was chosen on validation rows, with seeds of its own; test rows were scored only
in the final runs. Where the rate chosen is the lowest or highest one tried, a better one may lie beyond.</li>
<li>A seed sets the start of the adapter and the order of the rows. The same seed gives all methods the same order,
which is why runs are compared in pairs.</li>
<li>Intervals and tests are about seeds, by Student's t. They do not say how much the scores would differ on other test
rows: with n rows, a score p has a standard error of √(p(1 − p)/n) from that alone.</li>
<li>“No difference found at this size” means just that. The number beside it is the largest difference that the
interval allows.</li>
<li>Labels: the share of rows whose right label is the likeliest of all labels, each with its end token. A model that
was never trained can be asked this as well. Losses are per predicted token, in nats.</li>
<li>General text: loss on texts that have nothing to do with the task. What it rises by, against the base model,
was forgotten. Other tasks: change of the score on the other data sets, against the base model.</li>
<li>Memory is the most that was held while training: on a GPU by the tensors, else by the whole process. Seconds are
those of the training steps alone, on a machine that may have run several at once.</li>
</ul>
"""

CELL_TITLES = [
    "run",
    "status",
    "validation score",
    "validation loss",
    "test score",
    "test loss",
    "general text",
    "last training loss",
    "seconds",
    "memory",
]


def escape(text: str) -> str:
    """Foreign text as text of the page; what turns its direction or is not seen is shown as an escape."""
    return html.escape(plain_lines(text))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are HTML already. Long text is set as text."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(_cell(i, text) for i, text in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(place: int, text: str) -> str:
    return f'<td class="text">{text}</td>' if place and len(text) > 48 and "<" not in text else f"<td>{text}</td>"


def estimated(value: Estimate | None, scale: float, digits: int, *, sign: bool = False) -> str:
    """`81.2 ± 0.7`, or `–`."""
    if value is None:
        return "–"
    mean = signed(scale * value.mean, digits) if sign else f"{scale * value.mean:.{digits}f}"
    return mean if value.half_width is None else f"{mean} ± {scale * value.half_width:.{digits}f}"


def signed(value: float, digits: int) -> str:
    """`+0.02` or `−0.02`."""
    return f"{value:+.{digits}f}".replace("-", "−")


def million(number: int) -> str:
    """`2.44 M` or `61 k`."""
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number / 1e3:.1f} k" if number >= 1000 else str(number)


def cell_row(record: Record) -> list[str]:
    """A run in the table of all runs."""
    return [
        escape(record.key),
        escape(record.status),
        _percent(record.validation_score),
        _loss(record.validation_loss),
        _percent(record.score),
        _loss(record.loss),
        _loss(record.general_loss),
        _loss(record.losses[-1][1] if record.losses else None),
        f"{record.train_seconds:.1f}",
        f"{record.peak_memory / 1e9:.2f} GB",
    ]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
