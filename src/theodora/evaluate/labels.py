"""Which of a closed set of labels a model finds likeliest: a question that is fair to an untrained model, too.

The likelihood of a label is that of its whole answer, end token included, after the prompt. The prompt runs once; the
labels follow from its cache, the most promising ones first, until no other can be likelier any more: an answer's
likelihood never exceeds that of its beginning. So the result is that of scoring every label in full.

Legend: B rows, T tokens, K positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from theodora.data import Examples, reference_answer, tokenize
from theodora.data.masks import agreement
from theodora.data.prompts import answered_alone
from theodora.errors import DataError
from theodora.evaluate.batches import batches_by_length, pad
from theodora.evaluate.loss import logits_at
from theodora.kernels.cross_entropy import IGNORED
from theodora.synonyms import cache_argument

_REASONED = "</think>"  # ends reasoning that stands in the answer itself
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-6}
_ROUNDING_HALF = 0.15  # nats, between a label scored from the cache and in one pass


@dataclass(frozen=True)
class Choice:
    """One question with its possible answers."""

    prefix: list[int]
    """Token ids that all answers share: the prompt, and perhaps a beginning."""
    endings: list[list[int]]
    """Token ids of each label after the prefix."""
    learned: list[list[bool]]
    """Which of them belong to the answer."""
    right: int
    """Index of the right label."""


def labels_of(examples: Examples) -> list[str]:
    """The different answers that rows give, sorted.

    Raises:
        DataError: plain text, or fewer than two answers.
    """
    labels = sorted(answers_of(examples))
    if len(labels) < 2:
        raise DataError(f"{examples.source} has {len(labels)} different answers; a choice needs at least two labels")
    return labels


def answers_of(examples: Examples) -> set[str]:
    """The different answers that rows give.

    Raises:
        DataError: plain text.
    """
    return {_label(reference_answer(row)) for row in _rows(examples)}


def choices(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    *,
    max_length: int,
    use_chat_template: bool | None = None,
) -> list[Choice]:
    """Tokenise each row once with each label as its answer.

    Raises:
        DataError: an answer is none of the labels, or a row is too long.
    """
    labels = [label.strip() for label in labels]
    if len(set(labels)) < 2:
        raise DataError(f"A choice needs at least two different labels; found {', '.join(labels) or 'none'}")
    rows = _rows(examples)
    answers = [_label(reference_answer(row)) for row in rows]
    strange = sorted(set(answers) - set(labels))
    if strange:
        raise DataError(
            f"{examples.source}: {len(strange)} answers are none of the {len(labels)} labels: {', '.join(strange[:5])}"
            + (", …" if len(strange) > 5 else "")
        )
    # Blanks that set an answer off from its prompt stay, and so does reasoning in front of it.
    labelled = [answered_alone(row, _with_label(reference_answer(row), label)) for row in rows for label in labels]
    # The context window is the limit of one row, so none may be cut: rows and labels would no longer agree.
    tokens = tokenize(
        examples.with_dataset(Dataset.from_list(labelled, features=examples.dataset.features)),
        tokenizer,
        max_length=max_length,
        use_chat_template=use_chat_template,
    )
    ids, marks = list(tokens["input_ids"]), list(tokens["labels"])
    if len(ids) != len(labelled) or max(map(len, ids)) >= max_length:
        raise DataError(f"{examples.source}: rows are longer than max_length={max_length} with their labels")
    groups = range(0, len(ids), len(labels))
    return [
        _choice(ids[at : at + len(labels)], marks[at : at + len(labels)], labels.index(answer))
        for at, answer in zip(groups, answers, strict=True)
    ]


def choose(
    model: PreTrainedModel, questions: Sequence[Choice], batch_size: int
) -> Iterator[tuple[list[int], list[int]]]:
    """For batch after batch: the questions' numbers, and the index of the likeliest label of each.

    Args:
        model: any causal language model, in evaluation mode.
        questions: from `choices`.
        batch_size: questions in a forward pass, at most.
    """
    by_cache, checked = True, False
    for batch in batches_by_length([len(q.prefix) for q in questions], batch_size):
        part = [questions[i] for i in batch]
        labels = _from_cache(model, part, check=not checked) if by_cache else None
        by_cache, checked = labels is not None, True
        yield batch, labels if labels is not None else [_best(score_in_full(model, [q])[0]) for q in part]


def _rows(examples: Examples) -> list[Any]:
    if examples.format == "text":
        raise DataError(f"{examples.source} is plain text, which has no labels; expected prompts with answers")
    return list(examples.dataset)


def _label(answer: str) -> str:
    """The label that an answer gives: without its reasoning and the blanks around it."""
    return answer.rpartition(_REASONED)[2].strip()


def _with_label(answer: str, label: str) -> str:
    """An answer with another label, and its own reasoning and blanks."""
    reasoning, tag, words = answer.rpartition(_REASONED)
    start = len(words) - len(words.lstrip())
    return reasoning + tag + words[:start] + label + words[len(words.rstrip()) :]


def _choice(ids: list[list[int]], marks: list[list[int]], right: int) -> Choice:
    ends = [max(i for i, mark in enumerate(row) if mark != IGNORED) + 1 for row in marks]
    rows = [row[:end] for row, end in zip(ids, ends, strict=True)]
    # What the first and the last row in order have in common, all have. An ending has a token at least.
    shared = max(1, min(agreement(min(rows), max(rows)), *(len(row) - 1 for row in rows)))
    return Choice(
        prefix=rows[0][:shared],
        endings=[row[shared:] for row in rows],
        learned=[[mark != IGNORED for mark in row[shared:end]] for row, end in zip(marks, ends, strict=True)],
        right=right,
    )


def _best(scores: list[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def score_in_full(model: PreTrainedModel, questions: Sequence[Choice], only: int | None = None) -> list[list[float]]:
    """log p of every label (or of one) of each question, without a cache."""
    wanted = [(q, i) for q in questions for i in (range(len(q.endings)) if only is None else [only])]
    scores: list[float] = []
    for start in range(0, len(wanted), 32):
        part = wanted[start : start + 32]
        ids_BT = pad([q.prefix + q.endings[i] for q, i in part], 0)
        first = min(len(q.prefix) for q, _ in part) - 1
        positions = torch.arange(first, ids_BT.shape[1] - 1)
        log_probs_BKV = logits_at(model, ids_BT.to(model.device), positions.to(model.device)).float().log_softmax(-1)
        nats = log_probs_BKV.gather(2, ids_BT[:, first + 1 :, None].to(log_probs_BKV.device))[..., 0].tolist()
        for (q, i), row in zip(part, nats, strict=True):
            own = row[len(q.prefix) - 1 - first :][: len(q.endings[i])]
            scores.append(sum(value for value, counts in zip(own, q.learned[i], strict=True) if counts))
    size = len(wanted) // len(questions)
    return [scores[at : at + size] for at in range(0, len(scores), size)]


def _from_cache(model: PreTrainedModel, questions: Sequence[Choice], *, check: bool) -> list[int] | None:
    """The likeliest label of each question; None if this model has no such cache, or scores differently from it."""
    try:
        search = LabelSearch(model, questions)
        labels = search.run()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError):
        return None  # a model without a cache of this kind
    if check:
        label = labels[0]
        tolerance = _ROUNDING.get(model.dtype, _ROUNDING_HALF)
        expected = score_in_full(model, questions[:1], only=label)[0][0]
        # Also the shortest row of the batch, which has the most padding beside it.
        last = score_in_full(model, questions[-1:], only=labels[-1])[0][0]
        pairs = ((search.score[0][label], expected), (search.score[-1][labels[-1]], last))
        if any(abs(a - b) > tolerance * max(1.0, abs(b)) for a, b in pairs):
            return None
    return labels


class LabelSearch:
    """Best-first search over the labels of a batch of questions."""

    def __init__(self, model: PreTrainedModel, questions: Sequence[Choice]) -> None:
        self._model, self._questions = model, questions
        self._lengths = torch.tensor([len(q.prefix) for q in questions])
        ids_BT = pad([q.prefix for q in questions], 0)
        self._mask_BT = (torch.arange(ids_BT.shape[1]) < self._lengths[:, None]).long()
        self._cache: Any = DynamicCache(config=model.config)
        last = (self._lengths - 1).unique()
        logits = logits_at(
            model,
            ids_BT.to(model.device),
            last.to(model.device),
            attention_mask=self._mask_BT.to(model.device),
            use_cache=True,
            **{cache_argument(model): self._cache},
        )
        place = torch.searchsorted(last, self._lengths - 1)
        log_probs_BV = logits[torch.arange(len(questions)), place.to(logits.device)].float().log_softmax(-1).cpu()
        self.bound = [
            [float(row[e[0]]) if counts[0] else 0.0 for e, counts in zip(q.endings, q.learned, strict=True)]
            for q, row in zip(questions, log_probs_BV, strict=True)
        ]
        """log p of each label's first token: the most that the whole label can reach."""
        self.score: list[dict[int, float]] = [
            {i: bound[i] for i, ending in enumerate(q.endings) if len(ending) == 1}
            for q, bound in zip(questions, self.bound, strict=True)
        ]

    def run(self) -> list[int]:
        """The likeliest label of each question."""
        active = list(range(len(self._questions)))
        while True:
            following = {row: label for row in active if (label := self._next(row)) is not None}
            if not following:
                return [max(scores, key=lambda i: (scores[i], -i)) for scores in self.score]
            if len(following) < len(active):
                rows = torch.tensor([active.index(row) for row in following])
                self._cache.batch_select_indices(rows.to(self._model.device))
                self._mask_BT = self._mask_BT[rows]
                active = list(following)
            self._extend(following)

    def _next(self, row: int) -> int | None:
        """The most promising label that may still be the likeliest."""
        done, bound = self.score[row], self.bound[row]
        best = max(done.values(), default=float("-inf"))
        left = [i for i in range(len(bound)) if i not in done and bound[i] > best]
        return max(left, key=bound.__getitem__) if left else None

    def _extend(self, following: dict[int, int]) -> None:
        """Run one label's tokens for each row; later rounds do not see them, by the mask."""
        endings = [self._questions[row].endings[label] for row, label in following.items()]
        ids_BT = pad([ending[:-1] for ending in endings], 0)
        own_BT = pad([[1] * (len(ending) - 1) for ending in endings], 0)
        mask_BT = torch.cat([self._mask_BT, own_BT], dim=1)
        positions = self._lengths[list(following)][:, None] + torch.arange(ids_BT.shape[1])
        device = self._model.device
        logits_BTV = logits_at(
            self._model,
            ids_BT.to(device),
            None,
            attention_mask=mask_BT.to(device),
            position_ids=positions.to(device),
            use_cache=True,
            **{cache_argument(self._model): self._cache},
        )
        targets_BT = pad([ending[1:] for ending in endings], 0).to(logits_BTV.device)
        nats = logits_BTV.float().log_softmax(-1).gather(2, targets_BT[..., None])[..., 0].tolist()
        for (row, label), values in zip(following.items(), nats, strict=True):
            counts = self._questions[row].learned[label][1:]
            own = sum(v for v, counted in zip(values, counts, strict=False) if counted)
            self.score[row][label] = self.bound[row][label] + own
        self._mask_BT = torch.cat([self._mask_BT, torch.zeros_like(own_BT)], dim=1)
