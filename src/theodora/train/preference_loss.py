"""What dpo, ipo, orpo, simpo and kto learn from: the log-likelihoods of answers, under the model and its reference.

    DPO  −log σ(β·(Δ₊ − Δ₋))                    Δ = log π(y|x) − log π_ref(y|x), + the better answer, − the worse
    IPO  (Δ₊/|y₊| − Δ₋/|y₋| − 1/(2β))²
    SimPO  −log σ(β·(ℓ₊ − ℓ₋) − γ)              ℓ = log π(y|x)/|y|
    ORPO  −ℓ₊ − β·log σ(log odds₊ − log odds₋)   odds = p/(1 − p) of p = exp ℓ
    KTO  λ₊·(1 − σ(β·(Δ − KL))) of a good answer, λ₋·(1 − σ(β·(KL − Δ))) of a bad one

Papers: DPO 2305.18290, IPO 2310.12036, SimPO 2405.14734, ORPO 2403.07691, KTO 2402.01306; the others, which TRL's
`loss_type` names beside them, at each. Every loss is of one pair (or answer) alone and a step's is their mean, so that
batches can be cut into pieces, accumulated and shared among processes. Legend: P pairs or answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an objective computes; the names are TRL's."""

    objective: str
    beta: float = 0.1
    losses: tuple[tuple[str, float], ...] = (("sigmoid", 1.0),)
    """`loss_type` and `loss_weights`, of dpo."""
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    nll_weight: float = 0.0
    """Of the better answer's own loss (`cpo_alpha`)."""
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    precompute_ref_log_probs: bool = False
    precompute_ref_batch_size: int | None = None
    disable_dropout: bool = True
    unpaired_loss: str = "kto"
    """`loss_type` of kto: kto, or apo_zero_unpaired, which takes the divergence for 0."""

    @property
    def judged(self) -> bool:
        """Whether rows are answers with a verdict rather than pairs."""
        return self.objective == "kto"

    @property
    def compares(self) -> bool:
        """Whether there is a reference."""
        return self.objective in ("dpo", "ipo", "kto")


@dataclass(frozen=True)
class Answers:
    """What is known of some answers, (P,) each."""

    logps: Tensor
    """Log-likelihood under the model, with gradient."""
    tokens: Tensor
    """How many there are."""
    reference: Tensor | None
    """Log-likelihood under the reference."""

    @property
    def ratios(self) -> Tensor:
        """Δ, or without a reference the log-likelihood itself."""
        return self.logps if self.reference is None else self.logps - self.reference

    @property
    def means(self) -> Tensor:
        """ℓ: log-likelihood of a token, on average."""
        return self.logps / self.tokens.clamp(min=1)


@dataclass(frozen=True)
class _Pair:
    """The scores that the losses of pairs are made of."""

    chosen: Tensor
    rejected: Tensor
    better: Answers
    worse: Answers

    @property
    def delta(self) -> Tensor:
        return self.chosen - self.rejected

    @property
    def mean_delta(self) -> Tensor:
        return self.chosen / self.better.tokens.clamp(min=1) - self.rejected / self.worse.tokens.clamp(min=1)


def pair_losses(better: Answers, worse: Answers, settings: Settings) -> Tensor:
    """The loss of each pair, (P,)."""
    if settings.objective == "simpo":
        return _simpo(better, worse, settings)
    if settings.objective == "orpo":
        return _orpo(better, worse, settings)
    score = _SCORES[settings.f_divergence_type]
    pair = _Pair(score(better.ratios, settings), score(worse.ratios, settings), better, worse)
    losses = (("ipo", 1.0),) if settings.objective == "ipo" else settings.losses
    return torch.stack([weight * PAIR_LOSSES[name](pair, settings) for name, weight in losses]).sum(0)


def judged_losses(answers: Answers, good: Tensor, kl: Tensor, settings: Settings) -> Tensor:
    """KTO's loss of each answer, (P,), its equation 7.

    Args:
        answers: with a reference.
        good: whether each is a good one, (P,) bool.
        kl: divergence from the reference, a scalar of at least 0: `divergence` of answers to other prompts.
        settings: of the objective.
    """
    sign = torch.where(good, 1.0, -1.0)
    weight = torch.where(good, settings.desirable_weight, settings.undesirable_weight)
    return weight * (1 - torch.sigmoid(settings.beta * sign * (answers.ratios - kl)))


def rewards(answers: Answers, settings: Settings) -> Tensor:
    """The implicit reward of each answer, (P,): β·Δ, or β·ℓ without a reference."""
    return settings.beta * (answers.ratios if settings.compares else answers.means).detach()


# Without a reference


def _simpo(better: Answers, worse: Answers, settings: Settings) -> Tensor:
    z = settings.beta * (better.means - worse.means) - settings.simpo_gamma
    e = settings.label_smoothing
    return -(1 - e) * logsigmoid(z) - e * logsigmoid(-z) - settings.nll_weight * better.means


def _orpo(better: Answers, worse: Answers, settings: Settings) -> Tensor:
    def log_odds(mean: Tensor) -> Tensor:
        mean = mean.clamp(max=-1e-7)
        # log(1 − exp ℓ), by the form that keeps its digits (Mächler 2012).
        return mean - torch.where(mean > -math.log(2), torch.log(-torch.expm1(mean)), torch.log1p(-torch.exp(mean)))

    return -better.means - settings.beta * logsigmoid(log_odds(better.means) - log_odds(worse.means))


# The scores of f-DPO (2309.16240): f' of the ratio π/π_ref, less what cancels


def _alpha(ratios: Tensor, settings: Settings) -> Tensor:
    power = settings.f_alpha_divergence_coef - 1
    if abs(power) < 1e-6:
        return ratios
    return (torch.exp((power * ratios).clamp(max=80.0)) - 1) / power


_SCORES: Mapping[str, Callable[[Tensor, Settings], Tensor]] = {
    "reverse_kl": lambda ratios, _: ratios,
    "forward_kl": lambda ratios, _: 1 - torch.exp(-ratios),
    "js_divergence": lambda ratios, _: math.log(2) + logsigmoid(ratios),
    "alpha_divergence": _alpha,
}

# The losses of pairs, by TRL's names


def _exo(pair: _Pair, settings: Settings) -> Tensor:
    """EXO (2402.00856), equation 16."""
    z, e = settings.beta * pair.delta, settings.label_smoothing
    likely = torch.sigmoid(z) * (logsigmoid(z) - math.log1p(-e))
    return likely + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(e))


def _nca(pair: _Pair, settings: Settings) -> Tensor:
    """NCA (2402.05369)."""
    good, bad = settings.beta * pair.better.ratios, settings.beta * pair.worse.ratios
    return -logsigmoid(good) - 0.5 * logsigmoid(-good) - 0.5 * logsigmoid(-bad)


def _robust(pair: _Pair, settings: Settings) -> Tensor:
    """Robust DPO (2403.00409): as if a share of the labels were the wrong way round."""
    z, e = settings.beta * pair.delta, settings.label_smoothing
    return (-(1 - e) * logsigmoid(z) + e * logsigmoid(-z)) / (1 - 2 * e)


def _bco(pair: _Pair, settings: Settings) -> Tensor:
    """BCO (2404.04656), without its running mean, as TRL has it for pairs."""
    return -logsigmoid(settings.beta * pair.better.ratios) - logsigmoid(-settings.beta * pair.worse.ratios)


def _sppo(pair: _Pair, settings: Settings) -> Tensor:
    """SPPO (2405.00675), with hard labels."""
    half = 0.5 / settings.beta
    return (pair.better.ratios - half) ** 2 + (pair.worse.ratios + half) ** 2


def _apo_zero(pair: _Pair, settings: Settings) -> Tensor:
    """APO (2408.06266), equation 7."""
    return 1 - torch.sigmoid(settings.beta * pair.better.ratios) + torch.sigmoid(settings.beta * pair.worse.ratios)


def _apo_down(pair: _Pair, settings: Settings) -> Tensor:
    """APO (2408.06266), equation 8."""
    good = settings.beta * pair.better.ratios
    return torch.sigmoid(good) + 1 - torch.sigmoid(good - settings.beta * pair.worse.ratios)


def _discopop(pair: _Pair, settings: Settings) -> Tensor:
    """DiscoPOP (2406.08414), equation 5."""
    z = settings.beta * pair.delta
    mixed = torch.sigmoid(z / settings.discopop_tau)
    return -logsigmoid(z) * (1 - mixed) + torch.exp(-z) * mixed


PAIR_LOSSES: Mapping[str, Callable[[_Pair, Settings], Tensor]] = {
    "sigmoid": lambda pair, settings: -logsigmoid(settings.beta * pair.delta),
    "sigmoid_norm": lambda pair, settings: -logsigmoid(settings.beta * pair.mean_delta),
    "hinge": lambda pair, settings: torch.relu(1 - settings.beta * pair.delta),  # SLiC, 2305.10425
    "ipo": lambda pair, settings: (pair.mean_delta - 1 / (2 * settings.beta)) ** 2,
    "robust": _robust,
    "exo_pair": _exo,
    "nca_pair": _nca,
    "bco_pair": _bco,
    "sppo_hard": _sppo,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": lambda pair, _: -pair.better.means,
}
"""TRL's others (aot, aot_unpaired) set the pairs of one batch against each other."""
