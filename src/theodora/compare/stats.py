"""Means, intervals and paired tests, by Student's t. Plain Python: fifty lines replace a dependency.

A seed gives the same order of rows to every method, so methods are compared seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

LEVEL = 0.95
ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its interval."""

    mean: float
    half_width: float | None
    """Of the 95 % interval over seeds; None with fewer than two values."""
    count: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A paired test of one method against another."""

    difference: Estimate
    """Mean of (one - other)."""
    p: float | None
    """Two-sided, of the paired t-test; None with fewer than two pairs, or if all pairs differ by exactly as much."""
    p_corrected: float | None = None
    """After Holm's correction for the tests that are read together."""
    effect: float | None = None
    """Cohen's d_z: the mean difference over its standard deviation."""


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval, by the t-distribution.

    Args:
        values: at least one.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Estimate(mean=mean, half_width=None, count=count)
    half = t_quantile((1 + LEVEL) / 2, count - 1) * deviation(values) / math.sqrt(count)
    return Estimate(mean=mean, half_width=half, count=count)


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample (n - 1)."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def paired_test(one: Sequence[float], other: Sequence[float]) -> Comparison:
    """Student's t-test of paired values.

    Args:
        one: values of one method, at least one.
        other: those of the other, in the same order of pairs.
    """
    differences = [a - b for a, b in zip(one, other, strict=True)]
    gap = estimate(differences)
    if gap.count < 2:
        return Comparison(difference=gap, p=None)
    spread = deviation(differences)
    if spread <= 1e-12 * max(1.0, abs(gap.mean)):  # t has no value
        return Comparison(difference=gap, p=1.0 if abs(gap.mean) <= 1e-12 else None)
    t = gap.mean / (spread / math.sqrt(gap.count))
    return Comparison(difference=gap, p=2 * t_tail(abs(t), gap.count - 1), effect=gap.mean / spread)


def holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Holm's step-down correction (1979) of p-values that are read together, in the same order."""
    tested = sorted((c.p, i) for i, c in enumerate(comparisons) if c.p is not None)
    corrected: dict[int, float] = {}
    largest = 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        corrected[i] = largest
    return [replace(c, p_corrected=corrected.get(i)) for i, c in enumerate(comparisons)]


def t_tail(t: float, freedom: int) -> float:
    """P(T > t) for t >= 0 of Student's t with so many degrees of freedom."""
    return 0.5 * _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def t_quantile(probability: float, freedom: int) -> float:
    """The t below which `probability` (at least 0.5, below 1) lies, by bisection."""
    low, high = 0.0, 1.0
    while t_tail(high, freedom) > 1 - probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > 1 - probability else (low, middle)
    return (low + high) / 2


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges fast
        return 1 - _incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    # Evaluated from its tail: 200 terms are far more than double precision needs here.
    value = 1.0
    for m in range(200, 0, -1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        value = 1 + even / (1 + odd / value)
    return front / (1 + (-(a + b) * x / (a + 1)) / value)
