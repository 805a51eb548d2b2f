"""loss.png: how the loss fell, on the rows trained on and on those held out; of grpo how the reward rose."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from theodora.files.atomic import atomic_write
from theodora.train.preference_report import function_of, functions_in

_REWARDS = {"rewards/chosen": "better answers", "rewards/rejected": "worse answers", "rewards/margins": "margin"}
_TRAINING, _HELD_OUT, _GENERAL = "#3b6fb6", "#d1603d", "#6a8f3c"
_FUNCTIONS = ("#8064a2", "#4a9a8f", "#b8860b", "#8c564b")
_PER_TOKEN = "token (nats)"
Metrics = dict[str, Any]
"""A line of metrics.jsonl."""


def draw_losses(metrics: Sequence[Metrics], path: Path, title: str, per: str = _PER_TOKEN) -> None:
    """Draw the losses of a run, and beneath them the rewards of better and worse answers, if there are any; of a run
    that learned from rewards these, the length of answers, and how far the model has come.

    Args:
        metrics: the lines of metrics.jsonl.
        path: the PNG to write.
        title: one line above the figure.
        per: what a loss is a mean over.
    """
    # The figure class itself, not pyplot: no windows, and no state shared with a user's own figures.
    from matplotlib.figure import Figure

    held_out, general = _points(metrics, "eval_loss"), _points(metrics, "general_loss")
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    drawn = [line for line in metrics if line.get("reward") is not None]
    if drawn:
        _draw_drawn(figure, drawn, [line for line in metrics if line.get("eval_reward") is not None], title)
        with atomic_write(path) as file:
            figure.savefig(file, format="png")
        return
    rewards = [line for line in metrics if line.get("rewards/margins") is not None]
    if rewards:
        figure.set_size_inches(8, 8)
        axes, below = figure.subplots(2, 1)
        _draw_rewards(below, rewards)
    else:
        axes = figure.subplots()
    _draw_smoothed(axes, metrics, "loss", _TRAINING, "training (smoothed)")
    _draw_points(axes, held_out, _HELD_OUT, "held out")
    if per == _PER_TOKEN:  # what general text costs is of no other scale
        _draw_points(axes, general, _GENERAL, "general text")
    _style(axes, title, f"loss per {per}")
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _draw_points(axes: Any, points: Sequence[tuple[int, float]], color: str, label: str) -> None:
    """Losses at some steps, the last with its value."""
    if not points:
        return
    steps, losses = zip(*points, strict=True)
    axes.plot(steps, losses, color=color, linewidth=2, marker="o", markersize=5, label=label)
    axes.annotate(
        f"{losses[-1]:.3f}",
        (steps[-1], losses[-1]),
        xytext=(8, 0),
        textcoords="offset points",
        color=color,
        va="center",
        fontweight="bold",
    )


def smooth(values: Sequence[float]) -> list[float]:
    """Running mean of each value and its predecessors, over a twentieth of them."""
    width = max(1, len(values) // 20)
    return [sum(part) / len(part) for part in (values[max(0, i - width + 1) : i + 1] for i in range(len(values)))]


def _draw_drawn(figure: Any, lines: Sequence[Metrics], held_out: Sequence[Metrics], title: str) -> None:
    """Rewards, by function if there are several; tokens of an answer; the divergence from the reference."""
    figure.set_size_inches(8, 9)
    rewards, lengths, divergence = figure.subplots(3, 1, height_ratios=(3, 2, 2), sharex=True)
    _draw_smoothed(rewards, lines, "reward", _TRAINING, "training (smoothed)")
    for name, color in zip(functions_in(lines), itertools.cycle(_FUNCTIONS)):
        _draw_smoothed(rewards, lines, name, color, function_of(name))
    _draw_points(rewards, _points(held_out, "eval_reward"), _HELD_OUT, "held out")
    _draw_smoothed(lengths, lines, "completions/mean_length", _TRAINING, "training (smoothed)")
    _draw_points(lengths, _points(held_out, "eval_completions/mean_length"), _HELD_OUT, "held out")
    _draw_smoothed(divergence, lines, "kl", _TRAINING, "training (smoothed)")
    _draw_points(divergence, _points(held_out, "eval_kl"), _HELD_OUT, "held out")
    _style(rewards, title, "reward")
    _style(lengths, "", "tokens of an answer")
    _style(divergence, "", "divergence from the\nreference (nats/token)")
    for axes in (rewards, lengths):  # one axis of steps for all
        axes.set_xlabel("")


def _draw_smoothed(axes: Any, lines: Sequence[Metrics], name: str, color: str, label: str) -> None:
    points = _points(lines, name)
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
        axes.plot(steps, smooth(values), color=color, linewidth=2, label=label)


def _points(lines: Sequence[Metrics], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def _draw_rewards(axes: Any, lines: Sequence[Metrics]) -> None:
    steps = [line["step"] for line in lines]
    for name, color in {
        "rewards/chosen": _HELD_OUT,
        "rewards/rejected": _TRAINING,
        "rewards/margins": "#444444",
    }.items():
        values = [line.get(name, float("nan")) for line in lines]
        axes.plot(steps, smooth(values), color=color, linewidth=2, label=_REWARDS[name])
    _style(axes, "Implicit rewards, in training", "reward (smoothed)")


def _style(axes: Any, title: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color="#222222")
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    low, high = axes.get_ylim()
    if low < high / 2 and low > -0.1 * high:  # from zero, unless that would flatten the curve
        axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors="#555555")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    if axes.lines:
        axes.legend(loc="best", facecolor="white", framealpha=0.9, edgecolor="none")
