"""What some tools write into the parts of a turn's content (Anthropic, Axolotl) → turns as everybody else has them."""

from __future__ import annotations

from typing import Any, cast

_CALL, _RESULT = "tool_use", "tool_result"
_FLAGS = ("train", "weight")


def turns_of_blocks(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """A turn whose content holds Anthropic's `tool_use` or `tool_result` blocks as the turns that these are.

    Results go in front of what the user says beside them. A turn with words behind a call has no other spelling (they
    would change places with the call): it stays as it is, and its blocks are refused where parts are read.
    """
    turn = _with_shared_flags(turn)
    content = turn.get("content")
    kinds = [_kind(part) for part in cast(list[Any], content)] if isinstance(content, list) else []
    parts = cast(list[dict[str, Any]], content)
    if _RESULT in kinds and _CALL not in kinds:
        rest = [part for part, kind in zip(parts, kinds, strict=True) if kind != _RESULT]
        results = [_result(part, turn) for part, kind in zip(parts, kinds, strict=True) if kind == _RESULT]
        return [*results, turn | {"content": rest}] if rest else results
    if _CALL in kinds and turn.get("tool_calls") is None:
        first = kinds.index(_CALL)
        if all(kind == _CALL for kind in kinds[first:]):
            return [turn | {"content": parts[:first] or None, "tool_calls": [_call(part) for part in parts[first:]]}]
    return [turn]


def _with_shared_flags(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn that is learned, or not, if all of its parts are said to be (Axolotl marks parts)."""
    content = turn.get("content")
    for key in _FLAGS:
        parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
        flags = [part.get(key) for part in cast(list[dict[str, Any]], parts)]
        shared = flags and len(flags) == len(cast(list[Any], content)) and all(flag == flags[0] for flag in flags)
        if shared and flags[0] is not None and turn.get(key) is None:
            content = [{name: value for name, value in part.items() if name != key} for part in parts]
            turn = turn | {key: flags[0], "content": content}
    return turn


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else None


def _call(block: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in block.items() if key not in ("type", "name", "input")}
    return {**rest, "function": {"name": block.get("name"), "arguments": block.get("input")}}


def _result(block: dict[str, Any], turn: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in block.items() if key not in ("type", "tool_use_id", "content")}
    said = block.get("content")
    return {
        **turn,
        **rest,
        "role": "tool",
        "content": "" if said is None else said,
        "tool_call_id": block.get("tool_use_id"),
    }
