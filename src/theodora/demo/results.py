"""What the demo measured: as a table, as JSON, and as a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten

from rich import box
from rich.table import Table

from theodora.files.atomic import atomic_write
from theodora.parse import to_json

_BEFORE, _AFTER = "#9aa5b1", "#1f7a5c"
_QUESTION_LENGTH = 120  # characters shown; results.json has all of them


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The model at one moment. Losses are per predicted token, in nats."""

    exact_match: float
    """Share of held-out rows answered exactly, 0 to 1."""
    loss: float
    """On the answers of the held-out rows."""
    general_loss: float
    """On general text: it rises by what was forgotten."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One held-out question and what was said to it."""

    question: str
    reference: str
    base: str
    adapted: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """All figures of one demo."""

    model: str
    dtype: str
    before: Measured
    after: Measured
    training_rows: int
    held_out_rows: int
    """Held-out rows that were scored."""
    all_held_out_rows: int
    """As many as are scored where time allows it."""
    general_texts: int
    all_general_texts: int
    steps: int
    all_steps: int
    measured_step_seconds: float | None
    """What a step took when it was tried out, by which the numbers above were chosen; None where they were not."""
    minutes: float | None
    """In which the demo was to be done."""
    trainable_parameters: int
    total_parameters: int
    training_seconds: float
    tokens_per_second: float
    total_seconds: float
    """From start to end, fetching and converting included."""
    peak_memory: int
    """Bytes."""
    merged_difference: float
    """Largest difference between logits of the merged and of the adapted model, in float32."""
    merged_scale: float
    """Largest absolute logit, to compare that with."""
    answers: tuple[Answers, ...]

    def save(self, path: Path) -> None:
        """Write all figures as JSON."""
        with atomic_write(path) as file:
            file.write_text(to_json(asdict(self), indent=2, readable=True) + "\n", encoding="utf-8")


def result_table(results: Results) -> Table:
    """Before and after, then what it took."""
    before, after = results.before, results.after
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("before", justify="right", no_wrap=True)
    table.add_column("after", justify="right", style="bold", no_wrap=True)
    of_all = f" of {results.all_held_out_rows}" if results.held_out_rows < results.all_held_out_rows else ""
    table.add_row(
        f"exact match, {results.held_out_rows}{of_all} held-out rows",
        f"{before.exact_match:.1%}",
        f"{after.exact_match:.1%}",
    )
    table.add_row("loss on held-out rows", f"{before.loss:.3f}", f"{after.loss:.3f}")
    table.add_row(
        f"loss on general text, {results.general_texts} texts",
        f"{before.general_loss:.3f}",
        f"{after.general_loss:.3f}",
        end_section=True,
    )
    share = results.trainable_parameters / results.total_parameters
    table.add_row("trained parameters", "", f"{results.trainable_parameters:,} ({share:.2%})")
    table.add_row("training", "", f"{results.training_seconds:.0f} s, {results.tokens_per_second:,.0f} tokens/s")
    table.add_row("everything", "", f"{results.total_seconds:.0f} s")
    table.add_row("peak memory", "", f"{results.peak_memory / 1e9:.1f} GB")
    return table


def answers_table(results: Results) -> Table:
    """Held-out questions with both models' answers."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True, title="Held-out questions", title_justify="left"
    )
    table.add_column("finding", ratio=4)
    table.add_column("base model", ratio=3, style="dim")
    table.add_column("adapted", ratio=2, style="bold")
    table.add_column("right answer", ratio=2)
    for answer in results.answers:
        mark = "✓" if answer.adapted == answer.reference else "✗"
        question = shorten(answer.question, _QUESTION_LENGTH, placeholder=" …")
        table.add_row(question, answer.base, f"{mark} {answer.adapted}", answer.reference)
    return table


def draw(results: Results, path: Path) -> None:
    """Draw before and after as three pairs of bars, each pair on its own scale."""
    # The figure class itself, not pyplot: no windows, and no state shared with a user's own figures.
    from matplotlib.figure import Figure

    before, after = results.before, results.after
    panels = [
        (
            "Exact match, held-out rows",
            100 * before.exact_match,
            100 * after.exact_match,
            "{:.1f} %",
            "higher is better",
        ),
        ("Loss, held-out rows", before.loss, after.loss, "{:.2f}", "lower is better"),
        ("Loss, general text", before.general_loss, after.general_loss, "{:.2f}", "the rise is what was forgotten"),
    ]
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    for axes, (title, old, new, form, remark) in zip(figure.subplots(1, 3), panels, strict=True):
        bars = axes.bar(["before", "after"], [old, new], color=[_BEFORE, _AFTER], width=0.62)
        axes.bar_label(bars, labels=[form.format(old), form.format(new)], padding=3, fontsize=12, fontweight="bold")
        axes.set_title(title, fontsize=11, fontweight="bold", color="#222222")
        axes.set_xlabel(remark, fontsize=9, color="#666666")
        axes.set_ylim(0, 100 if "%" in form else 1.15 * max(old, new))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_yticks([])
        axes.tick_params(length=0, labelsize=10)
    figure.suptitle(
        f"{results.model}, DoRA, {results.training_seconds:.0f} s of training on {results.training_rows} rows",
        fontsize=11,
        color="#444444",
    )
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
