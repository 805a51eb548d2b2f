import math
from dataclasses import replace
from itertools import pairwise

import pytest

from theodora.demo import pace
from theodora.demo.pace import DemoSettings

WHOLE = DemoSettings()


def chosen(step, minutes, *, scoring_takes=1.0):
    """What is chosen, and how long it takes, where all takes as long as expected, and scoring so many times as long."""
    left = 60.0 * minutes
    scored = pace.with_scores_that_fit(WHOLE, step, left)
    scoring = scoring_takes * pace._scoring(scored, step)
    settings = pace.with_steps_that_fit(scored, step, scoring, left - scoring)
    return settings, scoring + pace.seconds_to_come(settings, step, scoring)


@pytest.mark.parametrize("step", [0.01, 0.5, 1.4])
def test_where_all_fits_all_is_done(step):
    assert pace.with_scores_that_fit(WHOLE, step, 300) == WHOLE
    settings, seconds = chosen(step, 5)
    assert settings == WHOLE
    assert seconds < 300


@pytest.mark.parametrize("minutes", [5, 8, 20])
@pytest.mark.parametrize("step", [2, 4, 8])
@pytest.mark.parametrize("scoring_takes", [0.7, 1.0, 1.2])
def test_what_is_chosen_is_done_in_time_and_uses_it(step, minutes, scoring_takes):
    settings, seconds = chosen(step, minutes, scoring_takes=scoring_takes)
    assert seconds <= 60 * minutes
    assert settings.steps == WHOLE.steps or seconds > 60 * minutes - step - 1
    assert settings.steps > pace._LEAST_STEPS
    assert pace._LEAST_ROWS <= settings.scored <= 200
    assert settings.general_texts <= 64


def test_a_slower_machine_does_no_more():
    done = [chosen(step / 4, 5)[0] for step in range(1, 60)]
    for part in (lambda s: s.steps, lambda s: s.scored, lambda s: s.general_texts):
        counts = [part(settings) for settings in done]
        assert counts[0] > counts[-1]
    assert all(a.scored >= b.scored for a, b in pairwise(done))


@pytest.mark.parametrize("left", [10.0, 0.0, -100.0])
def test_something_is_shown_however_slow_it_is(left):
    settings = pace.with_steps_that_fit(pace.with_scores_that_fit(WHOLE, 60.0, left), 60.0, 500.0, left)
    assert (settings.steps, settings.scored, settings.general_texts) == (10, 40, 16)
    small = DemoSettings(steps=3, held_out_rows=4, general_texts=2)
    assert replace(pace.with_scores_that_fit(small, 60.0, left), scored_rows=None) == small
    assert pace.with_steps_that_fit(small, 60.0, 500.0, left) == small


@pytest.mark.parametrize(
    ("step", "left", "steps"),
    [(0.0, 300.0, 100), (0.0, 0.0, 10), (1.0, math.inf, 100), (math.inf, 300.0, 10), (math.nan, 300.0, 10)],
)
def test_odd_seconds_choose_all_or_the_least(step, left, steps):
    settings = pace.with_scores_that_fit(WHOLE, step, left)
    assert pace.with_steps_that_fit(settings, step, 0.0, left).steps == steps


def test_it_is_said_what_was_measured_and_chosen():
    fewer = replace(WHOLE, steps=24, scored_rows=48, general_texts=16)
    assert pace.what_is_scored(WHOLE, WHOLE, 1.38) == "A training step takes 1.4 s here."
    assert pace.what_is_scored(WHOLE, fewer, 8.1) == (
        "A training step takes 8.1 s here: 48 of the 200 held-out rows and 16 of 64 general texts are scored, to save "
        "time."
    )
    assert pace.what_is_trained(WHOLE, WHOLE, 1.38, 5, 220) == "100 steps, to be done in about 4 minutes."
    said = pace.what_is_trained(WHOLE, fewer, 8.1, 5, 301)
    assert said.startswith(
        "At 8.1 s a step: 24 steps instead of 100, to be done in about 5 minutes. Fewer steps teach less"
    )
    assert "in about 9 minutes and not in 5." in pace.what_is_trained(WHOLE, fewer, 8.1, 5, 540)


@pytest.mark.parametrize("step", [2, 8, 30])
def test_the_minutes_that_are_named_have_room_for_all(step):
    fewer, _ = chosen(step, 5)
    named = float(pace.what_is_trained(WHOLE, fewer, step, 5, 300).split("--minutes ")[1].split()[0])
    assert chosen(step, named)[0] == WHOLE
