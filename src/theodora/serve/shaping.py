"""What one request does to its own logits before a token is picked: bias, penalties, and tokens that cannot come.

All of it is computed beside the batch, from tensors that stay where the logits are: the host waits for nothing, except
under a grammar, which must be told each token. V: vocabulary.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from theodora.serve.requests import GrammarState, Sampling

log = logging.getLogger("theodora.serve")


class Shaper:
    """The logits of one answer, as its sampling wants them: `begin`, `apply` and `took` for each token."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling, self._prompt = sampling, prompt
        self._count = -1  # tokens that the tensors below know of
        self._generated: Sequence[int] = ()  # what they are to be made from
        self._made = False
        self._bias_V: Tensor | None = None
        self._counts_V: Tensor | None = None
        self._seen_V: Tensor | None = None
        self._last: list[Tensor] = []
        self._places: dict[tuple[int, ...], Tensor] = {}
        self._most = max((len(tokens) - 1 for tokens in sampling.banned), default=0)
        self._grammar: GrammarState | None = None
        self.problem: str | None = None
        """Why the grammar could not be followed."""

    def begin(self, count: int, generated: Callable[[], Sequence[int]]) -> None:
        """Come to the token after `count` others, which are asked for only if they are not known already.

        transformers runs a request anew where it makes room for others, and forgets tokens that were under way.
        """
        if count != self._count:
            self._generated, self._count = generated()[:count], count
            self._made = False

    def apply(self, logits_V: Tensor) -> None:
        """Change the logits, in place."""
        if not self._made:
            self._restart(logits_V)
            self._made = True
        if self._bias_V is not None:
            logits_V += self._bias_V
        if self._counts_V is not None and self._seen_V is not None:
            self._penalise(logits_V, self._counts_V, self._seen_V)
        if self._grammar is not None:
            self._follow(self._grammar.mask, logits_V)
        for mask in self._masks(logits_V):
            masked_V = logits_V.masked_fill(mask, -torch.inf)
            # What leaves no token at all is not minded: a grammar that is at its end, and min_tokens, say.
            logits_V.copy_(torch.where(masked_V.isfinite().any(), masked_V, logits_V))

    def took(self, token: Tensor) -> None:
        """Mind the token that was picked, which is on the device."""
        self._count += 1
        if self._counts_V is not None and self._seen_V is not None:
            index = token.long().reshape(1)
            self._counts_V.index_add_(0, index, torch.ones_like(index, dtype=self._counts_V.dtype))
            self._seen_V.index_fill_(0, index, True)
        if self._most:
            self._last = [*self._last, token.reshape(())][-self._most :]
        if self._grammar is not None:
            picked = int(token)
            if picked in self._sampling.stop_ids:
                self._grammar = None  # batches that are under way pick more, which nobody is told
            else:
                self._follow(self._grammar.accept, picked)

    def _restart(self, logits_V: Tensor) -> None:
        sampling, device = self._sampling, logits_V.device
        if sampling.bias:
            self._bias_V = _spread(dict(sampling.bias), logits_V)
        if sampling.penalises:
            self._counts_V = _spread(Counter(self._generated), logits_V)
            self._seen_V = _spread(dict.fromkeys((*self._prompt, *self._generated), 1), logits_V) > 0
        self._last = (
            [torch.tensor(token, device=device) for token in self._generated[-self._most :]] if self._most else []
        )
        grammar = sampling.grammar
        self._grammar = None if grammar is None or self.problem else grammar.start()
        for token in self._generated:
            if self._grammar is not None:
                self._follow(self._grammar.accept, token)

    def _follow(self, step: Callable[[Any], None], what: Any) -> None:
        try:
            step(what)
        except Exception as error:  # of one request, which must not end the others'
            log.warning("a grammar cannot be followed: %s", error)
            self._grammar, self.problem = None, str(error)

    def _penalise(self, logits_V: Tensor, counts_V: Tensor, seen_V: Tensor) -> None:
        sampling = self._sampling
        if sampling.repetition_penalty != 1:
            logits_V.copy_(repeated_less(logits_V, seen_V, sampling.repetition_penalty))
        logits_V -= sampling.frequency_penalty * counts_V
        logits_V -= sampling.presence_penalty * (counts_V > 0)

    def _masks(self, logits_V: Tensor) -> Iterator[Tensor]:
        """Where tokens cannot come, the strictest rule first."""
        sampling = self._sampling
        if sampling.allowed is not None:
            yield ~self._at(sampling.allowed, logits_V)
        if self._count < sampling.min_tokens and sampling.stop_ids:
            yield self._at(sampling.stop_ids, logits_V)
        for *before, last in sampling.banned:
            if len(before) <= len(self._last):
                mask = self._at((last,), logits_V)
                for known, token in zip(reversed(self._last), reversed(before), strict=False):
                    mask = mask & (known == token)
                yield mask

    def _at(self, tokens: tuple[int, ...], logits_V: Tensor) -> Tensor:
        """Where these tokens are; made once, because the way to the device is long."""
        if tokens not in self._places:
            self._places[tokens] = _spread(dict.fromkeys(tokens, 1), logits_V) > 0
        return self._places[tokens]


def repeated_less(logits: Tensor, seen: Tensor, by: float) -> Tensor:
    """Logits, (…, V), with a repetition penalty on those of tokens that were `seen`, of the same shape."""
    return torch.where(seen, torch.where(logits > 0, logits / by, logits * by), logits)


def _spread(values: Mapping[int, float], logits_V: Tensor) -> Tensor:
    """Values of some tokens among zeros for the others; tokens without a logit are left out."""
    known = {token: value for token, value in values.items() if token < logits_V.shape[0]}
    spread_V = torch.zeros_like(logits_V)
    at = torch.tensor(list(known), dtype=torch.long, device=logits_V.device)
    spread_V[at] = torch.tensor(list(known.values()), dtype=logits_V.dtype, device=logits_V.device)
    return spread_V


def shape(logits_NV: Tensor, shapers: Sequence[tuple[int, Shaper]]) -> Tensor:
    """A copy of the logits in which the rows that have a shaper are changed; the others are as they were."""
    shaped_NV = logits_NV.clone()
    for row, shaper in shapers:
        shaper.apply(shaped_NV[row])
    return shaped_NV
