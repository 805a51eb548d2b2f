"""Completions drawn in lock-step by a live model: a token of every row is one CUDA graph.

    drawn = draw_in_step(model, prompts, settings, samplings, kept=kept)   # as `offline.draw_together`

transformers' continuous batching puts each batch together on the host, which takes as long for a small model's step as
its kernels do eight times over. Here everything has one size: prompts are padded on their left, so that all rows write
at the same place of keys and values that stay where they are, and a step runs from a graph without the host: the pass,
the picking, and the flags of who is over. Prompts that are the same are read once. Once few rows are left, they move
together, into a graph for fewer.

Shapes: N rows, T new tokens, W places of keys and values, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from theodora.ends import length_to_end
from theodora.kernels.graph import record, strict
from theodora.layers.norm_cache import looked_at_once
from theodora.serve.offline import Kept, records, runnable, seedless
from theodora.serve.offline_manager import MOST_ROWS, NoRoom, Unfit, as_when_answering, room_for_keys
from theodora.serve.requests import Sampling
from theodora.serve.sampling import draw_alike
from theodora.serve.shaping import repeated_less
from theodora.serve.static_cache import Asked, Batch, Masks, Read, Run, added
from theodora.serve.trial import Trial
from theodora.serve.tried import Way
from theodora.synonyms import cache_argument

log = logging.getLogger("theodora.serve")

DEVICES = {"cuda"}
"""Where it is faster than other ways."""
_READ = 4096  # tokens of prompts in a pass, at most, but for a single longer one
_LOOK = 8  # steps between two looks at who is over
_FEW = 8  # rows; fewer are hardly faster
_WORTH = 16  # steps that are left from which on moving rows together pays
_GRAIN = 64  # places; also what attention's kernels like best

Answer = tuple[list[int], list[float]]
"""Tokens, and their log-probabilities."""


def draw_in_step(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    samplings: Sequence[Sampling],
    *,
    over: Callable[[], object] = lambda: None,
    rows: int = MOST_ROWS,
    longest: int = 0,
    kept: Kept | None = None,
) -> list[Answer]:
    """What `offline.draw_together` gives, with the same arguments, in lock-step.

    Args:
        model: a causal language model with whatever adapter is active in it.
        prompts: token ids of each; all of them must fit (`offline.fits`).
        settings: of which only `max_new_tokens` and `eos_token_id` are minded.
        samplings: how each answer's tokens are drawn: alike, but for the seeds, and without what changes logits but a
            repetition penalty.
        over: called whenever an answer is over, some steps later.
        rows: answers under way at a time, at most.
        longest: tokens of the longest prompt of any call, if that is known: then all sizes go by it and by `rows`, so
            that what is drawn does not depend on the calls before (other sizes round otherwise).
        kept: what earlier calls have left, and this one leaves for later ones. Nothing is left if not given.

    Returns:
        Of each prompt the tokens, and the logarithm of their softmax at the temperature, before any filter or penalty.

    Raises:
        Unfit: the model or the samplings cannot be run so, or memory does not do.
    """
    base = runnable(model)
    graphs = records(base)
    if base.device.type == "cuda" and not graphs:
        raise Unfit("its passes are not recorded in CUDA graphs")
    if replace(samplings[0], repetition_penalty=1.0).shapes:
        raise Unfit("it is asked for what changes logits")
    masks = Masks.of(base)
    _WAY.try_out(base)
    asked = Asked(seedless(samplings), tuple(settings.eos_token_id), settings.max_new_tokens)  # pyright: ignore
    own = Kept() if kept is None else kept
    try:
        with as_when_answering(base), looked_at_once(own.begin(base, "in step", asked)):
            return _answers(Run(base, masks, asked, graphs), prompts, samplings, over, _Sizes(rows, longest), own)
    except (torch.OutOfMemoryError, MemoryError) as error:
        own.let_go()
        raise NoRoom(f"memory does not do: {error}") from error
    except RuntimeError as error:  # something in it waits for the device, say
        own.let_go()
        raise _WAY.failed(base, error) from error
    except BaseException:
        own.let_go()
        raise
    finally:
        if kept is None:
            own.let_go()


def _answer_trial(model: Any, trial: Trial) -> list[Answer]:
    greedy = Sampling(max_tokens=trial.count, temperature=0.0)
    # The longer one puts padding before the others.
    prompts = [*trial.prompts, [token for prompt in trial.prompts for token in prompt]]
    kept, run = Kept(), Run(model, Masks.of(model), Asked(greedy, (-1,), trial.count), False)
    with as_when_answering(model), looked_at_once():
        return _answers(run, prompts, [greedy] * 3, lambda: None, _Sizes(3), kept)[:2]


_WAY = Way("tried-in-step", "batches in lock-step", _answer_trial)


@dataclass(frozen=True)
class _Sizes:
    """What calls ask for."""

    rows: int
    """At a time, at most."""
    longest: int = 0
    """Tokens of the longest prompt of any call; 0 if it is not known."""


def _answers(
    run: Run,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    over: Callable[[], object],
    sizes: _Sizes,
    kept: Kept,
) -> list[Answer]:
    """Answers to all prompts, as many at a time as there is memory for."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), tuple(prompts[i])))  # equal ones together
    answers: dict[int, Answer] = {}
    while order:
        batch = _batch_for(run, kept, len(order), sizes, prompts[order[0]])
        some, order = order[: batch.rows], order[batch.rows :]
        steps = _Steps(run, batch, [prompts[i] for i in some], [samplings[i] for i in some])
        answers.update(zip(some, steps.run(over), strict=True))
    return [answers[index] for index in range(len(prompts))]


def _batch_for(run: Run, kept: Kept, count: int, sizes: _Sizes, longest: Sequence[int]) -> Batch:
    """One for so many prompts, the longest first: the one that is kept if it does, or another."""
    need = max(2, len(longest), sizes.longest) + run.asked.most
    wanted = min(sizes.rows, _rounded(sizes.rows if sizes.longest else count, _FEW))
    before: Batch | None = kept.made
    if before is not None:
        # Each step reads all places.
        if before.wanted >= wanted and need <= before.width <= max(4 * need, 4 * _GRAIN):
            return before
        wanted = max(wanted, before.wanted)
    width = _rounded(need, max(_GRAIN, (1 << need.bit_length()) // 8))
    like = run.read([longest])

    def make() -> Batch:
        fit = min(wanted, _most_rows(run, like, width))
        if fit < 1:
            raise NoRoom("the keys and values of one row would take more than half of the free memory")
        batch = Batch(run.asked, like, fit, width)
        batch.wanted = wanted
        return batch

    return kept.replace(make)


def _most_rows(run: Run, like: Read, width: int) -> int:
    """Rows that there is memory for."""
    device = like.logits_NV.device
    if device.type != "cuda":
        return MOST_ROWS
    of_keys = sum(t.shape[1] * t.shape[3] * t.itemsize for layer in like.layers for t in layer) * width
    of_picking = 8 * like.logits_NV[0].nbytes
    return room_for_keys(device) // (of_keys + of_picking)


def _rounded(count: int, grain: int) -> int:
    return -(-count // grain) * grain


class _Steps:
    """Some prompts, from reading them to the last token."""

    def __init__(self, run: Run, batch: Batch, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> None:
        self._run, self._batch, self._prompts, self._samplings = run, batch, prompts, samplings
        self._size = self._sizes(len(prompts))
        self._who: list[int | None] = [*range(len(prompts)), *[None] * (self._size - len(prompts))]
        """Whose answer each row is; nobody's if it only fills up."""
        self._answers: dict[int, Answer] = {}
        self._told = 0

    def _sizes(self, count: int) -> int:
        """Rows of the smallest graph for so many."""
        size = self._batch.rows
        while size > _FEW and (smaller := _rounded(-(-size // 2), _FEW)) >= count and smaller < size:
            size = smaller
        return size

    @property
    def _most(self) -> int:
        return self._run.asked.most

    def run(self, over: Callable[[], object]) -> list[Answer]:
        """The answers; `over` is called for each."""
        batch, done = self._batch, 1
        self._draw_ahead(0, 1 + _LOOK)
        self._take(self._size, self._begun())
        while done < self._most:
            flags, ahead = None, min(_LOOK, self._most - done)
            for step in range(ahead):
                if step == ahead - 1:  # the last one runs while the host looks
                    flags = _Flags(batch.over_N[: self._size])
                self._step()
            done += ahead
            self._draw_ahead(done, _LOOK)
            assert flags is not None
            live = self._look(flags.get(), over)
            if not live:
                break
            smaller = self._sizes(len(live))
            if smaller < self._size and self._most - done >= _WORTH:
                self._move_together(live, smaller)
        self._note(range(self._size))
        for _ in range(len(self._answers) - self._told):
            over()
        return [self._answers[index] for index in range(len(self._prompts))]

    def _begun(self) -> Tensor:
        """Read the prompts into the batch; the logits of each row's first token, (N, V)."""
        batch, device = self._batch, self._batch.at.device
        for keys, values in batch.layers:  # whatever is there, NaN, too, would be multiplied by 0
            keys.zero_()
            values.zero_()
        batch.mask_N11W.fill_(torch.finfo(batch.mask_N11W.dtype).min)
        batch.at.fill_(batch.begin)
        batch.step.zero_()
        batch.over_N[:] = torch.tensor([who is None for who in self._who] + [True] * (batch.rows - self._size))
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, who in enumerate(self._who):
            rows_of.setdefault(tuple(self._prompts[who or 0]), []).append(row)
        of_rows = [len(self._prompts[who or 0]) for who in self._who]
        batch.position_N1[: self._size, 0] = torch.tensor(of_rows)
        if batch.seen_NV is not None:
            batch.seen_NV.zero_()
            for prompt, rows in rows_of.items():
                places = torch.tensor(rows)[:, None], torch.tensor(prompt)[None]
                batch.seen_NV[places] = True
        logits_NV = None
        for prompts in _passes(sorted(rows_of, key=len, reverse=True)):
            read = self._run.read(prompts)
            to = torch.tensor([row for prompt in prompts for row in rows_of[prompt]], device=device)
            counts = [len(rows_of[prompt]) for prompt in prompts]
            from_ = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts)).to(device)
            place = slice(batch.begin - read.seen_NL.shape[1], batch.begin)
            padding = ~read.seen_NL[:, None, :, None]
            for layer, new in zip(batch.layers, read.layers, strict=True):
                for old, tensor in zip(layer, new, strict=True):
                    old[:, :, place].index_copy_(0, to, tensor.masked_fill(padding, 0)[from_])
            batch.mask_N11W[:, 0, 0, place].index_copy_(0, to, added(read.seen_NL, batch.mask_N11W.dtype)[from_])
            if logits_NV is None:
                logits_NV = read.logits_NV.new_empty(self._size, read.logits_NV.shape[1])
            logits_NV.index_copy_(0, to, read.logits_NV[from_])
        assert logits_NV is not None
        return logits_NV

    def _draw_ahead(self, first: int, count: int) -> None:
        """Make the random numbers of some steps, while the device is busy with others."""
        last = min(first + count, self._most)
        if last > first and self._run.asked.sampling.temperature > 0:
            chances = [
                [0] * (last - first)
                if who is None
                else [self._samplings[who].chance(len(self._prompts[who]) + step) for step in range(first, last)]
                for who in self._who
            ]
            made = torch.tensor(chances, dtype=torch.int32)
            if self._batch.at.is_cuda:  # a copy of other memory would wait for all steps before it
                made = made.pin_memory().to(self._batch.at.device, non_blocking=True)
            self._batch.chance_NT[: self._size, first:last] = made

    def _step(self) -> None:
        """Another token of each row."""
        batch, size = self._batch, self._size
        if not self._run.graphs:
            self._forward(size)
            return
        if size not in batch.graphs:
            batch.graphs[size] = self._recorded(size)
        batch.graphs[size].replay()

    def _recorded(self, size: int) -> Any:
        """A graph, after passes that choose and make its kernels and leave no trace: every token comes from a graph, so
        that whoever goes on from the same weights draws the same, whatever was recorded before."""
        batch = self._batch
        written = [batch.at, batch.step, batch.token_N1, batch.position_N1, batch.over_N]
        written += [] if batch.seen_NV is None else [batch.seen_NV]
        before = [tensor.clone() for tensor in written]
        # The second so that what cannot be captured does not fail half-way.
        for watch in (nullcontext, strict)[: 1 if batch.graphs else 2]:
            with watch():
                self._forward(size)
            for tensor, value in zip(written, before, strict=True):
                tensor.copy_(value)
        graph, _, batch.pool = record(lambda: self._forward(size), batch.pool)
        return graph

    def _forward(self, size: int) -> None:
        batch, run = self._batch, self._run
        batch.mask_N11W[:size].index_fill_(3, batch.at, 0)
        output = run.model(
            input_ids=batch.token_N1[:size],
            attention_mask=run.masks.given(batch.mask_N11W[:size], batch.at),
            position_ids=batch.position_N1[:size],
            use_cache=True,
            **{cache_argument(run.model): batch.cache(size)},
        )
        batch.at.add_(1)
        batch.position_N1[:size].add_(1)
        self._take(size, output.logits[:, -1].float())

    def _take(self, size: int, logits_NV: Tensor) -> None:
        """Pick a token of each row."""
        batch, sampling = self._batch, self._run.asked.sampling
        shaped_NV, seen_NV = logits_NV, None if batch.seen_NV is None else batch.seen_NV[:size]
        if seen_NV is not None:
            shaped_NV = repeated_less(logits_NV, seen_NV, sampling.repetition_penalty)
        chance_N = batch.chance_NT[:size].index_select(1, batch.step)[:, 0]
        token_N, logprob_N = draw_alike(shaped_NV, logits_NV, chance_N, sampling)
        batch.token_N1[:size].copy_(token_N[:, None])
        batch.drawn_NT[:size].index_copy_(1, batch.step, token_N[:, None])
        batch.logprob_NT[:size].index_copy_(1, batch.step, logprob_N[:, None])
        batch.over_N[:size].logical_or_((token_N[:, None] == batch.ends_E).any(1))
        if seen_NV is not None:
            seen_NV.scatter_(1, token_N[:, None], True)
        batch.step.add_(1)

    def _look(self, flags: list[bool], over: Callable[[], object]) -> list[int]:
        """The rows that are under way."""
        count = len(self._answers) + sum(
            is_over and who is not None for is_over, who in zip(flags, self._who, strict=True)
        )
        for _ in range(count - self._told):
            over()
        self._told = count
        return [row for row, is_over in enumerate(flags) if not is_over]

    def _move_together(self, live: list[int], size: int) -> None:
        """Let the rows that are under way be the first ones, and go on with fewer."""
        others = sorted(set(range(self._size)) - set(live))
        self._note(others)
        rows = [*live, *others[: size - len(live)]]
        index = torch.tensor(rows, device=self._batch.at.device)
        for tensor in self._batch.of_rows():
            tensor[:size] = tensor[index]
        self._who, self._size = [self._who[row] for row in rows], size

    def _note(self, rows: Sequence[int]) -> None:
        """Take the answers of rows from the device."""
        batch, ends = self._batch, set(self._run.asked.ends)
        drawn, logprobs = batch.drawn_NT[: self._size].tolist(), batch.logprob_NT[: self._size].tolist()
        for row in rows:
            if (who := self._who[row]) is not None:
                tokens: list[int] = drawn[row]
                count = length_to_end(tokens, ends)
                self._answers[who] = tokens[:count], logprobs[row][:count]
                self._who[row] = None


class _Flags:
    """A copy of flags on the device, on its way to the host."""

    def __init__(self, flags_N: Tensor) -> None:
        self._event = None
        if not flags_N.is_cuda:
            self._flags = flags_N.clone()
            return
        self._flags = torch.empty(flags_N.shape, dtype=torch.bool, pin_memory=True)
        self._flags.copy_(flags_N, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def get(self) -> list[bool]:
        """The flags as they were; waits for them alone."""
        if self._event is not None:
            self._event.synchronize()
        return self._flags.tolist()


def _passes(prompts: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Prompts, the longest first, in groups that are read in one pass."""
    begin = 0
    while begin < len(prompts):
        count = max(1, _READ // len(prompts[begin]))
        yield list(prompts[begin : begin + count])
        begin += count
