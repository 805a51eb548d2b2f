"""Records summed up: one line for each method on each data set, and the tests between lines. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from theodora.compare.cells import Record, Records, at_the_edge, chosen_rate, final_records, pairs
from theodora.compare.config import CompareConfig
from theodora.compare.methods import Variant
from theodora.compare.stats import ALPHA, Comparison, Estimate, estimate, holm, paired_test

Measure = Literal["score", "reward", "loss", "general_loss"]
MEASURES: dict[Measure, str] = {
    "score": "test score",
    "reward": "reward of answers to test prompts",
    "loss": "test loss",
    "general_loss": "loss on general text",
}
POOLED = "all data sets"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A method on a data set."""

    data: str
    variant: Variant
    rate: float | None
    """The learning rate chosen; None if none works."""
    edge: str | None
    """lowest or highest, where the rate chosen is the end of those tried."""
    runs: list[Record]
    """The final runs that went well, by seed."""
    failed: list[Record]
    score: Estimate | None
    loss: Estimate | None
    general_loss: Estimate | None
    reward: Estimate | None
    other_change: Estimate | None
    """Mean change of the scores on the other data sets, against the base model."""

    @property
    def parameters(self) -> int:
        """How many numbers were trained."""
        return self.runs[0].parameters if self.runs else 0

    def judged(self, name: str) -> Estimate | None:
        """A figure of the answers to test prompts, over the runs."""
        return _estimate([run.judged.get(self.data, {}).get(name) for run in self.runs])

    def mean(self, of: Callable[[Record], float]) -> float:
        """Mean of a figure over the runs."""
        return sum(map(of, self.runs)) / len(self.runs)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A method against a reference, on one data set or on all together."""

    data: str
    variant: Variant
    reference: Variant
    measure: Measure
    comparison: Comparison

    @property
    def is_found(self) -> bool:
        """Whether there is a difference, after correction."""
        return self.comparison.p_corrected is not None and self.comparison.p_corrected < ALPHA

    @property
    def is_better(self) -> bool:
        """Whether the method is ahead of the reference on average."""
        return (self.comparison.difference.mean > 0) == (self.measure in ("score", "reward"))

    def in_words(self) -> str:
        """One sentence, without names of what it is about."""
        difference = self.comparison.difference
        points = self.measure == "score"
        scale, unit = (100, " points") if points else (1, "" if self.measure == "reward" else " nats")
        if difference.half_width is None:
            return f"only {difference.count} pair: nothing can be said"
        half = scale * difference.half_width
        size = f"{scale * abs(difference.mean):.{1 if points else 3}f}"
        if not self.is_found:
            most = scale * (abs(difference.mean) + difference.half_width)
            return (
                f"no difference found at this size (one of more than {most:.{1 if points else 3}f}{unit} is unlikely)"
            )
        verb = "better" if self.is_better else "worse"
        return f"{verb} by {size}{unit} (± {half:.{1 if points else 3}f})"


def lines(config: CompareConfig, records: Records) -> list[Line]:
    """One line for each data set and variant."""
    base = records.get("base")
    return [_line(config, records, base, data, variant) for data, variant in pairs(config)]


def _line(config: CompareConfig, records: Records, base: Record | None, data: str, variant: Variant) -> Line:
    finals = final_records(config, records, data, variant)
    runs = [record for record in finals if record.status == "ok"]
    before = base.other_scores if base is not None else {}
    changes = [
        sum(run.other_scores[name] - before[name] for name in known) / len(known)
        for run in runs
        if (known := run.other_scores.keys() & before.keys())
    ]
    return Line(
        data=data,
        variant=variant,
        rate=chosen_rate(config, records, data, variant),
        edge=at_the_edge(config, records, data, variant),
        runs=runs,
        failed=[record for record in finals if record.status != "ok"],
        score=_estimate([run.score for run in runs]),
        loss=_estimate([run.loss for run in runs]),
        general_loss=_estimate([run.general_loss for run in runs]),
        reward=_estimate([run.reward for run in runs]),
        other_change=estimate(changes) if changes else None,
    )


def _estimate(values: Sequence[float | None]) -> Estimate | None:
    known = [value for value in values if value is not None]
    return estimate(known) if known else None


def tests(config: CompareConfig, all_lines: Sequence[Line]) -> list[Finding]:
    """Every method against the reference methods: on each data set, and pair by pair over all of them.

    Those of one measure on one data set are read together, and corrected together.
    """
    result: list[Finding] = []
    for measure in MEASURES:
        for data in [*config.data, *([POOLED] if len(config.data) > 1 else [])]:
            family = [
                test
                for variant in config.variants
                for reference in references(config, variant)
                if (test := _test(all_lines, data, variant, reference, measure)) is not None
            ]
            corrected = holm([test.comparison for test in family])
            result += [replace(test, comparison=c) for test, c in zip(family, corrected, strict=True)]
    return result


def references(config: CompareConfig, variant: Variant) -> list[Variant]:
    """What a variant is tested against: the reference methods of its rank, or itself without replay."""
    if variant.replay:
        return [
            v
            for v in config.variants
            if (v.method, v.rank, v.options, v.replay) == (variant.method, variant.rank, variant.options, 0.0)
        ]
    chosen: list[Variant] = []
    for name in config.reference:
        named = [v for v in config.variants if v.name == name]
        same = [v for v in named if v.rank == variant.rank]
        # A method without a rank meets the reference at its largest.
        other = sorted(named, key=lambda v: v.rank or 0)[-1:] if variant.rank is None else []
        chosen += same or other
    own = [v.key for v in config.variants if v.name in config.reference]
    # Two references meet once.
    return [v for v in chosen if v.name != variant.name and not (variant.key in own and v.key > variant.key)]


def _test(
    all_lines: Sequence[Line], data: str, variant: Variant, reference: Variant, measure: Measure
) -> Finding | None:
    one: list[float] = []
    other: list[float] = []
    for name in [line.data for line in all_lines if line.variant.key == variant.key]:
        if data in (name, POOLED):
            mine, theirs = (_by_seed(all_lines, name, v, measure) for v in (variant, reference))
            seeds = sorted(mine.keys() & theirs.keys())
            one += [mine[seed] for seed in seeds]
            other += [theirs[seed] for seed in seeds]
    if not one:
        return None
    return Finding(data=data, variant=variant, reference=reference, measure=measure, comparison=paired_test(one, other))


def _by_seed(all_lines: Sequence[Line], data: str, variant: Variant, measure: Measure) -> dict[int, float]:
    line = next(line for line in all_lines if line.data == data and line.variant.key == variant.key)
    values = {run.seed: getattr(run, measure) for run in line.runs}
    return {seed: value for seed, value in values.items() if value is not None}


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, gain) than which none has less cost and at least as much gain, by cost."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    best: list[int] = []
    for i in order:
        if not best or points[i][1] > points[best[-1]][1]:
            best.append(i)
    return best
