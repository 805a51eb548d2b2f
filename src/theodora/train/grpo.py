"""The trainer of grpo: it draws completions from the model as it is, has them rewarded, and learns from the better.

Before an optimizer step the prompts of its batches, and of the next ones' if so asked (`steps_per_generation`), are
answered by the live model (`rollouts.py`), all at once; functions reward the answers (`rewards.py`), and the batches
that are learned from are made of both. From there on a batch goes the way of all others (`trainer.py`). What is drawn
depends on the run's seed, the step, the row and the weights, so that a resumed run draws the same, and so do several
processes; what was drawn and is still to be learned from goes into checkpoints. The loss stands in `grpo_loss.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from theodora.data import PromptRows
from theodora.evaluate.batches import without_router_loss
from theodora.evaluate.decoding import end_tokens
from theodora.train.flattened import Shape
from theodora.train.fused_loss import Head, at_temperature
from theodora.train.grpo_batches import (
    PLACE,
    PROMPTS,
    Asked,
    DrawnBatches,
    Repeated,
    asked_for,
    copies_of,
    repeated,
    steps_at_once,
)
from theodora.train.grpo_loss import PolicySettings, TokenTerms, advantages, loss_sum, spread, token_terms
from theodora.train.out_of_memory import in_parts
from theodora.train.pairs import ADVANTAGE, OLD, SAMPLED, taken_apart
from theodora.train.processes import Processes
from theodora.train.reference import Reference
from theodora.train.rewards import Rewards
from theodora.train.rollouts import Completion
from theodora.train.sequence_losses import SequenceLosses
from theodora.train.sequence_trainer import BALANCE, SequenceTrainer, of_balance
from theodora.train.shares import NOTHING
from theodora.train.vllm_rollouts import rollouts_of

_OF_PASSES = ("entropy", "clip_ratio/region_mean", "sampling/sampling_logp_difference/mean")
_OF_GROUPS = ("frac_reward_zero_std", "reward_std")
_OF_DRAWN = ("reward", "completions/mean_length", "completions/clipped_ratio")
_MOST_ROWS = 256
_SHAPES, _SHORTEST = 12, 64
"""Lengths that batches are filled up to, at most, and the shortest."""
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


_OfAll = tuple[list[int], Tensor, list[int], list[bool]]
"""Of completions: the row of each, its rewards, its tokens, and whether it was cut."""


@dataclass(frozen=True)
class _Lesson:
    """What a step learns from: the completions of this process, and what they are worth among those of all."""

    completions: list[Completion]
    learned: list[bool]
    advantage: list[float]
    items: float
    """What the losses of the step are divided by, over all processes; a whole number if it is drawn for alone."""
    old: list[list[float]] | None = None
    """Log-probabilities under the policy that drew them, where several steps learn from what was drawn at once."""

    def __getitem__(self, some: slice) -> _Lesson:
        old = None if self.old is None else self.old[some]
        return _Lesson(self.completions[some], self.learned[some], self.advantage[some], self.items, old)

    @classmethod
    def read(cls, values: dict[str, Any]) -> _Lesson:
        """From what `asdict` has made of it."""
        completions: Any = [Completion(**each) for each in values["completions"]]
        return cls(**{**values, "completions": completions})


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
        sizes, rows = kwargs["args"], kwargs["train_dataset"]
        batches, count = sizes.gradient_accumulation_steps, Processes.here().count
        self._steps_at_once = steps_at_once(settings, sizes.train_batch_size, batches, count)
        """Steps for which completions are drawn at once."""
        self._lessons_last = self._steps_at_once * settings.num_iterations
        """Steps that learn from what was drawn at once."""
        self._prompts = len(rows)
        at_once = self._steps_at_once * sizes.train_batch_size * batches * count // settings.num_generations
        self._prompts_at_once = None if self._lessons_last == 1 else at_once
        copies = copies_of(self._prompts, self._prompts_at_once)
        kwargs["train_dataset"] = repeated(rows, settings.num_generations, copies)
        if kwargs.get("eval_dataset") is not None:
            kwargs["eval_dataset"] = repeated(kwargs["eval_dataset"], settings.num_generations_eval)
        super().__init__(*args, reference=reference, **kwargs)
        self._collate = DrawnBatches(self.data_collator)
        self.data_collator = asked_for
        tokenizer: Any = self.processing_class
        self._decode, ends = tokenizer.batch_decode, end_tokens(self.model, tokenizer)
        rows, longest = self._drawn_at_once()
        most, by_vllm = settings.max_completion_length, settings.vllm
        self.rollouts = rollouts_of(self.model, settings.drawing, ends, most, rows, longest, by_vllm)
        self._ends = frozenset(ends)
        self._without_spread: int | None = 0
        """Steps from the first on in which all completions of each prompt had one reward; None once there was another.
        """
        self._lessons: dict[int, _Lesson] = {}
        """Of each step of those that were drawn for at once, by its place among them."""
        self._ahead: deque[list[dict[str, Any]]] = deque()
        """Batches of their prompts that are loaded already, of each step to come."""
        self._of_step: tuple[*_OfAll, tuple[float, float]] | None = None

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

    @property
    def fast_notes(self) -> list[str]:
        """Overrides `AdapterTrainer.fast_notes`: also what draws."""
        return [*super().fast_notes, f"answers drawn by {self.rollouts.way}"]

    def _drawn_at_once(self) -> tuple[int, int]:
        """Completions that are drawn together, at most, and tokens of the longest prompt."""
        parts: list[Any] = [rows for rows in (self.train_dataset, self.eval_dataset) if rows is not None]
        longest = max(int(self.lengths_in_batches(rows)[0].max()) for rows in parts)
        step = self._steps_at_once * self.args.train_batch_size * self.args.gradient_accumulation_steps
        held_out = 0 if self.eval_dataset is None else min(self.args.eval_batch_size, len(parts[-1]))
        return min(_MOST_ROWS, max(step, held_out)), longest

    # How a batch is made

    def read_head(self) -> Head | str:
        """Overrides `LossOverrides.read_head`: logits are divided by the temperature that tokens are drawn with."""
        return at_temperature(super().read_head(), self.temperature)

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
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        in_order = self.args.train_sampling_strategy == "sequential"
        return Repeated(
            self._prompts,
            self.settings.num_generations,
            None if in_order else seed,
            iterations=self.settings.num_iterations,
            at_once=self._prompts_at_once,
        )

    @property
    def rows_of_epoch(self) -> int:
        """Overrides `AdapterTrainer.rows_of_epoch`: completions, as often as they are learned from."""
        return len(self._get_train_sampler())

    def _set_signature_columns_if_needed(self) -> None:
        """Overrides `SequenceTrainer._set_signature_columns_if_needed`: rows are prompts."""
        self._signature_columns = ["input_ids", "labels", "row", PLACE, NOTHING]

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Overrides `SequenceTrainer._get_num_items_in_batch`: they are counted once they are drawn."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides `StepOverrides.get_batch_samples`: draws the completions of a step, or of several, and has them
        rewarded."""
        batches = self._ahead.popleft() if self._ahead else super().get_batch_samples(*args, **kwargs)[0]
        if not batches:
            return batches, None
        if not self.model.training:  # after an evaluation
            self.model.train()
        place = self.state.global_step % self._lessons_last
        part = place % self._steps_at_once
        self._of_step = None
        if place == 0:
            self._lessons = {}
        if part not in self._lessons:  # (in the midst of them after a change of the number of processes)
            for later in range(part + 1, self._steps_at_once):
                if later not in self._lessons:
                    self._ahead.append(super().get_batch_samples(*args, **kwargs)[0])
            new = self._new_lessons([_asked(step) for step in (batches, *self._ahead)])
            self._lessons |= dict(enumerate(new, start=part))
        lesson = self._lessons[part]
        made = iter(self._batches(_asked(batches), lesson))
        nothing = {NOTHING: True, "input_ids": torch.zeros(1, 0, dtype=torch.long)}
        batches = [dict(nothing) if batch.get(NOTHING) else next(made) for batch in batches]
        return batches, torch.tensor(lesson.items, device=self.args.device)

    def _new_lessons(self, steps: list[list[Asked]]) -> list[_Lesson]:
        """Draw completions of the batches of steps, and find out what they are worth: a lesson for each step."""
        asked = [*chain(*steps)]
        drawn = self._drawn(_joined(asked))
        (groups, rewards, lengths, cut), own = self._gathered(drawn)
        self._of_step = groups, rewards, lengths, cut, spread(rewards, self.rewards.weights, groups)
        self._record_drawn(*self._of_step)
        self._look_for_spread(self._of_step[-1][0])
        items = self.settings.items([n * self._learns_from(each) for n, each in zip(lengths, cut, strict=True)])
        worth = advantages(rewards, self.rewards.weights, groups, self.settings)[own]
        whole = _Lesson(
            drawn.completions,
            [self._learns_from(each) for each in drawn.cut],
            worth.tolist(),
            items if len(steps) == 1 else items / len(steps),  # all tokens count alike, as in TRL
        )
        if self._lessons_last > 1:
            whole = replace(whole, old=self._old(asked, whole))
        ends = [*accumulate(sum(len(batch.rows) for batch in step) for step in steps)]
        return [whole[begin:end] for begin, end in pairwise((0, *ends))]

    def _learns_from(self, cut: bool) -> bool:
        return not (cut and self.settings.mask_truncated_completions)

    @torch.no_grad()
    def _old(self, asked: list[Asked], lesson: _Lesson) -> list[list[float]]:
        """Log-probabilities of all completions' tokens as training computes them."""

        def logps(batch: dict[str, Any]) -> Tensor:
            tokens = self.each(self.model, taken_apart(batch)[0]).tokens
            return -tokens.nats[tokens.learned.bool()]

        parts = [self._in_parts(logps, batch) for batch in self._batches(asked, lesson)]
        flat = iter(torch.cat([*chain(*parts)]).tolist() if parts else [])
        return [
            [next(flat) if learned else 0.0 for _ in each.tokens]
            for each, learned in zip(lesson.completions, lesson.learned, strict=True)
        ]

    def carried(self) -> Any:
        """Overrides `CountingTrainer.carried`: what the next step learns from, too."""
        place = self.state.global_step % self._lessons_last
        if place == 0:
            return None
        last = place >= self._lessons_last - self._steps_at_once  # that they are learned from
        first = place % self._steps_at_once if last else 0
        lessons = [[part, asdict(lesson)] for part, lesson in self._lessons.items() if part >= first]
        return {"settings": repr(self.settings), "lessons": lessons}

    def carry_on(self, carried: Any) -> None:
        """Overrides `CountingTrainer.carry_on`: what was drawn for other settings is drawn anew."""
        if carried is not None and carried.get("settings") == repr(self.settings):
            self._lessons = {part: _Lesson.read(lesson) for part, lesson in carried["lessons"]}

    def _drawn(self, asked: Asked) -> _Drawn:
        """Completions of prompts, and what they are rewarded with: of held-out ones by the same random numbers in every
        evaluation."""
        step = 0 if self.mode == "eval" else self.state.global_step + 1
        seed = (self.args.seed << 32) + step
        with self.compute_loss_context_manager(), without_router_loss(self.model):
            completions = self.rollouts(asked.tokens, seed, places=asked.places) if asked.rows else []
        told = self._told[self.mode]
        assert told is not None
        rewards = torch.zeros(0, len(self.rewards.names))
        if completions:
            texts = self._decode([each.tokens for each in completions], skip_special_tokens=True)
            prompts, columns = told(asked.rows)
            rewards = self.rewards(prompts, texts, columns, [each.tokens for each in completions], self.state)
        return _Drawn(asked, completions, [each.tokens[-1] not in self._ends for each in completions], rewards)

    def _gathered(self, drawn: _Drawn) -> tuple[_OfAll, slice]:
        """Of the completions of all processes: the row of each, its rewards, its tokens, and whether it was cut; and
        which of them are those of this one."""
        lengths = [len(each.tokens) for each in drawn.completions]
        found = self.processes.gather((drawn.asked.rows, drawn.rewards, lengths, drawn.cut))
        before = sum(len(rows) for rows, *_ in found[: self.processes.index])
        rows, rewards, lengths, cut = zip(*found, strict=True)
        of_all = [*chain(*rows)], torch.cat(rewards), [*chain(*lengths)], [*chain(*cut)]
        return of_all, slice(before, before + len(drawn.completions))

    def _batches(self, asked: Sequence[Asked], lesson: _Lesson) -> list[dict[str, Any]]:
        """The batches that are learned from."""
        batches: list[dict[str, Any]] = []
        begin = 0
        for batch in asked:
            own = slice(begin, begin := begin + len(batch.rows))
            old = None if lesson.old is None else lesson.old[own]
            worth = torch.tensor(lesson.advantage[own])
            batches.append(self._collate(batch.tokens, lesson.completions[own], lesson.learned[own], worth, old))
        return batches

    @property
    def why_at_rest(self) -> str | None:
        """Overrides `AdapterTrainer.why_at_rest`: all rewards were alike."""
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
        old = _at(losses, own[OLD]) if OLD in own else None
        terms = token_terms(losses, own[ADVANTAGE], old, frozen, self.settings)
        count = losses.count.sum() if items is None else torch.as_tensor(items, device=terms.loss.device)
        total = loss_sum(terms, losses, self.settings) / count.clamp(min=1)
        return self.balanced(total, losses.balance, items, weight), self._figures(losses, terms, own)

    def _figures(self, losses: SequenceLosses, terms: TokenTerms, own: dict[str, Any]) -> Tensor:
        """Sums and numbers in the order of `pass_figures`, (2, F)."""
        learned = losses.tokens.learned.float()
        count = losses.count.sum()
        # The policy that has drawn them may be another by now.
        trained = _at(losses, own[OLD]) if OLD in own else -losses.tokens.nats.detach()
        difference = (trained - _at(losses, own[SAMPLED])).abs() * learned
        found = {
            "entropy": losses.entropy.sum(),
            "kl": terms.kl.sum(),
            "clip_ratio/region_mean": terms.clipped.sum(),
            "sampling/sampling_logp_difference/mean": difference.sum(),
        }
        return self.stacked({**{name: (total, count) for name, total in found.items()}, **of_balance(losses)})

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Overrides `PassOverrides.prediction_step`: the held-out loss is the mean reward, negative."""
        if inputs.pop(NOTHING, False):
            return torch.zeros((), device=self.args.device), None, None
        asked: Asked = inputs[PROMPTS]
        drawn = self._drawn(asked)
        lengths = [len(each.tokens) for each in drawn.completions]
        self._record_drawn(asked.rows, drawn.rewards, lengths, drawn.cut)
        self._measure(drawn)
        reward = float((drawn.rewards.double() @ self.rewards.weights).mean())
        self._eval_nats -= reward * len(asked.rows)
        self._eval_tokens += len(asked.rows)
        return torch.tensor(-reward, device=self.args.device), None, None

    @torch.no_grad()
    def _measure(self, drawn: _Drawn) -> None:
        """Record what passes record, of held-out completions: as many at a time as in training, fewer if they do not
        fit."""
        count, size = len(drawn.completions), self.args.train_batch_size
        asked = [drawn.asked[n : n + size] for n in range(0, count, size)]
        lesson = _Lesson(drawn.completions, [True] * count, [0.0] * count, 0)
        for batch in self._batches(asked, lesson):
            for figures in self._in_parts(self._figures_of, batch):
                self.record(figures, 0)

    def _in_parts(self, found: Callable[[dict[str, Any]], Tensor], batch: dict[str, Any]) -> list[Tensor]:
        """What is found of a batch without gradients, for which graphs make room if they have to."""
        inputs = self._prepare_inputs(batch)
        with self.compute_loss_context_manager():
            try:
                return in_parts(found, inputs)
            except torch.OutOfMemoryError:
                if not self.release_graphs("a pass without gradients needs the memory"):
                    raise
            # Outside the handler, which holds what did not fit.
            return in_parts(found, inputs)

    def _figures_of(self, batch: dict[str, Any]) -> Tensor:
        return self.loss_of(self.model, *taken_apart(batch), None)[1]

    # What is recorded

    def _record_drawn(
        self,
        groups: list[int],
        rewards: Tensor,
        lengths: list[int],
        cut: list[bool],
        of_groups: tuple[float, float] | None = None,
    ) -> None:
        """Record completions, and of those that are learned from what `spread` says."""
        total = rewards.double() @ self.rewards.weights
        count = len(groups)
        self.add_to_mean("reward", float(total.sum()), count)
        self.add_to_mean("completions/mean_length", float(sum(lengths)), count)
        self.add_to_mean("completions/clipped_ratio", float(sum(cut)), count)
        for n, name in enumerate(self.rewards.names):
            self.add_to_mean(f"rewards/{name}/mean", float(rewards[:, n].sum()), count)
        if of_groups is not None:
            for name, value in zip(_OF_GROUPS, of_groups, strict=True):
                self.add_to_mean(name, value, 1)

    def _look_for_spread(self, same: float) -> None:
        self._without_spread = None if same < 1 or self._without_spread is None else self._without_spread + 1
        drawings = -(-_STEPS_WITHOUT // self._lessons_last)
        if self._without_spread == drawings:
            self.say(f"{drawings * self._lessons_last} steps, and {_SAME_REWARDS}")

    def start_step_over(self) -> None:
        """Overrides `StepOverrides.start_step_over`: what draws lets go of its memory, too, and keeps none any more."""
        self.rollouts.release(for_good=True)
        super().start_step_over()
        if self._of_step is not None:  # what was recorded of the step is forgotten, and it is not drawn again
            self._record_drawn(*self._of_step)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides `PassOverrides.train`: what draws does not outlive it."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.rollouts.release()


def _asked(batches: Sequence[dict[str, Any]]) -> list[Asked]:
    """The prompts of those batches that have any."""
    return [batch[PROMPTS] for batch in batches if not batch.get(NOTHING)]


def _joined(batches: Sequence[Asked]) -> Asked:
    parts = ([value for each in batches for value in getattr(each, name)] for name in ("tokens", "rows", "places"))
    return Asked(*parts)


def _at(losses: SequenceLosses, grid_BT: Tensor) -> Tensor:
    """What stands in a grid at the tokens of a batch, (N,)."""
    flat = grid_BT.flatten()
    return flat[losses.at.clamp(max=flat.numel() - 1)]  # what fills up may lie behind the last one


def _rounded(size: float) -> int:
    return -(-int(size) // _SHORTEST) * _SHORTEST
