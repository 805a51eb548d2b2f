"""Recognises by its columns how a source writes its rows, and brings each row into one of the three shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Features, Json, List, Value

from theodora.data.examples import Format
from theodora.data.files import Row
from theodora.data.messages import (
    Message,
    assistant,
    check_answered,
    read_history,
    read_turns,
    user,
    with_system,
)
from theodora.data.notes import Notes, is_empty, spelling
from theodora.data.problems import listed, nearest
from theodora.data.tools import parsed_or_same, read_tools, schemas_of, storable_json
from theodora.data.words import read_words

# Columns in order of preference. Names are compared without regard to capitals, spaces and hyphens.
CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "question", "instruction", "query", "input")
COMPLETIONS = ("completion", "response", "answer", "output")
CONTEXTS = ("input", "context")
_INSTRUCTIONS = tuple(name for name in PROMPTS if name not in CONTEXTS)
SYSTEMS = ("system", "system_prompt", "system_message")
HISTORIES = ("history",)
TOOLS = ("tools", "functions")
BESIDE = (*SYSTEMS, *HISTORIES, *TOOLS, *CONTEXTS)
"""What is used beside a question or a conversation."""
# Pictures, sounds and places in them (LLaMA-Factory's, ms-swift's, TRL's).
MEDIA = ("image", "images", "video", "videos", "audio", "audios", "objects")
TEXT = "text"
COLUMNS = (*CONVERSATIONS, *PROMPTS, *COMPLETIONS, *BESIDE, TEXT)
"""Every name that means something, if only in other files."""
# What is preferred, and what it is preferred to.
PREFERENCES = {"chosen": "rejected", "preferred_output": "non_preferred_output"}
_SHOWN_COLUMNS = 20
# Columns of layouts that are not read, and what to do.
_HINTS = {
    "segments": "is Axolotl's input_output, which is not read here. Write what is masked as 'prompt' and what is "
    "learned as 'completion', or 'messages' whose turns have a weight of 0 or 1",
    "input_ids": "holds tokens, and rows are read as text here. Write the text that they stand for",
}

LOOKED_FOR = (
    "prompt + completion (or question + answer, input + output, prompt + response, instruction + response)",
    "messages: a list of {role, content}",
    "conversations: a list of {from, value} (ShareGPT)",
    "instruction (+ input) + output (Alpaca)",
    "text (plain documents)",
)


class NeedsTurns(Exception):
    """Prompts and completions were read as they stand, and a row has something beside them that only turns can say."""


@dataclass(frozen=True)
class Layout:
    """How the rows of one source are read."""

    format: Format
    sentence: Callable[[Sequence[str]], str]
    """What was recognised, for people, given the columns that were used."""
    needed: tuple[str, ...]
    """The columns that every row must have."""
    features: Features
    read: Callable[[Row, Notes], Row | None]
    """Row → row in our shape (None: nothing is in it). What it uses, leaves out and finds wrong goes to the notes."""
    skipped: str = "rows without text"
    """What rows are called in which nothing is."""


def recognise(row: Row, *, as_turns: bool = False) -> Layout | None:
    """The layout of a source, from its first row; None if there is no column to learn from.

    Args:
        row: the first row. What a table fills in as null, or a CSV file as nothing, does not count beside what holds
            something, so that all kinds of file are read alike.
        as_turns: read a prompt and a completion as turns, even where they could be taken as they stand.
    """
    filled = {name: value for name, value in row.items() if not is_empty(value)}
    return _recognise(filled, row, as_turns) or _recognise(row, row, as_turns)


def _recognise(named: Row, row: Row, as_turns: bool) -> Layout | None:
    by_name = _by_name(named)

    def column(names: tuple[str, ...], *taken: str | None) -> str | None:
        return next((by_name[name] for name in names if name in by_name and by_name[name] not in taken), None)

    conversation = column(CONVERSATIONS)
    if conversation is not None:
        return _conversation_layout(conversation, row)
    prompt = column(PROMPTS)
    completion = column(COMPLETIONS, prompt)
    if prompt is not None and completion is not None:
        return _pair_layout(prompt, completion, row, as_turns)
    if TEXT in by_name:
        return _text_layout(by_name[TEXT])
    return None


def explain_unknown(row: Row) -> str:
    """Why no column is usable: those there are, what was looked for, and likely slips."""
    columns = list(row)
    lines = [f"no usable column; there are {listed(columns, 40) or 'none at all'}. Looked for:"]
    lines += [f"    {choice}" for choice in LOOKED_FOR]
    known: list[str] = list(dict.fromkeys((*CONVERSATIONS, *PROMPTS, *COMPLETIONS, TEXT)))
    for name in columns[:_SHOWN_COLUMNS]:
        lower = spelling(name)
        if lower in _HINTS:
            lines.append(f"    {name!r} {_HINTS[lower]}")
        elif lower in PREFERENCES:
            whole = "messages" if holds_turns(row[name]) and not set(_by_name(row)) & set(PROMPTS) else "completion"
            lines.append(
                f"    {name!r} belongs to preferences, which --objective dpo learns. To train on what is preferred "
                f"alone, rename it to {whole!r}"
            )
        elif lower in known:
            partner = COMPLETIONS if lower in PROMPTS else PROMPTS
            lines.append(f"    {name!r} lacks its partner: one of {', '.join(partner)}")
        elif nearest(lower, known):
            lines.append(f"    {name!r}{nearest(lower, known)}")
    return "\n".join(lines) + "\n    Rename the columns of your file accordingly."


def _conversation_layout(column: str, row: Row) -> Layout:
    keys = _keys_of_turns(row[column])
    sharegpt = "from" in keys and "role" not in keys

    def read(row: Row, notes: Notes) -> Row:
        notes.use(column)
        tools = _read_tools(row, notes)
        messages = read_turns(row[column], column, notes, schemas_of(tools))
        system, rules = _optional(row, SYSTEMS, notes)
        messages = with_system(messages, _text(rules, system, notes), system, notes)
        if not notes.problems:
            _check_preferences(row, messages, column, notes)
            check_answered(messages, column, notes)
        return {"messages": messages, **_stored_tools(tools, notes)}

    kind = "ShareGPT conversations" if sharegpt else "chat messages"
    return Layout(
        format="sharegpt" if sharegpt else "messages",
        sentence=lambda used: (
            f"{kind} in the column {column!r}{_beside(used, column)}; every assistant turn is learned"
        ),
        needed=(column,),
        features=Features({"messages": List(Json()), "tools": Value("string")}),
        read=read,
    )


def _pair_layout(prompt: str, completion: str, row: Row, as_turns: bool) -> Layout:
    names = spelling(prompt), spelling(completion)
    # `input` beside `instruction` is material for it; as the only prompt it was taken for that.
    contexts = tuple(name for name in CONTEXTS if name != names[0])
    alpaca = names[0] == "instruction" and (names[1] == "output" or bool(set(contexts) & set(_by_name(row))))
    kind, needed = List(Json()), (prompt, completion)
    if holds_turns(row[prompt]):
        read = _turns_reader(prompt, completion)
    elif names[0] == "prompt" and names[1] in ("completion", "response") and not as_turns:
        read, kind = _verbatim_reader(prompt, completion, contexts), Value("string")
    else:
        read, needed = _instruction_reader(prompt, completion, contexts), (completion,)
    return Layout(
        format="alpaca" if alpaca else "prompt-completion",
        sentence=lambda used: (
            f"{'Alpaca' if alpaca else 'prompt/completion'} rows: {prompt!r}{_beside(used, prompt, completion)} → "
            f"{completion!r}, of which the latter {_learned(used)}"
        ),
        needed=needed,
        features=Features({"prompt": kind, "completion": kind, "tools": Value("string")}),
        read=read,
    )


def _text_layout(column: str) -> Layout:
    def read(row: Row, notes: Notes) -> Row | None:
        notes.use(column)
        text = read_words(row[column], repr(column), notes)
        # Corpora such as WikiText have empty rows between their documents.
        return {"text": text} if text.strip() or notes.problems else None

    return Layout(
        format="text",
        sentence=lambda _: f"plain text in the column {column!r}, all of which is learned",
        needed=(column,),
        features=Features({"text": Value("string")}),
        read=read,
    )


def _verbatim_reader(prompt: str, completion: str, contexts: tuple[str, ...]) -> Callable[[Row, Notes], Row]:
    """Strings that the writer of the file may have fitted together (" ->", a leading space): kept as they stand."""

    def read(row: Row, notes: Notes) -> Row:
        if any(_optional(row, names)[0] for names in (SYSTEMS, HISTORIES, TOOLS, contexts)):
            raise NeedsTurns
        notes.use(prompt, completion)
        return {
            "prompt": read_words(row[prompt], repr(prompt), notes),
            "completion": _read_answer(row, completion, notes),
            "tools": None,
        }

    return read


def _turns_reader(prompt: str, completion: str) -> Callable[[Row, Notes], Row]:
    """A list of messages to answer, and a list of messages (or a string) that answers."""

    def read(row: Row, notes: Notes) -> Row:
        notes.use(prompt, completion)
        tools = _read_tools(row, notes)
        asked = read_turns(row[prompt], prompt, notes, schemas_of(tools))
        system, rules = _optional(row, SYSTEMS, notes)
        asked = with_system(asked, _text(rules, system, notes), system, notes)
        if isinstance(row[completion], str) and not holds_turns(row[completion]):
            answered = [assistant(_read_answer(row, completion, notes))]
        else:
            answered = read_turns(row[completion], completion, notes, schemas_of(tools))
        if not notes.problems:
            check_answered(answered, completion, notes)
        return {"prompt": asked, "completion": answered, **_stored_tools(tools, notes)}

    return read


def _instruction_reader(prompt: str, completion: str, contexts: tuple[str, ...]) -> Callable[[Row, Notes], Row]:
    """Questions and instructions become a user's turn, so that nothing has to be glued together."""

    def read(row: Row, notes: Notes) -> Row:
        notes.use(prompt, completion)
        tools = _read_tools(row, notes)
        system, rules = _optional(row, SYSTEMS, notes)
        history, earlier = _optional(row, HISTORIES, notes)
        turns: list[Message] = read_history(earlier, history, notes, schemas_of(tools))
        turns = with_system(turns, _text(rules, system, notes), system, notes)
        turns.append(user(_read_question(row, prompt, contexts, notes)))
        answer = assistant(_read_answer(row, completion, notes))
        return {"prompt": turns, "completion": [answer], **_stored_tools(tools, notes)}

    return read


def _read_question(row: Row, prompt: str, contexts: tuple[str, ...], notes: Notes) -> str:
    """What is asked, and the material for it behind an empty line; one of the two may be missing."""
    asked, material = _optional(row, (spelling(prompt),), notes), _optional(row, contexts, notes)
    if spelling(prompt) in CONTEXTS and _optional(row, _INSTRUCTIONS)[0]:
        # The first row had no instruction, so that its material was taken for the question.
        asked, material = _optional(row, _INSTRUCTIONS, notes), _optional(row, CONTEXTS, notes)
    texts = [_text(value, column, notes) for column, value in (asked, material) if column]
    if not texts:
        notes.wrong(f"{prompt!r} is empty" if prompt in row else f"has no {prompt!r}; it has {listed(row, 40)}")
    return "\n\n".join(texts)


def _read_answer(row: Row, column: str, notes: Notes) -> str:
    before = len(notes.problems)
    text = read_words(row[column], repr(column), notes)
    if not text.strip() and len(notes.problems) == before:
        notes.wrong(f"{column!r} is empty, so there is nothing to learn from it")
    return text


def _optional(row: Row, names: tuple[str, ...], notes: Notes | None = None) -> tuple[str, Any]:
    """The first column of these names that holds something in this row, which is then used; "" and None without one."""
    by_name = _by_name(row)
    for name in names:
        column = by_name.get(name)
        if column is not None and not is_empty(row[column]):
            if notes is not None:
                notes.use(column)
            return column, row[column]
    return "", None


def _text(value: Any, column: str, notes: Notes) -> str:
    return "" if value is None else read_words(value, repr(column), notes)


def _read_tools(row: Row, notes: Notes) -> list[Any]:
    column, value = _optional(row, TOOLS, notes)
    return read_tools(value, column, notes) if column else []


def _stored_tools(tools: list[Any], notes: Notes) -> Row:
    """The tools on offer in a conversation, as JSON text (each has a schema of its own)."""
    return {"tools": storable_json(tools, "what tools", notes) if tools else None}


def _check_preferences(row: Row, messages: list[Message], column: str, notes: Notes) -> None:
    """Refuse a conversation whose answer stands in a column of preferences."""
    if messages and messages[-1]["role"] == "assistant":
        return
    for preferred, other in PREFERENCES.items():
        name, _ = _optional(row, (preferred,))
        if name and _optional(row, (other,))[0]:
            notes.wrong(
                f"{column!r} ends without an answer, and {name!r} and {other!r} hold preferences, which "
                f"--objective dpo learns. To train on what is preferred alone, append it to {column!r}"
            )


def holds_turns(value: Any) -> bool:
    """Whether a cell is a conversation: a list of turns, or its text in JSON."""
    return bool(_keys_of_turns(value) & {"role", "from"})


def _keys_of_turns(value: Any) -> set[str]:
    """The keys that hold something in the first turn of a conversation, if it is one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parsed_or_same(value)
    first = value[0] if isinstance(value, list) and value else None
    return {spelling(key) for key, item in first.items() if item is not None} if isinstance(first, dict) else set()


def _beside(used: Sequence[str], *columns: str) -> str:
    return "".join(f" + {name!r}" for name in used if name not in columns)


def _learned(used: Sequence[str]) -> str:
    histories = [name for name in used if spelling(name) in HISTORIES]
    return f"and the answers in {histories[0]!r} are learned" if histories else "is learned"


def _by_name(row: Row) -> dict[str, str]:
    return {spelling(name): name for name in reversed(row)}
