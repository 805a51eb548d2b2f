"""What a form of a model predicts after each token of a text, and how two forms differ.

Shapes: T positions, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """Scores of the next token at T positions: all of them, or, from a server, of the likeliest tokens only."""

    logits_TV: Tensor | None
    """float32 logits; None for a server."""
    tops: tuple[dict[int, float], ...] = ()
    """For a server: token -> log-probability, at each position; nothing where it gave no answer."""

    def __len__(self) -> int:
        return len(self.tops) if self.logits_TV is None else self.logits_TV.shape[0]


@dataclass(frozen=True)
class Difference:
    """How far B's predictions are from A's."""

    positions: int
    largest: float
    """Largest difference of a logit; of a log-probability where a server gives no logits."""
    measure: str
    """`logit` or `logprob`: what `largest` is a difference of."""
    reference: float
    """Standard deviation of A's logits, to see `largest` beside; nan where there are none."""
    kl_mean: float
    """Mean of KL(A‖B) over the positions, in nats. Of a server: over its likeliest tokens and all others as one, which
    is a lower bound."""
    kl_max: float
    first: int | None
    """First position after which the likeliest token differs; None if it never does."""
    agreeing: float
    """Share of positions at which the likeliest token is the same."""
    choices: tuple[int, int] | None = None
    """A's and B's likeliest token at `first`."""
    margin: float | None = None
    """How much likelier A finds its own token there than B's, in logits; near 0 it is a tie."""


def difference(a: Predictions, b: Predictions) -> Difference:
    """Compare position by position.

    Raises:
        ValueError: the two have no common vocabulary, or other numbers of positions.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} and {len(b)} positions; expected the same number, and at least 1")
    if a.logits_TV is not None and b.logits_TV is not None:
        return _dense(a.logits_TV, b.logits_TV)
    return _sparse(a, b)


def _dense(a_TV: Tensor, b_TV: Tensor) -> Difference:
    # Some checkpoints pad the vocabulary, and converters drop or add such rows; tokens end before them.
    size = min(a_TV.shape[1], b_TV.shape[1])
    largest, kls, a_choice, b_choice = 0.0, [], [], []
    for a_V, b_V in zip(a_TV[:, :size].split(32), b_TV[:, :size].split(32), strict=True):
        one, other = a_V.double(), b_V.double()
        largest = max(largest, _or_infinite((one - other).abs().max()))
        log_p, log_q = one.log_softmax(1), other.log_softmax(1)
        kls.append((log_p.exp() * (log_p - log_q)).sum(1).clamp_min(0))
        a_choice.append(one.argmax(1))
        b_choice.append(other.argmax(1))
    kl_T, a_T, b_T = torch.cat(kls), torch.cat(a_choice), torch.cat(b_choice)
    first, choices, margin = None, None, None
    differs = (a_T != b_T).nonzero()
    if len(differs):
        first = int(differs[0, 0])
        choices = (int(a_T[first]), int(b_T[first]))
        margin = float(a_TV[first, choices[0]] - a_TV[first, choices[1]])
    return Difference(
        positions=len(a_T),
        largest=largest,
        measure="logit",
        reference=float(a_TV[:, :size].double().std()),
        kl_mean=_or_infinite(kl_T.mean()),
        kl_max=_or_infinite(kl_T.max()),
        first=first,
        agreeing=float((a_T == b_T).double().mean()),
        choices=choices,
        margin=margin,
    )


def _or_infinite(value: Tensor) -> float:
    """A number; NaN, with which every comparison fails, becomes infinity, which is beyond every bound."""
    return number if math.isfinite(number := float(value)) else math.inf


def _sparse(a: Predictions, b: Predictions) -> Difference:
    largest, kls, same = 0.0, [], []
    first, choices, margin = None, None, None
    for position, (one, other) in enumerate(zip(_log_probs(a, b), _log_probs(b, a), strict=True)):
        if not one or not other:
            continue
        common = sorted(one.keys() & other.keys())
        if not common:
            raise ValueError(f"position {position}: the two name no token in common among their likeliest")
        largest = max(largest, *(abs(one[token] - other[token]) for token in common))
        kls.append(_grouped_kl([one[token] for token in common], [other[token] for token in common]))
        picks = (_likeliest(one), _likeliest(other))
        same.append(picks[0] == picks[1])
        if not same[-1] and first is None:
            first, choices = position, picks
            margin = one[picks[0]] - one[picks[1]] if picks[1] in one else None
    dense = a.logits_TV if a.logits_TV is not None else b.logits_TV
    return Difference(
        positions=len(same),
        largest=largest,
        measure="logprob",
        reference=math.nan if dense is None else float(dense.double().std()),
        kl_mean=math.fsum(kls) / len(kls),
        kl_max=max(kls),
        first=first,
        agreeing=sum(same) / len(same),
        choices=choices,
        margin=margin,
    )


def _log_probs(form: Predictions, other: Predictions) -> list[dict[int, float]]:
    """Log-probabilities at each position: what a server gave; of a model, the server's tokens and its own likeliest."""
    if form.logits_TV is None:
        return list(form.tops)
    log_probs = []
    for row, theirs in zip(form.logits_TV, other.tops, strict=True):
        log_p = row.double().log_softmax(0)
        wanted = {token for token in theirs if token < len(log_p)} | {int(log_p.argmax())}
        log_probs.append({token: float(log_p[token]) for token in wanted} if theirs else {})
    return log_probs


def _grouped_kl(log_p: Sequence[float], log_q: Sequence[float]) -> float:
    """KL of a distribution over these tokens and one more that stands for all others."""
    p, q = [math.exp(x) for x in log_p], [math.exp(x) for x in log_q]
    rest_p, rest_q = max(1 - math.fsum(p), 1e-12), max(1 - math.fsum(q), 1e-12)
    terms = [x * (lx - ly) for x, lx, ly in zip(p, log_p, log_q, strict=True)]
    return max(0.0, math.fsum([*terms, rest_p * math.log(rest_p / rest_q)]))


def _likeliest(scores: dict[int, float]) -> int:
    return max(scores, key=lambda token: (scores[token], -token))
