"""The cells of a comparison, in two rounds: runs that choose each learning rate, then the seeds. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from theodora.compare.config import CompareConfig
from theodora.compare.methods import Variant

Phase = Literal["base", "tune", "final"]
Status = Literal["ok", "diverged", "out of memory", "failed", "killed"]
"""`killed`: its process died without a word, again and again. That is no verdict: it is tried again when resumed."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run, or the base model as it is (`phase` base)."""

    phase: Phase
    data: str = ""
    variant: str = ""
    """Key of the variant."""
    learning_rate: float = 0.0
    seed: int = 0

    @property
    def key(self) -> str:
        """Short and unique, fit for a file name."""
        if self.phase == "base":
            return "base"
        rate = f"{self.learning_rate:g}"  # of six digits: two that differ only beyond them are two cells
        rate = rate if float(rate) == self.learning_rate else repr(self.learning_rate)
        return f"{self.phase}.{self.data}.{self.variant}.lr{rate}.seed{self.seed}"


@dataclass(kw_only=True)
class Record:
    """What came out of a cell. Losses are means per predicted token, in nats; scores are 0 to 1, more is better."""

    key: str
    phase: Phase
    data: str = ""
    variant: str = ""
    method: str = ""
    rank: int | None = None
    replay: float = 0.0
    learning_rate: float = 0.0
    seed: int = 0
    status: Status = "ok"
    message: str = ""
    validation_score: float | None = None
    validation_loss: float | None = None
    score: float | None = None
    """On test rows."""
    loss: float | None = None
    general_loss: float | None = None
    other_scores: dict[str, float] = field(default_factory=dict[str, float])
    """On test rows of the other data sets (of all, for the base model)."""
    other_losses: dict[str, float] = field(default_factory=dict[str, float])
    parameters: int = 0
    """How many numbers were trained."""
    train_seconds: float = 0.0
    seconds: float = 0.0
    """With evaluation."""
    tokens: int = 0
    drawn: int = 0
    """Tokens that were drawn to learn from (grpo)."""
    judged: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    """Of answers drawn to its data set's test prompts (of all, for the base model): `reward` (the weighted sum),
    rewards/NAME of each function, `length` in tokens, and `kl` from what the reference is, of a token, in nats."""
    peak_memory: int = 0
    """Most bytes held while training."""
    graphed_steps: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    """Training losses along the way, (step, mean since the one before)."""
    curve: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    """Losses on validation rows along the way, (step, loss)."""
    device: str = ""
    sizes: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    """Of the base model's record: for each data set the rows of its parts, and the share of the commonest answer."""

    @classmethod
    def of(cls, cell: Cell, config: CompareConfig) -> Record:
        """A record of a cell that has not run yet."""
        variant = next((v for v in config.variants if v.key == cell.variant), None)
        return cls(
            **asdict(cell),
            key=cell.key,
            method=variant.name if variant else "",
            rank=variant.rank if variant else None,
            replay=variant.replay if variant else 0.0,
        )

    @property
    def reward(self) -> float | None:
        """Mean reward of the answers to test prompts."""
        return self.judged.get(self.data, {}).get("reward")

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


Records = Mapping[str, Record]


def all_cells(config: CompareConfig, records: Records) -> tuple[list[Cell], list[Cell]]:
    """The cells that can run now and have not, and those of all rounds whose learning rate is not known yet.

    The latter bear a learning rate of 0.
    """
    ready: list[Cell] = []
    later: list[Cell] = []
    if "base" not in records:
        ready.append(Cell(phase="base"))
    for data in config.data:
        for variant in config.variants:
            cells = tuning_cells(config, data, variant)
            missing = [cell for cell in cells if cell.key not in records]
            ready += missing
            rate = None if missing else chosen_rate(config, records, data, variant)
            if rate is None and not missing:
                continue  # no learning rate works
            finals = [
                Cell(phase="final", data=data, variant=variant.key, learning_rate=rate or 0.0, seed=seed)
                for seed in config.final_seeds
            ]
            if rate is None:
                later += finals
            else:
                ready += [cell for cell in finals if cell.key not in records]
    return ready, later


def tuning_cells(config: CompareConfig, data: str, variant: Variant) -> list[Cell]:
    """The runs that choose the learning rate; none where there is no choice."""
    if len(variant.learning_rates) < 2:
        return []
    return [
        Cell(phase="tune", data=data, variant=variant.key, learning_rate=rate, seed=seed)
        for rate in variant.learning_rates
        for seed in config.choosing_seeds
    ]


def chosen_rate(config: CompareConfig, records: Records, data: str, variant: Variant) -> float | None:
    """The learning rate that was best on validation rows; None if none was finished.

    A rate of which a run did not finish is out: it is not to be relied on.
    """
    if len(variant.learning_rates) < 2:
        return next(iter(variant.learning_rates), None)
    scored: dict[float, tuple[float, float]] = {}
    for rate in variant.learning_rates:
        runs = [records.get(c.key) for c in tuning_cells(config, data, variant) if c.learning_rate == rate]
        if all(run is not None and run.status == "ok" for run in runs):
            scored[rate] = _quality([run for run in runs if run is not None], config.select)
    return max(scored, key=lambda rate: (*scored[rate], -rate)) if scored else None


def at_the_edge(config: CompareConfig, records: Records, data: str, variant: Variant) -> str | None:
    """`lowest` or `highest`, if the chosen learning rate is the end of what was tried."""
    rate, rates = chosen_rate(config, records, data, variant), variant.learning_rates
    if rate is None or len(rates) < 2:
        return None
    return "lowest" if rate == rates[0] else "highest" if rate == rates[-1] else None


def _quality(runs: list[Record], select: str) -> tuple[float, float]:
    losses = [run.validation_loss if run.validation_loss is not None else math.inf for run in runs]
    loss = sum(losses) / len(losses)
    scores = [run.validation_score for run in runs if run.validation_score is not None]
    if select == "loss" or len(scores) < len(runs):
        return -loss, 0.0
    return sum(scores) / len(scores), -loss


def final_records(config: CompareConfig, records: Records, data: str, variant: Variant) -> list[Record]:
    """The finished final runs of a variant on a data set, by seed."""
    rate = chosen_rate(config, records, data, variant)
    if rate is None:
        return []
    keys = (
        Cell(phase="final", data=data, variant=variant.key, learning_rate=rate, seed=seed).key
        for seed in config.final_seeds
    )
    return [records[key] for key in keys if key in records]


def pairs(config: CompareConfig) -> Iterator[tuple[str, Variant]]:
    """Every data set with every variant."""
    return ((data, variant) for data in config.data for variant in config.variants)
