"""Whether a trained model stops by itself: a few prompts of the data, answered greedily, a little beyond their answers.

A loss may be 0 and the model still write for ever, where what ends its answers in the data is not what stops it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from theodora.data import Examples, encode_prompt, reference_answer
from theodora.errors import TheodoraError
from theodora.evaluate.decoding import end_tokens
from theodora.train.asked import answers_to

_ROWS = 4
_LOOKED_AT = 64  # rows, of which those with the shortest answers are asked
_MOST = 128  # tokens of an answer
_BEYOND = 8  # tokens that a model may write more than the answer has
_SMALL_LOSS = 1.0


@dataclass(frozen=True)
class SelfStopping:
    """In how many of how many answers the model stopped."""

    stopped: int
    asked: int

    def warning(self, loss: float) -> str | None:
        """What to say where it goes on and on although it has learned the rest."""
        if 2 * self.stopped >= self.asked or not loss < _SMALL_LOSS:
            return None
        return (
            f"the model stopped by itself in {self.stopped} of {self.asked} answers only, although its loss is small: "
            "does the data end its answers, and with a token that ends the model's?"
        )


def count_self_stops(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples, use_chat_template: bool | None
) -> SelfStopping | None:
    """Ask a few rows; None where there is nothing to ask (plain text, long answers), or the model does not generate."""
    if examples.format == "text":
        return None
    asked = sorted(_questions(tokenizer, examples, use_chat_template), key=lambda pair: pair[1])[:_ROWS]
    if not asked:
        return None
    ends = end_tokens(model, tokenizer)
    longest = max(length for _, length in asked)
    answers = answers_to(model, [prompt for prompt, _ in asked], ends, longest + _BEYOND)
    if answers is None:
        return None
    stopped = torch.isin(answers.cpu(), torch.tensor(ends)).any(dim=1)
    return SelfStopping(int(stopped.sum()), len(asked))


def _questions(
    tokenizer: PreTrainedTokenizerBase, examples: Examples, use_chat_template: bool | None
) -> list[tuple[list[int], int]]:
    """Prompts of the first rows, and how long their answers are."""
    questions: list[tuple[list[int], int]] = []
    for row in examples.dataset.select(range(min(_LOOKED_AT, len(examples)))):
        try:
            length = len(tokenizer(reference_answer(row), add_special_tokens=False)["input_ids"])  # pyright: ignore
            prompt = encode_prompt(row, tokenizer, use_chat_template)  # pyright: ignore[reportArgumentType]
        except (TheodoraError, StopIteration, KeyError, ValueError, TypeError):
            continue
        if prompt and length <= _MOST:
            questions.append((prompt, length))
    return questions
