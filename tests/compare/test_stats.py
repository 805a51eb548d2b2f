"""Against tables of Student's t, and values worked out by hand."""

import math

import pytest

from theodora.compare.stats import Comparison, Estimate, estimate, holm, paired_test, t_quantile, t_tail
from theodora.compare.summary import front


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (200, 1.97190)]
)
def test_quantiles_are_those_of_the_tables(freedom, quantile):
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, rel=1e-5)
    assert t_tail(quantile, freedom) == pytest.approx(0.025, rel=1e-4)


def test_tails_where_they_have_a_closed_form():
    for t in (0.0, 0.3, 1.0, 5.0, 60.0):
        assert t_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, abs=1e-12)
        assert t_tail(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), abs=1e-12)


def test_an_interval():
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half_width == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert estimate([5.0]) == Estimate(mean=5.0, half_width=None, count=1)


def test_a_paired_test():
    # Differences 1, 2, 3: mean 2, deviation 1, t = 2√3 with two degrees of freedom.
    found = paired_test([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found.effect == pytest.approx(2.0)
    assert found.p == pytest.approx(1 - 2 * math.sqrt(3) / math.sqrt(2 + 12), rel=1e-9)
    assert paired_test([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert paired_test([1.5, 2.5], [1.0, 2.0]).p is None
    assert paired_test([1.0], [2.0]).p is None


def test_holms_correction():
    tests = [Comparison(difference=estimate([0.0]), p=p) for p in (0.01, 0.04, None, 0.03)]
    assert [c.p_corrected for c in holm(tests)] == [pytest.approx(0.03), pytest.approx(0.06), None, pytest.approx(0.06)]


def test_the_front():
    assert front([(1, 5), (2, 4), (3, 9), (1, 3), (4, 9)]) == [0, 2]
