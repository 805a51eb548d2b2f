"""What a reward model scores on pairs of a better and a worse answer."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from theodora.adapters.scoring import scores
from theodora.data import Examples, left_out_of, tokenize_preferences
from theodora.data.left_out import LeftOut
from theodora.data.sequences import parted
from theodora.errors import DataError
from theodora.evaluate.questions import context_window


@dataclass(frozen=True, kw_only=True)
class RewardScores:
    """What a reward model scores on pairs."""

    accuracy: float
    """Share of pairs whose better answer has the higher score, 0 to 1."""
    better: float
    """Mean score of the better answers."""
    worse: float
    """Of the worse ones."""
    lowest: float
    """The least score of any answer."""
    highest: float
    """The largest."""
    pairs: int
    tokens: int
    """Of all answers, prompts included."""
    seconds: float
    left_out: tuple[LeftOut, ...] = ()
    """What the rows hold that the model was not shown, with how many rows it concerns."""
    note: str = ""
    """What else became of the rows, in words."""

    @property
    def margin(self) -> float:
        """Better less worse."""
        return self.better - self.worse

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {**asdict(self), "margin": self.margin}


def evaluate_reward_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    *,
    max_length: int | None = None,
    use_chat_template: bool | None = None,
) -> RewardScores:
    """Score both answers of each pair.

    Args:
        model: one that gives a text one number, as `load_model_and_tokenizer(…, scores=True)` loads it.
        tokenizer: its tokenizer.
        examples: pairs, as `load_examples` returns them with `kind` "pairs", "ranked" or "any".
        max_length: tokens of an answer with its prompt from which on a pair is left out. Default: the model's window.
        use_chat_template: as in `tokenize`.

    Raises:
        DataError: the rows are no pairs, or none is of use.
    """
    start = time.perf_counter()
    if examples.format != "preference":
        raise DataError(
            f"{examples.source} is {examples.format}; expected pairs of a better and a worse answer (prompt, chosen, "
            "rejected), which a reward model scores"
        )
    longest = max_length or context_window(model, tokenizer)
    rows = tokenize_preferences(examples, tokenizer, max_length=longest, use_chat_template=use_chat_template, cut=False)
    ids = [sequence["input_ids"] for row in rows for sequence in parted(row)]
    found = scores(model, ids).double()
    better, worse = found[::2], found[1::2]
    return RewardScores(
        accuracy=float((better > worse).double().mean()),
        better=float(better.mean()),
        worse=float(worse.mean()),
        lowest=float(found.min()),
        highest=float(found.max()),
        pairs=len(rows),
        tokens=sum(map(len, ids)),
        seconds=time.perf_counter() - start,
        left_out=tuple(left_out_of(rows)),
        note=rows.info.description,
    )
