"""What a model is asked, and what it should answer, for one row of `Examples.dataset`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from datasets import Value
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from theodora.data.chat import ChatRenderer, tools_of
from theodora.data.messages import Message, assistant, user
from theodora.data.templates import TEMPLATE_ERRORS
from theodora.errors import DataError


def render_prompt(
    example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, use_chat_template: bool | None = None
) -> str:
    """The text a model is given to answer. For its tokens take `encode_prompt`, which knows who writes BOS.

    Args:
        example: a row of `Examples.dataset`.
        tokenizer: whose chat template is used.
        use_chat_template: as in `tokenize`.

    Raises:
        DataError: a row of plain text, which asks nothing, or one that the chat template refuses.
    """
    verbatim = is_verbatim(example, tokenizer, use_chat_template)
    return rendered(example, None if verbatim else ChatRenderer(tokenizer, use_chat_template))


def rendered(example: Mapping[str, Any], renderer: ChatRenderer | None) -> str:
    """`render_prompt` with the renderer of many rows; None: as it stands."""
    _refuse_text(example)
    if renderer is None:
        return example["prompt"]
    asked, _ = question_and_answer(example)
    try:
        return renderer.render(asked, tools_of(example), generation_prompt=True)
    except TEMPLATE_ERRORS as error:
        raise DataError(f"The chat template refuses a prompt: {error}") from error


def encode_prompt(
    example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, use_chat_template: bool | None = None
) -> list[int]:
    """`render_prompt` as token ids: BOS from the chat template or from the tokenizer, never from both, and no EOS."""
    return encode_prompts([example], tokenizer, use_chat_template)[0]


def encode_prompts(
    examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, use_chat_template: bool | None = None
) -> list[list[int]]:
    """`encode_prompt` of each row, with one call of the tokenizer. The rows are of one data set."""
    if not examples:
        return []
    verbatim = is_verbatim(examples[0], tokenizer, use_chat_template)
    renderer = None if verbatim else ChatRenderer(tokenizer, use_chat_template)
    return encode_rendered([rendered(example, renderer) for example in examples], tokenizer, verbatim=verbatim)


def encode_rendered(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, verbatim: bool) -> list[list[int]]:
    """Token ids of what `rendered` gives; `verbatim` says that no chat template has written BOS."""
    if not texts:
        return []
    ids = cast("list[list[int]]", tokenizer(texts, add_special_tokens=verbatim, verbose=False)["input_ids"])
    return [row[own_tokens(row, tokenizer)] for row in ids] if verbatim else ids


def reference_answer(example: Mapping[str, Any]) -> str:
    """The words of the answer that a row gives to its prompt: of its completion, or of its last learned turn.

    Raises:
        DataError: a row of plain text, which answers nothing.
    """
    _refuse_text(example)
    _, answered = question_and_answer(example)
    return answered[0].get("content") or ""


def expected_answer(
    example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, use_chat_template: bool | None = None
) -> str:
    """What a model writes that answers a row's prompt exactly: what the chat template makes of the answer.

    That is the answer with its reasoning and tool calls, from behind the generation prompt to before the token that
    ends the turn, as it is in training, and without special tokens, which a decoded answer lacks too. Without a
    template, and for an answer of which the template shows nothing, it is `reference_answer`.

    Args:
        example: a row of `Examples.dataset`.
        tokenizer: whose chat template is used.
        use_chat_template: as in `tokenize`.

    Raises:
        DataError: a row of plain text, which answers nothing, or one that the chat template refuses.
    """
    return expected_answers([example], tokenizer, use_chat_template)[0]


def expected_answers(
    examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, use_chat_template: bool | None = None
) -> list[str]:
    """`expected_answer` of each row, with one call of the tokenizer. The rows are of one data set."""
    for example in examples:
        _refuse_text(example)
    if not examples or is_verbatim(examples[0], tokenizer, use_chat_template):
        return [example["completion"] for example in examples]
    renderer = ChatRenderer(tokenizer, use_chat_template)
    shown = [_shown_answer(example, renderer) for example in examples]
    texts = [text for text in shown if text is not None]
    ids = cast("list[list[int]]", tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    decoded = (tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False) for row in ids)
    return [
        reference_answer(example) if text is None else str(next(decoded))
        for example, text in zip(examples, shown, strict=True)
    ]


def _shown_answer(example: Mapping[str, Any], renderer: ChatRenderer) -> str | None:
    """What the chat template makes of the answer; None if it shows nothing of it."""
    asked, _ = question_and_answer(example)
    turn = sum(message["role"] == "assistant" for message in asked)
    try:
        chat = renderer.render_for_training(whole_conversation(example), tools_of(example))
    except TEMPLATE_ERRORS as error:
        raise DataError(f"The chat template refuses an answer: {error}") from error
    return chat.answers.get(turn) if chat is not None else None


def with_answer(example: Mapping[str, Any], answer: str) -> dict[str, Any]:
    """The same row with another answer to its prompt.

    Raises:
        DataError: a row of plain text, which answers nothing.
    """
    _refuse_text(example)
    if isinstance(example.get("prompt"), str):
        return {**example, "completion": answer}
    asked, (old, *rest) = question_and_answer(example)
    turns = [{**old, "content": answer}, *rest]
    if "messages" in example:
        return {**example, "messages": asked + turns}
    return {**example, "completion": [*asked[len(example["prompt"]) :], *turns]}


def answered_alone(example: Mapping[str, Any], answer: str) -> dict[str, Any]:
    """The same row with another answer, and without the turns behind it.

    Raises:
        DataError: a row of plain text, which answers nothing.
    """
    changed = with_answer(example, answer)
    if isinstance(example.get("prompt"), str) or "messages" in example:
        return changed
    asked, answered = question_and_answer(changed)
    return {**changed, "completion": [*asked[len(example["prompt"]) :], answered[0]]}


def whole_conversation(row: Mapping[str, Any]) -> list[Message]:
    """All turns of a row. Those of the model that belong to the prompt are not learned, unless they say so."""
    if "messages" in row:
        return list(row["messages"])
    if isinstance(row["prompt"], str):
        return [user(row["prompt"]), assistant(row["completion"])]
    return [*({"weight": 0, **message} for message in row["prompt"]), *row["completion"]]


def is_verbatim(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, use_chat_template: bool | None) -> bool:
    """Whether rows are tokenised as they stand: text, and strings if no chat template is to be used.

    `row` is a row, or the features of a dataset.
    """
    if "text" in row:
        return True
    is_string = isinstance(row.get("prompt"), str | Value)
    return is_string and not (tokenizer.chat_template if use_chat_template is None else use_chat_template)


def own_tokens(ids: Sequence[int] | NDArray[np.int32], tokenizer: PreTrainedTokenizerBase) -> slice:
    """The ids without a doubled BOS (the text began with one itself) and without EOS at the end."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    first = int(bos is not None and list(ids[:2]) == [bos, bos])
    # A text of nothing but BOS stays, although one token may be BOS and EOS (GPT-2).
    return slice(first, len(ids) - int(len(ids) > first + 1 and ids[-1] == eos))


def question_and_answer(row: Mapping[str, Any]) -> tuple[list[Message], list[Message]]:
    """The turns before the answer, and from the answer on: the first of a completion, the last learned of messages."""
    if isinstance(row.get("prompt"), str):
        return [user(row["prompt"])], [assistant(row["completion"])]
    if "messages" in row:
        messages = list(row["messages"])
        at = max(places) if (places := _answers_of(messages)) else len(messages) - 1
        return messages[:at], messages[at : at + 1]
    prompt, completion = list(row["prompt"]), list(row["completion"])
    at = min(_answers_of(completion), default=0)
    return prompt + completion[:at], completion[at:]


def _answers_of(messages: list[Message]) -> list[int]:
    """Where the model's turns stand: those that are learned, or else all."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return [i for i in answers if messages[i].get("weight") != 0] or answers


def _refuse_text(row: Mapping[str, Any]) -> None:
    if "text" in row:
        raise DataError("A row of plain text has no question and no answer; expected prompt/completion or messages")
