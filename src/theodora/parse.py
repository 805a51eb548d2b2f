"""JSON and YAML from files that nobody vouches for: all that can be wrong is a ValueError, and nothing runs.

Both formats let a file say the same name twice and leave it to the reader which one counts; here that is an error,
because the next reader may choose the other one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

# A few lines of YAML aliases can stand for more values than memory holds ("billion laughs").
_MOST_YAML_VALUES = 100_000


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: no JSON (a `json.JSONDecodeError`), nested too deeply, or with the same key twice in an object.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_yaml(text: str) -> Any:
    """What a YAML text holds: plain values only; tags such as `!!python/object` are refused.

    Raises:
        ValueError: no YAML, nested too deeply, with the same key twice in a mapping, or with aliases that stand for
            more values than any configuration has.
    """
    import yaml

    try:
        value = yaml.load(text, _yaml_loader())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except Exception as error:  # besides YAMLError what `!!int ""`, `!!bool x` and their like make PyYAML trip over
        raise ValueError(str(error) if isinstance(error, yaml.YAMLError | ValueError) else repr(error)) from error
    if _values_in(value, _MOST_YAML_VALUES) >= _MOST_YAML_VALUES:
        raise ValueError(f"its aliases stand for more than {_MOST_YAML_VALUES:,} values")
    return value


def to_yaml(value: Any) -> str:
    """Plain values as YAML that gives them again: readable, unless a character would be lost that way (U+0085 is)."""
    import yaml

    for readable in (True, False):
        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=readable)
        if repr(yaml.safe_load(text)) == repr(value):  # NaN differs from itself
            break
    return text


@cache
def _yaml_loader() -> Any:
    """PyYAML's SafeLoader, except that a mapping cannot hold a key twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            # Here, before keys that come by `<<` are merged in, which may be overridden.
            node: Any = super().compose_mapping_node(anchor)
            keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                line = node.start_mark.line + 1
                name = _first_repeated(keys)[1]
                raise ValueError(f"it has the key {name!r} twice in the mapping that begins in line {line}")
            return node

    return Loader


def _values_in(value: Any, most: int) -> int:
    """How many values `value` holds, each as often as it is met; counting stops at `most`."""
    count, waiting = 0, [value]
    while waiting and count < most:
        count += 1
        item = waiting.pop()
        if isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple | set):
            waiting.extend(item)
    return count


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"it has the key {_first_repeated([name for name, _ in pairs])!r} twice")
    return row


def _first_repeated(names: list[Any]) -> Any:
    seen: set[Any] = set()
    return next(name for name in names if name in seen or seen.add(name))


def to_json(value: Any, *, indent: int | None = None, readable: bool = False) -> str:
    """A value as JSON that every reader takes: a number that is not finite is null, since JSON has no NaN.

    Args:
        value: plain values; what else there may be is the caller's to turn into them.
        indent: blanks for each level; None: all on one line.
        readable: letters as they are, for a file; else ASCII alone, for a stream of any encoding.
    """
    return json.dumps(finite_values(value), indent=indent, ensure_ascii=not readable, allow_nan=False)


def finite_values(value: Any) -> Any:
    """The same plain values, with None for numbers that are not finite, as JSON has no others."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_finite_key(key): finite_values(item) for key, item in value.items()}
    return [finite_values(item) for item in value] if isinstance(value, list | tuple) else value


def _finite_key(key: Any) -> Any:
    return str(key) if isinstance(key, float) and not math.isfinite(key) else key
