"""Completions drawn from the model in training, and the log-probability that each of their tokens was drawn with.

    rollouts = Rollouts(model, Drawing(temperature=0.9), ends=[2], max_new_tokens=256)
    completions = rollouts(prompts, seed=step)   # of the weights as they are now
    rollouts.release()                           # memory goes back until the next call

On a GPU the live model itself runs in lock-step, from CUDA graphs (`theodora.serve.static_batches`); if it cannot, in
the batches that serve (`theodora.serve.offline`); elsewhere `generate` does, in padded batches. All pick tokens by
`theodora.serve.sampling.pick`, with a random number made from the seed, the prompt's index and the token's place:
torch's generators are left alone, and a token does not depend on who else is in the batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from theodora.ends import length_to_end
from theodora.errors import ConfigError, DataError, TheodoraError
from theodora.evaluate.batches import batches_by_length, evaluating, pad
from theodora.evaluate.decoding import decoding
from theodora.evaluate.exact_match import head_reads_one_piece
from theodora.serve import offline, static_batches
from theodora.serve.requests import Sampling
from theodora.serve.sampling import draw_alike
from theodora.serve.shaping import Shaper, shape

log = logging.getLogger("theodora.train")

_ROWS = 128


class OutputNotFinite(TheodoraError):
    """What tokens were to be drawn from holds NaN or infinite values."""


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn; names and defaults of TRL's `GRPOConfig`.

    Raises:
        ConfigError: a value that nothing can be drawn with.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {getattr(self, name)!r}, and has to be {wanted}"
            for name, fits, wanted in (
                ("temperature", 0 < self.temperature < math.inf, "above 0: completions are to differ"),
                ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
                ("top_k", self.top_k >= 0, "a number of tokens, or 0 for all"),
                ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1"),
                ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0; 1 does nothing"),
            )
            if not fits
        ]
        if wrong:
            raise ConfigError("Tokens cannot be drawn so: " + "; ".join(wrong) + ".")

    def sampling(self, max_new_tokens: int) -> Sampling:
        """The same as the batches that serve take it, without a seed."""
        return Sampling(
            max_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty,
        )


@dataclass(frozen=True)
class Completion:
    """What the model went on with after one prompt."""

    tokens: list[int]
    """With the end token, unless it was cut at the most tokens."""
    logps: list[float]
    """Of each token: log softmax(logits / temperature), float32, before penalty, top_p, top_k and min_p."""


def check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """Raise a DataError for a prompt without tokens."""
    if empty := [index for index, prompt in enumerate(prompts) if not prompt]:
        raise DataError(f"Nothing can be drawn after a prompt without tokens (number {empty[0] + 1}).")


class Rollouts:
    """Draws completions from a model whose weights change between the calls, in place.

    Args:
        model: a causal language model, with whatever adapter is active in it, in any mode. Each call leaves it as it
            was: modes, attention, gradients; and torch's generators.
        drawing: how tokens are drawn.
        ends: the tokens that end a completion, at least one.
        max_new_tokens: tokens of a completion, at most.
        rows: completions under way at a time, at most. Halved where memory does not do.
        longest: tokens of the longest prompt of any call, so that what is drawn does not depend on earlier calls.
    """

    def __init__(
        self,
        model: Any,
        drawing: Drawing,
        ends: Sequence[int],
        max_new_tokens: int,
        rows: int = _ROWS,
        longest: int = 0,
    ) -> None:
        self._model, self._rows = model, rows
        self._sampling = drawing.sampling(max_new_tokens)
        self._settings = decoding(list(ends), max_new_tokens)
        self._kept, self._keeps = offline.Kept(), True
        self._ways: list[tuple[str, Callable[..., Any]]] = []
        """What is tried before `generate`, the fastest first."""
        self._why = f"it is faster on {model.device.type}"
        """Why the last of them was given up."""
        try:
            self._model = offline.runnable(model)
        except offline.Unfit as error:
            self._why = str(error)
            return
        if model.device.type in static_batches.DEVICES:
            in_step = partial(static_batches.draw_in_step, longest=longest)
            self._ways.append(("batches in lock-step", in_step))
        if offline.worth_it(model):
            self._ways.append(("transformers' continuous batching", offline.draw_together))

    @property
    def way(self) -> str:
        """What draws; the first call may change it."""
        return self._ways[0][0] if self._ways else f"generate ({self._why})"

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        seed: int,
        over: Callable[[], object] = lambda: None,
        places: Sequence[int] | None = None,
    ) -> list[Completion]:
        """A completion of each prompt, in their order.

        Args:
            prompts: token ids of each. Where several are the same, each has random numbers of its own.
            seed: another one gives other completions.
            over: called whenever a completion is over.
            places: what the random numbers of each go by beside the seed, below 2³²; None for its index.

        Raises:
            DataError: a prompt without tokens.
            OutputNotFinite: of the model.
            torch.OutOfMemoryError: memory does not do for a single row.
        """
        check_prompts(prompts)
        own = range(len(prompts)) if places is None else places
        samplings = [replace(self._sampling, seed=(seed << 32) + place) for place in own]
        told = _Told(over)
        found = self._together(prompts, samplings, told)
        if not self._keeps:
            self.release()
        self._by_generate(prompts, samplings, found, told)
        completions = [Completion(*found[index]) for index in range(len(prompts))]
        if not all(math.isfinite(sum(each.logps)) for each in completions):
            raise OutputNotFinite(
                "Completions cannot be drawn: the model's output is not finite. Its weights hold NaN or infinite "
                "values (training has diverged: try a lower learning rate), or its dtype is too small: try bfloat16."
            )
        return completions

    def release(self, for_good: bool = False) -> None:
        """Give back the memory that is held between calls; the next one takes it again.

        On a GPU those are the keys and values of the rows under way (half of what was free, at most), and CUDA graphs,
        which the next call has to record again; nothing elsewhere.

        Args:
            for_good: whether later calls are to leave nothing, either, because others have no room beside it.
        """
        self._keeps = self._keeps and not for_good
        self._kept.let_go()

    def _together(
        self, prompts: Sequence[Sequence[int]], samplings: list[Sampling], over: _Told
    ) -> dict[int, tuple[list[int], list[float]]]:
        """What the batches that serve can give, by index."""
        most = self._sampling.max_tokens
        fit = [i for i, prompt in enumerate(prompts) if offline.fits(self._model, prompt, most)]
        while self._ways and fit:
            over.begin(0)
            title, draw = self._ways[0]
            try:
                drawn = draw(
                    self._model,
                    [prompts[i] for i in fit],
                    self._settings,
                    [samplings[i] for i in fit],
                    over=over,
                    rows=self._rows,
                    kept=self._kept,
                )
                return dict(zip(fit, drawn, strict=True))
            except offline.Unfit as error:
                if isinstance(error, offline.NoRoom) and self._rows > 1:
                    self._rows //= 2
                    continue
                log.info("completions are not drawn by %s: %s", title, error)
                self._why = str(error)
                del self._ways[0]
        return {}

    def _by_generate(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: list[Sampling],
        found: dict[int, tuple[list[int], list[float]]],
        over: _Told,
    ) -> None:
        """Add what is not `found` yet, in padded batches."""
        over.begin(len(found))
        while rest := [index for index in range(len(prompts)) if index not in found]:
            lengths = [len(prompts[index]) + self._sampling.max_tokens for index in rest]
            batch = [rest[i] for i in next(batches_by_length(lengths, self._rows))]
            try:
                drawn = self._in_a_batch([prompts[i] for i in batch], [samplings[i] for i in batch])
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                drawn = None
            if drawn is None:  # outside the handler, which holds what did not fit
                self._rows = len(batch) // 2
                continue
            for index, each in zip(batch, drawn, strict=True):
                found[index] = each
                over()

    def _in_a_batch(
        self, prompts: list[Sequence[int]], samplings: list[Sampling]
    ) -> list[tuple[list[int], list[float]]]:
        draw = _Draw(prompts, samplings)
        ends: Any = self._settings.eos_token_id
        with evaluating(self._model), _without_own_settings(self._model), head_reads_one_piece(self._model):
            output: Any = self._model.generate(
                input_ids=pad(prompts, ends[0], left=True).to(self._model.device),
                attention_mask=pad([[1] * len(prompt) for prompt in prompts], 0, left=True).to(self._model.device),
                generation_config=self._settings,
                logits_processor=LogitsProcessorList([draw]),
            )
        drawn: list[tuple[list[int], list[float]]] = []
        for tokens, logps in zip(output[:, max(map(len, prompts)) :].tolist(), draw.logps(), strict=True):
            count = length_to_end(tokens, ends)
            drawn.append((tokens[:count], logps[:count]))
        return drawn


class _Told:
    """Tells of each completion once, though some may be drawn anew."""

    def __init__(self, over: Callable[[], object]) -> None:
        self._over, self._told, self._count = over, 0, 0

    def begin(self, count: int) -> None:
        """So many completions are over."""
        self._count = count

    def __call__(self) -> None:
        self._count += 1
        if self._count > self._told:
            self._told = self._count
            self._over()


class _Draw(LogitsProcessor):
    """Leaves of each row's logits only the token that is drawn, and notes its log-probability. Rows N, vocabulary V."""

    def __init__(self, prompts: list[Sequence[int]], samplings: list[Sampling]) -> None:
        self._samplings, self._lengths = samplings, [len(prompt) for prompt in prompts]
        # What changes logits: `pick` does the rest.
        self._shapers = [
            (row, Shaper(sampling, prompt))
            for row, (sampling, prompt) in enumerate(zip(samplings, prompts, strict=True))
            if sampling.shapes
        ]
        self._steps: list[Tensor] = []

    def logps(self) -> list[list[float]]:
        """Of the tokens of each row, those after its end included."""
        return torch.stack(self._steps, 1).tolist()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Scores, (N, V), for greedy decoding."""
        logits, step = scores.float(), len(self._steps)
        for _, shaper in self._shapers:
            shaper.begin(step, list)
        chances = [each.chance(length + step) for each, length in zip(self._samplings, self._lengths, strict=True)]
        shaped = shape(logits, self._shapers) if self._shapers else logits
        tokens, logps = draw_alike(shaped, logits, torch.tensor(chances, device=scores.device), self._samplings[0])
        for row, shaper in self._shapers:
            shaper.took(tokens[row])
        self._steps.append(logps)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0)


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """While it lasts `generate` adds nothing of the model's own (tokens that it suppresses, say): completions are those
    of the logits that training computes."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
