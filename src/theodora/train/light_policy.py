"""grpo without a trainer, for many short runs one after the other: what `light.py` is to the other objectives.

    policy = Policy(settings=settings, rewards=rewards, weights=rewards.weights, prompts=prompts, reference=reference)
    result = train_policy(model, policy, LightSettings(steps=100), tokenizer=tokenizer, head=head)
    judged = judge(model, prompts, rewards, tokenizer, head=head, …)   # any model's answers, drawn and rewarded

A step asks `batch_size` prompts, in the order in which the other objectives take their rows. Their completions are
learned from in passes of twice as many sequences as a step has prompts, which is what pairs take. Loss, advantages and
what is drawn at once for several steps are those of `grpo.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from theodora.data import PromptRows
from theodora.evaluate.batches import without_router_loss
from theodora.evaluate.decoding import end_tokens
from theodora.kernels.cross_entropy import IGNORED
from theodora.train.fused_loss import Head, at_temperature
from theodora.train.graphed import graphs_pay
from theodora.train.grpo_batches import steps_at_once
from theodora.train.grpo_loss import PolicySettings, advantages, loss_sum, token_terms
from theodora.train.light import (
    LightBatch,
    LightResult,
    LightRun,
    LightSettings,
    Row,
    light_batch,
    one_shape_of,
    row_order,
    take_steps,
)
from theodora.train.reference import Reference
from theodora.train.rewards import Rewards
from theodora.train.rollouts import Completion, Drawing, Rollouts
from theodora.train.sequence_losses import SequenceLosses

_MOST_ROWS = 256
"""Completions that are drawn together, at most."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What is asked."""

    tokens: Sequence[Sequence[int]]
    rows: Sequence[int]
    """The number of each among those that `told` tells of."""
    told: PromptRows
    """What functions are given of them."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """An objective that learns from rewards of what the model says."""

    settings: PolicySettings
    prompts: Prompts
    rewards: Rewards
    weights: Tensor
    """Of the functions in their sum, (functions,), float64."""
    reference: Reference | None
    """What β holds the policy to, if it does."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a model's own answers are worth."""

    rewards: dict[str, float]
    """Function -> mean over the answers."""
    reward: float
    """Mean of the weighted sum."""
    length: float
    """Tokens of an answer."""
    kl: float | None
    """Estimated divergence from the reference, of a token, in nats; None without one."""


def train_policy(
    model: PreTrainedModel,
    policy: Policy,
    settings: LightSettings,
    *,
    tokenizer: PreTrainedTokenizerBase,
    head: Head | str,
    pad_id: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> LightResult:
    """Train whatever asks for gradients.

    Args:
        model: as of `train_light`; with an adapter.
        policy: what is learned.
        settings: how; `batch_size` is of prompts.
        tokenizer: decodes completions.
        head: as of `train_light`.
        pad_id: likewise.
        on_step: likewise.

    Raises:
        LightRunDiverged: a loss is not finite.
        OutputNotFinite: what is drawn from is not.
        DataError: a reward fails.
    """
    own, step = policy.settings, settings.batch_size * policy.settings.num_generations
    at_once = steps_at_once(own, step, 1, 1)
    drawn = _Drawn(model, own.drawing, own.max_completion_length, policy.prompts, tokenizer, at_once * step)
    run = _PolicyRun(model, own, policy.reference, head, graphed=graphs_pay(model.device))
    course = _Course(run, policy, settings, drawn, at_once, pad_id)
    try:
        losses = take_steps(model, settings, course.steps(), on_step)
        graphed = run.close() * settings.steps // course.passes
        return LightResult(losses=losses, tokens=course.tokens, graphed=graphed, drawn=course.tokens_drawn)
    finally:
        drawn.release()


def judge(
    model: PreTrainedModel,
    prompts: Prompts,
    rewards: Rewards,
    tokenizer: PreTrainedTokenizerBase,
    *,
    head: Head | str,
    most: int,
    rows: int,
    reference: Reference | None = None,
    pad_id: int = 0,
) -> Judged:
    """Draw an answer to each prompt, by the same random numbers every time, and have it rewarded.

    Args:
        model: any.
        prompts: that are asked.
        rewards: the functions.
        tokenizer: as of `train_policy`.
        head: likewise.
        most: tokens of an answer.
        rows: answers under way at a time, and sequences of a pass.
        reference: what the divergence is measured from.
        pad_id: as of `train_policy`.
    """
    drawn = _Drawn(model, Drawing(), most, prompts, tokenizer, rows)
    try:
        completions, found = drawn(rewards, [(n, n) for n in range(len(prompts))], seed=0)
    finally:
        drawn.release()
    lengths = [len(each.tokens) for each in completions]
    kl = None
    if reference is not None:
        run = _PolicyRun(model, PolicySettings(), reference, head, graphed=False)
        order = sorted(range(len(prompts)), key=lambda n: -len(prompts.tokens[n]) - lengths[n])
        batches = (order[at : at + rows] for at in range(0, len(order), rows))
        sums = [
            run.divergence(light_batch([_row(prompts.tokens[n], completions[n]) for n in batch], pad_id, None))
            for batch in batches
        ]
        kl = sum(sums) / sum(lengths)
    means = found.double().mean(0)
    return Judged(
        rewards=dict(zip(rewards.names, means.tolist(), strict=True)),
        reward=float(means @ rewards.weights),
        length=sum(lengths) / len(lengths),
        kl=kl,
    )


class _Drawn:
    """Draws completions of a model's prompts, and has them rewarded."""

    def __init__(
        self,
        model: PreTrainedModel,
        drawing: Drawing,
        most: int,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase,
        rows: int,
    ) -> None:
        self._model, self._prompts = model, prompts
        self._tokenizer: Any = tokenizer
        ends, longest = end_tokens(model, tokenizer), max(map(len, prompts.tokens))
        self.ends = frozenset(ends)
        self._rollouts = Rollouts(model, drawing, ends, most, rows=min(_MOST_ROWS, rows), longest=longest)

    def __call__(
        self, rewards: Rewards, asked: Sequence[tuple[int, int]], seed: int
    ) -> tuple[list[Completion], Tensor]:
        """A completion of each of some prompts, by number and by what its random numbers go by; and their rewards."""
        tokens = [self._prompts.tokens[n] for n, _ in asked]
        with without_router_loss(self._model):
            completions = self._rollouts(tokens, seed, places=[place for _, place in asked])
        texts = self._tokenizer.batch_decode([each.tokens for each in completions], skip_special_tokens=True)
        prompts, columns = self._prompts.told([self._prompts.rows[n] for n, _ in asked])
        return completions, rewards(prompts, texts, columns, [each.tokens for each in completions])

    def release(self) -> None:
        """Give all memory back."""
        self._rollouts.release(for_good=True)


@dataclass(frozen=True)
class _Pass:
    batch: LightBatch
    advantage: Tensor
    """(B,) float32."""
    items: float
    """What the losses of the step are divided by."""
    old: Tensor | None
    """(B, T): log-probabilities of the tokens under the policy that drew them, if others learn from them, too."""


class _Course:
    """The steps of a run: what each learns from, and how."""

    def __init__(
        self,
        run: _PolicyRun,
        policy: Policy,
        settings: LightSettings,
        drawn: _Drawn,
        at_once: int,
        pad_id: int,
    ) -> None:
        self._run, self._policy, self._settings, self._drawn, self._pad_id = run, policy, settings, drawn, pad_id
        own = policy.settings
        self._times = own.num_generations
        self._at_once = at_once
        self._size = 2 * settings.batch_size
        self._shape = None
        if run.graphed:
            longest = max(map(len, policy.prompts.tokens)) + own.max_completion_length
            self._shape = one_shape_of(self._size, longest, self._size * own.max_completion_length)
        self.tokens = 0
        """Learned from, prompts with them."""
        self.tokens_drawn = 0
        self.passes = 0

    def steps(self) -> Iterator[Callable[[], Tensor]]:
        """What computes each step's gradients and loss."""
        order, taken = row_order(len(self._policy.prompts), self._settings), 0
        while taken < self._settings.steps:
            left = self._settings.steps - taken
            parts = self._lessons([*islice(order, min(self._at_once, left))], taken)
            repeats = [part for _ in range(self._policy.settings.num_iterations) for part in parts]
            for part in repeats[:left]:
                taken += 1
                yield partial(self._learn, part)

    def _lessons(self, steps: list[list[int]], taken: int) -> list[list[_Pass]]:
        """Completions of the prompts of some steps, drawn at once, as the passes of each step."""
        own, prompts = self._policy.settings, self._policy.prompts
        seen: Counter[int] = Counter()
        asked: list[tuple[int, int]] = []
        for n in (n for step in steps for n in step):
            group = seen[n] * len(prompts) + n  # another one, each time that a prompt is asked
            asked += [(n, group * self._times + time) for time in range(self._times)]
            seen[n] += 1
        seed = (self._settings.seed << 32) + taken + 1
        completions, rewards = self._drawn(self._policy.rewards, asked, seed)
        lengths = [len(each.tokens) for each in completions]
        self.tokens_drawn += sum(lengths)
        learned = [not own.mask_truncated_completions or each.tokens[-1] in self._drawn.ends for each in completions]
        groups = [place // self._times for _, place in asked]
        worth = advantages(rewards, self._policy.weights, groups, own)
        items = own.items([n * each for n, each in zip(lengths, learned, strict=True)]) / len(steps)
        rows = [
            _row(prompts.tokens[n], completion, is_learned)
            for (n, _), completion, is_learned in zip(asked, completions, learned, strict=True)
        ]
        passes: list[list[_Pass]] = []
        begin = 0
        for step in steps:
            end = begin + len(step) * self._times
            cuts = (slice(at, min(at + self._size, end)) for at in range(begin, end, self._size))
            passes.append([self._pass(rows[cut], worth[cut], items) for cut in cuts])
            begin = end
        return passes

    def _pass(self, rows: Sequence[Row], worth: Tensor, items: float) -> _Pass:
        batch = light_batch(rows, self._pad_id, self._shape)
        advantage = torch.zeros(len(batch.input_ids))
        advantage[: len(worth)] = worth
        again = self._at_once * self._policy.settings.num_iterations > 1
        return _Pass(batch, advantage, items, self._run.logps(batch) if again else None)

    def _learn(self, passes: Sequence[_Pass]) -> Tensor:
        self.tokens += sum(int(each.batch.mask.sum()) for each in passes)
        self.passes += len(passes)
        return torch.stack([self._run.share(each) for each in passes]).sum()


class _PolicyRun(LightRun):
    """Passes over completions."""

    def __init__(
        self,
        model: PreTrainedModel,
        settings: PolicySettings,
        reference: Reference | None,
        head: Head | str,
        *,
        graphed: bool,
    ) -> None:
        self._settings, self._reference = settings, reference
        temperature = settings.drawing.temperature
        cooled = at_temperature(head, temperature)
        graphed = graphed and isinstance(cooled, Head) and cooled.maskless
        super().__init__(model, cooled, None, None, graphed=graphed, by_sequence=True, temperature=temperature)

    def share(self, given: _Pass) -> Tensor:
        """The loss of a pass, as its share of the step's, whose gradients are added; a scalar on the device."""
        device = self.model.device
        own = {"advantage": given.advantage, "items": torch.tensor(float(given.items))}
        own |= {} if given.old is None else {"old": given.old}
        own = {name: value.to(device, non_blocking=True) for name, value in own.items()}
        if self._step is not None:
            batch = given.batch
            host = {"input_ids": batch.input_ids, "positions": batch.positions, "targets": batch.targets}
            return self._step(own | {n: t.to(device, non_blocking=True) for n, t in host.items()}).clone()
        return self._learned(lambda model: self.losses_of(given.batch, model), own)

    def _tensors_only(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Overrides `LightRun._tensors_only`: with advantages."""
        where = tensors["input_ids"], None, tensors["positions"], tensors["targets"]
        return self._learned(lambda model: self._sequences(*where, model), tensors)

    def _learned(self, losses: Callable[[PreTrainedModel], SequenceLosses], own: Mapping[str, Tensor]) -> Tensor:
        found, frozen = losses(self.model), None
        if self._reference is not None and self._settings.beta:
            with self._reference.running() as model:
                frozen = -losses(model).tokens.nats.detach()
        old = None
        if "old" in own:
            flat = own["old"].flatten()
            old = flat[found.at.clamp(max=flat.numel() - 1)]  # what fills up may lie behind the last one
        terms = token_terms(found, own["advantage"], old, frozen, self._settings)
        return self._backward(loss_sum(terms, found, self._settings), own["items"])

    @torch.no_grad()
    def logps(self, batch: LightBatch) -> Tensor:
        """Log-probability of each learned token where it stands, (B, T) float32, 0 elsewhere."""
        found = self.losses_of(batch, self.model)
        learned = found.tokens.learned.bool()
        grid = torch.zeros(batch.input_ids.numel(), device=found.at.device)
        grid[found.at[learned]] = -found.tokens.nats[learned].float()
        return grid.view(batch.input_ids.shape)

    @torch.no_grad()
    def divergence(self, batch: LightBatch) -> float:
        """The estimated divergence from the reference, summed over the tokens of a batch."""
        assert self._reference is not None
        own = self.losses_of(batch, self.model)
        with self._reference.running() as model:
            frozen = -self.losses_of(batch, model).tokens.nats
        nothing = torch.zeros(len(batch.input_ids), device=frozen.device)
        return float(token_terms(own, nothing, None, frozen, self._settings).kl.sum())


def _row(prompt: Sequence[int], completion: Completion, is_learned: bool = True) -> Row:
    labels = completion.tokens if is_learned else [IGNORED] * len(completion.tokens)
    return Row(input_ids=[*prompt, *completion.tokens], labels=[IGNORED] * len(prompt) + labels)
