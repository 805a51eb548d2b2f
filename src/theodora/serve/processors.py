"""In the place of transformers' logits processors: picks each sequence's next token as its request asks.

Slots and sampling travel with a batch in the rows of arguments that logits processors have. `batching.py` puts this in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.logits_process import LogitsProcessorList

from theodora.serve.requests import Request, Sampling
from theodora.serve.sampling import likeliest, pick
from theodora.serve.scoring import Scored, ScoringModel
from theodora.serve.shaping import Shaper, shape
from theodora.serve.watch import Watch

KEY = "request"
"""Under which a `Request` travels in transformers' request."""
MOST_TOP_LOGPROBS = 20

_GREEDY = Sampling(max_tokens=1, temperature=0.0)  # what transformers warms up with
_ROWS = 7
SLOT, _TEMPERATURE, _CHANCE, _TOP_P, _TOP_K, _MIN_P, _SEQUENCE = range(_ROWS)
"""The rows of a batch's arguments, int32, one column for each sequence; those of floats hold float32's bits."""


def request_of(state: Any) -> Request | None:
    """Our request behind transformers' (None for those that it warms up with)."""
    return state.logit_processor_kwargs.get(KEY)


class RoutedProcessors(ContinuousBatchingLogitsProcessorList):
    """Takes each sequence's slot and sampling along with the batch, and picks tokens by them.

    Args:
        alike: what all requests sample by, but for the seed, where that is so. Then CUDA graphs hold what only some
            requests of a server ask for, and log-probabilities are those at its temperature: what was drawn from.
    """

    current_io: Callable[[], Any]
    """Gives the outputs of the batch at hand; set with the worker's other parts."""
    watch: Watch
    """What of the batch at hand is not finite; set as well."""

    def __init__(self, alike: Sampling | None = None) -> None:
        # The class's own __init__ sorts logits processors, of which there are none here.
        self._alike = alike
        self.logits_processor = LogitsProcessorList()
        self.tensors_required = _ROWS
        self.supported_keys, self.ignored_keys = {}, set()
        self.do_processing = True
        self.samples = self.filters = self.tops = False
        """Whether the batch at hand asks for random tokens; for some of the tokens only; for the likeliest ones."""
        self.shapers: list[tuple[int, Shaper]] = []
        """Rows of the batch at hand whose logits are changed, by what."""
        self.scored: tuple[Scored, ...] = ()
        """Prompts of the batch at hand whose tokens are scored."""
        self._args: Tensor | None = None

    @property
    def eager(self) -> bool:
        """Whether the batch asks for what is not in a CUDA graph."""
        return (self.filters and self._alike is None) or self.tops or bool(self.shapers) or bool(self.scored)

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """A request's arguments are checked before it gets here."""

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Slot 0, and greedy."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: Tensor) -> Tensor:
        """Write the rows: slots for all sequences, the rest for those that get a new token.

        Last the sequences in the order of the outputs, of which those with a new token come first (`outputs_of`).
        """
        slots: list[int] = []
        new: list[tuple[Sampling, int]] = []
        scored: list[Scored | None] = []
        self.shapers, at = [], 0
        for future in requests_in_batch:
            request, place = request_of(future.state), future.state.position_offset
            sampling = _GREEDY if request is None else request.sampling
            slots.append(0 if request is None else request.slot)
            scored.append(Scored.of(request, place - future.query_length, future.query_length, at))
            at += future.query_length
            if future.has_new_token:
                if request is not None and sampling.shapes:
                    self.shapers.append((len(new), _shaper(request, future.state)))
                new.append((sampling, place))
        self.scored = tuple(part for part in scored if part is not None)
        samplings = [sampling for sampling, _ in new]
        self.samples = any(sampling.temperature > 0 for sampling in samplings)
        self.filters = any(s.filters for s in (samplings if self._alike is None else [self._alike]))
        self.tops = any(sampling.top_logprobs > 0 for sampling in samplings)
        chances = [sampling.chance(place) if sampling.temperature > 0 else 0 for sampling, place in new]
        rows = torch.zeros(_ROWS, len(slots), dtype=torch.int32)
        rows[SLOT] = torch.tensor(slots, dtype=torch.int32)
        for row, values in (
            (_TEMPERATURE, torch.tensor([sampling.temperature for sampling in samplings]).view(torch.int32)),
            (_CHANCE, torch.tensor(chances, dtype=torch.int32)),
            (_TOP_P, torch.tensor([sampling.top_p for sampling in samplings]).view(torch.int32)),
            (_TOP_K, torch.tensor([sampling.top_k for sampling in samplings], dtype=torch.int32)),
            (_MIN_P, torch.tensor([sampling.min_p for sampling in samplings]).view(torch.int32)),
        ):
            rows[row, : len(new)] = values
        # Without a new token there are no logits to look at: ~sequence.
        sequences = [n if future.has_new_token else ~n for n, future in enumerate(requests_in_batch)]
        rows[_SEQUENCE, outputs_of(requests_in_batch)] = torch.tensor(sequences, dtype=torch.int32)
        arg_storage[:_ROWS, : len(slots)] = rows.to(arg_storage.device)
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """Leave the logits alone; `sample` needs them and the arguments."""
        self._args = logits_processor_args
        return scores

    def sample(self, scores: Tensor, output_ids: Tensor) -> None:
        """Pick each sequence's next token; write tokens and log-probabilities, and note the likeliest others.

        A sequence that is not finite gets NaN for its log-probability, also one without a new token: it costs no
        transfer of its own.

        Args:
            scores: logits, (1, N, V).
            output_ids: (2, …) int32: tokens, and log-probabilities as float32's bits.
        """
        logits, args = scores[0], self._args
        assert args is not None
        count = logits.shape[0]
        # A copy: what is told of the logits is the model's own.
        shaped = shape(logits, self.shapers) if self.shapers else logits
        if self.samples or logits.is_cuda:  # a graph is captured for all batches that are not `eager`
            floats = args.view(torch.float32)
            tokens = pick(
                shaped,
                floats[_TEMPERATURE],
                args[_CHANCE],
                floats[_TOP_P],
                args[_TOP_K],
                floats[_MIN_P],
                self.filters,
            )
        else:
            tokens = shaped.argmax(-1)
        for row, shaper in self.shapers:
            shaper.took(tokens[row])
        if self._alike is not None and self._alike.temperature > 0:
            logits = logits / self._alike.temperature
        whole = logits.logsumexp(-1)
        output_ids[0, :count].copy_(tokens)
        logprobs, sequence = logits.gather(1, tokens[:, None])[:, 0] - whole, args[_SEQUENCE].long()
        new = sequence >= 0
        not_finite = self.watch.not_finite()[torch.where(new, sequence, ~sequence).clamp_max(count - 1)]
        not_finite |= new & ~whole.isfinite()
        # (What stands in the rows without a new token is another sequence's, and may be NaN.)
        logprobs = logprobs.masked_fill(~new, 0).masked_fill(not_finite, torch.nan)
        output_ids[1, :count].copy_(logprobs.view(torch.int32))
        if self.tops:
            # Beside the batch's other outputs: two batches can be under way.
            self.current_io().tops = likeliest(logits, whole, MOST_TOP_LOGPROBS)

    def scoring(self, forward: Callable[..., None]) -> Callable[..., None]:
        """The batch's function, with the model's place taken by one that scores prompts as well."""
        io, most = self.current_io(), max(part.request.sampling.prompt_logprobs or 0 for part in self.scored)

        def scored(model: Any, *rest: Any) -> None:
            stand_in = ScoringModel(model, self.scored, most)
            forward(stand_in, *rest)
            io.scores = stand_in.scores

        return scored

    def hand_out(self, requests: Sequence[Any], io: Any) -> None:
        """Hand what a finished batch has beside its tokens to the requests that asked for it."""
        if io.scores is not None:
            io.scores.tell()
        if io.tops is not None:
            self._hand_out_tops(requests, io.tops)
        io.scores = io.tops = None

    def _hand_out_tops(self, requests: Sequence[Any], tops: tuple[Tensor, Tensor]) -> None:
        tokens, values = (both.cpu() for both in tops)
        for row, future in enumerate(future for future in requests if future.has_new_token):
            request = request_of(future.state)
            if request is not None and (count := request.sampling.top_logprobs):
                request.tops[len(future.state.logprobs)] = tokens[row, :count].tolist(), values[row, :count].tolist()


def outputs_of(requests: Sequence[Any]) -> list[int]:
    """Where in a batch's outputs each of its requests stands: those with a new token first, then the others."""
    new = sum(future.has_new_token for future in requests)
    tokens, others = itertools.count(), itertools.count(new)
    return [next(tokens if future.has_new_token else others) for future in requests]


def _shaper(request: Request, state: Any) -> Shaper:
    """What changes the logits of the token that comes next, told of the tokens before it."""
    if request.shaper is None:
        request.shaper = Shaper(request.sampling, request.prompt)
    start = len(request.prompt)
    # A request that was run anew has what it had generated among its first tokens.
    request.shaper.begin(state.position_offset - start, lambda: (state.initial_tokens + state.generated_tokens)[start:])
    return request.shaper
