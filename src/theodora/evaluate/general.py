"""General text: by how much a model's loss on it has risen is what training made it forget."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from theodora.data import Examples, load_examples
from theodora.errors import DataError
from theodora.evaluate.questions import Questions, questions


def read_general(source: str) -> Examples:
    """The texts of a source.

    Raises:
        DataError: it cannot be read, or holds something else than plain text.
    """
    texts = load_examples(source)
    if texts.format != "text":
        raise DataError(f"{source} is {texts.format}; expected plain text (a column `text`)")
    return texts


def general_questions(texts: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Questions:
    """Texts ready to be scored, each cut after `max_length` tokens."""
    return questions(texts, tokenizer, max_length=max_length, answered=False)
