"""Recognises rows that ask something, with or without an answer to compare with, in anybody's layout.

A row becomes `prompt` (a string as it stands in a column of that name, or a list of messages), `completion` (the
reference: empty if there is none) and `columns`, the row as it was, as JSON, whose columns rewards get by their names.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from datasets import Dataset, Features, Json, List, Value

from theodora.data import formats
from theodora.data.examples import Examples
from theodora.data.files import Row
from theodora.data.formats import BESIDE, CONVERSATIONS, HISTORIES, MEDIA, SYSTEMS, TOOLS, Layout, NeedsTurns
from theodora.data.messages import Message, assistant, read_turns, with_system
from theodora.data.notes import Notes, is_empty, spelling
from theodora.data.preference import asked_in, speaks
from theodora.data.problems import listed
from theodora.data.prompts import question_and_answer
from theodora.data.sequences import as_answers
from theodora.data.tools import read_tools, schemas_of, storable_json
from theodora.data.words import read_words
from theodora.errors import DataError

PROMPTS = ("prompt", "question", "instruction", "query", "problem", "input")
REFERENCES = ("reference", "ground_truth", "answer", "solution", "completion", "response", "output", "label")
"""Columns with what answers are compared with; the first of them that holds something is taken."""
_LOOKED_FOR = (
    "prompt (also question, instruction, query, problem), as text or as a list of {role, content}",
    "messages or conversations, of which a last turn of the model's is the reference",
)


def recognise_prompts(row: Row, *, as_turns: bool = False) -> Layout | None:
    """The layout of a source of prompts, from its first row; None if it asks nothing. As `formats.recognise`."""
    by_name = {spelling(name): name for name in reversed(row)}
    conversation = _first(row, by_name, CONVERSATIONS)
    prompt = _first(row, by_name, PROMPTS)
    asking = conversation or prompt
    if asking is None:
        return None
    candidates = [by_name[name] for name in REFERENCES if name in by_name and by_name[name] != asking]
    usable = [name for name in candidates if _says(row[name], name)]
    reference = next(iter(usable or [name for name in candidates if is_empty(row[name])]), None)
    text = not as_turns and asking == prompt and spelling(asking) == "prompt" and _is_text(row[asking])

    def read(row: Row, notes: Notes) -> Row | None:
        notes.use(*(name for name in row if spelling(name) not in MEDIA))
        if is_empty(row[asking]):
            return None
        if text:
            made = _as_it_stands(row, asking, reference, notes)
        else:
            made = _as_turns(row, conversation, asking, reference, notes)
        return {**made, "columns": _columns(row, notes)}

    return Layout(
        format="prompts",
        sentence=lambda _: _sentence(row, asking, conversation, reference, usable[1:]),
        needed=(asking,),
        features=_features(text),
        read=read,
        skipped="rows without a prompt",
    )


def as_prompts(examples: Examples) -> Examples:
    """Rows with answers as prompts, whose references these are; of pairs the better ones.

    Functions that reward get these rows' columns by their names, not what the file had beside them.

    Raises:
        DataError: plain text, which asks nothing.
    """
    if examples.format == "text":
        raise DataError(f"{examples.source} is plain text, which asks nothing; expected prompts with completions")
    rows = [_as_prompt(dict(row)) for row in as_answers(examples).dataset]  # pyright: ignore[reportArgumentType]
    text = bool(rows) and isinstance(rows[0]["prompt"], str)
    return replace(examples, dataset=Dataset.from_list(rows, features=_features(text)), format="prompts")


def _as_prompt(row: Row) -> Row:
    asked, answered = question_and_answer(row)
    said = answered[0].get("content") or ""
    text = isinstance(row.get("prompt"), str)
    tools = row.pop("tools", None)
    return {
        "prompt": row["prompt"] if text else [{k: v for k, v in turn.items() if k != "weight"} for turn in asked],
        "completion": said if text else [assistant(said)],
        "tools": tools,
        "columns": json.dumps(row),
    }


def _features(text: bool) -> Features:
    kind = Value("string") if text else List(Json())
    return Features({"prompt": kind, "completion": kind, "tools": Value("string"), "columns": Value("string")})


def explain_no_prompt(row: Row) -> str:
    """Why a row asks nothing: what there is, and what was looked for."""
    lines = [f"no prompt; there are {listed(list(row), 40) or 'no columns at all'}. Looked for:"]
    lines += [f"    {choice}" for choice in _LOOKED_FOR]
    found = formats.recognise(row)
    if found is not None:
        lines.append(f"    These rows are {found.format}, which --objective sft learns.")
    elif {spelling(name) for name in row} & formats.PREFERENCES.keys():
        lines.append("    These rows hold preferences, which --objective dpo learns.")
    return "\n".join(lines)


def reference_text(value: Any) -> str | None:
    """A cell as the text that answers are compared with: text, a number, or a turn of the model's; None if neither."""
    if isinstance(value, float) and value.is_integer():  # as tables with gaps hold whole numbers
        value = int(value)
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value.strip() else None


def _first(row: Row, by_name: dict[str, str], names: tuple[str, ...]) -> str | None:
    """The first column of these names that holds something, or else that is there."""
    found = [by_name[name] for name in names if name in by_name]
    return next((name for name in found if not is_empty(row[name])), next(iter(found), None))


def _says(value: Any, name: str) -> bool:
    """Whether a cell is an answer to compare with: a verdict is none."""
    if is_empty(value) or (spelling(name) == "label" and isinstance(value, bool)):
        return False
    return formats.holds_turns(value) or reference_text(value) is not None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not speaks(value) and not formats.holds_turns(value)


def _as_it_stands(row: Row, prompt: str, reference: str | None, notes: Notes) -> Row:
    """A string that the writer of the file may have fitted to the answer: kept."""
    if any(spelling(name) in BESIDE and not is_empty(value) for name, value in row.items()):
        raise NeedsTurns
    if isinstance(row[prompt], str) and not _is_text(row[prompt]):
        raise NeedsTurns
    answered = _reference(row, reference, notes)
    return {
        "prompt": read_words(row[prompt], repr(prompt), notes),
        "completion": answered[-1]["content"] if answered else "",
        "tools": None,
    }


def _as_turns(row: Row, conversation: str | None, asking: str, reference: str | None, notes: Notes) -> Row:
    by_name = {spelling(name): name for name in reversed(row)}

    def filled(names: tuple[str, ...]) -> str | None:
        found = (by_name[name] for name in names if name in by_name)
        return next((name for name in found if not is_empty(row[name])), None)

    tools_in, system_in = filled(TOOLS), filled(SYSTEMS)
    tools = [] if tools_in is None else read_tools(row[tools_in], tools_in, notes)
    asked = asked_in(row, asking, conversation, filled(HISTORIES), notes, tools)
    answered: list[Message] = []
    if conversation is not None and asked and asked[-1]["role"] == "assistant":
        asked, answered = question_and_answer({"messages": asked})
    if system_in is not None:
        asked = with_system(asked, read_words(row[system_in], repr(system_in), notes), system_in, notes)
    if reference is not None and formats.holds_turns(row.get(reference)):
        turns = read_turns(row[reference], reference, notes, schemas_of(tools))
        asked, answered = question_and_answer({"prompt": asked, "completion": turns})
    answered = _reference(row, reference, notes) or answered
    if not notes.problems and not any(turn["role"] != "system" for turn in asked):
        notes.wrong(f"{asking!r} asks nothing: nobody speaks before the answer")
    return {
        "prompt": [{key: value for key, value in turn.items() if key != "weight"} for turn in asked],
        "completion": [assistant(answered[0].get("content") or "" if answered else "")],
        "tools": storable_json(tools, "what tools", notes) if tools else None,
    }


def _reference(row: Row, column: str | None, notes: Notes) -> list[Message]:
    """What a column says that answers are compared with, as a turn of the model's; none if it says nothing."""
    value = None if column is None else row.get(column)
    if column is None or is_empty(value) or formats.holds_turns(value):
        return []
    text = reference_text(value)
    if text is None:
        notes.leave_out(f"the reference in {column!r}", "not text; rewards get the column by its name")
        return []
    return [assistant(read_words(text, repr(column), notes))]


def _columns(row: Row, notes: Notes) -> str:
    """What a row holds, for functions that take it by name, as JSON."""
    texts: list[str] = []
    for name, value in row.items():
        if spelling(name) in MEDIA:
            continue
        try:
            texts.append(f"{json.dumps(name)}: {json.dumps(value)}")
        except (TypeError, ValueError):
            notes.leave_out(f"the column {name!r}", "not given to rewards: JSON cannot say what it holds")
    return "{" + ", ".join(texts) + "}"


def _sentence(row: Row, asking: str, conversation: str | None, reference: str | None, others: list[str]) -> str:
    beside = [name for name in row if spelling(name) in BESIDE and name != asking and not is_empty(row[name])]
    said = f"prompts: {' + '.join(map(repr, [asking, *([] if conversation else beside)]))} is answered"
    if reference is not None:
        also = f" (not {' or '.join(map(repr, others))})" if others else ""
        return f"{said}, and {reference!r}{also} is what answers are compared with"
    ends = conversation is not None and _ends_with_an_answer(row[conversation])
    last = ", and the model's last turn is what answers are compared with"
    return said + (last if ends else ", with nothing to compare with")


def _ends_with_an_answer(value: Any) -> bool:
    turns = read_turns(value, "", Notes())
    return bool(turns) and turns[-1]["role"] == "assistant"
