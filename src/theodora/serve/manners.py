"""How an adapter was taught to be asked and to end, where its folder says so: its own chat template and EOS.

The server has one tokenizer, the base model's. An adapter that was trained with another template (a fallback for a base
without one, say) is asked with that template, and ends where that ends its turns.
"""

from __future__ import annotations

import copy
import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theodora.ends import as_ids, end_token_ids

log = logging.getLogger("theodora.serve")


@dataclass(frozen=True)
class Manner:
    """Of one adapter, or of the base model."""

    template: str | None
    """The chat template; None for the tokenizer's own."""
    ends: frozenset[int]
    """Tokens that end an answer."""
    with_tools: str | None = None
    """The chat template where tools are on offer, if there is one of its own for them."""

    def template_of(self, tools: bool) -> str | None:
        """The chat template of a chat with tools, or without; None for the tokenizer's own."""
        return (self.with_tools if tools else None) or self.template


def manner_of(folder: Path | None, tokenizer: Any, generation_config: Any) -> Manner:
    """How the adapter in `folder` is asked, and where it ends; that of the base model where it says nothing else.

    Args:
        folder: the adapter's; None for the base model.
        tokenizer: the base model's, by which all requests are cut into tokens.
        generation_config: the base model's.
    """
    base = frozenset(end_token_ids(generation_config, tokenizer))
    if folder is None:
        return Manner(None, base)
    settings = _read(folder / "tokenizer_config.json")
    template, with_tools = _templates(folder, settings)
    if template == getattr(tokenizer, "chat_template", None):
        template = None
    own = copy.copy(tokenizer)
    own.chat_template = template or getattr(tokenizer, "chat_template", None)
    eos = settings.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    known = tokenizer.get_vocab()
    ends = [*end_token_ids(_read(folder / "generation_config.json"), own), *base, *as_ids(known.get(eos))]
    _tell_unknown(folder, known)
    return Manner(template, frozenset(ends), with_tools)


def _templates(folder: Path, settings: dict[str, Any]) -> tuple[str | None, str | None]:
    """The chat template, and the one for tools: in files of their own, or, in older folders, among the settings."""
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
    else:
        named = {"default": found}
    files = {
        "default": folder / "chat_template.jinja",
        "tool_use": folder / "additional_chat_templates" / "tool_use.jinja",
    }
    for name, file in files.items():
        with suppress(OSError, UnicodeDecodeError):
            named[name] = file.read_text(encoding="utf-8")
    default, with_tools = (named.get(name) if isinstance(named.get(name), str) else None for name in files)
    return default, with_tools


def _tell_unknown(folder: Path, known: dict[str, int]) -> None:
    """Log the tokens that an adapter was trained with, and that the server does not cut its requests into."""
    added = _read(folder / "tokenizer.json").get("added_tokens")
    entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    strange = [str(entry.get("content")) for entry in entries if known.get(entry.get("content", "")) != entry.get("id")]
    if strange:
        log.warning(
            "%s was trained with tokens that the base model's tokenizer does not have (%s): texts are cut without "
            "them. Send token ids, or merge the adapter and serve the merged model.",
            folder,
            ", ".join(strange[:8]),
        )


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none. What is wrong with an adapter's own files was said before."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
