"""What a model answers, decoding greedily: many prompts together where that is faster, else in padded batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from theodora.evaluate.batches import batches_by_length, pad
from theodora.evaluate.decoding import decoding, end_tokens

log = logging.getLogger("theodora.evaluate")


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    first_line_only: bool,
    only_if: Sequence[str] | None = None,
    batch_size: int = 16,
    advance: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """The greedy continuation of each prompt, without blanks around it, in the order of the prompts.

    An answer ends with the model's end token, or as soon as it cannot be its text of `only_if` any more. The second
    saves most of the time on a model that is not trained yet, and changes no exact match.

    Args:
        model: any causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt.
        max_new_tokens: tokens generated at most.
        first_line_only: end an answer at the first line break after some text. For prompts without a chat template,
            where a model that was never trained to end an answer would go on writing.
        only_if: texts to which alone answers are compared. An answer that is not its text may be broken off.
        batch_size: prompts in a padded batch, at most.
        advance: told of answers that are over.
    """
    rules = _Rules(tokenizer, only_if, ends=end_tokens(model, tokenizer), first_line_only=first_line_only)
    found = _together(model, prompts, rules, max_new_tokens, advance)
    rest = [index for index in range(len(prompts)) if index not in found]
    for batch in batches_by_length([len(prompts[i]) + max_new_tokens for i in rest], batch_size):
        indices = [rest[i] for i in batch]
        found |= zip(indices, _in_a_batch(model, prompts, indices, rules, max_new_tokens), strict=True)
        advance(len(batch))
    return [rules.answer(found[index]) for index in range(len(prompts))]


def _together(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    rules: _Rules,
    max_new_tokens: int,
    advance: Callable[[int], object],
) -> dict[int, list[int]]:
    """Tokens of the answers, by index, as far as the batches that serve can give them."""
    from theodora.serve import offline  # transformers' continuous batching, which nothing else here needs

    fit = [i for i, prompt in enumerate(prompts) if offline.fits(model, prompt, max_new_tokens)]
    if not fit or not offline.worth_it(model):
        return {}
    count = 0

    def over() -> None:
        nonlocal count
        count += 1
        advance(1)

    try:
        tokens = offline.answer_together(
            model,
            [prompts[i] for i in fit],
            decoding(rules.ends, max_new_tokens),
            settled=None if rules.takes_all else lambda at, tokens: rules.settled(fit[at], tokens),
            over=over,
        )
    except offline.Unfit as error:
        log.info("answers come from generate, in padded batches: %s", error)
        advance(-count)
        return {}
    return dict(zip(fit, tokens, strict=True))


def _in_a_batch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], indices: list[int], rules: _Rules, max_new_tokens: int
) -> list[list[int]]:
    """Tokens of the answers to some of the prompts, by `generate`, with padding behind them."""
    batch = [prompts[i] for i in indices]
    width, pad_token = max(map(len, batch)), rules.ends[0]
    with head_reads_one_piece(model):
        output: Any = model.generate(  # pyright: ignore[reportCallIssue] (it is typed as a Tensor, through nn.Module.__getattr__)
            input_ids=pad(batch, pad_token, left=True).to(model.device),
            attention_mask=pad([[1] * len(prompt) for prompt in batch], 0, left=True).to(model.device),
            generation_config=decoding(rules.ends, max_new_tokens),
            stopping_criteria=StoppingCriteriaList([_Judge(rules, indices, width)]),
        )
    return output[:, width:].tolist()


@contextmanager
def head_reads_one_piece(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, the output head is given contiguous tensors.

    The states at the last position of each row are a view with gaps. torch multiplies such a view by a frozen weight
    row by row, and copies the weight for each row first: gigabytes, and much of the time where the vocabulary is large.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda module, args: tuple(map(_in_one_piece, args)))
    try:
        yield
    finally:
        hook.remove()


def _in_one_piece(given: Any) -> Any:
    return given.contiguous() if isinstance(given, Tensor) else given


class _Rules:
    """When an answer is settled, and what its text is."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        references: Sequence[str] | None,
        *,
        ends: list[int],
        first_line_only: bool,
    ) -> None:
        self.ends = ends
        self._tokenizer = tokenizer
        self._references = None if references is None else [reference.strip() for reference in references]
        self._first_line_only = first_line_only

    @property
    def takes_all(self) -> bool:
        """Whether nothing but an end token settles an answer."""
        return self._references is None and not self._first_line_only

    def settled(self, row: int, tokens: list[int]) -> bool:
        """Whether the answer to a prompt (its index) need not go on after these tokens."""
        return self._ended(tokens) or not self._may_match(row, tokens)

    def answer(self, tokens: list[int]) -> str:
        """The text of a finished answer."""
        ended = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        text = self._text(tokens[:ended]).lstrip()
        if self._first_line_only:
            text = text.partition("\n")[0]
        return text.rstrip()

    def _may_match(self, row: int, tokens: list[int]) -> bool:
        return self._references is None or self._references[row].startswith(self.answer(tokens))

    def _ended(self, tokens: list[int]) -> bool:
        return tokens[-1] in self.ends or (self._first_line_only and "\n" in self._text(tokens).lstrip())

    def _text(self, tokens: list[int]) -> str:
        # What follows the end is padding; and an end token need not be one that decoding skips.
        tokens = tokens[: next((at for at, token in enumerate(tokens) if token in self.ends), None)]
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).rstrip("\ufffd")  # half of a character: its other bytes are in the next token


class _Judge(StoppingCriteria):
    """Ends each row of a padded batch as soon as its answer is settled."""

    def __init__(self, rules: _Rules, indices: list[int], prompt_width: int) -> None:
        self._rules, self._indices, self._prompt_width = rules, indices, prompt_width
        self._settled = [False] * len(indices)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Say which rows are settled, (rows,)."""
        for i, tokens in enumerate(input_ids[:, self._prompt_width :].tolist()):
            if not self._settled[i]:
                self._settled[i] = self._rules.settled(self._indices[i], tokens)
        return torch.tensor(self._settled, device=input_ids.device)
