"""What one looks at in a run that learns from preferences or rewards: in words, and in rows of a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from theodora.config import TrainConfig
from theodora.train.grpo_loss import PolicySettings
from theodora.train.objectives import settings_of
from theodora.train.preference_loss import Settings
from theodora.train.reference import BASE
from theodora.train.reward_loss import ScoreSettings

Figures = Mapping[str, tuple[float | None, float | None]]
"""TRL's name of a figure -> its value on the held-out rows before and after training."""

# TRL's name -> how it is called in tables, and how it is written.
_ROWS = {
    "rewards/accuracies": ("Better answer preferred", "{:.1%}"),
    "rewards/margins": ("Margin of rewards", "{:.4f}"),
    "rewards/chosen": ("Reward of better answers", "{:.4f}"),
    "rewards/rejected": ("Reward of worse answers", "{:.4f}"),
    "logps/chosen": ("Log-likelihood of better answers", "{:.2f}"),
    "logps/rejected": ("Log-likelihood of worse answers", "{:.2f}"),
    "kl": ("Divergence from the reference", "{:.4f}"),
}
# The same of reward models.
_OF_SCORES = {
    "accuracy": ("Better answer scores higher", "{:.1%}"),
    "margin": ("Margin of scores", "{:.4f}"),
    "mean_reward": ("Mean score", "{:.4f}"),
    "min_reward": ("Least score", "{:.4f}"),
    "max_reward": ("Largest score", "{:.4f}"),
}
# The same of grpo, whose divergence is of a token. Between them stand its rewards by function.
_REWARD = {"reward": ("Reward", "{:.4f}")}
_DRAWN = {
    "kl": ("Divergence from the reference, of a token", "{:.5f}"),
    "entropy": ("Entropy of a token (nats)", "{:.4f}"),
    "completions/mean_length": ("Tokens of an answer", "{:.1f}"),
    "completions/clipped_ratio": ("Answers that were cut", "{:.1%}"),
}


def held_out_figures(objective: str, history: Sequence[Mapping[str, Any]], best: float | None = None) -> Figures:
    """Figures of the first evaluation, if it was before the first step, and of the last, or of the best.

    Args:
        objective: of the run.
        history: the trainer's log.
        best: the held-out loss of the adapter that was kept; None: the last one was.
    """
    lines = [line for line in history if "eval_loss" in line]
    if not lines or objective == "sft":
        return {}
    first = lines[0] if lines[0]["step"] == 0 else {}
    last = next((line for line in lines if line["eval_loss"] == best), lines[-1])
    drawn = (*_REWARD, *functions_in([last], "eval_"), *_DRAWN) if objective == "grpo" else ()
    names = drawn or (_OF_SCORES if objective == "reward" else _ROWS)
    found = {name: (first.get(f"eval_{name}"), last.get(f"eval_{name}")) for name in names}
    if found.get("rewards/margins", (None,))[0] == 0:  # the model is its reference still: it prefers nothing
        found["rewards/accuracies"] = None, found["rewards/accuracies"][1]
    return {name: values for name, values in found.items() if values[1] is not None}


def functions_in(lines: Iterable[Mapping[str, Any]], before: str = "") -> list[str]:
    """Names of the rewards by function in lines of a log, where there are several; `before` stands before each."""
    begin, end = f"{before}rewards/", "/mean"
    names = dict.fromkeys(
        name.removeprefix(before) for line in lines for name in line if name.startswith(begin) and name.endswith(end)
    )
    return [*names] if len(names) > 1 else []


def figure_rows(objective: str, figures: Figures) -> list[tuple[str, str, str]]:
    """Figure, before, after, in words."""
    known = {"grpo": _REWARD | _DRAWN, "reward": _OF_SCORES}.get(objective, _ROWS)

    def row(key: str, values: tuple[float | None, float | None]) -> tuple[str, str, str]:
        words, form = known.get(key) or (f"Reward: {function_of(key)}", "{:.4f}")
        before, after = ("" if value is None else form.format(value) for value in values)
        return words, before, after

    return [row(key, values) for key, values in figures.items()]


def function_of(name: str) -> str:
    """`brief`, of rewards/brief/mean."""
    return name.removeprefix("rewards/").removesuffix("/mean")


def described(config: TrainConfig) -> str | None:
    """`dpo, beta 0.1, compared with the base model (the adapter switched off)`; None for sft."""
    settings = settings_of(config)
    if settings is None:
        return None
    if isinstance(settings, ScoreSettings):
        centred = settings.center_rewards_coefficient
        return "reward, a model that scores answers" + (f", centred by {centred:g}" if centred else "")
    of_policy = isinstance(settings, PolicySettings)
    parts = [config.objective, *(_of_policy(config, settings) if of_policy else _settings(settings))]
    if config.reference is not None:
        what = "the base model (the adapter switched off)" if config.reference == BASE else config.reference
        beforehand = not of_policy and settings.precompute_ref_log_probs
        parts.append(f"compared with {what}" + (", beforehand" if beforehand else ""))
    return ", ".join(parts)


def per_row(config: TrainConfig) -> str:
    """What a loss is a mean over."""
    return {"sft": "token (nats)", "kto": "answer", "grpo": "token"}.get(config.objective, "pair")


def _of_policy(config: TrainConfig, settings: PolicySettings) -> list[str]:
    weights = config.reward_weights or (1.0,) * len(config.reward)
    shares = (f"{weight:g} × {name}" for weight, name in zip(weights, config.reward, strict=True))
    rewards = config.reward[0] if len(config.reward) == 1 else " + ".join(shares)
    return [
        f"rewards {rewards}",
        f"{settings.num_generations} completions of each prompt, {settings.max_completion_length} tokens at most",
        f"temperature {settings.drawing.temperature:g}",
        *(
            f"{name} {value}"
            for name in ("num_iterations", "steps_per_generation", "generation_batch_size")
            if (value := getattr(settings, name)) not in (None, 1)
        ),
        *([f"beta {settings.beta:g}"] if settings.beta else []),
        *([f"loss {settings.loss_type}"] if settings.loss_type != "dapo" else []),
    ]


def _settings(settings: Settings) -> list[str]:
    own = [f"beta {settings.beta:g}"]
    if settings.objective == "dpo" and settings.losses != (("sigmoid", 1.0),):
        own.append(" + ".join(f"{weight:g} × {name}" for name, weight in settings.losses))
    if settings.objective == "simpo":
        own.append(f"gamma {settings.simpo_gamma:g}")
    return own
