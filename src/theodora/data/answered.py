"""`encode_answered`: prompts with answers to them → the token ids that `tokenize_preferences` makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from theodora.data.chat import ChatRenderer
from theodora.data.messages import Message, assistant, user
from theodora.data.notes import Notes, is_empty
from theodora.data.prompts import is_verbatim, own_tokens
from theodora.data.templates import TEMPLATE_ERRORS, Tools
from theodora.data.tools import read_tools
from theodora.errors import DataError


def encode_answered(
    prompts: Sequence[str | list[Message]],
    answers: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Any] = (),
) -> list[list[int]]:
    """Token ids of each prompt and its answer, as a reward model reads them in training: to the end, with EOS where the
    chat template writes no end of turn.

    Args:
        prompts: of each answer, texts or messages, as `PromptRows` gives them.
        answers: their texts.
        tokenizer: the reward model's, whose chat template is used if it has one.
        tools: on offer in each prompt, as the column of the file has them; none by default.

    Raises:
        DataError: the chat template refuses one, or its tools are none.
    """
    if not prompts:
        return []
    found: list[list[int]] = []
    verbatim = is_verbatim({"prompt": prompts[0]}, tokenizer, None)
    renderer = None if verbatim else ChatRenderer(tokenizer)
    end: Any = tokenizer.eos_token_id
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if renderer is None:
            ids: list[int] = tokenizer(f"{prompt}{answer}", verbose=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
            found.append([*ids[own_tokens(ids, tokenizer)], end])
            continue
        asked = [user(prompt)] if isinstance(prompt, str) else prompt
        text, ends_open = _rendered(renderer, [*asked, assistant(answer)], _tools(tools[number] if tools else None))
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
        found.append([*ids, end] if ends_open else ids)
    return found


def _rendered(renderer: ChatRenderer, messages: list[Message], tools: Tools) -> tuple[str, bool]:
    """A conversation as text, and whether its last turn is left open."""
    try:
        chat = renderer.render_for_training(messages, tools)
        return (renderer.render(messages, tools), False) if chat is None else (chat.text, chat.ends_open)
    except TEMPLATE_ERRORS as error:
        raise DataError(f"The chat template of the reward model refuses a prompt with its answer: {error}") from error


def _tools(value: Any) -> Tools:
    notes = Notes()
    found = [] if is_empty(value) else read_tools(value, "tools", notes)
    if notes.problems:
        raise DataError(f"The tools of a prompt cannot be read: {'; '.join(notes.problems)}")
    return found or None
