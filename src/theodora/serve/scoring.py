"""How likely the tokens of prompts are: logits of their places, computed in the same batch as everybody's next tokens.

T tokens in the batch, M of them in prompts that are scored, N sequences, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from theodora.serve.requests import Request, Score
from theodora.serve.sampling import likeliest

_ROWS = 256  # whose logits are float32 at once


@dataclass(frozen=True)
class Scored:
    """The part of one prompt that a batch works on."""

    request: Request
    first: int
    """Place in the prompt of the first token that is scored: the one behind the batch's first."""
    count: int
    at: int
    """Where in the batch the tokens before them are."""

    @classmethod
    def of(cls, request: Request | None, past: int, length: int, at: int) -> Scored | None:
        """What a batch scores of a prompt of which `past` tokens are known and `length` more lie in it from `at`."""
        if request is None or request.sampling.prompt_logprobs is None:
            return None
        count = min(length, len(request.prompt) - 1 - past)
        return cls(request, past + 1, count, at) if count > 0 else None


@dataclass(frozen=True)
class Scores:
    """Numbers of a batch, on its device until they are told."""

    parts: tuple[Scored, ...]
    logprobs_M: Tensor
    ranks_M: Tensor
    tops: tuple[Tensor, Tensor]

    def tell(self) -> None:
        """Hand them to their requests."""
        logprobs, ranks = self.logprobs_M.tolist(), self.ranks_M.tolist()
        tokens, values = (both.cpu() for both in self.tops)
        row = 0
        for part in self.parts:
            request, top = part.request, part.request.sampling.prompt_logprobs or 0
            if not request.scores:
                request.scores = [None] * len(request.prompt)
            for place in range(part.first, part.first + part.count):
                tops = tokens[row, :top].tolist(), values[row, :top].tolist()
                request.scores[place] = Score(logprobs[row], ranks[row], tops)
                request.not_finite |= math.isnan(logprobs[row])
                row += 1


class ScoringModel:
    """Stands for the model in one batch: gives the logits that are asked for, and scores the prompts beside them."""

    def __init__(self, model: Any, parts: tuple[Scored, ...], most: int) -> None:
        self.model, self.parts, self.most = model, parts, most
        self.scores: Scores | None = None

    def __call__(self, **batch: Any) -> Any:
        """The model's output, with the logits of the next tokens alone, as without scoring."""
        device = batch["input_ids"].device
        places = [place for part in self.parts for place in range(part.at, part.at + part.count)]
        at_M = torch.tensor(places, dtype=torch.int32, device=device)
        keep_N = batch.get("logits_to_keep")
        if keep_N is not None:
            batch["logits_to_keep"] = torch.cat([keep_N, at_M])
        output = self.model(**batch)
        logits = output.logits
        if keep_N is None:
            self.scores = self._scores(logits[0, at_M.long()])
        else:
            self.scores = self._scores(logits[0, keep_N.shape[0] :])
            output.logits = logits[:, : keep_N.shape[0]]
        return output

    def _scores(self, logits_MV: Tensor) -> Scores:
        targets = [token for part in self.parts for token in part.request.prompt[part.first : part.first + part.count]]
        targets_M = torch.tensor(targets, device=logits_MV.device)
        parts = [_score(*rows, self.most) for rows in zip(logits_MV.split(_ROWS), targets_M.split(_ROWS), strict=True)]
        logprobs, ranks, tokens, values = (torch.cat(column) for column in zip(*parts, strict=True))
        return Scores(self.parts, logprobs, ranks, (tokens, values))


def _score(logits_MV: Tensor, targets_M: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits_MV = logits_MV.float()
    whole_M = logits_MV.logsumexp(-1)
    own_M1 = logits_MV.gather(1, targets_M[:, None])
    tokens, values = likeliest(logits_MV, whole_M, most)
    return own_M1[:, 0] - whole_M, (logits_MV > own_M1).sum(-1) + 1, tokens, values
