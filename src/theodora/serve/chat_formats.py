"""The chat template and the end tokens that an adapter was trained with, where its folder says so.

The server has one tokenizer, the base model's. An adapter that was trained with another template (a fallback for a base
without one, say) is asked with that template, and ends where that ends its turns.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from theodora.ends import as_ids, end_token_ids
from theodora.errors import CheckpointError
from theodora.files.folder import Place
from theodora.parse import parse_json

log = logging.getLogger("theodora.serve")

_SETTINGS, _GENERATION = "tokenizer_config.json", "generation_config.json"
_TEMPLATES = {"default": "chat_template.jinja", "tool_use": "additional_chat_templates/tool_use.jinja"}
_LARGEST = 4 << 20  # bytes; what is read stays in memory as long as the adapter is served
_LARGEST_VOCABULARY = 128 << 20  # four times the largest


@dataclass(frozen=True)
class ChatFormat:
    """How one adapter, or the base model, is asked, and where its answers end."""

    template: str | None
    """The chat template; None for the tokenizer's own."""
    ends: frozenset[int]
    """Tokens that end an answer."""
    with_tools: str | None = None
    """The chat template where tools are on offer, if there is one of its own for them."""

    def template_of(self, tools: bool) -> str | None:
        """The chat template of a chat with tools, or without; None for the tokenizer's own."""
        return (self.with_tools if tools else None) or self.template


def read_format_files(place: Place) -> dict[str, bytes]:
    """The files of an adapter's folder that its chat format is read from, by their names.

    Raises:
        CheckpointError: one is no file, far too large, or leads out of the folder that it may be in.
    """
    try:
        with place.open() as folder:
            contents = {name: folder.read(name, _LARGEST) for name in (_SETTINGS, _GENERATION, *_TEMPLATES.values())}
    except OSError:
        return {}
    return {name: content for name, content in contents.items() if content is not None}


def chat_format_of(files: Mapping[str, bytes] | None, tokenizer: Any, generation_config: Any) -> ChatFormat:
    """The chat format of an adapter: the base model's, where its files say nothing else.

    Args:
        told: what its folder says (see `read_format_files`); None for the base model.
        tokenizer: the base model's, by which all requests are cut into tokens.
        generation_config: the base model's.
    """
    base = frozenset(end_token_ids(generation_config, tokenizer))
    if files is None:
        return ChatFormat(None, base)
    settings = _object(files.get(_SETTINGS))
    template, with_tools = _templates(files, settings)
    if template == getattr(tokenizer, "chat_template", None):
        template = None
    own = copy.copy(tokenizer)
    own.chat_template = template or getattr(tokenizer, "chat_template", None)
    eos = settings.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    known = tokenizer.get_vocab()
    ends = [*end_token_ids(_object(files.get(_GENERATION)), own), *base]
    ends += as_ids(known.get(eos)) if isinstance(eos, str) else []
    return ChatFormat(template, frozenset(ends), with_tools)


def _templates(files: Mapping[str, bytes], settings: dict[str, Any]) -> tuple[str | None, str | None]:
    """The chat template, and the one for tools: in files of their own, or, in older folders, among the settings."""
    setting = settings.get("chat_template")
    if isinstance(setting, list):  # several, by name
        named = {str(entry.get("name")): entry.get("template") for entry in setting if isinstance(entry, dict)}
    else:
        named = {"default": setting}
    for name, file in _TEMPLATES.items():
        with suppress(KeyError, UnicodeDecodeError):
            named[name] = files[file].decode("utf-8")
    default, with_tools = (named.get(name) if isinstance(named.get(name), str) else None for name in _TEMPLATES)
    return default, with_tools


def warn_of_unknown_tokens(place: Place, tokenizer: Any) -> None:
    """Log the tokens that an adapter was trained with, and that the server does not cut its requests into."""
    try:
        with place.open() as folder:
            added = _object(folder.read("tokenizer.json", _LARGEST_VOCABULARY)).get("added_tokens")
    except (OSError, CheckpointError):
        return
    known = tokenizer.get_vocab()
    entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    strange = [text for entry in entries if known.get(text := str(entry.get("content"))) != entry.get("id")]
    if strange:
        log.warning(
            "%s was trained with tokens that the base model's tokenizer does not have (%s): texts are cut without "
            "them. Send token ids, or merge the adapter and serve the merged model.",
            place.path,
            ", ".join(strange[:8]),
        )


def _object(content: bytes | None) -> dict[str, Any]:
    """A JSON object; an empty one where there is none. What is wrong with an adapter's own files was said before."""
    try:
        value = parse_json((content or b"").decode("utf-8"))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
