"""Recognises by its columns how a source writes its rows, and brings each row into one of the three shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Features, Json, List, Value

from theodora.data.examples import Format
from theodora.data.files import Row
from theodora.data.messages import (
    Message,
    assistant,
    check_answered,
    describe,
    parsed_or_same,
    read_text,
    read_turns,
    storable_json,
    user,
)
from theodora.data.problems import nearest
from theodora.errors import shown

# Columns in order of preference. Names are compared without regard to case.
CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "question", "instruction", "query", "input")
COMPLETIONS = ("completion", "response", "answer", "output")
CONTEXTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
TEXT = "text"
TOOLS = "tools"
_SHOWN_COLUMNS = 20

LOOKED_FOR = (
    "prompt + completion (or question + answer, input + output, prompt + response, instruction + response)",
    "messages: a list of {role, content}",
    "conversations: a list of {from, value} (ShareGPT)",
    "instruction (+ input) + output (Alpaca)",
    "text (plain documents)",
)


@dataclass(frozen=True)
class Layout:
    """How the rows of one source are read."""

    format: Format
    sentence: str
    """What was recognised, for people."""
    columns: tuple[str, ...]
    """The columns that are read."""
    needed: tuple[str, ...]
    """Those that every row must have."""
    features: Features
    read: Callable[[Row, list[str]], Row | None]
    """Row → row in our shape (None: skip it silently); what is wrong with it is appended to the list."""


def recognise(row: Row) -> Layout | None:
    """The layout of a source, from its first row; None if there is no column to learn from."""
    by_name = {name.strip().lower(): name for name in reversed(row)}

    def column(names: tuple[str, ...], *taken: str | None) -> str | None:
        return next((by_name[name] for name in names if name in by_name and by_name[name] not in taken), None)

    conversation = column(CONVERSATIONS)
    if conversation is not None:
        return _conversation_layout(conversation, by_name.get(TOOLS), row)
    prompt = column(PROMPTS)
    completion = column(COMPLETIONS, prompt)
    if prompt is not None and completion is not None:
        # `input` beside `instruction` is material for it; as the only prompt it was taken above.
        return _pair_layout(prompt, completion, column(CONTEXTS, prompt), column(SYSTEMS), by_name.get(TOOLS), row)
    if TEXT in by_name:
        return _text_layout(by_name[TEXT])
    return None


def explain_unknown(columns: list[str]) -> str:
    """Why no column is usable: those there are, what was looked for, and likely slips."""
    lines = [f"no usable column; there are {shown(columns, 40)[1:-1] or 'none at all'}. Looked for:"]
    lines += [f"    {choice}" for choice in LOOKED_FOR]
    known: list[str] = list(dict.fromkeys((*CONVERSATIONS, *PROMPTS, *COMPLETIONS, TEXT)))
    for name in columns[:_SHOWN_COLUMNS]:
        lower = name.strip().lower()
        if lower in known:
            partner = COMPLETIONS if lower in PROMPTS else PROMPTS
            lines.append(f"    {name!r} lacks its partner: one of {', '.join(partner)}")
        elif nearest(lower, known):
            lines.append(f"    {name!r}{nearest(lower, known)}")
    return "\n".join(lines) + "\n    Rename the columns of your file accordingly."


def _conversation_layout(column: str, tools: str | None, row: Row) -> Layout:
    value = parsed_or_same(row[column]) if isinstance(row[column], str) else row[column]
    first = value[0] if isinstance(value, list) and value else None
    sharegpt = isinstance(first, dict) and first.get("from") is not None and first.get("role") is None

    def read(row: Row, problems: list[str]) -> Row:
        messages = read_turns(row[column], column, problems)
        if not problems:
            check_answered(messages, column, problems)
        return {"messages": messages, **_read_tools(row, tools, problems)}

    kind = "ShareGPT conversations" if sharegpt else "chat messages"
    return Layout(
        format="sharegpt" if sharegpt else "messages",
        sentence=f"{kind} in the column {column!r}; every assistant turn is learned",
        columns=_present(column, tools),
        needed=(column,),
        features=Features({"messages": List(Json()), **_tools_feature(tools)}),
        read=read,
    )


def _pair_layout(
    prompt: str, completion: str, context: str | None, system: str | None, tools: str | None, row: Row
) -> Layout:
    names = prompt.strip().lower(), completion.strip().lower()
    alpaca = names[0] == "instruction" and (names[1] == "output" or context is not None)
    verbatim = names[0] == "prompt" and names[1] in ("completion", "response") and context is None and system is None
    if verbatim and not _holds_turns(row[prompt]):
        read, kind = _verbatim_reader(prompt, completion), Value("string")
        tools = None
    elif _holds_turns(row[prompt]):
        read, kind = _turns_reader(prompt, completion, tools), List(Json())
        context = system = None
    else:
        read, kind = _instruction_reader(prompt, completion, context, system, tools), List(Json())
    used = "".join(f" + {name!r}" for name in (system, context) if name is not None)
    return Layout(
        format="alpaca" if alpaca else "prompt-completion",
        sentence=f"{'Alpaca' if alpaca else 'prompt/completion'} rows: {prompt!r}{used} → {completion!r}, "
        "of which the latter is learned",
        columns=_present(prompt, completion, context, system, tools),
        needed=(prompt, completion),
        features=Features({"prompt": kind, "completion": kind, **_tools_feature(tools)}),
        read=read,
    )


def _text_layout(column: str) -> Layout:
    def read(row: Row, problems: list[str]) -> Row | None:
        text = read_text(row[column], repr(column), problems)
        # Corpora such as WikiText have empty rows between their documents.
        return {"text": text} if text.strip() or problems else None

    return Layout(
        format="text",
        sentence=f"plain text in the column {column!r}, all of which is learned",
        columns=(column,),
        needed=(column,),
        features=Features({"text": Value("string")}),
        read=read,
    )


def _verbatim_reader(prompt: str, completion: str) -> Callable[[Row, list[str]], Row]:
    """Strings that the writer of the file may have fitted together (" ->", a leading space): kept as they stand."""

    def read(row: Row, problems: list[str]) -> Row:
        return {
            "prompt": read_text(row[prompt], repr(prompt), problems),
            "completion": _read_answer(row, completion, problems),
        }

    return read


def _turns_reader(prompt: str, completion: str, tools: str | None) -> Callable[[Row, list[str]], Row]:
    """A list of messages to answer, and a list of messages (or a string) that answers."""

    def read(row: Row, problems: list[str]) -> Row:
        asked = read_turns(row[prompt], prompt, problems)
        if isinstance(row[completion], str) and not _holds_turns(row[completion]):
            answered = [assistant(_read_answer(row, completion, problems))]
        else:
            answered = read_turns(row[completion], completion, problems)
        if not problems:
            check_answered(answered, completion, problems)
        return {"prompt": asked, "completion": answered, **_read_tools(row, tools, problems)}

    return read


def _instruction_reader(
    prompt: str, completion: str, context: str | None, system: str | None, tools: str | None
) -> Callable[[Row, list[str]], Row]:
    """Questions and instructions become a user's turn, so that nothing has to be glued together."""

    def optional(row: Row, column: str | None, problems: list[str]) -> str:
        value = row.get(column) if column is not None else None
        return "" if value is None else read_text(value, repr(column), problems)

    def read(row: Row, problems: list[str]) -> Row:
        asked = read_text(row[prompt], repr(prompt), problems)
        if not asked.strip() and not problems:
            problems.append(f"{prompt!r} is empty")
        material = optional(row, context, problems)
        rules = optional(row, system, problems)
        turns: list[Message] = [{"role": "system", "content": rules}] if rules.strip() else []
        turns.append(user(f"{asked}\n\n{material}" if material.strip() else asked))
        answer = assistant(_read_answer(row, completion, problems))
        return {"prompt": turns, "completion": [answer], **_read_tools(row, tools, problems)}

    return read


def _read_answer(row: Row, column: str, problems: list[str]) -> str:
    before = len(problems)
    text = read_text(row[column], repr(column), problems)
    if not text.strip() and len(problems) == before:
        problems.append(f"{column!r} is empty, so there is nothing to learn from it")
    return text


def _read_tools(row: Row, column: str | None, problems: list[str]) -> Row:
    """The tools on offer in a conversation, as JSON text (each has a schema of its own)."""
    if column is None:
        return {}
    value = row.get(column)
    if isinstance(value, str):
        value = parsed_or_same(value) if value.strip() else None
    if value is not None and not isinstance(value, list):
        problems.append(f"{column!r} is {describe(value)}; expected a list of tools")
    return {"tools": storable_json(value, repr(column), problems) if value else None}


def _tools_feature(tools: str | None) -> dict[str, Any]:
    return {} if tools is None else {"tools": Value("string")}


def _holds_turns(value: Any) -> bool:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parsed_or_same(value)
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and ("role" in first or "from" in first)


def _present(*columns: str | None) -> tuple[str, ...]:
    return tuple(column for column in columns if column is not None)
