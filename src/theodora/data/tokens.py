"""`tokenize`: rows → token ids and labels, where -100 marks what is not learned.

Every text is tokenised once, as a whole, so that training sees the tokens that plain tokenisation gives; what is
learned is then marked by the characters that tokens stand for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, cast

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import generate_random_fingerprint
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from theodora.data.chat import ChatRenderer, tools_of
from theodora.data.examples import Examples
from theodora.data.hidden import HiddenCounts
from theodora.data.left_out import LeftOut, sentences
from theodora.data.masks import (
    Span,
    are_sound,
    extents,
    learned_by_extent,
    learned_by_prefix,
    places_in,
    places_of,
    straddles,
)
from theodora.data.messages import Message
from theodora.data.pieces import PieceTokenizer, Tokens
from theodora.data.problems import Problems
from theodora.data.prompts import is_verbatim, own_tokens, whole_conversation
from theodora.data.stored import plain_columns
from theodora.data.templates import TEMPLATE_ERRORS
from theodora.errors import ConfigError, DataError
from theodora.kernels.cross_entropy import IGNORED
from theodora.metered import whole_job

__all__ = ["TrainOn", "tokenize"]

IDS_AND_LABELS = {"input_ids": List(Value("int32")), "labels": List(Value("int32"))}
ROW = "row"
"""The column with the number of the example, from 0 on, that a row is of."""
_TEXT_AT_ONCE = 1 << 20  # bytes; each takes some 50 while tokens, offsets and labels are lists
TrainOn = Literal["completion", "all"]

logger = logging.getLogger(__name__)


def tokenize(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    use_chat_template: bool | None = None,
    train_on: TrainOn = "completion",
    progress: bool = False,
    numbered: bool = False,
) -> Dataset:
    """Token ids and labels, ready for TRL's `SFTTrainer` (which takes tokenised rows as they are, and packs them).

    Conversations, and prompt/completion rows if the tokenizer has a chat template, are rendered with it; every
    assistant turn (or the completion) is learned, through its end-of-turn token. Without a template prompt and
    completion are joined as they stand, and conversations get `fallback_chat_template`. EOS ends what has no
    end-of-turn token. Plain text is learned whole and cut into pieces of `max_length`; anything else is cut at
    `max_length`, and dropped if nothing to learn is left.

    Args:
        examples: from `load_examples`.
        tokenizer: fast tokenizers tell offsets; with others each text is tokenised a few times over.
        max_length: most tokens in a row.
        use_chat_template: None: if the tokenizer has one. True: insist on it. False: do without.
        train_on: "all" learns prompts and user turns, too.
        progress: show a progress bar.
        numbered: also say in a column `row` (int64) which of the examples, from 0 on, each row is of.

    Returns:
        A dataset with `input_ids` and `labels` (int32, of equal length per row). What was cut or dropped stands, in
        words, in its `info.description`, and is logged as a warning.

    Raises:
        DataError: the chat template refuses rows, or no row is left.
        ConfigError: an argument makes no sense.
    """
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}; expected at least 2 (a token, and one to predict)")
    if train_on not in ("completion", "all"):
        raise ConfigError(f"train_on is {train_on!r}; expected 'completion' or 'all'")
    if tokenizer.eos_token_id is None:
        raise ConfigError("The tokenizer has no EOS token, so that a model never learns to stop; set its eos_token")
    batches = (Numbered if numbered else Batches)(examples, tokenizer, max_length, use_chat_template, train_on)
    tokenised = encoded_rows(batches, examples, progress=progress)
    left_out = batches.counts.hidden.left_out()
    if not len(tokenised) and batches.counts.unseen:
        raise DataError(
            f"{examples.source}: the chat template shows nothing of what {batches.counts.unseen:,} rows have to learn: "
            + ". ".join(sentences(left_out))
        )
    if not len(tokenised) and len(examples):
        raise DataError(
            f"{examples.source}: all {len(examples):,} rows are cut off at max_length={max_length} before anything to "
            "learn; raise max_length"
        )
    return tokenised


def encoded_rows(batches: Batches, examples: Examples, *, progress: bool = False) -> Dataset:
    """Every row as `batches` encodes it; what was cut or dropped stands in words in its `info.description`.

    Raises:
        DataError: the chat template refuses rows.
    """
    with progress_bars(progress), whole_job():
        tokenised = examples.dataset.with_format("arrow").map(
            batches.encode,
            batched=True,
            batch_size=_rows_at_once(examples.dataset),
            with_indices=True,
            remove_columns=examples.dataset.column_names,
            features=Features({**IDS_AND_LABELS, **batches.more_columns}),
            # Without a name of its own, datasets would hash the tokenizer and everything else that is held here.
            new_fingerprint=generate_random_fingerprint(),
            desc="Tokenising",
        )
    tokenised.reset_format()
    batches.problems.raise_if_any("Bring these conversations into the form that the chat template expects.")
    left_out = batches.counts.hidden.left_out()
    tokenised.info.description = batches.counts.describe(batches.max_length, left_out)
    if batches.counts.are_worth_saying or left_out:
        logger.warning("%s: %s", examples.source, tokenised.info.description)
    return tokenised


def _rows_at_once(dataset: Dataset) -> int:
    """Rows that are tokenised in one call: fewer where they are long, so that memory holds about 1 MB of text."""
    mean = dataset.data.nbytes / max(len(dataset), 1)
    return int(min(1000, max(1, _TEXT_AT_ONCE // max(mean, 1))))


@dataclass
class Counts:
    """What became of the rows."""

    rows: int = 0
    tokens: int = 0
    learned: int = 0
    dropped: int = 0
    cut: int = 0
    straddled: int = 0
    unseen: int = 0
    hidden: HiddenCounts = field(default_factory=HiddenCounts)
    unprompted: int = 0
    unprompted_earlier: int = 0

    @property
    def are_worth_saying(self) -> bool:
        """Whether something was left."""
        return bool(
            self.dropped or self.cut or self.straddled or self.unseen or self.unprompted or self.unprompted_earlier
        )

    def describe(self, max_length: int, left_out: Sequence[LeftOut]) -> str:
        """All of it in words."""
        parts = [f"{self.rows:,} rows, {self.tokens:,} tokens, {self.learned:,} of them learned"]
        if self.dropped:
            parts.append(f"{self.dropped:,} rows dropped: nothing to learn within max_length={max_length}")
        if self.cut:
            parts.append(f"{self.cut:,} rows cut at max_length={max_length}")
        if self.straddled:
            parts.append(
                f"in {self.straddled:,} rows one token spans the end of a prompt and the start of an answer (does the "
                "prompt end with a space, or the chat template's with a line break?), so that the prompt alone gives "
                "other tokens than in training"
            )
        if self.unseen:
            parts.append(f"{self.unseen:,} rows dropped: the chat template shows nothing of what is to be learned")
        parts += sentences(left_out)
        if self.unprompted:
            parts.append(
                f"in {self.unprompted:,} rows the answer does not follow the chat template's generation prompt, which "
                "adds something (an opened <think>?): the model will be asked otherwise than it was trained"
            )
        if self.unprompted_earlier:
            parts.append(
                f"in {self.unprompted_earlier:,} rows turns before the last do not follow the chat template's "
                "generation prompt, which adds something (an opened <think>?): they teach another beginning than the "
                "model will be asked to go on from (to avoid it, end a row with each such turn)"
            )
        return "; ".join(parts) + "."


@dataclass(frozen=True)
class Text:
    """A text to tokenise and what of it to learn."""

    text: str
    spans: Sequence[Span]
    special: bool
    """The tokenizer adds BOS (a chat template writes its own)."""
    end: bool
    """EOS is appended, and learned."""


class Batches:
    """Encodes batches of rows for `Dataset.map`, and remembers what went wrong and what was left out."""

    more_columns: Mapping[str, Any] = {}
    """Columns beside ids and labels, and their types."""

    def __init__(
        self,
        examples: Examples,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        use_chat_template: bool | None,
        train_on: TrainOn,
    ) -> None:
        self.tokenizer, self.max_length, self.features = tokenizer, max_length, examples.dataset.features
        self.problems, self.counts = Problems(examples.source), Counts()
        self.is_text = "text" in examples.dataset.column_names
        self.learns_all = self.is_text or train_on == "all"
        verbatim = is_verbatim(examples.dataset.features, tokenizer, use_chat_template)
        self.renderer = None if verbatim else ChatRenderer(tokenizer, use_chat_template)
        self._piece_tokenizer = PieceTokenizer.of(tokenizer)

    def encode(self, table: Any, indices: list[int]) -> Any:
        """One batch, as pyarrow tables; a row may give no row, or several."""
        rows = self.rows(table)
        texts = [self.text(index, row) for index, row in zip(indices, rows, strict=True)]
        encoded: list[tuple[Tokens, Tokens]] = []
        numbers: list[int] = []
        given = [index for index, text in zip(indices, texts, strict=True) if text is not None]
        for index, (ids, labels) in zip(given, self.tokenised([t for t in texts if t is not None]), strict=True):
            added = [self._add(ids[piece], labels[piece], encoded) for piece in self._pieces(len(ids))]
            self.counts.cut += len(ids) > self.max_length and not self.is_text and any(added)
            numbers += [index] * sum(added)
        columns = {"input_ids": lists([ids for ids, _ in encoded]), "labels": lists([l for _, l in encoded])}
        return pa.table(columns | ({ROW: pa.array(numbers, pa.int64())} if ROW in self.more_columns else {}))

    def rows(self, table: Any) -> list[dict[str, Any]]:
        """The rows of a batch as dictionaries."""
        columns = plain_columns(table, self.features)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def text(self, index: int, row: dict[str, Any]) -> Text | None:
        """A row's text; None if it has none, which is counted or a problem."""
        if self.renderer is not None:
            return self._chat(self.renderer, index, row)
        prompt, rest = ("", row["text"]) if self.is_text else (row["prompt"], row["completion"])
        text = prompt + rest
        return Text(text, ((len(prompt), len(text)),), special=True, end=True)

    def _chat(self, renderer: ChatRenderer, index: int, row: dict[str, Any]) -> Text | None:
        messages = whole_conversation(row)
        try:
            chat = renderer.render_for_training(messages, tools_of(row))
        except TEMPLATE_ERRORS as error:
            self.problems.add(
                row_in_words(index, messages), f"the chat template refuses it: {error}{_hint_of_tools(messages)}"
            )
            return None
        if chat is None:
            self.problems.add(
                row_in_words(index, messages),
                "the chat template leaves an assistant turn out, or begins it so that it cannot be found; "
                "use a template that has {% generation %} and {% endgeneration %} around assistant turns",
            )
            return None
        self.counts.hidden.add(chat.hidden)
        if not chat.spans and not self.learns_all:
            self.counts.unseen += 1
            return None
        self.counts.unprompted += not chat.as_prompted
        self.counts.unprompted_earlier += chat.as_prompted and not chat.earlier_as_prompted
        return Text(chat.text, chat.spans, special=False, end=chat.ends_open)

    def tokenised(self, texts: Sequence[Text]) -> Iterator[tuple[Tokens, Tokens]]:
        """Ids and labels of each text of a batch, however long."""
        texts = [self._shortened(text) for text in texts]
        made = dict(self._by_pieces(texts))
        rest = [number for number in range(len(texts)) if number not in made]
        made |= zip(rest, self._whole([texts[number] for number in rest]), strict=True)
        for number, text in enumerate(texts):
            ids, labels = made[number]
            own = own_tokens(ids, self.tokenizer) if text.special else slice(None)
            end = [cast(int, self.tokenizer.eos_token_id)] if text.end else []
            yield _with(ids[own], end), _with(labels[own], end)

    def _by_pieces(self, texts: Sequence[Text]) -> Iterator[tuple[int, tuple[Tokens, Tokens]]]:
        """The number, ids and labels of each text that can be tokenised by its pieces."""
        by_pieces = self._piece_tokenizer
        around = by_pieces.around if by_pieces and any(text.special for text in texts) else ((), ())
        if by_pieces is None or around is None or list(around[1]) not in ([], [self.tokenizer.eos_token_id]):
            return
        fitting = [number for number, text in enumerate(texts) if by_pieces.fits(text.text)]
        found = by_pieces.encode([texts[number].text for number in fitting]) if fitting else None
        if found is None:
            return
        labels = found.ids
        if not self.learns_all:
            learned, straddled = found.learned([texts[number].spans for number in fitting])
            labels = np.where(learned, found.ids, np.int32(IGNORED))
            self.counts.straddled += straddled
        for number, (begin, end) in zip(fitting, pairwise(found.begins.tolist()), strict=True):
            yield (
                number,
                (
                    self._between(around, found.ids[begin:end], is_label=False),
                    self._between(around, labels[begin:end], is_label=not self.learns_all),
                ),
            )

    def _between(self, around: tuple[Sequence[int], Sequence[int]], tokens: Tokens, *, is_label: bool) -> Tokens:
        if not any(around):
            return tokens
        before, behind = ([IGNORED] * len(side) if is_label else side for side in around)
        return np.concatenate([np.array(before, np.int32), tokens, np.array(behind, np.int32)])

    def _whole(self, texts: Sequence[Text]) -> Iterator[tuple[Tokens, Tokens]]:
        """Ids and labels of texts that the tokenizer is given as they are."""
        if not texts:
            return
        # verbose: transformers would warn about texts beyond the model's length, which are cut further down.
        batch = self.tokenizer(
            [text.text for text in texts],
            add_special_tokens=texts[0].special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        encodings = batch.encodings or [None] * len(texts)
        for text, ids, encoding in zip(texts, batch["input_ids"], encodings, strict=True):
            tokens = np.array(ids, np.int32)
            # Reading offsets takes time: they are read where something is not learned.
            yield tokens, tokens if self.learns_all else self._labels(text, tokens, encoding)

    def _shortened(self, text: Text) -> Text:
        """A text without what lies beyond any `max_length` tokens, which would be tokenised to be thrown away."""
        enough = max(_TEXT_AT_ONCE, 2 * self.max_length * self._longest_token)
        if self.is_text or len(text.text) <= enough:
            return text
        spans = [(start, min(end, enough)) for start, end in text.spans if start < enough]
        return replace(text, text=text.text[:enough], spans=spans, end=False)

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.tokenizer.get_vocab()), default=1)

    def _labels(self, text: Text, ids: Tokens, encoding: Encoding | None) -> Tokens:
        given = places_of([]) if encoding is None else places_in(encoding, len(text.text))
        if are_sound(given, text.text):
            places = extents(given)
            learned = learned_by_extent(text.spans, places)
            self.counts.straddled += straddles(text.spans, places)
        else:
            learned = learned_by_prefix(
                text.spans,
                text.text,
                ids.tolist(),
                lambda prefix: self.tokenizer(prefix, add_special_tokens=text.special, verbose=False)["input_ids"],
            )
        return np.where(learned, ids, np.int32(IGNORED))

    def _pieces(self, length: int) -> list[slice]:
        if self.is_text:
            return [slice(start, start + self.max_length) for start in range(0, length, self.max_length)]
        return [slice(0, self.max_length)]

    def _add(self, ids: Tokens, labels: Tokens, encoded: list[tuple[Tokens, Tokens]]) -> bool:
        """Add one row, unless there is nothing to learn in it; whether it was added."""
        # The first token of a row has nothing before it to be predicted from.
        learned = int(np.count_nonzero(labels[1:] != IGNORED))
        if not learned:
            # The last piece of a text may be one token, which is no row lost.
            self.counts.dropped += not self.is_text
            return False
        encoded.append((ids, labels))
        self.counts.rows += 1
        self.counts.tokens += len(ids)
        self.counts.learned += learned
        return True


class Numbered(Batches):
    """Batches that also say which example each row is of."""

    more_columns: Mapping[str, Any] = {ROW: Value("int64")}


def lists(rows: Sequence[Tokens]) -> Any:
    """Rows as one pyarrow array of lists."""
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate([np.zeros(0, np.int32), *rows]))


def _with(tokens: Tokens, end: Sequence[int]) -> Tokens:
    return np.append(tokens, np.array(end, np.int32)) if end else tokens


def _hint_of_tools(messages: Sequence[Message]) -> str:
    with_tools = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
    mend = "if the template knows none, use one that does (chat_template_path), or write them as text into other turns"
    return f" (the row holds tool calls or results; {mend})" if with_tools else ""


def row_in_words(index: int, messages: Sequence[Message]) -> str:
    """A row for people: its number, and how it begins."""
    text = " ".join(messages[0]["content"].split())
    return f"row {index + 1} ({messages[0]['role']}: {text[:40]}{'…' if len(text) > 40 else ''})"


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Within the block datasets shows its bars, or does not."""
    if shown or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
