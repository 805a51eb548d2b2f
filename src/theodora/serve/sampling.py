"""Picking tokens: each row of a batch by its own temperature, filters and random number, without a look at values.

One random number picks from the summed-up probabilities, so the same seed picks the same token in any batch.
Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from theodora.serve.requests import Sampling

_BITS = 23  # of a random number; below 1 also after a product with the largest float32 sum


def pick(
    logits_NV: Tensor,
    temperature_N: Tensor,
    chance_N: Tensor,
    top_p_N: Tensor,
    top_k_N: Tensor,
    min_p_N: Tensor,
    filters: bool,
) -> Tensor:
    """The picked tokens, (N,) int64.

    Args:
        logits_NV: float32.
        temperature_N: float32; 0 picks the likeliest.
        chance_N: 23 random bits for each row.
        top_p_N: float32 in (0, 1]; see `filters`.
        top_k_N: integers; 0 stands for all; see `filters`.
        min_p_N: float32 in [0, 1], a share of the likeliest token's chance; see `filters`.
        filters: whether to mind top_p, top_k and min_p, which takes sorting. top_p is a share of what the other two
            leave.
    """
    rows = logits_NV.shape[0]
    temperature, chance = temperature_N[:rows, None], chance_N[:rows, None].float() / 2**_BITS
    greedy = logits_NV.argmax(-1)
    # Without the shift a small temperature would overflow.
    shifted = logits_NV - logits_NV.gather(1, greedy[:, None])
    chances = (shifted / temperature.clamp_min(torch.finfo(torch.float32).tiny)).softmax(-1)
    sampled = _draw(chances, chance)[:, 0]
    if filters:
        chances, tokens = chances.sort(-1, descending=True)
        rank = torch.arange(chances.shape[1], device=chances.device)
        top_p, top_k, min_p = top_p_N[:rows, None], top_k_N[:rows, None], min_p_N[:rows, None]
        few = ((top_k > 0) & (rank >= top_k)) | (chances < min_p * chances[:, :1])
        chances = chances.masked_fill(few, 0)
        sums = chances.cumsum(-1)
        # The likeliest always stays.
        out = (sums - chances >= top_p * sums[:, -1:]) & (rank > 0) & (top_p < 1)
        filtered = tokens.gather(1, _draw(chances.masked_fill(out, 0), chance))[:, 0]
        # Rows without filters draw as they would in a batch without any.
        sampled = torch.where(((top_p < 1) | (top_k > 0) | (min_p > 0))[:, 0], filtered, sampled)
    return torch.where(temperature[:, 0] > 0, sampled, greedy)


def likeliest(logits_NV: Tensor, logsumexp_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each row and their log-probabilities, (N, count) each; all tokens if there are fewer."""
    values, tokens = logits_NV.topk(min(count, logits_NV.shape[1]), -1)
    return tokens, values - logsumexp_N[:, None]


def draw_alike(shaped_NV: Tensor, logits_NV: Tensor, chance_N: Tensor, how: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens of rows that are drawn alike but for their random numbers, (N,) int64, and their `logprobs_of`.

    Args:
        shaped_NV: logits to pick from, float32.
        logits_NV: those of the model.
        chance_N: as of `pick`.
        how: the settings of all rows.
    """
    alike = partial(torch.full, (logits_NV.shape[0],), device=logits_NV.device)
    given = alike(how.temperature), chance_N, alike(how.top_p), alike(how.top_k), alike(how.min_p)
    token_N = pick(shaped_NV, *given, how.filters)
    return token_N, logprobs_of(token_N, logits_NV, how.temperature)


def logprobs_of(tokens_N: Tensor, logits_NV: Tensor, temperature: float) -> Tensor:
    """The logarithm of the tokens' softmax at a temperature (0 stands for 1), before any filter, (N,) float32."""
    tempered = logits_NV / temperature if temperature > 0 else logits_NV
    return tempered.gather(1, tokens_N[:, None])[:, 0] - tempered.logsumexp(-1)


def _draw(chances_NV: Tensor, chance_N1: Tensor) -> Tensor:
    sums = chances_NV.cumsum(-1)
    return torch.searchsorted(sums, chance_N1 * sums[:, -1:], right=True).clamp_max(sums.shape[1] - 1)
