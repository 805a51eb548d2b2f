"""Where a text may be cut so that the tokens of its pieces are the tokens of the whole; proved of each tokenizer.

Byte-level tokenizers cut a text before they look anything up: at added tokens, then by a regular expression that knows
words, numbers and runs of signs. No alternative of those in `_ALTERNATIVES` goes on from something that is no white
space to white space other than line breaks, and none goes on behind line breaks to anything but more white space or
"/". So a word ends there whatever follows, and begins there whatever was before; only the sight ahead of `\\s+(?!\\S)`
goes beyond a word, over white space alone. A text that NFC would change is not cut, nor one for a
tokenizer with anything else (a space put before a text, added tokens that take white space with them, dropout).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_RUNS, _LAST_RUN, _BREAKS = r"\s+", r"\s+(?!\S)", r"\s*[\r\n]+"
_WITHIN_WORDS = (r"\p{N}", r"\p{N}{1,3}", r"\d", r"[0-9]", "[一-龥぀-ゟ゠-ヿ]+")
"""Alternatives that match no white space."""
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ALTERNATIVES = frozenset(
    (
        *(_RUNS, _LAST_RUN, _BREAKS, *_WITHIN_WORDS),
        *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _SHORT, "'(?i:[sdmt]|ll|ve|re)"),
        *(r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+"),  # GPT-2
        *(r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*"),  # GPT-4, Llama 3, Qwen
        *(r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),  # Qwen 3.5
        *(*_CASED, *(f"{words}{_SHORT}?" for words in _CASED), r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),  # GPT-4o, Mistral
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",  # DeepSeek
        *(r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+", r" ?[\p{P}\p{S}]+[\r\n]*"),
    )
)
# Words with the white space in front, and with the line breaks behind if the next line may begin a piece.
_NEXT = r"(?=[^\S\r\n]*[^\s/])"
_BY_LINES = re.compile(rf"[\r\n]+{_NEXT}|\s*\S+(?:(?![\r\n]+{_NEXT})[\r\n]\s*\S+)*(?:[\r\n]+{_NEXT}|[\r\n]\s*\Z)?|\s+")
# Where line breaks are no match of their own, several of them are cut by what follows: one alone is not.
_BY_WORDS = re.compile(r"\A\n(?=[^\s/])|\s*\S+(?:(?!\n[^\s/])[\r\n]\s*\S+)*(?:\n(?=[^\s/])|[\r\n]\s*\Z)?|\s+")
_CUT = re.compile(r"\S[^\S\r\n]|[\r\n][^\r\n]")


@dataclass(frozen=True)
class Borders:
    """How to cut texts."""

    hard: re.Pattern[str] | None
    """Added tokens, which the tokenizer looks for before anything else; None if there are none."""
    pieces: re.Pattern[str]
    """Matches the pieces of what stands between them, one after another."""
    separator: str | None
    """One of the added tokens that stays itself whatever stands beside it; None if there is none."""
    normalizes: bool
    """Whether the tokenizer brings texts into NFC, so that tokens of others lie elsewhere than their characters."""
    around: tuple[Sequence[int], Sequence[int]] | None
    """The special tokens that are put before and behind a text; None if more may be done to it."""

    def cut(self, text: str) -> list[str]:
        """The pieces of a text, which make up the text together."""
        if self.hard is None:
            return self.pieces.findall(text)
        stretches = self.hard.split(text)
        if len(stretches) == 1:
            return self.pieces.findall(text)
        cut: list[str] = []
        for i, stretch in enumerate(stretches):
            if i % 2:
                cut.append(stretch)
            elif stretch:
                cut += self.pieces.findall(stretch)
        return cut


def borders_of(tokenizer: PreTrainedTokenizerBase) -> Borders | None:
    """How to cut texts for a tokenizer; None where it is not sure that this gives the same tokens."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or not _calls_are_its_own(tokenizer):
        return None
    backend: Tokenizer = tokenizer.backend_tokenizer
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content]
    hard = [token.content for token in added if not token.normalized]
    normalizer = _state(backend.normalizer)
    if not _model_is_sure(backend) or not _is_nfc(normalizer) or not all(map(_stands_alone, added)):
        return None
    stages = _stages(_state(backend.pre_tokenizer))
    by_lines = None if stages is None else _cuts_by_lines(stages)
    if by_lines is None:
        return None
    longest_first = sorted(hard, key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if hard else None
    around = _around(_state(backend.post_processor))
    return Borders(pattern, _BY_LINES if by_lines else _BY_WORDS, _separator(hard), bool(normalizer), around)


def _separator(hard: Sequence[str]) -> str | None:
    def stays(token: str) -> bool:
        """Whether no other token holds it, and none (itself, too: "||") ends as it begins: the leftmost is found."""
        begins = tuple(token[:end] for end in range(1, len(token)))
        return not any((other != token and token in other) or other.endswith(begins) for other in hard)

    return next(filter(stays, hard), None)


def _calls_are_its_own(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether texts go to the tokenizers library as they are: nobody's own class or function does something to them."""
    kind, names = type(tokenizer), ("__call__", "_encode_plus")
    is_replaced = not vars(tokenizer).keys().isdisjoint(names)
    return not is_replaced and all(getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in names)


def _model_is_sure(backend: Tokenizer) -> bool:
    """Whether the model always gives the same tokens, at least one for each byte."""
    model = backend.model
    if not isinstance(model, models.BPE) or model.dropout:
        return False
    # With these, letters within a word or at its end are other tokens, which may not be there.
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    return all(model.token_to_id(letter) is not None for letter in pre_tokenizers.ByteLevel.alphabet())


def _stands_alone(token: AddedToken) -> bool:
    """Whether an added token looks at nothing beside it, and is never cut itself."""
    looks = token.lstrip or token.rstrip or token.single_word
    return not looks and not (token.normalized and _CUT.search(token.content))


def _state(part: Any) -> dict[str, Any]:
    return json.loads(part.__getstate__()) if part is not None else {}


def _is_nfc(normalizer: dict[str, Any]) -> bool:
    if normalizer.get("type") == "Sequence":
        return all(map(_is_nfc, normalizer["normalizers"]))
    return not normalizer or normalizer["type"] == "NFC"


def _around(post_processor: dict[str, Any]) -> tuple[list[int], list[int]] | None:
    kind = post_processor.get("type", "ByteLevel")
    if kind == "Sequence":
        parts = [part for part in post_processor["processors"] if part["type"] != "ByteLevel"]
        return _around(parts[0] if parts else {}) if len(parts) < 2 else None
    if kind != "TemplateProcessing":
        return ([], []) if kind == "ByteLevel" else None
    whole, special = post_processor["single"], post_processor["special_tokens"]
    at = [i for i, part in enumerate(whole) if "Sequence" in part]
    ids = [special[part["SpecialToken"]["id"]]["ids"] if "SpecialToken" in part else [] for part in whole]
    return (list(chain(*ids[: at[0]])), list(chain(*ids[at[0] :]))) if len(at) == 1 else None


def _stages(pre_tokenizer: dict[str, Any]) -> list[Sequence[str]] | None:
    """The alternatives of each regular expression that texts are cut by; None if something else is done."""
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        parts = [_stages(part) for part in pre_tokenizer["pretokenizers"]]
        return None if None in parts else [stage for part in parts for stage in cast("list[Sequence[str]]", part)]
    if kind == "Digits":
        return [[r"\d"]]
    if kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        gpt2 = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+"]
        return [[*gpt2, _LAST_RUN, _RUNS]] if pre_tokenizer["use_regex"] else []
    pattern = pre_tokenizer.get("pattern", {}).get("Regex")
    if kind != "Split" or pattern is None or pre_tokenizer["behavior"] != "Isolated" or pre_tokenizer["invert"]:
        return None
    alternatives = _alternatives(pattern.replace("\r", r"\r").replace("\n", r"\n"))
    return [alternatives] if _ALTERNATIVES.issuperset(alternatives) else None


def _cuts_by_lines(stages: Sequence[Sequence[str]]) -> bool | None:
    """Whether the first stage that cuts at white space has line breaks as a match of their own; None if none cuts."""
    cutting = next((stage for stage in stages if not set(stage) <= set(_WITHIN_WORDS)), [])
    order = [cutting.index(part) for part in (_BREAKS, _LAST_RUN, _RUNS) if part in cutting]
    if _RUNS not in cutting or order != sorted(order):
        return None
    return _BREAKS in cutting


def _alternatives(pattern: str) -> list[str]:
    """A regular expression cut at its outermost bars."""
    parts, depth, in_class, at = [""], 0, False, 0
    while at < len(pattern):
        part = pattern[at : at + 2] if pattern[at] == "\\" else pattern[at]
        at += len(part)
        if part == "|" and not depth and not in_class:
            parts.append("")
            continue
        depth += 0 if in_class else (part == "(") - (part == ")")
        in_class = part == "[" or (in_class and part != "]")
        parts[-1] += part
    return parts
