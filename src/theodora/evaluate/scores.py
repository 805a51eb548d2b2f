"""Scores of a model on examples, and on plain text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from theodora.adapters.state import find_state
from theodora.data import Examples
from theodora.data.left_out import LeftOut
from theodora.data.vocabulary import check_rows
from theodora.errors import DataError, TheodoraError, in_line
from theodora.evaluate.batches import USUAL_ROWS, batches_by_length, evaluating, rows_together
from theodora.evaluate.exact_match import answers
from theodora.evaluate.labels import choose
from theodora.evaluate.loss import row_losses
from theodora.evaluate.metrics import Metric, mean_score, same_text, token_f1
from theodora.evaluate.questions import Questions, context_window, questions, warn_of_long_answers
from theodora.layers.norm_cache import looked_at_once
from theodora.terminal import Terminal

MEND_VOCABULARY = (
    "Score the model, or an adapter of it, that was trained with these tokens (theodora train --resize-embeddings), or "
    "take the tokenizer that fits this one."
)


class LossNotFinite(TheodoraError):
    """A model's loss is NaN or infinite, so that there is nothing to report."""


@dataclass(frozen=True, kw_only=True)
class RowScore:
    """What a model scores on one row."""

    loss: float | None
    """Mean negative log-likelihood of a predicted token, in nats; None where nothing to predict is left of the row."""
    tokens: int
    """Predicted tokens."""
    expected: str | None
    """The answer to write exactly; None for plain text."""
    answer: str | None
    """What the model writes, whole; None where it was not asked."""
    right: bool | None
    """Whether that is the expected answer, blanks around both aside."""


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
    label_accuracy: float | None = None
    """Share of rows whose right label is the likeliest of all labels, 0 to 1; None without labels."""
    token_f1: float | None = None
    """Mean F1 of the words that answer and reference share, 0 to 1; None if not asked for."""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """Means of the user's own metrics, by name."""
    left_out: tuple[LeftOut, ...] = ()
    """What the rows hold that the model was not shown or asked for, with how many rows it concerns."""
    each: tuple[RowScore, ...] = ()
    """Each row, in the order of the examples; empty if not asked for."""

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))  # exp(710) is beyond a float

    def to_dict(self) -> dict[str, Any]:
        """All scores, those of each row apart, ready for JSON."""
        scores = asdict(replace(self, each=()))
        del scores["each"]
        return {**scores, "perplexity": self.perplexity}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    *,
    batch_size: int | None = None,
    max_new_tokens: int = 64,
    exact_match: bool = True,
    labels: Sequence[str] | None = None,
    f1: bool = False,
    metrics: Mapping[str, Metric] | None = None,
    max_length: int | None = None,
    use_chat_template: bool | None = None,
    each_row: bool = False,
    progress: bool | Told = False,
) -> Scores:
    """Score a model, adapted or not, on rows with answers (loss and exact match) or on plain text (loss only).

    Example:
        `evaluate(model, tokenizer, theodora.data.load_examples("held_out.jsonl")).exact_match`

    Args:
        model: any causal language model; its weights, device and training mode are left as they are.
        tokenizer: its tokenizer.
        examples: rows as `load_examples` returns them. The prompts are those that training sees.
        batch_size: rows in a padded forward pass, at most. Long rows come in smaller batches. Default: 16, and for
            losses on a GPU as many as memory allows for. Answers that come together on a GPU
            (`evaluate/exact_match.py`) have no padding, and bounds of their own.
        max_new_tokens: tokens of the longest answer to generate.
        exact_match: also generate answers (greedily) and compare them; slower than the loss alone.
        labels: the closed set of answers; then also the share of rows whose right label is the likeliest.
        f1: also generate answers and score the words they share with the references.
        metrics: functions of (answer, reference), by name, whose means over the rows are wanted.
        max_length: tokens after which a row is cut. Default: the model's context window.
        use_chat_template: whether prompts are wrapped in the chat template. Default: if the tokenizer has one.
        each_row: also say what each row scores; answers are then whole, also those that are wrong from the start.
        progress: show a bar on the terminal (standard error), or whom to tell what is done, how many of how many.

    Raises:
        DataError: there is no row, or no row has a token to predict; rows do not fit the labels; a metric gives
            something that is no finite number.
        LossNotFinite: the model's loss is NaN or infinite; the message names the model and the rows.
    """
    start = time.perf_counter()
    if examples.format == "preference":
        raise DataError(
            f"{examples.source} holds pairs of answers, which evaluate_preferences scores; as_answers leaves the better"
        )
    is_text = examples.format == "text"
    if is_text and (f1 or metrics or labels is not None):
        raise DataError(
            f"{examples.source} is plain text, which has no answers to score; expected prompts with answers"
        )
    asked = questions(
        examples,
        tokenizer,
        max_length=max_length or context_window(model, tokenizer),
        use_chat_template=use_chat_template,
        answered=exact_match or f1 or bool(metrics),
        labels=labels,
        numbered=each_row,
    )
    scores = score(
        model,
        tokenizer,
        asked,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        exact_match=exact_match and not is_text,
        f1=f1,
        metrics=metrics,
        progress=progress,
    )
    return replace(scores, seconds=time.perf_counter() - start)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Questions,
    *,
    batch_size: int | None = None,
    max_new_tokens: int = 64,
    exact_match: bool = True,
    f1: bool = False,
    metrics: Mapping[str, Metric] | None = None,
    progress: bool | Told = False,
) -> Scores:
    """`evaluate` on rows that `questions` has made ready; numbered ones are scored each by itself, too. Arguments and
    errors are the same."""
    start = time.perf_counter()
    metrics = {**({"token_f1": token_f1} if f1 else {}), **(metrics or {})}
    check_rows(asked.token_ids(), model, tokenizer, asked.source, MEND_VOCABULARY)
    with evaluating(model), looked_at_once(), progress_bar(shown=progress) as bar:
        losses = losses_of(model, asked, batch_size or rows_together(model), bar)
        total, tokens = sum(loss for loss, _ in losses), sum(count for _, count in losses)
        batch_size = batch_size or USUAL_ROWS
        if tokens == 0:
            raise DataError(f"{asked.source}: no row has a token to predict; is every completion empty or cut off?")
        accuracy = _label_accuracy(model, asked, batch_size, bar) if asked.choices else None
        matches, means, given = None, dict[str, float](), None
        if exact_match or metrics:
            # An answer that is only compared is broken off as soon as it differs.
            given = _answers(
                model, tokenizer, asked, batch_size, max_new_tokens, bar, whole=bool(metrics or asked.numbers)
            )
            matches = mean_score(same_text, "exact_match", given, asked.references) if exact_match else None
            means = {name: mean_score(metric, name, given, asked.references) for name, metric in metrics.items()}
    return Scores(
        loss=total / tokens,
        exact_match=matches,
        rows=asked.rows,
        tokens=tokens,
        seconds=time.perf_counter() - start,
        label_accuracy=accuracy,
        token_f1=means.pop("token_f1", None) if f1 else None,
        metrics=means,
        left_out=asked.left_out,
        each=tuple(_each(asked, losses, given)) if asked.numbers else (),
    )


def _each(asked: Questions, losses: Sequence[tuple[float, int]], given: Sequence[str] | None) -> Iterator[RowScore]:
    sums, counts = [0.0] * asked.rows, [0] * asked.rows
    for number, (loss, tokens) in zip(asked.numbers, losses, strict=True):
        sums[number] += loss
        counts[number] += tokens
    for number in range(asked.rows):
        expected = asked.references[number] if asked.references else None
        answer = None if given is None else given[number]
        yield RowScore(
            loss=sums[number] / counts[number] if counts[number] else None,
            tokens=counts[number],
            expected=expected,
            answer=answer,
            right=None if answer is None or expected is None else bool(same_text(answer, expected)),
        )


def text_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    batch_size: int | None = None,
    max_length: int | None = None,
    progress: bool = False,
) -> Scores:
    """Score a model on plain texts, to see for instance what fine-tuning made it forget.

    Args:
        model: any causal language model; left as it is.
        tokenizer: its tokenizer.
        texts: the texts.
        batch_size: texts in a forward pass, at most. Default: as of `evaluate`.
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


Told = Callable[[str, int, int], object]
"""Is told what is done, how many of it, and of how many."""


class _Bar(Progress):
    told: Told | None = None

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Note that more is done, and tell it."""
        super().advance(task_id, advance)
        if self.told is not None:
            task = self.tasks[self.task_ids.index(task_id)]
            self.told(task.description, int(task.completed), int(task.total or 0))


def progress_bar(*, shown: bool | Told) -> Progress:
    """On standard error, gone when it is done; or nothing to see, where somebody is told."""
    bar = _Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Terminal(stderr=True),
        transient=True,
        disable=shown is not True,
    )
    bar.told = shown if callable(shown) else None
    return bar


def losses_of(
    model: PreTrainedModel,
    asked: Questions,
    batch_size: int | Callable[[int], int],
    bar: Progress,
    title: str = "Loss",
) -> list[tuple[float, int]]:
    """`row_losses` of all rows, in their order.

    Raises:
        LossNotFinite: naming the model and the rows.
    """
    rows = asked.input_ids
    losses = [(0.0, 0)] * len(rows)
    task = bar.add_task(title, total=len(rows))
    for batch in batches_by_length([len(row) for row in rows], batch_size):
        found = _losses_of(model, asked, batch)
        if not math.isfinite(total := sum(loss for loss, _ in found)):
            raise LossNotFinite(_not_finite(model, asked, batch, total))
        for i, own in zip(batch, found, strict=True):
            losses[i] = own
        bar.advance(task, len(batch))
    return losses


def _losses_of(model: PreTrainedModel, asked: Questions, batch: Sequence[int]) -> list[tuple[float, int]]:
    """Of some rows: together, or in halves where there is no memory for more than the usual number."""
    try:
        return row_losses(model, [asked.input_ids[i] for i in batch], [asked.labels[i] for i in batch])
    except torch.OutOfMemoryError:
        if len(batch) <= USUAL_ROWS:
            raise
    half = len(batch) // 2  # (outside the handler, which holds what did not fit)
    return [loss for part in (batch[:half], batch[half:]) for loss in _losses_of(model, asked, part)]


def _not_finite(model: PreTrainedModel, asked: Questions, batch: Sequence[int], loss: float) -> str:
    """Which model says what of which rows, and what that usually comes from."""
    alone = [row_losses(model, [asked.input_ids[i]], [asked.labels[i]])[0][0] for i in batch]
    bad = sorted(i + 1 for i, own in zip(batch, alone, strict=True) if not math.isfinite(own))
    told = in_line([str(row) for row in bad], 5)
    # A long text is cut into several rows.
    what = asked.unit or ("row" if asked.rows == len(asked.input_ids) else "piece of text")
    which = f"{what} {told}" if bad else f"a batch of {len(batch)} rows, though in none of them alone"
    adapted = " with its adapter" if find_state(model) is not None else ""
    return (
        f"The model {model.name_or_path}{adapted} gives no finite numbers: its loss on {asked.source} is {loss}, in "
        f"{which} of the {len(batch)} scored together; nothing was scored. Expected a number. Are there NaN or "
        f"infinite weights in it, or do its values overflow in {str(model.dtype).removeprefix('torch.')}? float32 "
        "(--dtype fp32) tells the two apart."
    )


def _label_accuracy(model: PreTrainedModel, asked: Questions, batch_size: int, bar: Progress) -> float:
    right = 0
    task = bar.add_task("Labels", total=len(asked.choices))
    for batch, chosen in choose(model, asked.choices, batch_size):
        right += sum(asked.choices[i].right == label for i, label in zip(batch, chosen, strict=True))
        bar.advance(task, len(batch))
    return right / len(asked.choices)


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Questions,
    batch_size: int,
    max_new_tokens: int,
    bar: Progress,
    *,
    whole: bool,
) -> list[str]:
    """The answers to all prompts, in the order of the rows."""
    warn_of_long_answers(tokenizer, asked.references, max_new_tokens)
    task = bar.add_task("Answers" if whole else "Exact match", total=len(asked.prompts))
    return answers(
        model,
        tokenizer,
        asked.prompts,
        max_new_tokens=max_new_tokens,
        first_line_only=asked.single_line,
        only_if=None if whole else asked.references,
        batch_size=batch_size,
        advance=lambda count: bar.advance(task, count),
    )
