"""Recognises rows that say which of two answers is the better one, or whether one answer is good, in anybody's layout.

A pair becomes `prompt`, `chosen` and `rejected`; a judged answer becomes `prompt`, `completion` and `label`. Prompts
and answers are strings, as they stand in the file, or lists of messages. What has no prompt of its own (two whole
conversations, Anthropic's "\\n\\nHuman: … \\n\\nAssistant: …") is parted where the two begin to differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from datasets import Features, Json, List, Value

from theodora.data import formats
from theodora.data.files import Row
from theodora.data.formats import CONTEXTS, CONVERSATIONS, HISTORIES, PROMPTS, SYSTEMS, TOOLS, Layout, NeedsTurns
from theodora.data.messages import Message, assistant, read_history, read_turns, user, with_system
from theodora.data.notes import Notes, is_empty, spelling
from theodora.data.problems import listed
from theodora.data.tools import read_tools, schemas_of, storable_json
from theodora.data.words import read_words

CHOSEN = ("chosen", "chosen_response", "preferred_output", "chosen_messages", "preferred")
REJECTED = ("rejected", "rejected_response", "non_preferred_output", "rejected_messages", "dispreferred")
LABELS = ("label", "kto_tag")
"""Columns that say whether an answer is a good one."""

_PAIRS = (
    "prompt + chosen + rejected (also instruction + chosen_response + rejected_response, question + …)",
    "chosen + rejected: two whole conversations, as lists of {role, content} or as \\n\\nHuman: … \\n\\nAssistant: …",
    "messages or conversations + chosen + rejected; messages + rejected_response",
)
_JUDGED = (
    "prompt + completion + label (true or false)",
    "messages or conversations + label (or kto_tag)",
)
_SPEAKER = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):")
_TRUE, _FALSE = ("true", "1", "1.0"), ("false", "0", "0.0")

Answer = str | list[Message]


def recognise_pairs(row: Row, *, as_turns: bool = False) -> Layout | None:
    """The layout of a source of pairs, from its first row; None if it has none. As `formats.recognise`."""
    by_name = {spelling(name): name for name in reversed(row)}

    def column(names: tuple[str, ...], *, filled: bool = False) -> str | None:
        found = (by_name[name] for name in names if name in by_name)
        return next((name for name in found if not (filled and is_empty(row[name]))), None)

    chosen, rejected, conversation = column(CHOSEN), column(REJECTED), column(CONVERSATIONS, filled=True)
    if rejected is None or (chosen is None and conversation is None):
        return None
    prompt = column(PROMPTS, filled=True)
    needed = (chosen or conversation or "", rejected)
    text = not as_turns and chosen is not None and _are_texts(row, chosen, rejected, prompt, conversation)
    kind = Value("string") if text else List(Json())
    features = Features({"prompt": kind, "chosen": kind, "rejected": kind, "tools": Value("string")})
    return Layout(
        format="preference",
        sentence=lambda used: (
            f"preferences:{_named(used, needed)} {needed[0]!r} is to become likelier than {rejected!r}"
        ),
        needed=needed,
        features=features,
        read=_text_reader(needed[0], rejected, prompt) if text else _turns_reader(chosen, rejected, prompt),
        skipped="pairs with an empty answer",
    )


def recognise_ranked(row: Row, *, as_turns: bool = False) -> Layout | None:
    """The same of pairs that may say by how much the better answer is better, a number in a column `margin`."""
    margin = next((name for name in row if spelling(name) == "margin"), None)
    found = recognise_pairs({name: value for name, value in row.items() if name != margin}, as_turns=as_turns)
    if found is None:
        return None
    layout, better, worse = found, *found.needed[-2:]

    def read(row: Row, notes: Notes) -> Row | None:
        made = layout.read({name: value for name, value in row.items() if name != margin}, notes)
        if margin is None:
            return made
        notes.use(margin)
        number = _number(row.get(margin))
        if number is None:
            notes.wrong(f"{margin!r} is {row.get(margin)!r}; expected a number: by how much {better!r} is better")
        return None if made is None else {**made, "margin": number}

    return replace(
        layout,
        sentence=lambda used: f"pairs:{_named(used, layout.needed)} {better!r} is to score higher than {worse!r}",
        needed=layout.needed if margin is None else (*layout.needed, margin),
        features=layout.features if margin is None else Features({**layout.features, "margin": Value("float32")}),
        read=read,
    )


def recognise_judged(row: Row, *, as_turns: bool = False) -> Layout | None:
    """The layout of a source of answers with a verdict, from its first row; None if it has none."""
    label = next((name for name in row if spelling(name) in LABELS), None)
    rest = {name: value for name, value in row.items() if name != label}
    found = formats.recognise(rest, as_turns=as_turns)
    if label is None or found is None or found.format == "text":
        return None
    layout, turns = found, "messages" in found.features
    kind = List(Json()) if turns else found.features["prompt"]

    def read(row: Row, notes: Notes) -> Row | None:
        verdict = _verdict(row[label], label, notes)
        made = layout.read({name: value for name, value in row.items() if name != label}, notes)
        if made is None or notes.problems:
            return made
        if turns:
            at = max((n for n, turn in enumerate(made["messages"]) if turn["role"] == "assistant"), default=0)
            made = {**made, "prompt": made["messages"][:at], "completion": made["messages"][at : at + 1]}
            del made["messages"]
        return {**made, "label": verdict}

    return Layout(
        format="unpaired",
        sentence=lambda used: (
            f"judged answers:{_named(used, (label,))} {label!r} says whether one is to become likelier or less likely"
        ),
        needed=(*found.needed, label),
        features=Features({"prompt": kind, "completion": kind, "tools": Value("string"), "label": Value("bool")}),
        read=read,
    )


def recognise_any(row: Row, *, as_turns: bool = False) -> Layout | None:
    """The layout of pairs or judged answers, where the first row shows one, else that of answers or text.

    A label that is neither true nor false, as those of other tasks, is no verdict.
    """
    by_name = {spelling(name): value for name, value in row.items()}
    verdicts = [by_name[name] for name in LABELS if name in by_name]
    judged = any(isinstance(value, bool) or str(value).strip().lower() in ("true", "false") for value in verdicts)
    return (
        recognise_pairs(row, as_turns=as_turns)
        or (recognise_judged(row, as_turns=as_turns) if judged else None)
        or formats.recognise(row, as_turns=as_turns)
    )


def explain_no_pairs(row: Row) -> str:
    """Why a row is no pair: what there is, what was looked for, and what learns from it."""
    return _explain(row, "no pair of a better and a worse answer", _PAIRS)


def explain_not_judged(row: Row) -> str:
    """Why a row is no answer with a verdict."""
    text = _explain(row, "no answer with a verdict", _JUDGED)
    return text + ("\n    Pairs are what --objective dpo learns." if recognise_pairs(row) is not None else "")


def _explain(row: Row, what: str, choices: Sequence[str]) -> str:
    lines = [f"{what}; there are {listed(list(row), 40) or 'no columns at all'}. Looked for:"]
    lines += [f"    {choice}" for choice in choices]
    found = formats.recognise(row)
    if found is not None:
        lines.append(f"    These rows are {found.format}, which --objective sft learns.")
    return "\n".join(lines)


def _number(value: Any) -> float | None:
    """A finite number, also one that stands as text, as in CSV; None for anything else."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _verdict(value: Any, column: str, notes: Notes) -> bool:
    notes.use(column)
    word = spelling(value)
    if word not in (*_TRUE, *_FALSE):
        notes.wrong(f"{column!r} is {value!r}; expected true (a good answer) or false")
    return word in _TRUE


# Strings as they stand


def _are_texts(row: Row, chosen: str, rejected: str, prompt: str | None, conversation: str | None) -> bool:
    """Whether the row is strings that the writer of the file has fitted together."""
    texts = [row[name] for name in (chosen, rejected, prompt) if name is not None]
    if conversation is not None or any(not isinstance(text, str) or speaks(text) for text in texts):
        return False
    if any(formats.holds_turns(text) for text in texts):
        return False
    return prompt is None or spelling(prompt) == "prompt"


def _text_reader(chosen: str, rejected: str, prompt: str | None) -> Callable[[Row, Notes], Row | None]:
    def read(row: Row, notes: Notes) -> Row | None:
        beside = (*SYSTEMS, *HISTORIES, *TOOLS, *CONTEXTS)
        if any(spelling(name) in beside and not is_empty(value) for name, value in row.items()):
            raise NeedsTurns
        texts = {name: row.get(name) for name in (chosen, rejected, prompt) if name is not None}
        if any(isinstance(text, str) and speaks(text) for text in texts.values()):
            raise NeedsTurns
        notes.use(*filter(None, (prompt, chosen, rejected)))
        better, worse = (read_words(row[name], repr(name), notes) for name in (chosen, rejected))
        if notes.problems or not (better.strip() and worse.strip()):
            return None
        asked = _common_text(better, worse) if prompt is None else read_words(row.get(prompt), repr(prompt), notes)
        if prompt is None or (asked and better.startswith(asked) and worse.startswith(asked)):
            better, worse = better[len(asked) :], worse[len(asked) :]
        if not (better.strip() and worse.strip()):
            return None
        return {"prompt": asked, "chosen": better, "rejected": worse, "tools": None}

    return read


def _common_text(one: str, other: str) -> str:
    """What two texts begin with, through the last space or line break before they differ."""
    shorter = min(len(one), len(other))
    differ = next((n for n in range(shorter) if one[n] != other[n]), shorter - 1)
    return one[: max(one.rfind(" ", 0, differ), one.rfind("\n", 0, differ)) + 1]


# Turns


def _turns_reader(chosen: str | None, rejected: str, prompt: str | None) -> Callable[[Row, Notes], Row | None]:
    def read(row: Row, notes: Notes) -> Row | None:
        by_name = {spelling(name): name for name in reversed(row)}

        def filled(names: tuple[str, ...]) -> str | None:
            found = (by_name[name] for name in names if name in by_name)
            return next((name for name in found if not is_empty(row[name])), None)

        tools_in, system_in, conversation = filled(TOOLS), filled(SYSTEMS), filled(CONVERSATIONS)
        tools = [] if tools_in is None else read_tools(row[tools_in], tools_in, notes)
        if chosen is None:  # ms-swift's: the conversation ends with the better answer
            better = read_turns(row[conversation or ""], conversation or "", notes, schemas_of(tools))
            asked, better = better[:-1], better[-1:]
            notes.use(conversation or "")
        else:
            notes.use(chosen)
            better = _turns(row[chosen], chosen, notes, tools)
            asked = []
        notes.use(rejected)
        worse = _turns(row[rejected], rejected, notes, tools)
        if notes.problems:
            return None
        if _is_whole(better) and _is_whole(worse):
            asked, better, worse = _parted(better, worse, chosen or "", rejected, notes)
        elif chosen is not None:
            asked = asked_in(row, prompt, conversation, filled(HISTORIES), notes, tools)
            better, worse = _without(asked, better), _without(asked, worse)
        if system_in is not None:
            notes.use(system_in)
            rules = read_words(row[system_in], repr(system_in), notes)
            asked = with_system(asked, rules, system_in, notes)
        if prompt is not None and prompt not in notes.used and _said(row[prompt], asked):
            notes.use(prompt)
        for name, answer in ((chosen or conversation, better), (rejected, worse)):
            if not notes.problems and answer and answer[0]["role"] != "assistant":
                notes.wrong(f"{name!r} begins with a turn of {answer[0]['role']!r}; expected the model's answer")
        if notes.problems or not _says(better) or not _says(worse):
            return None
        # What a prompt says of its turns' weights is for whoever learns them.
        asked = [{key: value for key, value in turn.items() if key != "weight"} for turn in asked]
        stored = storable_json(tools, "what tools", notes) if tools else None
        return {"prompt": asked, "chosen": better, "rejected": worse, "tools": stored}

    return read


def _turns(value: Any, column: str, notes: Notes, tools: list[Any]) -> list[Message]:
    """An answer, or a conversation that ends with one, as messages."""
    if isinstance(value, str) and not formats.holds_turns(value):
        return _spoken(value) if speaks(value) else [assistant(read_words(value, repr(column), notes))]
    turns = [value] if isinstance(value, dict) else value
    return [] if is_empty(turns) else read_turns(turns, column, notes, schemas_of(tools))


def asked_in(
    row: Row, prompt: str | None, conversation: str | None, history: str | None, notes: Notes, tools: list[Any]
) -> list[Message]:
    """What an answer replies to, from the columns beside it."""
    name = conversation or prompt
    if name is None or is_empty(row.get(name)):
        notes.wrong(f"has no prompt that the answers reply to; it has {listed(list(row), 40)}")
        return []
    notes.use(name)
    value = row[name]
    if isinstance(value, dict):  # OpenAI's {"messages": [...], "tools": [...]}
        value = next((value[key] for key in value if spelling(key) in CONVERSATIONS), value)
    if not isinstance(value, str) or formats.holds_turns(value):
        return read_turns(value, name, notes, schemas_of(tools))
    if speaks(value):
        return _spoken(value)
    turns: list[Message] = []
    if history is not None:
        notes.use(history)
        turns = read_history(row[history], history, notes, schemas_of(tools))
    words = [read_words(value, repr(name), notes)]
    for other in row:
        if spelling(other) in CONTEXTS and other != name and not is_empty(row[other]):
            notes.use(other)
            words.append(read_words(row[other], repr(other), notes))
    return [*turns, user("\n\n".join(words))]


def _is_whole(turns: list[Message]) -> bool:
    """Whether it is a conversation rather than an answer alone."""
    return len(turns) > 1 and turns[0]["role"] != "assistant"


def _parted(
    better: list[Message], worse: list[Message], chosen: str, rejected: str, notes: Notes
) -> tuple[list[Message], list[Message], list[Message]]:
    """What two conversations have in common, and the rest of each."""
    common = next((n for n, (a, b) in enumerate(zip(better, worse, strict=False)) if a != b), None)
    at = min(len(better), len(worse)) - 1 if common is None else common
    if better[at]["role"] != "assistant" or worse[at]["role"] != "assistant":
        notes.wrong(
            f"{chosen!r} and {rejected!r} differ in turn {at + 1} already, which is no answer "
            f"({better[at]['role']!r} and {worse[at]['role']!r}); expected the same conversation up to an answer"
        )
    return better[:at], better[at:], worse[at:]


def _without(asked: list[Message], answer: list[Message]) -> list[Message]:
    """An answer without the turns that it repeats from the prompt."""
    return answer[len(asked) :] if asked and len(answer) > len(asked) and answer[: len(asked)] == asked else answer


def _said(value: Any, asked: list[Message]) -> bool:
    """Whether a prompt that stands beside whole conversations is one of their turns."""
    said = {str(turn.get("content") or "").strip() for turn in asked}
    if isinstance(value, list):
        return all(isinstance(turn, dict) and str(turn.get("content")).strip() in said for turn in value)
    return isinstance(value, str) and value.strip() in said


def _says(turns: list[Message]) -> bool:
    return bool(turns) and any(
        turn["role"] == "assistant" and (str(turn.get("content") or "").strip() or turn.get("tool_calls"))
        for turn in turns
    )


def speaks(text: str) -> bool:
    """Whether a text is a dialogue as Anthropic's data write it."""
    return re.match(r"\s*(Human|Assistant):", text) is not None and "Human:" in text


def _spoken(text: str) -> list[Message]:
    """`\\n\\nHuman: … \\n\\nAssistant: …` as turns; an answer that is still to come is none."""
    parts = _SPEAKER.split(text)[1:]
    turns = [(speaker, words.strip()) for speaker, words in zip(parts[::2], parts[1::2], strict=True)]
    if turns and not turns[-1][1]:
        turns = turns[:-1]
    return [user(words) if speaker == "Human" else assistant(words) for speaker, words in turns]


def _named(used: Sequence[str], without: Sequence[str]) -> str:
    names = [repr(name) for name in used if name not in without]
    return f" beside {' + '.join(names)}," if names else ""
