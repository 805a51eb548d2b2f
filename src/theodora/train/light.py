"""A training loop without a trainer: for many short runs one after the other, on rows that are tokenised already.

It takes the same steps as `theodora train` (same order of rows, loss, optimizer, schedule and clipping; a test compares
the losses), and leaves out what a thousand short runs do not need: checkpoints, reports, several processes.
On a GPU all batches are brought to one shape, so that steps run as CUDA graphs, and the host never waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, get_scheduler

from theodora.errors import TheodoraError
from theodora.fastpath.masks import whole_rows
from theodora.kernels.cross_entropy import IGNORED
from theodora.kernels.graph import GraphedStep
from theodora.train.fused_loss import Head, Learned, fused_loss_pays
from theodora.train.graphed import graphs_pay
from theodora.train.loss import can_choose_positions, row_losses, token_losses
from theodora.train.preference_loss import Answers, Settings, pair_losses
from theodora.train.reference import Reference
from theodora.train.sequence_losses import SequenceLosses

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # transformers' defaults
_LENGTHS, _POSITIONS = 16, 64  # batches of one shape are as long, and learn as many tokens, as a multiple of these
_LOOK = 20  # steps between two looks at the losses, for which the host waits


class LightRunDiverged(TheodoraError):
    """The loss is no number any more."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A tokenised row: ids, and labels of the same length, IGNORED where nothing is learned."""

    input_ids: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class LightSettings:
    """How a run goes. The fields mean what they mean in `TrainConfig`."""

    steps: int
    batch_size: int = 8
    learning_rate: float = 5e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    b_ratio: float = 1.0
    """LoRA+ (arXiv 2402.12354): the learning rate of B over that of A."""


@dataclass(frozen=True, kw_only=True)
class LightResult:
    """What a run came to."""

    losses: list[float]
    """Mean loss per learned token of each step, in nats."""
    tokens: int
    """Tokens seen, padding not."""
    graphed: int
    """Steps that ran as CUDA graphs."""
    drawn: int = 0
    """Tokens that were drawn to learn from."""


@dataclass(frozen=True)
class Preference:
    """An objective that compares answers: rows are the sequences of pairs then, better, worse, better, …"""

    settings: Settings
    reference: Reference | None


@dataclass(frozen=True)
class LightBatch:
    """Rows of tokens, B of T, of which N are learned."""

    input_ids: Tensor
    """(B, T), padded on the right."""
    mask: Tensor
    labels: Tensor
    positions: Tensor
    """(N,): the places, in the flattened batch, whose next token is learned; filled up with the first row's last."""
    targets: Tensor
    """(N,): that token, or IGNORED."""
    count: int


def train_light(
    model: PreTrainedModel,
    rows: Sequence[Row],
    settings: LightSettings,
    *,
    head: Head | str,
    preference: Preference | None = None,
    pad_id: int = 0,
    autocast: torch.dtype | None = None,
    on_step: Callable[[int], None] | None = None,
) -> LightResult:
    """Train whatever asks for gradients.

    Args:
        model: on its device, with its adapter; left in training mode.
        rows: what to train on.
        settings: how.
        head: `fused_head` of the base model, before anything was trained.
        preference: what is learned of pairs; None learns the rows. A batch has `batch_size` of either.
        pad_id: the token that fills up rows.
        autocast: dtype of the products where weights are wider.
        on_step: called after each step with its number, from 1 on.

    Raises:
        LightRunDiverged: a loss is not finite.
    """
    device = model.device
    graphed = graphs_pay(device) and isinstance(head, Head) and head.maskless
    run = LightRun(model, head, autocast, preference, graphed=graphed)
    together = 1 if preference is None else 2
    tokens = 0

    def step_of(batch: LightBatch) -> Tensor:
        nonlocal tokens
        tokens += int(batch.mask.sum())
        return run.forward_backward(batch)

    batches = _batches(rows, settings, pad_id, together, one_shape=run.graphed)
    losses = take_steps(model, settings, (partial(step_of, batch) for batch in batches), on_step)
    return LightResult(losses=losses, tokens=tokens, graphed=run.close())


def take_steps(
    model: PreTrainedModel,
    settings: LightSettings,
    steps: Iterable[Callable[[], Tensor]],
    on_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Take the steps of a run, each of which adds its gradients and gives its loss, a scalar on the device; the losses.

    Raises:
        LightRunDiverged: a loss is not finite.
    """
    optimizer = make_optimizer(model, settings)
    scheduler = get_scheduler(
        settings.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup(settings),
        num_training_steps=settings.steps,
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = _Losses(settings)
    model.train()
    for step, work in enumerate(steps, start=1):
        optimizer.zero_grad()
        losses.add(work())
        if settings.max_grad_norm > 0:
            clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        scheduler.step()  # pyright: ignore[reportCallIssue] (of the one kind that wants a metric, none is made here)
        if on_step is not None:
            on_step(step)
            if not model.training:  # not every time: it walks through all modules, which look at their weights
                model.train()
    optimizer.zero_grad()
    return losses.read()


def make_optimizer(model: nn.Module, settings: LightSettings) -> torch.optim.AdamW:
    """AdamW as `theodora train` sets it up: vectors (biases, norms, magnitudes) do not decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            faster = settings.b_ratio != 1.0 and name.endswith(".lora_B")
            groups.setdefault((faster, parameter.dim() > 1), []).append(parameter)
    if not groups:
        raise TheodoraError("Nothing in this model is to be trained")
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": settings.learning_rate * (settings.b_ratio if faster else 1.0),
                "weight_decay": settings.weight_decay if decays else 0.0,
            }
            for (faster, decays), parameters in groups.items()
        ],
        betas=_BETAS,
        eps=_EPSILON,
        fused=True,
    )


def warmup(settings: LightSettings) -> int:
    """Steps of the warm-up, by transformers' reading of `warmup_steps`."""
    wanted = settings.warmup_steps
    return int(wanted) if wanted >= 1 else math.ceil(settings.steps * wanted)


def row_order(rows: int, settings: LightSettings) -> Iterator[list[int]]:
    """The rows of each step: shuffled anew in each epoch, as accelerate's seedable sampler does; without end."""
    for epoch in range(settings.steps):
        draw = torch.Generator().manual_seed(settings.seed + epoch)
        order = torch.randperm(rows, generator=draw).tolist()
        yield from (order[at : at + settings.batch_size] for at in range(0, rows, settings.batch_size))


def _batches(
    rows: Sequence[Row], settings: LightSettings, pad_id: int, together: int, *, one_shape: bool
) -> Iterator[LightBatch]:
    drawn = zip(row_order(len(rows) // together, settings), range(settings.steps), strict=False)
    order = [[together * i + n for i in batch for n in range(together)] for batch, _ in drawn]
    shape = None
    if one_shape:
        used = {i for batch in order for i in batch}
        learned = {i: sum(label != IGNORED for label in rows[i].labels[1:]) for i in used}
        most = max(sum(learned[i] for i in batch) for batch in order)
        shape = one_shape_of(settings.batch_size * together, max(len(rows[i].input_ids) for i in used), most)
    return (light_batch([rows[i] for i in batch], pad_id, shape) for batch in order)


def one_shape_of(rows: int, length: int, learned: int) -> tuple[int, int, int]:
    """What batches of so many rows, of so many tokens at most, and so many learned ones together, are filled up to."""
    return rows, _up(length, _LENGTHS), _up(learned, _POSITIONS)


def _up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def light_batch(rows: Sequence[Row], pad_id: int, shape: tuple[int, int, int] | None) -> LightBatch:
    """The batch of these rows, filled up to a shape of `one_shape_of`, if it has to have one."""
    size, length, places = shape or (len(rows), max(len(row.input_ids) for row in rows), 0)
    ids, labels = torch.full((size, length), pad_id), torch.full((size, length), IGNORED)
    mask = torch.zeros(size, length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
        labels[i, : len(row.labels)] = torch.tensor(row.labels)
        mask[i, : len(row.input_ids)] = 1
    following = torch.full_like(labels, IGNORED)
    following[:, :-1] = labels[:, 1:]
    learned = (following.flatten() != IGNORED).nonzero().squeeze(1)
    positions = learned.new_full((max(1, places, len(learned)),), length - 1)
    positions[: len(learned)] = learned
    return LightBatch(ids, mask, labels, positions, following.flatten()[positions], len(learned))


class LightRun:
    """Forward and backward passes of one run.

    Args:
        model: as of `train_light`.
        head: likewise.
        autocast: likewise.
        preference: likewise.
        graphed: whether passes are to be CUDA graphs, if they can be.
        by_sequence: whether losses are those of sequences, although there is no `preference`.
        temperature: what logits are divided by; the head's are already.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: Head | str,
        autocast: torch.dtype | None,
        preference: Preference | None,
        *,
        graphed: bool,
        by_sequence: bool = False,
        temperature: float = 1.0,
    ) -> None:
        self._preference, self._temperature = preference, temperature
        self.model, self.head, self.autocast = model, head, autocast
        layer: Any = model.get_output_embeddings()
        plain = getattr(type(layer), "forward", None) is nn.Linear.forward
        frozen = plain and not any(p.requires_grad for p in layer.parameters())
        self._reads_head = isinstance(head, Head) and frozen
        self._fused = self._reads_head and fused_loss_pays(model.device)
        self.graphed = graphed = graphed and (not (by_sequence or preference is not None) or self._reads_head)
        self._takes_positions = can_choose_positions(model)
        self._step = GraphedStep(self._tensors_only, list(model.parameters())) if graphed else None

    def forward_backward(self, batch: LightBatch) -> Tensor:
        """The loss per learned token of a batch, whose gradients are added; a scalar on the device."""
        if self._step is not None:
            host = {"input_ids": batch.input_ids, "positions": batch.positions, "targets": batch.targets}
            tensors = {name: t.to(self.model.device, non_blocking=True) for name, t in host.items()}
            return self._step(tensors).clone()
        if self._preference is not None:
            return self._backward(*self._pairs(lambda model: self.losses_of(batch, model)))
        return self._backward(self._nats(batch), batch.count)

    def close(self) -> int:
        """Let go of the graphs; how many steps ran from one."""
        if self._step is None:
            return 0
        replays = self._step.replays
        self._step.release("training has ended")
        return replays

    def _tensors_only(self, tensors: Mapping[str, Tensor]) -> Tensor:
        targets = tensors["targets"]
        if self._preference is not None:
            ids, positions = tensors["input_ids"], tensors["positions"]
            return self._backward(*self._pairs(lambda model: self._sequences(ids, None, positions, targets, model)))
        count = (targets != IGNORED).sum()
        return self._backward(self._from_states(tensors["input_ids"], None, tensors["positions"], targets), count)

    def _backward(self, nats: Tensor, count: Tensor | int) -> Tensor:
        loss = nats / torch.as_tensor(count, device=nats.device).clamp(min=1)
        loss.backward()
        return loss.detach()

    def _nats(self, batch: LightBatch) -> Tensor:
        device = self.model.device
        mask = batch.mask.to(device)
        if isinstance(self.head, Head):
            mask = None if self.head.maskless else mask
            return self._from_states(batch.input_ids.to(device), mask, batch.positions, batch.targets)
        inputs = {"input_ids": batch.input_ids.to(device), "attention_mask": mask, "labels": batch.labels.to(device)}
        with self._products():
            return token_losses(self.model, inputs, self._takes_positions).nats

    def _from_states(self, ids_BT: Tensor, mask: Tensor | None, positions_N: Tensor, targets_N: Tensor) -> Tensor:
        assert isinstance(self.head, Head)
        inputs = {"input_ids": ids_BT} | ({} if mask is None else {"attention_mask": mask})
        positions_N, targets_N = positions_N.to(ids_BT.device), targets_N.to(ids_BT.device)
        with self._products():
            if self._fused:
                learned = Learned(
                    targets=targets_N,
                    positions=positions_N,
                    tokens=0,
                    maskless=True,
                    packed=False,
                    bounds=None,
                    longest=0,
                    real=None,
                )
                return self.head.loss(self.model, learned, **inputs).nats
            body: Any = self.model.base_model
            with whole_rows() if mask is None else nullcontext():
                hidden_BTH = body(**inputs, use_cache=False).last_hidden_state
            logits_NV = self.head.logits(self.model, hidden_BTH.flatten(0, 1).index_select(0, positions_N))
            return F.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORED, reduction="sum")

    def _pairs(self, losses: Callable[[PreTrainedModel], SequenceLosses]) -> tuple[Tensor, Tensor]:
        """The sum of the losses of all pairs, and how many there are."""
        assert self._preference is not None
        settings, reference = self._preference.settings, self._preference.reference
        own, frozen = losses(self.model), None
        if reference is not None:
            with reference.running() as model:
                frozen = -losses(model).nats.detach()
        better, worse = (
            Answers(-own.nats[n::2], own.count[n::2], None if frozen is None else frozen[n::2]) for n in (0, 1)
        )
        real = (better.tokens > 0) & (worse.tokens > 0)  # a short batch is filled up
        each = pair_losses(better, worse, settings)
        return torch.where(real, each, torch.zeros_like(each)).sum(), real.sum()

    def losses_of(self, batch: LightBatch, model: PreTrainedModel) -> SequenceLosses:
        """The losses of a batch's sequences under a model: the policy, or what it is compared with."""
        device = model.device
        if isinstance(self.head, Head) and self._reads_head:
            mask = None if self.head.maskless else batch.mask.to(device)
            return self._sequences(batch.input_ids.to(device), mask, batch.positions, batch.targets, model)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.mask, "labels": batch.labels}
        with self._products():
            inputs = {name: t.to(device) for name, t in inputs.items()}
            return row_losses(model, inputs, self._takes_positions, temperature=self._temperature)

    def _sequences(
        self, ids_BT: Tensor, mask: Tensor | None, positions_N: Tensor, targets_N: Tensor, model: PreTrainedModel
    ) -> SequenceLosses:
        assert isinstance(self.head, Head)
        learned = Learned(
            targets=targets_N.to(ids_BT.device),
            positions=positions_N.to(ids_BT.device),
            tokens=0,
            maskless=mask is None,
            packed=False,
            bounds=None,
            longest=0,
            real=None,
            sequences=len(ids_BT),
        )
        inputs = {"input_ids": ids_BT} | ({} if mask is None else {"attention_mask": mask})
        with self._products():
            return self.head.loss(model, learned, **inputs)  # pyright: ignore[reportReturnType]

    def _products(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        # Weights change with every step, so that casts are of no use to the next; and a graph could not keep them.
        return torch.autocast(self.model.device.type, self.autocast, cache_enabled=False)


class _Losses:
    """The losses of a run, fetched now and then."""

    def __init__(self, settings: LightSettings) -> None:
        self._settings = settings
        self._read: list[float] = []
        self._waiting: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Take the loss of the next step."""
        self._waiting.append(loss)
        if loss.device.type == "cpu" or len(self._waiting) >= _LOOK:
            self.read()

    def read(self) -> list[float]:
        """All losses.

        Raises:
            LightRunDiverged: one is not finite.
        """
        if self._waiting:
            self._read += torch.stack(self._waiting).float().tolist()
            self._waiting = []
        for step, loss in enumerate(self._read, start=1):
            if not math.isfinite(loss):
                raise LightRunDiverged(
                    f"Training diverged: the loss is {loss} at step {step} (learning rate "
                    f"{self._settings.learning_rate:g})"
                )
        return self._read
