"""Scores of a model on examples, and on plain text."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from theodora.data import Examples, encode_prompt, reference_answer, tokenize
from theodora.data.prompts import is_verbatim
from theodora.errors import DataError
from theodora.evaluate.batches import batches_by_length, evaluating
from theodora.evaluate.exact_match import count_matches
from theodora.evaluate.loss import summed_loss


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model scores on a set of rows."""

    loss: float
    """Mean negative log-likelihood of a predicted token, in nats."""
    exact_match: float | None
    """Share of rows answered exactly, 0 to 1; None if not asked for, and for plain text."""
    rows: int
    """Rows scored."""
    tokens: int
    """Predicted tokens: the completions' (or all, for plain text), not the prompts'."""
    seconds: float
    """Time taken."""

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))  # exp(710) is beyond a float

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {**asdict(self), "perplexity": self.perplexity}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    exact_match: bool = True,
    max_length: int | None = None,
    use_chat_template: bool | None = None,
    progress: bool = False,
) -> Scores:
    """Score a model, adapted or not, on rows with answers (loss and exact match) or on plain text (loss only).

    Example:
        `evaluate(model, tokenizer, theodora.data.load_examples("held_out.jsonl")).exact_match`

    Args:
        model: any causal language model; its weights, device and training mode are left as they are.
        tokenizer: its tokenizer.
        examples: rows as `load_examples` returns them. The prompts are those that training sees.
        batch_size: rows in a forward pass, at most. Long rows come in smaller batches.
        max_new_tokens: tokens of the longest answer to generate.
        exact_match: also generate answers (greedily) and compare them; slower than the loss alone.
        max_length: tokens after which a row is cut. Default: the model's context window.
        use_chat_template: whether prompts are wrapped in the chat template. Default: if the tokenizer has one.
        progress: show a bar on the terminal (standard error).

    Raises:
        DataError: there is no row, or no row has a token to predict.
    """
    start = time.perf_counter()
    if not len(examples):
        raise DataError(f"{examples.source} holds no rows; expected at least one")
    exact_match = exact_match and examples.format != "text"
    tokenized = tokenize(
        examples,
        tokenizer,
        max_length=max_length or _context_window(model, tokenizer),
        use_chat_template=use_chat_template,
    )
    with evaluating(model), _progress_bar(shown=progress) as bar:
        total, tokens = _loss(model, tokenized, batch_size, bar)
        matches = (
            _matches(model, tokenizer, examples, batch_size, max_new_tokens, use_chat_template, bar)
            if exact_match
            else None
        )
    if tokens == 0:
        raise DataError(f"{examples.source}: no row has a token to predict; is every completion empty or cut off?")
    rows = len(examples)
    return Scores(
        loss=total / tokens,
        exact_match=None if matches is None else matches / rows,
        rows=rows,
        tokens=tokens,
        seconds=time.perf_counter() - start,
    )


def text_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: bool = False,
) -> Scores:
    """Score a model on plain texts, to see for instance what fine-tuning made it forget.

    Args:
        model: any causal language model; left as it is.
        tokenizer: its tokenizer.
        texts: the texts.
        batch_size: texts in a forward pass, at most.
        max_length: tokens after which a text is cut. Default: the model's context window.
        progress: show a bar on the terminal (standard error).

    Raises:
        DataError: there is no text, or none with a token to predict.
    """
    dataset = Dataset.from_dict({"text": list(texts)})
    return evaluate(
        model,
        tokenizer,
        Examples(dataset=dataset, format="text", source="texts"),
        batch_size=batch_size,
        max_length=max_length,
        progress=progress,
    )


def _context_window(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens that both model and tokenizer take (a tokenizer that knows no limit says 1e30)."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(known or sys.maxsize, tokenizer.model_max_length)


def _progress_bar(*, shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not shown,
    )


def _loss(model: PreTrainedModel, tokenized: Dataset, batch_size: int, bar: Progress) -> tuple[float, int]:
    rows, labels = list(tokenized["input_ids"]), list(tokenized["labels"])
    total, tokens = 0.0, 0
    task = bar.add_task("Loss", total=len(rows))
    for batch in batches_by_length([len(row) for row in rows], batch_size):
        batch_loss, predicted = summed_loss(model, [rows[i] for i in batch], [labels[i] for i in batch])
        total, tokens = total + batch_loss, tokens + predicted
        bar.advance(task, len(batch))
    return total, tokens


def _matches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    batch_size: int,
    max_new_tokens: int,
    use_chat_template: bool | None,
    bar: Progress,
) -> int:
    rows: list[Any] = list(examples.dataset)
    prompts = [encode_prompt(row, tokenizer, use_chat_template) for row in rows]
    references = [reference_answer(row) for row in rows]
    # Without a template nothing tells an untrained model where an answer ends.
    single_line = is_verbatim(rows[0], tokenizer, use_chat_template) and not any("\n" in r.strip() for r in references)
    _warn_of_long_answers(tokenizer, references, max_new_tokens)
    matches = 0
    task = bar.add_task("Exact match", total=len(prompts))
    for batch in batches_by_length([len(prompt) + max_new_tokens for prompt in prompts], batch_size):
        matches += count_matches(
            model,
            tokenizer,
            [prompts[i] for i in batch],
            [references[i] for i in batch],
            max_new_tokens=max_new_tokens,
            first_line_only=single_line,
        )
        bar.advance(task, len(batch))
    return matches


def _warn_of_long_answers(tokenizer: PreTrainedTokenizerBase, references: Sequence[str], max_new_tokens: int) -> None:
    lengths = [len(ids) for ids in tokenizer(list(references), add_special_tokens=False)["input_ids"]]
    too_long = sum(length > max_new_tokens for length in lengths)
    if too_long:
        warnings.warn(
            f"{too_long} of {len(lengths)} reference answers are longer than max_new_tokens ({max_new_tokens}) and "
            f"count as not matched; the longest has {max(lengths)} tokens",
            stacklevel=4,
        )
