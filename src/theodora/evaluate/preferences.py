"""Which answers a model finds likelier: on pairs of a better and a worse one, and on answers judged good or bad.

A model that carries an adapter is compared with its base, the adapter switched off. The difference of the two
log-likelihoods of an answer is its implicit reward, divided by β (arXiv 2305.18290, section 5).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from theodora.adapters.merge import adapter_disabled
from theodora.adapters.state import find_state
from theodora.data import Examples, left_out_of, tokenize_preferences
from theodora.data.left_out import LeftOut
from theodora.data.sequences import parted
from theodora.data.vocabulary import check_rows
from theodora.errors import DataError
from theodora.evaluate.batches import evaluating, rows_together
from theodora.evaluate.questions import Questions, context_window
from theodora.evaluate.scores import MEND_VOCABULARY, Told, losses_of, progress_bar
from theodora.layers.norm_cache import looked_at_once


@dataclass(frozen=True, kw_only=True)
class Preference:
    """What is made of better and worse answers: by log-likelihoods, or by differences of two models' ones. In nats."""

    better: float
    """Mean over the better (or good) answers, each the sum of its tokens."""
    worse: float
    """The same of the worse (or bad) ones."""
    better_per_token: float
    """Mean over the better answers, each the mean of its tokens."""
    worse_per_token: float
    """The same of the worse ones."""
    accuracy: float | None
    """Share of pairs whose better answer has more, 0 to 1; None without pairs."""
    accuracy_per_token: float | None
    """The same with the mean of each answer's tokens."""
    auc: float | None
    """Chance that a good answer has more per token than a bad one, equal ones counting half; None of pairs."""

    @property
    def margin(self) -> float:
        """Better less worse."""
        return self.better - self.worse

    def to_dict(self) -> dict[str, float | None]:
        """All figures, ready for JSON."""
        return {**asdict(self), "margin": self.margin}


@dataclass(frozen=True, kw_only=True)
class PreferenceScores:
    """What a model scores on pairs, or on judged answers."""

    policy: Preference
    """The log-likelihoods of the model as it is."""
    base: Preference | None
    """Those with its adapter switched off; None of a model that carries none."""
    rewards: Preference | None
    """The implicit rewards, divided by β: by how much the adapter made answers likelier."""
    better: int
    """Better answers; of pairs as many as there are pairs."""
    worse: int
    tokens: int
    """Predicted tokens of all answers."""
    seconds: float
    left_out: tuple[LeftOut, ...] = ()
    """What the rows hold that the model was not shown, with how many rows it concerns."""

    def to_dict(self) -> dict[str, Any]:
        """All scores, ready for JSON."""
        parts = {name: getattr(self, name) for name in ("policy", "base", "rewards")}
        return asdict(self) | {name: None if part is None else part.to_dict() for name, part in parts.items()}


def evaluate_preferences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    *,
    batch_size: int | None = None,
    max_length: int | None = None,
    use_chat_template: bool | None = None,
    progress: bool | Told = False,
) -> PreferenceScores:
    """Ask a model, adapted or not, which answers are likelier.

    Example:
        `evaluate_preferences(model, tokenizer, load_examples("pairs.jsonl", kind="pairs")).policy.accuracy`

    Args:
        model: any causal language model; its weights, device and training mode are left as they are.
        tokenizer: its tokenizer.
        examples: pairs or judged answers, as `load_examples` returns them with `kind` "pairs", "judged" or "any".
        batch_size: answers in a padded forward pass, at most. Default: as of `evaluate`.
        max_length: tokens after which prompt and answer are cut. Default: the model's context window.
        use_chat_template: whether prompts are wrapped in the chat template. Default: if the tokenizer has one.
        progress: as of `evaluate`.

    Raises:
        DataError: the rows are neither, none of them is of use, or all have the same verdict.
        LossNotFinite: log-likelihoods are NaN or infinite; the message names the model and the answers.
    """
    start = time.perf_counter()
    if examples.format not in ("preference", "unpaired"):
        raise DataError(f"{examples.source} is {examples.format}; expected pairs of answers, or answers with a verdict")
    asked, good = _answers(examples, tokenizer, max_length or context_window(model, tokenizer), use_chat_template)
    check_rows(asked.token_ids(), model, tokenizer, asked.source, MEND_VOCABULARY)
    size = batch_size or rows_together(model)

    def losses(title: str) -> list[tuple[float, int]]:
        with evaluating(model), looked_at_once(), progress_bar(shown=progress) as bar:
            return losses_of(model, asked, size, bar, title)

    own, base = losses("Log-likelihoods"), None
    if find_state(model) is not None:
        with adapter_disabled(model):
            base = _logps(losses("Without the adapter"))
    paired = examples.format == "preference"
    policy, counts = _logps(own), torch.tensor([tokens for _, tokens in own])
    return PreferenceScores(
        policy=_preference(policy, counts, good, paired),
        base=None if base is None else _preference(base, counts, good, paired),
        rewards=None if base is None else _preference(policy - base, counts, good, paired),
        better=int(good.sum()),
        worse=int((~good).sum()),
        tokens=int(counts.sum()),
        seconds=time.perf_counter() - start,
        left_out=asked.left_out,
    )


def _answers(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int, use_chat_template: bool | None
) -> tuple[Questions, Tensor]:
    """Every answer after its prompt, better, worse, better, … of pairs; and which are the better ones, (A,) bool."""
    rows = tokenize_preferences(examples, tokenizer, max_length=max_length, use_chat_template=use_chat_template)
    if examples.format == "preference":
        sequences = [sequence for row in rows for sequence in parted(row)]
        good = torch.arange(len(sequences)) % 2 == 0
    else:
        sequences = [parted(row)[0] for row in rows]
        good = torch.tensor(rows["label"])
        if good.all() or not good.any():
            raise DataError(
                f"{examples.source}: all {len(good):,} answers are {'good' if good.all() else 'bad'}; expected some of "
                "each kind"
            )
    asked = Questions(
        source=examples.source,
        rows=len(examples),
        input_ids=[sequence["input_ids"] for sequence in sequences],
        labels=[sequence["labels"] for sequence in sequences],
        unit="answer",
        left_out=(*examples.left_out, *left_out_of(rows)),
    )
    return asked, good


def _logps(losses: Sequence[tuple[float, int]]) -> Tensor:
    return -torch.tensor([nats for nats, _ in losses], dtype=torch.float64)


def _preference(logps_A: Tensor, counts_A: Tensor, good_A: Tensor, paired: bool) -> Preference:
    """Figures of A answers, from a number of nats and a count of tokens for each."""
    per_token_A = logps_A / counts_A
    better, worse, better_each, worse_each = (
        values[which] for values in (logps_A, per_token_A) for which in (good_A, ~good_A)
    )
    return Preference(
        better=float(better.mean()),
        worse=float(worse.mean()),
        better_per_token=float(better_each.mean()),
        worse_per_token=float(worse_each.mean()),
        accuracy=float((better > worse).double().mean()) if paired else None,
        accuracy_per_token=float((better_each > worse_each).double().mean()) if paired else None,
        auc=None if paired else _auc(better_each, worse_each),
    )


def _auc(good: Tensor, bad: Tensor) -> float:
    """The area under the ROC curve: in how many of all (good, bad) the good has more, equal ones counting half."""
    ordered = bad.sort().values
    below = torch.searchsorted(ordered, good) + torch.searchsorted(ordered, good, right=True)
    return float(below.double().mean() / (2 * len(bad)))
