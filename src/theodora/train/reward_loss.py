"""The loss of a reward model, as in TRL's RewardTrainer. Legend: P pairs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """What a reward model's loss is, by TRL's names (RewardConfig)."""

    center_rewards_coefficient: float = 0.0
    """What the squared sum of a pair's scores counts, which keeps them around 0 (2312.09244, equation 2)."""
    disable_dropout: bool = True


def score_losses(better_P: Tensor, worse_P: Tensor, margin_P: Tensor | None, settings: ScoreSettings) -> Tensor:
    """−log σ(r₊ − r₋ − margin) + c·(r₊ + r₋)² of each pair, (P,) (Bradley and Terry 1952; the margin: 2307.09288).

    Args:
        better_P: scores of the better answers, float32 or wider.
        worse_P: of the worse ones.
        margin_P: by how much the better ones are to be better; None: any.
        settings: of the run.
    """
    difference_P = better_P - worse_P
    losses_P = -F.logsigmoid(difference_P if margin_P is None else difference_P - margin_P)
    if not settings.center_rewards_coefficient:
        return losses_P
    return losses_P + settings.center_rewards_coefficient * (better_P + worse_P) ** 2
