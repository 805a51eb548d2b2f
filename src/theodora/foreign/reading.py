"""What a file of another tool says, on its way into ours: every field of it ends as an option, or as a note.

A tool is a table of rules, field → `Rule`. A field without a rule may still be one that we or TRL have by that name, or
one that `other_words` knows; what is left after that is noted as unknown. Nothing is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from theodora.coerce import coerce, type_hints
from theodora.config import OPTION_NAMES, SAME_AS, AdapterConfig, TrainConfig
from theodora.errors import ConfigError, bullet_list, shown
from theodora.other_words import NAMES, advice

Kind = Literal["translated", "default", "held", "differs", "missing", "flag", "unset"]
Checks = Mapping[str, Callable[[Any], str | None]]
"""Name of a field of TRL's → what is wrong with a value for it; None: nothing."""
_HINTS = {**type_hints(AdapterConfig), **type_hints(TrainConfig)}
OFF = (None, False, "", 0, "false", "False", "none", "None", "no")


@dataclass(frozen=True)
class Note:
    """What became of one field."""

    kind: Kind
    """translated; default (the tool's, written because ours is another); held (without an option); differs (taken over,
    and works otherwise); missing (no counterpart); flag (only a flag can say it); unset."""
    field: str
    """In their file; of a default, in ours."""
    value: Any
    text: str
    """The line here, why nothing is to be said, or what it would have meant."""


@dataclass
class Reading:
    """A file of another tool, being read."""

    tool: str
    checks: Checks
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """Ours, so far."""
    notes: list[Note] = field(default_factory=list[Note])
    origins: dict[str, str] = field(default_factory=dict[str, str])
    """Our option → the field that said it."""
    problems: list[str] = field(default_factory=list[str])
    """What makes the file ambiguous, or nothing that can be trained here."""

    def set(self, name: str, value: Any, origin: str, given: Any, differs: str = "") -> None:
        """Take an option over.

        Args:
            name: ours, or of TRL's.
            value: for it.
            origin: the field that says so.
            given: what stands there.
            differs: what is otherwise here, if something is.
        """
        value, wrong = self._fitting(name, value)
        if wrong is not None:
            self.note("missing", origin, given, wrong)
            return
        if name in self.options and self.options[name] != value:
            self.problems.append(
                f"{self.origins[name]} asks for {name}: {shown(self.options[name])}, and {origin} for {shown(value)}; "
                "expected one of them"
            )
            return
        self.options[name] = value
        self.origins[name] = f"{self.origins[name]}, {origin}" if name in self.origins else origin
        text = f"{name}: {shown(value)}" + (f"; {differs}" if differs else "")
        self.note("differs" if differs else "translated", origin, given, text)

    def _fitting(self, name: str, value: Any) -> tuple[Any, str | None]:
        """The value as the option's type, and what is wrong with it."""
        if name in _HINTS:
            try:
                fitted = coerce(value, _HINTS[name])
                value = fitted if isinstance(value, str) else value  # 16 stays 16 where 16.0 is as good
            except ValueError as error:
                return value, f"{name} cannot be that; expected {error}"
        wrong = self.checks[name](value) if name in self.checks else None
        return list(value) if isinstance(value, tuple) else value, wrong

    def default(self, name: str, value: Any) -> None:
        """Write what the tool does by default, where ours is another default and the file says nothing."""
        if name not in self.options:
            self.options[name] = value
            self.origins[name] = f"by default in {self.tool}"
            self.note("default", name, value, f"{name}: {shown(value)}, which {self.tool} has by default")

    def note(self, kind: Kind, origin: str, given: Any, text: str) -> None:
        """Say what became of a field."""
        self.notes.append(Note(kind, origin, given, text))

    def missing(self, origin: str, given: Any, text: str) -> None:
        """Say that a field has no counterpart, and what it would have meant."""
        self.note("missing", origin, given, text)

    def refuse(self, problem: str) -> None:
        """The file cannot be translated; all that is wrong is told together."""
        self.problems.append(problem)

    def finish(self, given: Mapping[str, Any]) -> None:
        """See that every field was read.

        Raises:
            ConfigError: for all that was refused.
        """
        noted = {re.split(r"[.\[]", note.field)[0] for note in self.notes if note.kind != "default"}
        for name in given.keys() - noted if not self.problems else ():
            self.note("unset", name, given[name], "nothing is said")
        self.check()

    def check(self) -> None:
        """Raise a ConfigError for all that was refused."""
        if self.problems:
            raise ConfigError(f"This file of {self.tool} cannot be translated:" + bullet_list(self.problems))


Rule = Callable[[Reading, str, Any], None]
"""What to do with a field: (reading, its name, its value)."""


def to(name: str, differs: str = "") -> Rule:
    """The same option under our name."""

    def rule(reading: Reading, origin: str, given: Any) -> None:
        reading.set(name, given, origin, given, differs)

    return rule


def held(why: str) -> Rule:
    """What needs no option here, because it is so by itself; if it is switched off there, that is missing."""

    def rule(reading: Reading, origin: str, given: Any) -> None:
        reading.note("held", origin, given, why)

    return rule


def missing(meaning: str) -> Rule:
    """What there is no counterpart for; switched off it is as here."""

    def rule(reading: Reading, origin: str, given: Any) -> None:
        if is_off(given):
            reading.note("held", origin, given, "it is off here, too")
        else:
            reading.missing(origin, given, meaning)

    return rule


def flag(words: str, why: str) -> Rule:
    """What a file cannot grant here; `{}` in the words is the value."""

    def rule(reading: Reading, origin: str, given: Any) -> None:
        if is_off(given):
            reading.note("held", origin, given, "it is off here, too")
        else:
            reading.note("flag", origin, given, f"{words.format(given)}: {why}")

    return rule


def when_on(name: str, value: Any, otherwise: str = "it is off here, too", differs: str = "") -> Rule:
    """An option that a switch stands for.

    Args:
        name: ours.
        value: its value where the switch is on.
        otherwise: what to note where it is off.
        differs: what is otherwise here, if something is.
    """

    def rule(reading: Reading, origin: str, given: Any) -> None:
        if is_on(given):
            reading.set(name, value, origin, given, differs)
        else:
            reading.note("held", origin, given, otherwise)

    return rule


def words(name: str, by_word: Mapping[str, Any], otherwise: str) -> Rule:
    """An option whose words are others here.

    Args:
        name: ours.
        by_word: their word, in small letters, → ours; None where nothing is to be said.
        otherwise: what to note of a word that is not among them.
    """

    def rule(reading: Reading, origin: str, given: Any) -> None:
        word = str(given).lower()
        if word not in by_word:
            reading.missing(origin, given, otherwise)
        elif by_word[word] is None:
            reading.note("held", origin, given, "it is so by default here, too")
        else:
            reading.set(name, by_word[word], origin, given)

    return rule


def bf16(reading: Reading, origin: str, given: Any) -> None:
    """Whether products are in bfloat16; `auto` is what holds by default."""
    if given == "auto":
        reading.note("held", origin, given, "bfloat16 is used where the hardware computes in it")
    else:
        reading.set("bf16", True if given == "full" else given, origin, given)


def is_off(value: Any) -> bool:
    """Whether a value switches something off, or says nothing."""
    return (value.strip() if isinstance(value, str) else value) in (*OFF, [], {}, ())


def is_on(value: Any) -> bool:
    """Whether a value is true, also as text."""
    return value is True or str(value).lower() == "true"


def read_fields(
    reading: Reading, given: Mapping[str, Any], rules: Mapping[str, Rule], done: tuple[str, ...] = ()
) -> None:
    """Apply the rules to every field but those that are done already."""
    for name, value in given.items():
        if name in done:
            continue
        if value is None:
            reading.note("unset", name, None, "nothing is said")
        elif name in rules:
            rules[name](reading, name, value)
        else:
            _by_name(reading, name, value)


def note_of_adapters(reading: Reading, given: Mapping[str, Any], names: Collection[str], where: str = "") -> None:
    """Say of the fields that tell how adapters are made that they do nothing where all weights are trained."""
    for name in names:
        if name in given:
            reading.note("held", where + name, given[name], "it is of adapters, and all weights are trained")


def read_under(reading: Reading, where: str, given: Any, rules: Mapping[str, Rule]) -> None:
    """The fields of something within the file; those without a rule have no counterpart."""
    if not isinstance(given, Mapping):
        reading.missing(where, given, "is no mapping of names to values")
        return
    for key, value in given.items():
        if value is None:
            reading.note("unset", f"{where}.{key}", None, "nothing is said")
        elif key in rules:
            rules[key](reading, f"{where}.{key}", value)
        else:
            missing("no counterpart is known; look up there what it means")(reading, f"{where}.{key}", value)


def _by_name(reading: Reading, name: str, value: Any) -> None:
    ours = name if name in OPTION_NAMES or name in reading.checks else NAMES.get(name)
    if name in SAME_AS:
        ours, words = SAME_AS[name]
        reading.set(ours, words.get(value, value) if isinstance(value, bool) else value, name, value)
    elif ours is not None:
        reading.set(ours, value, name, value)
    elif (told := advice(name, value)) is not None:
        missing(told)(reading, name, value)
    else:
        reading.missing(name, value, f"no field that is known of {reading.tool}; look up there what it means")
