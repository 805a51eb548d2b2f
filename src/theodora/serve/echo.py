"""A prompt as it is told again in front of its answer (`echo`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from theodora.serve.text import Writer


@dataclass(frozen=True)
class Echo:
    """What stands in front of an answer."""

    text: str
    offsets: Sequence[int] = ()
    """Where in the text each of the prompt's tokens begins."""


def echo_of(tokenizer: Any, prompt: str | list[int], ids: Sequence[int], special: bool = True) -> Echo:
    """A prompt as it was given; one of token ids as text, with its special tokens.

    Args:
        tokenizer: that made the ids, if the prompt is a text.
        prompt: as it was asked.
        ids: the prompt's tokens.
        special: whether the tokenizer added its special tokens.
    """
    if isinstance(prompt, str) and getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(prompt, add_special_tokens=special, return_offsets_mapping=True)
        if list(encoded["input_ids"]) == list(ids):
            # Tokens that the tokenizer adds stand at (0, 0), also behind the text.
            return Echo(prompt, list(accumulate((start for start, _ in encoded["offset_mapping"]), max)))
    writer = Writer(tokenizer, skip_special=False)
    text = writer.write(ids, finished=True)
    return Echo(prompt if isinstance(prompt, str) else text, writer.offsets)
