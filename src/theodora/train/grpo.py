"""The trainer of grpo: it draws completions from the model as it is, has them rewarded, and learns from the better.

Before each optimizer step the prompts of its batches are answered by the live model (`rollouts.py`), all at once;
functions reward the answers (`rewards.py`), and the batches that are learned from are made of both. From there on a
batch goes the way of all others (`trainer.py`). What is drawn depends on the run's seed, the step and the weights, so
that a resumed run draws the same. The step's loss stands in `grpo_loss.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from theodora.data import PromptRows
from theodora.evaluate.decoding import end_tokens
from theodora.train.flattened import Shape
from theodora.train.fused_loss import Head
from theodora.train.grpo_batches import PROMPTS, Asked, DrawnBatches, Repeated, asked_for, repeated
from theodora.train.grpo_loss import PolicySettings, TokenTerms, advantages, loss_sum, spread, token_terms
from theodora.train.out_of_memory import in_parts
from theodora.train.pairs import ADVANTAGE, SAMPLED, taken_apart
from theodora.train.reference import Reference
from theodora.train.rewards import Rewards
from theodora.train.rollouts import Completion, Rollouts
from theodora.train.sequence_losses import SequenceLosses
from theodora.train.sequence_trainer import BALANCE, SequenceTrainer, of_balance
from theodora.train.shares import NOTHING

_OF_PASSES = ("entropy", "clip_ratio/region_mean", "sampling/sampling_logp_difference/mean")
_OF_GROUPS = ("frac_reward_zero_std", "reward_std")
_OF_DRAWN = ("reward", "completions/mean_length", "completions/clipped_ratio")
_SHAPES, _SHORTEST = 12, 64
"""Lengths that batches are filled up to, at most, and the shortest."""
_PRIME = 1_000_003
_STEPS_WITHOUT = 10
_SAME_REWARDS = (
    "all completions of each prompt had the same reward. Prompts that the model can answer now and then, rewards that "
    "tell better from worse, more completions of each (num_generations) or a higher temperature give it something to "
    "learn from; so does an adapter that has seen right answers (--from-adapter)."
)


@dataclass(frozen=True)
class _Drawn:
    """What was drawn for some prompts in this process."""

    asked: Asked
    completions: list[Completion]
    cut: list[bool]
    """Whether each ended for want of tokens."""
    rewards: Tensor
    """(completions, functions) float32."""


class GRPOTrainer(SequenceTrainer):
    """Learns from rewards of completions that it draws.

    Args:
        settings: of the objective.
        reference: what the policy is held to by β, and its divergence from which is measured.
        rewards: the functions.
        training: what they are told of the rows trained on.
        held_out: likewise of the rows held out, if there are any.
        **kwargs: as of `AdapterTrainer`; rows are those of `tokenize_prompts`, each once.
    """

    def __init__(
        self,
        *args: Any,
        settings: PolicySettings,
        reference: Reference,
        rewards: Rewards,
        training: PromptRows,
        held_out: PromptRows | None,
        **kwargs: Any,
    ) -> None:
        self.settings, self.rewards, self._told = settings, rewards, {"train": training, "eval": held_out}
        kwargs["train_dataset"] = repeated(kwargs["train_dataset"], settings.num_generations)
        if kwargs.get("eval_dataset") is not None:
            kwargs["eval_dataset"] = repeated(kwargs["eval_dataset"], settings.num_generations_eval)
        super().__init__(*args, reference=reference, **kwargs)
        self._collate = DrawnBatches(self.data_collator)
        self.data_collator = asked_for
        ends = end_tokens(self.model, self.processing_class)
        self.rollouts = Rollouts(self.model, settings.drawing, ends, settings.max_completion_length)
        self._ends = frozenset(ends)
        self._eval_batch = self._before = 0
        self._without_spread: int | None = 0
        """Steps from the first on in which all completions of each prompt had one reward; None once there was another.
        """
        self._of_step: tuple[list[int], Tensor, list[int], list[bool]]

    @property
    def figures(self) -> tuple[str, ...]:
        """What is recorded, by TRL's names."""
        of_functions = (f"rewards/{name}/mean" for name in self.rewards.names)
        return (*self._of_passes(with_kl=True), *_OF_DRAWN, *_OF_GROUPS, *of_functions)

    @property
    def pass_figures(self) -> tuple[str, ...]:
        """Overrides `SequenceTrainer.pass_figures`: what is drawn is recorded once in a step."""
        return self._of_passes(self._compares)

    def _of_passes(self, with_kl: bool) -> tuple[str, ...]:
        return (*_OF_PASSES, *(("kl",) if with_kl else ()), *((BALANCE,) if self.aux_loss_enabled else ()))

    @property
    def _compares(self) -> bool:
        """Whether a pass runs the reference, too: without β held-out prompts alone tell how far the policy has come."""
        return bool(self.settings.beta) or self.mode == "eval"

    # How a batch is made

    def read_head(self) -> Head | str:
        """Overrides `LossOverrides.read_head`: logits are divided by the temperature that tokens are drawn with."""
        head, temperature = super().read_head(), self.settings.drawing.temperature
        if isinstance(head, str) or temperature == 1:
            return head
        if head.softcap is not None:
            return "logits are capped before the temperature divides them"
        return replace(head, scale=head.scale / temperature)

    @property
    def temperature(self) -> float:
        """Overrides `SequenceTrainer.temperature`."""
        return self.settings.drawing.temperature

    def _shapes(self) -> list[Shape]:
        """Overrides `PassOverrides._shapes`: completions are of any length, so the lengths to fill up to grow by a
        constant factor from the shortest batch to the longest."""
        lengths, _ = self.lengths_in_batches(self.train_dataset)
        rows, most = self.args.train_batch_size, self.settings.max_completion_length
        shortest, longest = rows * (int(lengths.min()) + 1), rows * (int(lengths.max()) + most)
        factor = max(1.15, (longest / shortest) ** (1 / (_SHAPES - 1)))
        sizes, size = {_rounded(longest)}, float(shortest)
        while size < longest:
            sizes.add(_rounded(size))
            size *= factor
        return [Shape(size, min(size, _rounded(rows * most))) for size in sorted(sizes)]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Overrides `StepOverrides._get_train_sampler`: completions of a prompt are drawn together."""
        times, seed = self.settings.num_generations, self.args.data_seed
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return Repeated(len(rows) // times, times, self.args.seed if seed is None else seed)

    def _set_signature_columns_if_needed(self) -> None:
        """Overrides `SequenceTrainer._set_signature_columns_if_needed`: rows are prompts."""
        self._signature_columns = ["input_ids", "labels", "row", NOTHING]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides `StepOverrides.get_batch_samples`: draws the completions of a step, and has them rewarded."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        if not batches:
            return batches, None
        if not self.model.training:  # after an evaluation
            self.model.train()
        real = [batch for batch in batches if not batch.get(NOTHING)]
        drawn = self._drawn(_joined([batch[PROMPTS] for batch in real]), (self.state.global_step << 1) * _PRIME)
        groups, rewards, lengths, cut = self._gathered(drawn)
        self._of_step = groups, rewards, lengths, cut
        self._record_drawn(*self._of_step)
        learned = [not (self.settings.mask_truncated_completions and each) for each in cut]
        items = self.settings.items([length for length, is_learned in zip(lengths, learned, strict=True) if is_learned])
        advantage = self._own(advantages(rewards, groups, self.settings), len(drawn.completions))
        made = iter(self._batches(drawn, advantage, [len(batch[PROMPTS].rows) for batch in real]))
        nothing = {NOTHING: True, "input_ids": torch.zeros(1, 0, dtype=torch.long)}
        batches = [dict(nothing) if batch.get(NOTHING) else next(made) for batch in batches]
        return batches, torch.tensor(items, device=self.args.device)

    def _drawn(self, asked: Asked, seed: int) -> _Drawn:
        """Completions of prompts, and what they are rewarded with."""
        seed = (self.args.seed * _PRIME + seed) * self.processes.count + self.processes.index
        with self.compute_loss_context_manager():
            completions = self.rollouts(asked.tokens, seed=seed % (1 << 62)) if asked.rows else []
        told = self._told[self.mode]
        assert told is not None
        rewards = torch.zeros(0, len(self.rewards.names))
        if completions:
            texts = self.processing_class.batch_decode([each.tokens for each in completions], skip_special_tokens=True)
            prompts, columns = told(asked.rows)
            rewards = self.rewards(prompts, texts, columns, [each.tokens for each in completions], self.state)
        return _Drawn(asked, completions, [each.tokens[-1] not in self._ends for each in completions], rewards)

    def _gathered(self, drawn: _Drawn) -> tuple[list[int], Tensor, list[int], list[bool]]:
        """Of the completions of all processes: the row of each, its rewards, its tokens, and whether it was cut."""
        lengths = [len(each.tokens) for each in drawn.completions]
        found = self.processes.gather((drawn.asked.rows, drawn.rewards, lengths, drawn.cut))
        self._before = sum(len(rows) for rows, *_ in found[: self.processes.index])
        rows, rewards, lengths, cut = zip(*found, strict=True)
        return [*chain(*rows)], torch.cat(rewards), [*chain(*lengths)], [*chain(*cut)]

    def _own(self, of_all: Tensor, count: int) -> Tensor:
        return of_all[self._before : self._before + count]

    def _batches(self, drawn: _Drawn, advantage: Tensor, sizes: Sequence[int]) -> list[dict[str, Any]]:
        batches: list[dict[str, Any]] = []
        begin = 0
        for size in sizes:
            own = slice(begin, begin := begin + size)
            learned = [not (self.settings.mask_truncated_completions and cut) for cut in drawn.cut[own]]
            batches.append(self._collate(drawn.asked.tokens[own], drawn.completions[own], learned, advantage[own]))
        return batches

    @property
    def nothing_to_learn(self) -> str | None:
        """Why no step could move anything, if none could."""
        if not self._without_spread:
            return None
        return f"There was nothing to learn: {_SAME_REWARDS}"

    # The loss

    def loss_of(
        self, model: nn.Module, given: dict[str, Any], own: dict[str, Any], items: Any, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Overrides `SequenceTrainer.loss_of`: a share of the step's mean."""
        losses = self.each(model, given, balanced=self.aux_loss_enabled)
        frozen = -self.of_reference(given).tokens.nats if self._compares else None
        terms = token_terms(losses, own[ADVANTAGE], None, frozen, self.settings)
        count = losses.count.sum() if items is None else torch.as_tensor(items, device=terms.loss.device)
        total = loss_sum(terms, losses, self.settings) / count.clamp(min=1)
        return self.balanced(total, losses.balance, items, weight), self._figures(losses, terms, own)

    def _figures(self, losses: SequenceLosses, terms: TokenTerms, own: dict[str, Any]) -> Tensor:
        """Sums and numbers in the order of `pass_figures`, (2, F)."""
        learned = losses.tokens.learned.float()
        count = losses.count.sum()
        sampled = own[SAMPLED].flatten()
        drawn_N = sampled[losses.at.clamp(max=sampled.numel() - 1)]
        difference = (-losses.tokens.nats.detach() - drawn_N).abs() * learned
        found = {
            "entropy": losses.entropy.sum(),
            "kl": terms.kl.sum(),
            "clip_ratio/region_mean": terms.clipped.sum(),
            "sampling/sampling_logp_difference/mean": difference.sum(),
        }
        return self.stacked({**{name: (total, count) for name, total in found.items()}, **of_balance(losses)})

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Overrides `PassOverrides.prediction_step`: the held-out loss is the mean reward, negative; the same random
        numbers each time."""
        if inputs.pop(NOTHING, False):
            return torch.zeros((), device=self.args.device), None, None
        asked: Asked = inputs[PROMPTS]
        self._eval_batch += 1
        drawn = self._drawn(asked, 2 * self._eval_batch + 1)
        lengths = [len(each.tokens) for each in drawn.completions]
        self._record_drawn(asked.rows, drawn.rewards, lengths, drawn.cut)
        self._measure(drawn)
        reward = float((drawn.rewards @ self.rewards.weights).mean())
        self._eval_nats -= reward * len(asked.rows)
        self._eval_tokens += len(asked.rows)
        return torch.tensor(-reward, device=self.args.device), None, None

    @torch.no_grad()
    def _measure(self, drawn: _Drawn) -> None:
        """Record what passes record, of held-out completions: as many at a time as in training, fewer if they do not
        fit."""
        count, size = len(drawn.completions), self.args.train_batch_size
        sizes = [min(size, count - begin) for begin in range(0, count, size)]
        for batch in self._batches(drawn, torch.zeros(count), sizes):
            with self.compute_loss_context_manager():
                self.record(in_parts(self._figures_of, self._prepare_inputs(batch)), 0)

    def _figures_of(self, batch: dict[str, Any]) -> Tensor:
        return self.loss_of(self.model, *taken_apart(batch), None)[1]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides `LossOverrides.evaluation_loop`: draws alike in every evaluation."""
        self._eval_batch = 0
        return super().evaluation_loop(*args, **kwargs)

    # What is recorded

    def _record_drawn(self, groups: list[int], rewards: Tensor, lengths: list[int], cut: list[bool]) -> None:
        total = rewards.double() @ self.rewards.weights.double()
        count = len(groups)
        self.add_to_mean("reward", float(total.sum()), count)
        self.add_to_mean("completions/mean_length", float(sum(lengths)), count)
        self.add_to_mean("completions/clipped_ratio", float(sum(cut)), count)
        for n, name in enumerate(self.rewards.names):
            self.add_to_mean(f"rewards/{name}/mean", float(rewards[:, n].sum()), count)
        if self.mode == "train":
            same, deviation = spread(rewards, groups, self.settings)
            self.add_to_mean("frac_reward_zero_std", same, 1)
            self.add_to_mean("reward_std", deviation, 1)
            self._without_spread = None if same < 1 or self._without_spread is None else self._without_spread + 1
            if self._without_spread == _STEPS_WITHOUT:
                self.say(f"{_STEPS_WITHOUT} steps, and {_SAME_REWARDS}")

    def start_step_over(self) -> None:
        """Overrides `StepOverrides.start_step_over`: what draws lets go of its memory, too, and keeps none any more."""
        self.rollouts.release(for_good=True)
        super().start_step_over()
        self._record_drawn(*self._of_step)  # what was recorded of the step is forgotten, and it is not drawn again

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides `PassOverrides.train`: what draws does not outlive it."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.rollouts.release()


def _joined(batches: Sequence[Asked]) -> Asked:
    return Asked([ids for each in batches for ids in each.tokens], [row for each in batches for row in each.rows])


def _rounded(size: float) -> int:
    return -(-int(size) // _SHORTEST) * _SHORTEST
