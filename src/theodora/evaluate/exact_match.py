"""What a model answers, decoding greedily."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from theodora.evaluate.batches import pad
from theodora.evaluate.decoding import decoding, end_tokens


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    first_line_only: bool,
    only_if: Sequence[str] | None = None,
) -> list[str]:
    """The greedy continuation of each prompt, without blanks around it.

    A row ends with the model's end token, or as soon as it cannot be `only_if` any more. The second saves most of the
    time on a model that is not trained yet, and changes no exact match.

    Args:
        model: any causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt.
        max_new_tokens: tokens generated at most.
        first_line_only: end an answer at the first line break after some text. For prompts without a chat template,
            where a model that was never trained to end an answer would go on writing.
        only_if: texts to which alone answers are compared. An answer that is not its text may be broken off.
    """
    ends = end_tokens(model, tokenizer)
    width = max(map(len, prompts))
    judge = _Judge(
        tokenizer, only_if, rows=len(prompts), prompt_width=width, ends=ends, first_line_only=first_line_only
    )
    output = model.generate(  # pyright: ignore[reportCallIssue] (it is typed as a Tensor, through nn.Module.__getattr__)
        input_ids=pad(prompts, ends[0], left=True).to(model.device),
        attention_mask=pad([[1] * len(prompt) for prompt in prompts], 0, left=True).to(model.device),
        generation_config=decoding(ends, max_new_tokens),
        stopping_criteria=StoppingCriteriaList([judge]),
    )
    return judge.answers(output)


class _Judge(StoppingCriteria):
    """Ends each row as soon as its answer is settled."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        references: Sequence[str] | None,
        *,
        rows: int,
        prompt_width: int,
        ends: list[int],
        first_line_only: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._references = None if references is None else [reference.strip() for reference in references]
        self._prompt_width = prompt_width
        self._ends = set(ends)
        self._first_line_only = first_line_only
        self._settled = [False] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Say which rows are settled, (rows,)."""
        for i, tokens in enumerate(input_ids[:, self._prompt_width :].tolist()):
            if not self._settled[i]:
                self._settled[i] = self._ended(tokens) or not self._may_match(i, tokens)
        return torch.tensor(self._settled, device=input_ids.device)

    def answers(self, output: Tensor) -> list[str]:
        """The answers in the finished output, (rows, tokens)."""
        return [self._answer(tokens) for tokens in output[:, self._prompt_width :].tolist()]

    def _may_match(self, row: int, tokens: list[int]) -> bool:
        return self._references is None or self._references[row].startswith(self._answer(tokens))

    def _ended(self, tokens: list[int]) -> bool:
        return tokens[-1] in self._ends or (self._first_line_only and "\n" in self._text(tokens).lstrip())

    def _answer(self, tokens: list[int]) -> str:
        ended = next((i for i, token in enumerate(tokens) if token in self._ends), len(tokens))
        text = self._text(tokens[:ended]).lstrip()
        if self._first_line_only:
            text = text.partition("\n")[0]
        return text.rstrip()

    def _text(self, tokens: list[int]) -> str:
        # What follows the end is padding; and an end token need not be one that decoding skips.
        tokens = tokens[: next((at for at, token in enumerate(tokens) if token in self._ends), None)]
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).rstrip("\ufffd")  # half of a character: its other bytes are in the next token
