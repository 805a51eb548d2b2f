"""Where the rows of another tool's file are, as ours names them: a file, a folder, or a data set of the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from theodora.errors import shown
from theodora.foreign.reading import Reading, is_off

JOINED = "all-rows.jsonl"
"""What several data sets have to be joined as: ours takes one."""
# Names that mean here what they say, whatever a file calls them.
TURNS = ("messages", "conversations", "conversation")
KEYS_OF_TURNS = ("role", "content", "from", "value", "weight", "train", "training")


def take(reading: Reading, option: str, origin: str, places: Sequence[str]) -> None:
    """Say where the rows are (`data`, `eval_data`); several places have to be joined first."""
    if len(places) == 1:
        reading.set(option, places[0], origin, places[0])
    elif places:
        reading.set(option, JOINED, origin, list(places))
        reading.missing(
            origin,
            list(places),
            f"the rows of all {len(places)} would be trained on; {option} takes one source. Write them into one file, "
            f"{JOINED}, say: `cat` does for .jsonl files of one layout",
        )


def hub_name(name: str, config: Any) -> str:
    """A data set of the Hub, with the configuration of it that is meant."""
    return f"{name}:{config}" if isinstance(config, str) and config and config != "default" else name


def name_columns(
    reading: Reading, origin: str, names: Mapping[str, Any], understood: Mapping[str, Sequence[str]]
) -> None:
    """Note which columns a file of theirs names: those that ours takes for the same, and those to rename.

    Args:
        reading: where to note it.
        origin: the field that holds the names.
        names: what a column is for → its name.
        understood: what it is for → names that are taken for it here.
    """
    for purpose, name in names.items():
        field = f"{origin}.{purpose}"
        if name is None:
            continue
        if purpose not in understood:
            reading.missing(field, name, f"would take the column {shown(name)} for {purpose}, which is not read here")
        elif name in understood[purpose]:
            reading.note("held", field, name, "the column is recognised by its name")
        else:
            expected = " or ".join(understood[purpose])
            reading.missing(field, name, f"would take the column {shown(name)} for {purpose}; rename it to {expected}")


def report_to(reading: Reading, origin: str, given: Any) -> None:
    """Where a run logs to: what writes files here; what sends is a flag."""
    names = [str(name) for name in listed(given) if not is_off(name)]
    if set(names) <= {"tensorboard"}:
        reading.set("report_to", names, origin, given)
    else:
        reading.note(
            "flag", origin, given, f"--report-to {' '.join(names)}: a file cannot send what a run logs to others"
        )


def listed(value: Any) -> Iterator[Any]:
    """The items of a list, of text with commas, or the one thing that stands there."""
    if isinstance(value, str):
        yield from (part.strip() for part in value.split(",") if part.strip())
    elif isinstance(value, list | tuple):
        yield from value
    else:
        yield value
