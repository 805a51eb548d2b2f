"""What a model answers to a few prompts of its data, before and after training: figures alone do not show it."""

from __future__ import annotations

from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from theodora.adapters.scoring import scores
from theodora.data import Examples, encode_prompt
from theodora.data.sequences import parted
from theodora.errors import TheodoraError
from theodora.evaluate.decoding import end_tokens
from theodora.kernels.cross_entropy import IGNORED
from theodora.train.asked import answers_to

_ROWS, _LOOKED_AT = 3, 32
_LONGEST_PROMPT, _TOKENS = 512, 96


@dataclass(frozen=True)
class Sample:
    """One prompt."""

    prompt: str
    """As the model reads it; of a reward model both answers to one."""
    before: str
    """Its answer where training began, greedily, 96 tokens at most; or their scores."""
    after: str
    """Its answer after training."""


def answers_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples, use_chat_template: bool | None
) -> list[tuple[str, str]]:
    """A few prompts, and what the model answers; nothing where it cannot be asked."""
    prompts: list[list[int]] = []
    for row in examples.dataset.select(range(min(_LOOKED_AT, len(examples)))):
        try:
            prompt = encode_prompt(row, tokenizer, use_chat_template)  # pyright: ignore[reportArgumentType]
        except (TheodoraError, KeyError, ValueError, TypeError):
            continue
        if 0 < len(prompt) <= _LONGEST_PROMPT and prompt not in prompts:
            prompts.append(prompt)
        if len(prompts) == _ROWS:
            break
    if not prompts:
        return []
    answers = answers_to(model, prompts, end_tokens(model, tokenizer), _TOKENS)
    if answers is None:
        return []
    return [
        (str(tokenizer.decode(prompt)), str(tokenizer.decode(answer, skip_special_tokens=True)).strip())
        for prompt, answer in zip(prompts, answers.tolist(), strict=True)
    ]


def scores_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> list[tuple[str, str]]:
    """A few pairs of `tokenize_preferences`, and what a reward model gives their answers."""
    pairs = [parted(row) for row in rows.select(range(min(_ROWS, len(rows))))]
    found = scores(model, [sequence["input_ids"] for pair in pairs for sequence in pair]).tolist()
    return [
        (_in_words(tokenizer, *pair), f"better {better:.3f}, worse {worse:.3f}")
        for pair, better, worse in zip(pairs, found[::2], found[1::2], strict=True)
    ]


def _in_words(tokenizer: PreTrainedTokenizerBase, better: dict[str, list[int]], worse: dict[str, list[int]]) -> str:
    """What both answer, and the answers."""

    def text(sequence: dict[str, list[int]], learned: bool) -> str:
        both = zip(sequence["input_ids"], sequence["labels"], strict=True)
        ids = [token for token, label in both if (label != IGNORED) == learned]
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()

    return f"{text(better, False)}\nbetter: {text(better, True)}\nworse: {text(worse, True)}"


def paired(before: list[tuple[str, str]], after: list[tuple[str, str]]) -> tuple[Sample, ...]:
    """The samples of a run, of the prompts that were answered both times."""
    later = dict(after)
    return tuple(Sample(prompt, answer, later[prompt]) for prompt, answer in before if prompt in later)
