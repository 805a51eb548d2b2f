"""What grpo learns from: completions that the policy has drawn itself, each with an advantage over its group.

    Aᵢ = (rᵢ − mean r)/(std r + 1e-4)             over the completions of one prompt; r is the weighted sum of rewards
    ρₜ = π(yₜ|x, y₍<ₜ₎)/π_old(yₜ|x, y₍<ₜ₎)         1 in value, if nothing was learned since y was drawn
    lₜ = −min(ρₜ·A, clip(ρₜ, 1 − ε, 1 + ε_high)·A) + β·KLₜ
    KLₜ = exp(dₜ) − dₜ − 1,  dₜ = log π_ref(yₜ) − log π(yₜ)

Papers: GRPO 2402.03300; DAPO 2503.14476 (ε_high, and the mean over all tokens of a step), Dr. GRPO 2503.20783 (a
constant instead of that mean, no std), CISPO 2506.13585, GSPO 2507.18071 (ρ of a sequence), GDPO 2601.05242 (each
reward normalised by itself), the unbiased gradient of KL 2512.02556. Names are TRL's. A step's loss is a sum over its
tokens divided by what `items` counts, so that batches can be cut into pieces, accumulated and shared among processes.
Legend: N learned tokens, S sequences, F reward functions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from theodora.train.rollouts import Drawing
from theodora.train.sequence_losses import SequenceLosses, by_sequence
from theodora.train.vllm_rollouts import ByVllm

_LITTLE = 1e-4
"""Added to a standard deviation, as in TRL."""
LOSSES = ("dapo", "grpo", "dr_grpo", "cispo")


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """What grpo computes; names and defaults are those of TRL's GRPOConfig, where not said otherwise."""

    num_generations: int = 8
    """Completions of each prompt."""
    num_generations_eval: int = 1
    """The same of held-out prompts. (TRL takes as many as in training.)"""
    max_completion_length: int = 256
    """Tokens of a completion, at most. (TRL's default is 512.)"""
    num_iterations: int = 1
    """How often the same completions are learned from."""
    steps_per_generation: int | None = None
    """Batches of this process whose completions are drawn at once. Default: those of a step. (TRL's unit.)"""
    generation_batch_size: int | None = None
    """The same, counted in completions of all processes; at most one of the two is given."""
    drawing: Drawing = field(default_factory=Drawing)
    vllm: ByVllm | None = None
    """How vLLM draws; None: the model in training does."""
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    scale_rewards: str = "group"
    multi_objective_aggregation: str = "sum_then_normalize"
    mask_truncated_completions: bool = False
    use_bias_correction_kl: bool = True
    disable_dropout: bool = True
    """(TRL leaves dropout on.)"""

    def items(self, tokens: list[int]) -> int:
        """What the losses of a step are divided by, given how many learned tokens each of its completions has: those of
        which nothing is learned count among them, as in TRL."""
        if self.loss_type == "grpo":
            return len(tokens)
        if self.loss_type == "dr_grpo":
            return len(tokens) * self.max_completion_length
        return sum(tokens)


@dataclass(frozen=True)
class TokenTerms:
    """What a step has of each learned token, (N,) float32."""

    loss: Tensor
    """With gradient."""
    kl: Tensor
    """Estimate of the divergence from the reference; zeros without one."""
    clipped: Tensor
    """Whether its ratio was cut off."""


def advantages(rewards_SF: Tensor, weights_F: Tensor, groups: list[int], settings: PolicySettings) -> Tensor:
    """The advantage of each completion, (S,) float32.

    Args:
        rewards_SF: of each function.
        weights_F: of the functions in their sum, float64.
        groups: which completions answer the same prompt: a number for each.
        settings: of the objective.
    """
    rewards_SF = rewards_SF.to(torch.float64, copy=True)
    places = list(_places(groups).values())
    if settings.multi_objective_aggregation == "normalize_then_sum":
        for place in places:
            own = rewards_SF[place]
            rewards_SF[place] = (own - own.mean(0)) / (_deviation(own) + _LITTLE)
        rewards = rewards_SF @ weights_F
        return ((rewards - rewards.mean()) / (_deviation(rewards) + _LITTLE)).float()
    rewards = rewards_SF @ weights_F
    found = torch.empty_like(rewards)
    for place in places:
        own = rewards[place]
        found[place] = own - own.mean()
        if settings.scale_rewards == "group":
            found[place] /= _deviation(own) + _LITTLE
    if settings.scale_rewards == "batch":
        found /= _deviation(rewards) + _LITTLE
    return found.float()


def spread(rewards_SF: Tensor, weights_F: Tensor, groups: list[int]) -> tuple[float, float]:
    """The share of groups whose completions all have the same reward, so that nothing is learned from them, and the
    standard deviation of rewards within a group, on average."""
    rewards = rewards_SF.double() @ weights_F
    deviations = torch.stack([_deviation(rewards[place]) for place in _places(groups).values()])
    return float((deviations < 1e-8).double().mean()), float(deviations.mean())


def token_terms(
    losses: SequenceLosses,
    advantage_S: Tensor,
    old_N: Tensor | None,
    reference_N: Tensor | None,
    settings: PolicySettings,
) -> TokenTerms:
    """What each token of a batch is learned by.

    Args:
        losses: of the policy.
        advantage_S: of each sequence.
        old_N: log-probability of each token when it was drawn; None: nothing was learned since, it is the policy's.
        reference_N: under the reference; None without one.
        settings: of the objective.
    """
    logps, learned = -losses.tokens.nats, losses.tokens.learned.float()
    sequence = losses.sequence.clamp(max=len(advantage_S) - 1)  # what fills up may lie behind the last one
    advantage = advantage_S[sequence]
    ratio_log = (logps - (logps.detach() if old_N is None else old_N)) * learned
    if settings.importance_sampling_level == "sequence":
        mean = by_sequence(ratio_log, losses.sequence, len(advantage_S)) / losses.count.clamp(min=1)
        ratio_log = mean[sequence]
    ratio = ratio_log.exp()
    kl = torch.zeros_like(logps)
    if reference_N is not None:
        d = (reference_N - logps) * learned
        kl = d.exp() - d - 1
        if settings.use_bias_correction_kl:
            kl = kl * ratio
    low, high = settings.epsilon, settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    if settings.loss_type == "cispo":
        loss = -ratio.clamp(max=high).detach() * advantage * logps
        clipped = (ratio > high) & (advantage > 0)
    else:
        within = ratio.clamp(1 - low, 1 + high)
        outer = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
        loss = -torch.minimum(outer * advantage, within * advantage)
        clipped = ((ratio < 1 - low) & (advantage < 0)) | ((ratio > 1 + high) & (advantage > 0))
    return TokenTerms((loss + settings.beta * kl) * learned, kl.detach() * learned, clipped.float() * learned)


def loss_sum(terms: TokenTerms, losses: SequenceLosses, settings: PolicySettings) -> Tensor:
    """The sum that a step divides by `PolicySettings.items`: over tokens, or over the means of completions."""
    if settings.loss_type != "grpo":
        return terms.loss.sum()
    return (by_sequence(terms.loss, losses.sequence, len(losses.count)) / losses.count.clamp(min=1)).sum()


def _places(groups: list[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        found.setdefault(group, []).append(place)
    return found


def _deviation(values: Tensor) -> Tensor:
    """Standard deviation over the first dimension, 0 of one value alone."""
    return values.std(0) if len(values) > 1 else torch.zeros_like(values[0])
