"""Turns of a conversation in anybody's spelling → messages with `role` and `content`, as chat templates expect them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from theodora.config import is_int
from theodora.data.blocks import turns_of_blocks
from theodora.data.notes import Notes, is_empty, not_used, spelling
from theodora.data.problems import listed, nearest
from theodora.data.tools import (
    Schemas,
    describe,
    parsed_or_same,
    read_calls,
    spoken_calls,
    storable_calls,
    text_of_result,
)
from theodora.data.words import (
    LEARNED_WHOLE,
    PARTLY,
    REASONING,
    are_parts,
    is_storable,
    read_parts,
    read_text,
    read_words,
)
from theodora.errors import shown

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "input": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "output": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "observations": "tool",
    "function_response": "tool",
    "function_result": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
}
# Turns whose words are a tool call: LLaMA-Factory's, ms-swift's.
_CALLS = ("function_call", "tool_call")
_CALL_KEYS = ("tool_calls", "function_call")
# Whether a turn is learned: OpenAI, Axolotl (both names), ms-swift (both), and loops that multiply the loss by it.
_LEARNED = ("weight", "train", "training", "loss", "loss_scale", "loss_mask")
# Whether it is hidden from the loss: torchtune's.
_MASKED = ("masked", "mask")
_WORDS = ("content", "value")
_READ = frozenset((*_WORDS, "role", "from", "name", "tool_call_id", *_CALL_KEYS, *REASONING, *_LEARNED, *_MASKED))
# ms-swift's pairs: {"human": …, "assistant": …}.
_ASKED, _ANSWERED = ("human", "user"), ("assistant", "gpt")
_KNOWN = _READ | {"refusal", *_ASKED, *_ANSWERED}
_HINTED = tuple(sorted(_READ))


class Turn(NamedTuple):
    """A message, and whether its turn is nothing but a call, which belongs to the model's words in front of it."""

    message: Message
    is_call: bool = False


def user(content: str) -> Message:
    """A user's turn."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """A model's turn."""
    return {"role": "assistant", "content": content}


def read_turns(value: Any, column: str, notes: Notes, schemas: Schemas | None = None) -> list[Message]:
    """A cell that holds a conversation, as messages; what is wrong, and what is not used, goes to `notes`.

    Turns may be spelt `{"role", "content"}` or, as in ShareGPT, `{"from", "value"}`. Text in JSON (from a CSV cell) is
    read too.

    Args:
        value: the cell.
        column: its name.
        notes: of the row.
        schemas: what the arguments of the row's tools are.
    """
    turns = _as_turns(value)
    if not isinstance(turns, list) or not turns:
        notes.wrong(f"{column!r} is {describe(value)}; expected a list of turns")
        return []
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        for read in _read_entry(turn, f"turn {number} of {column!r}", notes, schemas or {}):
            last = messages[-1] if messages else {}
            if read.is_call and last.get("role") == "assistant" and _weight(last) == _weight(read.message):
                messages[-1] = _joined(last, read.message, column, schemas or {}, notes)
            else:
                messages.append(read.message)
    return messages


def with_system(messages: list[Message], rules: str, column: str, notes: Notes) -> list[Message]:
    """A conversation that begins with the system's words of a column beside it."""
    if not rules.strip():
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() != rules.strip():
            notes.wrong(f"begins with a system turn and has another text in {column!r}; keep one of the two")
        return messages
    return [{"role": "system", "content": rules}, *messages]


def read_history(value: Any, column: str, notes: Notes, schemas: Schemas | None = None) -> list[Message]:
    """Earlier turns in a column beside a question: a list of [question, answer] pairs, or of turns.

    Their answers are learned (`weight: 1`), as by the tools that write such files.
    """
    given = parsed_or_same(value) if isinstance(value, str) else value
    if is_empty(given):
        return []
    if not isinstance(given, list):
        notes.wrong(f"{column!r} is {describe(value)}; expected a list of [question, answer] pairs")
        return []
    turns: list[Any] = []
    for number, pair in enumerate(given, 1):
        if isinstance(pair, list | tuple) and len(cast(list[Any], pair)) == 2:
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        elif isinstance(pair, dict):
            turns.append(pair)
        else:
            notes.wrong(f"item {number} of {column!r} is {describe(pair)}; expected a [question, answer] pair")
            return []
    return [
        {"weight": 1, **message} if message["role"] == "assistant" else message
        for message in read_turns(turns, column, notes, schemas)
    ]


def check_answered(messages: list[Message], column: str, notes: Notes) -> None:
    """Note a conversation that has nothing to learn from, or goes on behind what there is to learn."""
    if messages and messages[-1]["role"] != "assistant":
        notes.leave_out("turns behind the model's last", "nothing is learned from them")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not any(map(_weight, answers)):
        which = " that is to be learned (their weight is 0)" if answers else ""
        notes.wrong(f"{column!r} has no assistant turn{which}, so there is nothing to learn from it")


def calls_of(message: Message) -> Any:
    """The tool calls of a message, which may be stored as JSON text."""
    calls = message.get("tool_calls")
    return parsed_or_same(calls) if isinstance(calls, str) else calls


def _as_turns(value: Any) -> Any:
    if isinstance(value, str):
        value = parsed_or_same(value)
    if isinstance(value, dict):
        # datasets' Sequence of a dict: a dict of columns.
        columns = cast(dict[str, Any], value)
        lists = list(columns.values())
        if lists and all(isinstance(items, list) and len(items) == len(lists[0]) for items in lists):
            return [dict(zip(columns, turn, strict=True)) for turn in zip(*lists, strict=True)]
    return value


def _read_entry(turn: Any, what: str, notes: Notes, schemas: Schemas) -> list[Turn]:
    """One item of a conversation: a turn, or a question with its answer."""
    if (plain := _plain_role(turn)) is not None:
        return [Turn(dict(zip(("role", "content"), plain, strict=True)))]
    if isinstance(turn, str):  # a table that holds turns of many shapes may keep each as JSON text
        parsed = parsed_or_same(turn)
        turn = parsed if isinstance(parsed, dict) else turn
    if not isinstance(turn, dict):
        notes.wrong(f"{what} is {describe(turn)}; expected an object with role and content")
        return []
    turn = _with_known_keys(cast(Message, turn))
    asked, answered = _first_key(turn, _ASKED), _first_key(turn, _ANSWERED)
    if asked and answered and is_empty(turn.get("role")) and is_empty(turn.get("from")):
        rest = {key: item for key, item in turn.items() if key not in (asked, answered)}
        pair = {"role": "user", "content": turn[asked]}, {**rest, "role": "assistant", "content": turn[answered]}
        return [read for part in pair if (read := _read_turn(part, what, notes, schemas)).message]
    return [read for part in turns_of_blocks(turn) if (read := _read_turn(part, what, notes, schemas)).message]


def _plain_role(turn: Any) -> tuple[str, str] | None:
    """Role and words of a turn that holds nothing else, as most are: there is nothing to look for in it."""
    if not isinstance(turn, dict) or len(cast(Message, turn)) != 2:
        return None
    name, words = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    role = ROLES.get(name) if isinstance(name, str) and name not in _CALLS else None
    if not role or not isinstance(words, str) or not words or words.isspace() or not is_storable(words):
        return None
    return role, words


def _with_known_keys(turn: Message) -> Message:
    """A turn with `Role` and `Content` as `role` and `content`, where these are not there as well."""
    known: Message = {}
    for key, value in turn.items():
        plain = spelling(key)
        known[plain if plain in _KNOWN and plain not in turn and plain not in known else key] = value
    return known


def _read_turn(turn: Message, what: str, notes: Notes, schemas: Schemas) -> Turn:
    spelt, role = _read_role(turn, what, notes)
    if not role:
        return Turn({})
    _note_unused_keys(turn, notes)
    _check_spellings(turn, role, what, notes)
    content = _first_held(turn, (*_WORDS, "refusal"))
    if spelt in _CALLS:
        return Turn(_read_call_turn(turn, content, f"{what} ({spelt})", notes, schemas), is_call=True)
    reasoning, calls = "", _read_tool_calls(turn, what, notes, schemas) if role == "assistant" else []
    if role == "assistant" and are_parts(content):
        content, reasoning = read_parts(cast(list[dict[str, Any]], content), f"{what} ({role})", notes)
    if content is None and calls:
        content = ""
    if role == "tool" and isinstance(content, dict | list) and not are_parts(content):
        content = text_of_result(content, f"{what} ({role})", notes)
    if content is None and not any(key in turn for key in _WORDS):
        notes.wrong(f"{what} ({role}) has no content; its keys are {listed(turn, 10)}")
        return Turn({})
    text = read_words(content, f"{what} ({role})", notes)
    if isinstance(content, str) and role == "assistant" and not text.strip() and not calls:
        notes.wrong(f"{what} is an empty assistant turn")
    message = {"role": role, "content": text, **_read_extras(turn, role, reasoning, what, notes)}
    return Turn(
        message | ({"tool_calls": storable_calls(calls, f"tool_calls of {what}", schemas, notes)} if calls else {})
    )


def _read_role(turn: Message, what: str, notes: Notes) -> tuple[str, str]:
    """Whose turn it is, as the file says it and as it is said here ("" if that cannot be told)."""
    name = turn.get("role") if turn.get("role") is not None else turn.get("from")
    spelt = spelling(name) if isinstance(name, str) else ""
    if spelt not in ROLES:
        known = "system, user, assistant, tool (or human, gpt, …)"
        hint = nearest(name, list(ROLES)) if isinstance(name, str) else f"; its keys are {listed(turn, 10)}"
        notes.wrong(f"{what} has the role {shown(name)}; expected {known}{hint}")
    return spelt, ROLES.get(spelt, "")


def _note_unused_keys(turn: Message, notes: Notes) -> None:
    for key, value in turn.items():
        said = key == "refusal" and all(is_empty(turn.get(word)) for word in _WORDS)
        if key not in _READ and not is_empty(value) and not said:
            notes.leave_out(f"the key {key!r} of turns", LEARNED_WHOLE if key in PARTLY else not_used(key, _HINTED))


def _check_spellings(turn: Message, role: str, what: str, notes: Notes) -> None:
    """Note a turn that says a thing twice, and not the same."""
    speaker = turn.get("from")
    if isinstance(speaker, str) and turn.get("role") is not None and ROLES.get(spelling(speaker)) != role:
        notes.wrong(f"{what} has the role {shown(turn['role'])} and is from {shown(speaker)}; keep one of the two")
    words = [turn[key] for key in _WORDS if not is_empty(turn.get(key))]
    if len(words) > 1 and words[0] != words[1]:
        notes.wrong(f"{what} ({role}) has both content and value, not the same; keep one of the two")


def _first_held(turn: Message, keys: tuple[str, ...]) -> Any:
    """The first of some keys that holds something, or else is at least not null."""
    given = [turn[key] for key in keys if turn.get(key) is not None]
    return next((value for value in given if not is_empty(value)), given[0] if given else None)


def _read_call_turn(turn: Message, content: Any, what: str, notes: Notes, schemas: Schemas) -> Message:
    calls, reasoning = spoken_calls(content, what, schemas, notes)
    for key in _CALL_KEYS:
        if not is_empty(turn.get(key)):
            notes.wrong(f"{what} has {key} beside the call that it says; keep one of the two")
    extras = _read_extras(turn, "assistant", reasoning, what, notes)
    return {"role": "assistant", "content": "", **extras, "tool_calls": storable_calls(calls, what, schemas, notes)}


def _read_tool_calls(turn: Message, what: str, notes: Notes, schemas: Schemas) -> list[dict[str, Any]]:
    """OpenAI's `tool_calls`, or the one `function_call` that came before them."""
    given = {key: turn[key] for key in _CALL_KEYS if not is_empty(turn.get(key))}
    if len(given) > 1:
        notes.wrong(f"{what} has both tool_calls and function_call; keep one of the two")
    return next((read_calls(value, f"{key} of {what}", schemas, notes) for key, value in given.items()), [])


def _read_extras(turn: Message, role: str, reasoning: str, what: str, notes: Notes) -> Message:
    extras: Message = {}
    for key in ("name", "tool_call_id"):
        if not is_empty(value := turn.get(key)):
            extras[key] = str(value) if is_int(value) else read_text(value, f"{key} of {what}", notes)
    thoughts = {key: turn[key] for key in REASONING if not is_empty(turn.get(key))}
    read = [reasoning] if reasoning else []
    read += [read_text(value, f"{key} of {what}", notes) for key, value in thoughts.items()]
    if len(set(read)) > 1:
        notes.wrong(f"{what} has reasoning in several places ({', '.join(thoughts)}), not the same; keep one of them")
    if role != "assistant":
        for key in (*thoughts, *(key for key in _CALL_KEYS if not is_empty(turn.get(key)))):
            notes.leave_out(f"the key {key!r} of turns that are not the model's")
    elif read:
        extras["reasoning_content"] = read[0]
    return extras | _read_weight(turn, role, what, notes)


def _read_weight(turn: Message, role: str, what: str, notes: Notes) -> Message:
    """Whether a turn of the model is learned, from whichever key says so."""
    said: dict[str, bool] = {}
    for key, reader in _WEIGHTS.items():
        if turn.get(key) is not None and (learned := reader(turn[key], f"{key} of {what}", notes)) is not None:
            said[key] = learned
    if len(set(said.values())) > 1:
        notes.wrong(f"{what} is to be learned by one and not by another of {', '.join(said)}; keep one of them")
    if role != "assistant":
        for key in (key for key, learned in said.items() if learned):
            notes.leave_out(f"{key!r} of turns that are not the model's", "only the model's turns are learned")
        return {}
    return {"weight": int(learned)} if (learned := next(iter(said.values()), None)) is not None else {}


def _learned(value: Any, what: str, notes: Notes) -> bool | None:
    if value not in (0, 1):
        notes.wrong(f"{what} is {describe(value)}; expected 0 (not learned) or 1")
        return None
    return bool(value)


def _unmasked(value: Any, what: str, notes: Notes) -> bool | None:
    if not isinstance(value, bool):
        notes.wrong(
            f"{what} is {describe(value)}; expected true (hidden from the loss) or false: tools disagree about what "
            "numbers mean here. Write weight: 0 (not learned) or 1 instead"
        )
        return None
    return not value


_WEIGHTS: Mapping[str, Callable[[Any, str, Notes], bool | None]] = {
    **dict.fromkeys(_LEARNED, _learned),
    **dict.fromkeys(_MASKED, _unmasked),
}


def _weight(message: Message) -> Any:
    return message.get("weight", 1)


def _joined(last: Message, call: Message, column: str, schemas: Schemas, notes: Notes) -> Message:
    """The model's words (or calls) and a call that follows them, as one turn."""
    calls = [*(calls_of(last) or []), *(calls_of(call) or [])]
    reasoning = "\n".join(part["reasoning_content"] for part in (last, call) if part.get("reasoning_content"))
    joined = last | call | {"content": last["content"]} | ({"reasoning_content": reasoning} if reasoning else {})
    return joined | {"tool_calls": storable_calls(calls, f"a call of {column!r}", schemas, notes)}


def _first_key(turn: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if turn.get(key) is not None), None)
