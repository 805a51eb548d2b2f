"""report.html: one page with all results of a comparison, which needs no other file to be read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from theodora.compare import figures
from theodora.compare.cells import Record, all_cells, tuning_cells
from theodora.compare.config import CompareConfig
from theodora.compare.methods import Variant
from theodora.compare.page import CELL_TITLES, NOTES, PAGE, cell_row, escape, estimated, million, signed, table
from theodora.compare.store import REPORT, Store
from theodora.compare.summary import MEASURES, POOLED, Finding, Line, Measure, lines, tests
from theodora.files.atomic import atomic_write


def write_report(store: Store) -> Path:
    """Write the page from the records there are, also of a comparison that is not finished."""
    config, records = store.config, store.records
    all_lines = lines(config, records)
    sections = [
        _unfinished(store),
        _asked(config, records),
        *_in_words(config, tests(config, all_lines)),
        _results(config, all_lines, records.get("base")),
        _answers(config, all_lines, records.get("base")),
        _tests(config, tests(config, all_lines)),
        *_figures(config, records, all_lines),
        _failures(records.values()),
        _runs(records.values()),
        f"<section><h2>How to read this</h2>{NOTES}</section>",
    ]
    title = f"{Path(config.model).name}: {', '.join(dict.fromkeys(v.name for v in config.variants))}"
    page = PAGE.replace("{title}", escape(title)).replace("{body}", "\n".join(filter(None, sections)))
    path = store.folder / REPORT
    with atomic_write(path) as file:
        file.write_text(page, encoding="utf-8")
    return path


def _unfinished(store: Store) -> str:
    ready, later = all_cells(store.config, store.records)
    left = len(ready) + len(later)
    return f'<p class="warning">This comparison is not finished: {left} cells are still to run.</p>' if left else ""


def _asked(config: CompareConfig, records: dict[str, Record]) -> str:
    base = records.get("base")
    devices = sorted({record.device for record in records.values() if record.device})
    seeds, choosing = config.final_seeds, config.choosing_seeds
    what = [
        ("model", config.model),
        ("methods", ", ".join(dict.fromkeys(f"{v.title.partition(',')[0]}" for v in config.variants))),
        ("ranks", ", ".join(map(str, sorted({v.rank for v in config.variants if v.rank is not None}))) or "–"),
        (
            "learning rates",
            ", ".join(f"{rate:g}" for rate in sorted({r for v in config.variants for r in v.learning_rates})),
        ),
        (
            "seeds",
            f"{len(seeds)} ({', '.join(map(str, seeds))}); the learning rate was chosen with {len(choosing)} other",
        ),
        ("each run", f"{config.steps} steps of {config.batch_size} rows, {config.lr_scheduler_type} schedule"),
        *_rewarded(config),
        ("ran on", ", ".join(devices) or "–"),
    ]
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in what)
    data = []
    for name, wanted in config.data.items():
        sizes = base.sizes.get(name, {}) if base is not None else {}
        commonest = sizes.get("commonest")
        data.append(
            [
                escape(name),
                *(f"{int(sizes[part]):,}" if part in sizes else "–" for part in ("train", "validation", "test")),
                escape(wanted.score),
                "–" if commonest is None else f"{100 * commonest:.1f} %",
            ]
        )
    head = ["data set", "rows to train on", "validation", "test", "scored by", "always the commonest answer"]
    return f"<section><h2>What was asked</h2><table class='facts'>{rows}</table>{table(head, data)}</section>"


def _rewarded(config: CompareConfig) -> list[tuple[str, str]]:
    """What is said of rewards, if there are any."""
    if not config.reward:
        return []
    weights = config.reward_weights or (1.0,) * len(config.reward)
    rows = [("rewards", " + ".join(f"{w:g} × {name}" for w, name in zip(weights, config.reward, strict=True)))]
    if any(variant.objective == "grpo" for variant in config.variants):
        equal = (
            f"steps, and rows of a step: {config.batch_size} prompts, each answered as often as num_generations says. "
            "Neither tokens nor time are equal"
        )
        rows.append(("what grpo has in common with the others", equal))
    return rows


def _in_words(config: CompareConfig, findings: Sequence[Finding]) -> Iterable[str]:
    main: Measure = "score" if any(test.measure == "score" for test in findings) else "loss"
    where = POOLED if len(config.data) > 1 else next(iter(config.data))
    for measure in (main, "general_loss"):
        own = [test for test in findings if test.measure == measure and test.data == where]
        if own:
            differ, same = [t for t in own if t.is_found], [t for t in own if not t.is_found]
            items = "".join(f"<li>{_sentence(test)}</li>" for test in [*differ, *same])
            lead = (
                f"{where.capitalize()}; pairs of runs with the same seed; p-values corrected for {len(own)} tests, of "
                f"which {len(differ)} find a difference."
            )
            title = f"In words: {MEASURES[measure]}"
            yield f"<section><h2>{escape(title)}</h2><p>{escape(lead)}</p><ul>{items}</ul></section>"


def _sentence(test: Finding) -> str:
    titles = escape(test.variant.title), escape(test.reference.title)
    words = f"<b>{titles[0]}</b> against {titles[1]}: {escape(test.in_words())}"
    return f"<b>{words}</b>" if test.is_found else words


def _results(config: CompareConfig, all_lines: Sequence[Line], base: Record | None) -> str:
    parts = []
    for data in config.data:
        own = [line for line in all_lines if line.data == data]
        rows = [_base_row(data, base)] if base is not None else []
        best = max((line.score.mean for line in own if line.score is not None), default=None)
        rows += [_result_row(line, base, best) for line in own]
        head = [
            "method", "test score, %", "test loss", "general text", "of which forgotten", "other tasks, points",
            "parameters", "learning rate", "seconds", "memory", "seeds",
        ]  # fmt: skip
        parts.append(f"<h3>{escape(data)}</h3>{table(head, rows)}")
    return f"<section><h2>Results</h2><p>Means over seeds ± half of the 95 % interval.</p>{''.join(parts)}</section>"


def _base_row(data: str, base: Record) -> list[str]:
    score, loss = base.other_scores.get(data), base.other_losses.get(data)
    return [
        "<i>base model</i>",
        "–" if score is None else f"{100 * score:.1f}",
        "–" if loss is None else f"{loss:.3f}",
        "–" if base.general_loss is None else f"{base.general_loss:.3f}",
        *["–"] * 7,
    ]


def _result_row(line: Line, base: Record | None, best: float | None) -> list[str]:
    name = escape(line.variant.title)
    if not line.runs:
        return [name, "no run finished", *["–"] * 8, f"0 ({len(line.failed)} failed)"]
    score = estimated(line.score, 100, 1)
    general, before = line.general_loss, base.general_loss if base is not None else None
    forgotten = "–" if general is None or before is None else signed(general.mean - before, 3)
    edge = f" <small>({line.edge} tried)</small>" if line.edge else ""
    failed = f" <small>({len(line.failed)} failed)</small>" if line.failed else ""
    return [
        name,
        f"<b>{score}</b>" if line.score is not None and line.score.mean == best else score,
        estimated(line.loss, 1, 3),
        estimated(general, 1, 3),
        forgotten,
        "–" if line.other_change is None else signed(100 * line.other_change.mean, 1),
        million(line.parameters),
        "–" if line.rate is None else f"{line.rate:g}{edge}",
        f"{line.mean(lambda run: run.train_seconds):.1f}",
        f"{line.mean(lambda run: float(run.peak_memory)) / 1e9:.2f} GB",
        f"{len(line.runs)}{failed}",
    ]


def _answers(config: CompareConfig, all_lines: Sequence[Line], base: Record | None) -> str:
    """What the models' own answers to test prompts are rewarded with."""
    if not config.reward:
        return ""
    parts = []
    for data in config.data:
        own = [line for line in all_lines if line.data == data and line.runs]
        known = (found for line in own for run in line.runs if (found := run.judged.get(data)))
        before = base.judged.get(data, {}) if base is not None else {}
        functions = [name for name in next(known, before) if name.startswith("rewards/")]
        names = ["reward", *functions, "length", "kl"]
        rows = [["<i>base model</i>", *(f"{before[n]:.3f}" if n in before else "–" for n in names), "–", "–"]]
        rows += [
            [
                escape(line.variant.title),
                *(estimated(line.judged(name), 1, 3) for name in names),
                f"{line.mean(lambda run: float(run.drawn)):,.0f}" if line.variant.objective == "grpo" else "–",
                f"{line.mean(lambda run: float(run.tokens)):,.0f}",
            ]
            for line in own
        ]
        head = ["method", "reward", *(n.removeprefix("rewards/") for n in functions), "tokens of an answer"]
        head += ["KL of a token, nats", "tokens drawn to learn from", "tokens trained on"]
        parts.append(f"<h3>{escape(data)}</h3>{table(head, rows)}")
    return (
        "<section><h2>What answers are worth</h2><p>Each model draws one answer to each test prompt, at temperature 1, "
        "by the same random numbers. KL is estimated from those answers: from the base model, or from the adapter that "
        f"a method goes on from.</p>{''.join(parts)}</section>"
    )


def _tests(config: CompareConfig, findings: Sequence[Finding]) -> str:
    rows = []
    for test in findings:
        scale, digits = (100, 1) if test.measure == "score" else (1, 3)
        rows.append(
            [
                escape(test.data),
                MEASURES[test.measure],
                f"{escape(test.variant.title)} − {escape(test.reference.title)}",
                estimated(test.comparison.difference, scale, digits, sign=True),
                _p(test.comparison.p),
                _p(test.comparison.p_corrected),
                "–" if test.comparison.effect is None else f"{test.comparison.effect:+.2f}",
                str(test.comparison.difference.count),
                escape(test.in_words()),
            ]
        )
    if not rows:
        return ""
    head = ["data set", "of", "difference", "mean", "p", "p, corrected", "effect size", "pairs", "in words"]
    return (
        "<section><h2>Tests between methods</h2><p>Paired t-tests, two-sided; a pair is one seed on one data set. "
        "Corrected by Holm's method within one measure on one data set. The effect size is the mean difference over "
        "its standard deviation (Cohen's d<sub>z</sub>). Scores in points of a hundred, losses in nats.</p>"
        f"{table(head, rows)}</section>"
    )


def _p(value: float | None) -> str:
    return "–" if value is None else "&lt; 0.001" if value < 0.001 else f"{value:.3f}"


def _figures(config: CompareConfig, records: dict[str, Record], all_lines: Sequence[Line]) -> Iterable[str]:
    ranks = sorted({v.rank for v in config.variants if v.rank is not None})
    rank = ranks[len(ranks) // 2] if ranks else None
    by_data = {data: [line for line in all_lines if line.data == data] for data in config.data}
    base = records.get("base")
    every = config.variants
    panels = {
        "Score against parameters": {d: figures.score_against_parameters(own, every) for d, own in by_data.items()},
        "Score against forgetting": {
            d: figures.score_against_forgetting(own, every, base) for d, own in by_data.items()
        },
        f"Learning curves{f' at rank {rank}' if rank else ''}": {
            d: figures.learning_curves(own, every, rank) for d, own in by_data.items()
        },
        "Learning rates": {d: _rates(config, records, d) for d in config.data},
    }
    for title, drawn in panels.items():
        shown = {data: svg for data, svg in drawn.items() if svg}
        if shown:
            inside = "".join(f"<figure><figcaption>{escape(d)}</figcaption>{svg}</figure>" for d, svg in shown.items())
            yield f'<section><h2>{escape(title)}</h2><div class="figures">{inside}</div></section>'


def _rates(config: CompareConfig, records: dict[str, Record], data: str) -> str | None:
    scored = config.data[data].score != "loss"
    curves: list[tuple[Variant, list[tuple[float, float]]]] = []
    for variant in config.variants:
        points: dict[float, list[float]] = {}
        for cell in tuning_cells(config, data, variant):
            record = records.get(cell.key)
            value = None if record is None else record.validation_score if scored else record.validation_loss
            if value is not None:
                points.setdefault(cell.learning_rate, []).append(100 * value if scored else value)
        curves.append((variant, [(rate, sum(values) / len(values)) for rate, values in sorted(points.items())]))
    return figures.rates(curves, config.variants, "validation score (%)" if scored else "validation loss (nats)")


def _failures(records: Iterable[Record]) -> str:
    rows = [
        [escape(record.key), escape(record.status), escape(record.message)]
        for record in records
        if record.status != "ok"
    ]
    if not rows:
        return ""
    return f"<section><h2>Runs that failed</h2>{table(['run', 'how', 'why'], rows)}</section>"


def _runs(records: Iterable[Record]) -> str:
    order = {"base": 0, "final": 1, "tune": 2}
    rows = [cell_row(record) for record in sorted(records, key=lambda r: (order[r.phase], r.data, r.variant, r.seed))]
    return (
        f"<section><h2>Every run</h2><details><summary>{len(rows)} runs</summary>{table(CELL_TITLES, rows)}</details>"
        "</section>"
    )
