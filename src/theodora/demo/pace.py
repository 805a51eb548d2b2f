"""How much of the demo fits into the minutes that it may take: pure functions of what was measured.

Two things are chosen. Before anything is scored, from the time of a step: how many held-out rows and texts are scored.
When they have been scored once, from the time that this took: how many steps are taken. Where all fits, all is done.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# In training steps of 8 rows, as measured with SmolLM2-135M in float32 on a CPU: how long other things take.
_SCORED_ROW = 0.095  # its loss and its answer
_SCORED_TEXT = 0.1
_REST = 5  # loading, reading the rows, three questions, merging
_REST_SECONDS = 8  # the part of it that does not grow with a step: starting, writing files
_ADAPTED = 1.2  # how much longer scoring takes with an adapter, and with right answers, which are not broken off
_FOR_SCORES = 0.4  # of the time, at most, where not all fits
_LEAST_STEPS, _LEAST_ROWS, _LEAST_TEXTS = 10, 40, 16  # fewer would show nothing
_TOGETHER = 8  # rows and texts are scored in batches: numbers in between save nothing


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """How much is done. The defaults take a few minutes on two cores."""

    steps: int = 100
    batch_size: int = 8
    learning_rate: float = 2e-3
    held_out_rows: int = 200
    """Rows that are not trained on."""
    scored_rows: int | None = None
    """How many of them, from the first, are scored. Default: all."""
    general_texts: int = 64
    text_length: int = 256
    """Tokens of a general text that are scored."""

    @property
    def scored(self) -> int:
        """Held-out rows that are scored."""
        return self.held_out_rows if self.scored_rows is None else min(self.scored_rows, self.held_out_rows)

    @staticmethod
    def quick() -> DemoSettings:
        """To see that it works."""
        return DemoSettings(steps=5, batch_size=4, held_out_rows=16, general_texts=4, text_length=128)


def seconds_needed(settings: DemoSettings, step: float) -> float:
    """How long the whole job takes, roughly, where a training step takes `step` seconds."""
    return settings.steps * step + (1 + _ADAPTED) * _scoring(settings, step) + _rest(step)


def with_scores_that_fit(settings: DemoSettings, step: float, left: float) -> DemoSettings:
    """The settings, with fewer rows and texts scored if not all of the job fits.

    Args:
        settings: all that would be done.
        step: seconds of a training step.
        left: seconds in which the whole job should be done.
    """
    if seconds_needed(settings, step) <= left:
        return settings
    room = _FOR_SCORES * max(left - _rest(step), 0.0)
    share = min(room / ((1 + _ADAPTED) * _scoring(settings, step)), 1.0) if room > 0 else 0.0
    return replace(
        settings,
        scored_rows=_part(settings.scored, share, _LEAST_ROWS),
        general_texts=_part(settings.general_texts, share, _LEAST_TEXTS),
    )


def with_steps_that_fit(settings: DemoSettings, step: float, scoring: float, left: float) -> DemoSettings:
    """The settings, with as many steps as fit.

    Args:
        settings: all that would be done.
        step: seconds of a training step.
        scoring: seconds that scoring took before training.
        left: seconds in which training, scoring once more, and all else should be done.
    """
    room = left - _ADAPTED * scoring - _rest(step)
    if room >= settings.steps * step:
        return settings
    fit = int(room / step) if room > 0 else 0
    return replace(settings, steps=min(max(fit, _LEAST_STEPS), settings.steps))


def seconds_to_come(settings: DemoSettings, step: float, scoring: float) -> float:
    """How long training, scoring once more, and all else take; arguments as in `with_steps_that_fit`."""
    return settings.steps * step + _ADAPTED * scoring + _rest(step)


def what_is_scored(whole: DemoSettings, chosen: DemoSettings, step: float) -> str:
    """In words, what a step takes, and what is scored for it."""
    said = f"A training step takes {step:.1f} s here"
    if (chosen.scored, chosen.general_texts) == (whole.scored, whole.general_texts):
        return f"{said}."
    return (
        f"{said}: {chosen.scored} of the {whole.scored} held-out rows and {chosen.general_texts} of "
        f"{whole.general_texts} general texts are scored, to save time."
    )


def what_is_trained(whole: DemoSettings, chosen: DemoSettings, step: float, minutes: float, total: float) -> str:
    """In words, how many steps are taken, and why.

    Args:
        whole: all that would be done.
        chosen: what is done.
        step: seconds of a training step.
        minutes: that the job should take at most.
        total: seconds that it takes from its begin to its end, roughly.
    """
    if chosen.steps == whole.steps:
        return f"{chosen.steps} steps, to be done in about {_minutes(total)}."
    all_of_it = -(-seconds_needed(whole, step) * 1.1 // 60)
    goal = f" and not in {minutes:g}" if total > 1.1 * 60 * minutes else ""
    return (
        f"At {step:.1f} s a step: {chosen.steps} steps instead of {whole.steps}, to be done in about "
        f"{_minutes(total)}{goal}. Fewer steps teach less; --minutes {all_of_it:.0f} has room for all."
    )


def _minutes(seconds: float) -> str:
    minutes = max(round(seconds / 60), 1)
    return "a minute" if minutes == 1 else f"{minutes} minutes"


def _scoring(settings: DemoSettings, step: float) -> float:
    return (settings.scored * _SCORED_ROW + settings.general_texts * _SCORED_TEXT) * step


def _rest(step: float) -> float:
    return _REST * step + _REST_SECONDS


def _part(count: int, share: float, least: int) -> int:
    """A share of `count` in whole batches; `least` at least, where there are so many."""
    return min(max(int(count * share) // _TOGETHER * _TOGETHER, least), count)
