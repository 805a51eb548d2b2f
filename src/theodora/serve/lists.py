"""How many entries the lists and objects of a body may have, and how many of their misses are looked for.

Pydantic writes an error for every entry, of every kind that it could be: of a list of 10⁶ entries, gigabytes of errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BeforeValidator, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

MANY = 65_536
"""Entries of a list whose real limit is what the server can run, and is checked later: no server takes as many."""


@dataclass(frozen=True)
class AtMost:
    """For `Annotated[list[…], AtMost(64)]`: so many entries. Of a long list, only the first miss is told."""

    most: int
    few: int = 16
    """Entries of a list whose misses are all told."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The list's schema twice: a long list is read by the one that stops at the first miss."""
        schema: Any = {**handler(source), "max_length": self.most}

        def how_many(value: Any) -> str:
            return "MANY" if isinstance(value, list) and len(value) > self.few else "FEW"  # pyright: ignore[reportUnknownArgumentType]

        choices: dict[Any, Any] = {"FEW": schema, "MANY": {**schema, "fail_fast": True}}
        return core_schema.tagged_union_schema(choices, discriminator=how_many)


def keys_at_most(most: int) -> BeforeValidator:
    """For `Annotated[dict[…], keys_at_most(64)]`: so many entries, counted before they are looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:  # pyright: ignore[reportUnknownArgumentType]
            context = {"field_type": "Dictionary", "max_length": most, "actual_length": len(value)}  # pyright: ignore[reportUnknownArgumentType]
            raise PydanticKnownError("too_long", context)
        return value

    return BeforeValidator(check)
