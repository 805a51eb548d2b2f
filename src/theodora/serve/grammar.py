"""Answers of a given form: grammars, compiled beside the event loop by xgrammar, and which tokens can come next.

A grammar comes from a stranger: its size and its time have limits. Special tokens cannot come, except those that end
the answer, which can where the grammar can stop, and those that the format of the answer is made of.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import torch
import xgrammar
from torch import Tensor

from theodora.errors import ConfigError, TheodoraError
from theodora.serve.calls.forced import json_format
from theodora.serve.daemon_threads import DaemonThreads
from theodora.serve.messages import StructuredOutputs
from theodora.serve.schemas import check_optional, check_size, enforceable

T = TypeVar("T")

_COMPILE_SECONDS = 30.0
_STEP_SECONDS = 5.0
"""For one token, after which its answer is given up: the worker computes it for all."""
_MOST_STUCK = 4
"""Threads that may be left behind by grammars that took too long: native code cannot be stopped."""
_MOST_CHARACTERS = 2_000_000
"""Of a whole grammar: the schemas of all tools, say."""
_MOST_TAGS = 1024  # structures of a tag: each is compiled
_CACHE = 256 << 20  # bytes of compiled grammars that a compiler keeps
_LOG_HEADER = re.compile(r"^\[[\d:]+\] \S+: ")
"""What xgrammar writes in front of a message: time, and place in its source."""


class Unfollowable(TheodoraError):
    """The grammar leaves no token of the vocabulary, or takes too long."""


class Grammar:
    """A compiled grammar, for any number of answers."""

    def __init__(self, compiled: Any, hidden: Tensor, size: int) -> None:
        self._compiled, self._hidden, self._size = compiled, hidden, size

    def start(self) -> GrammarState:
        """The state of an answer without any token."""
        return GrammarState(xgrammar.GrammarMatcher(self._compiled), self._hidden, self._size)


class GrammarState:
    """How far one answer has come."""

    def __init__(self, matcher: Any, hidden: Tensor, size: int) -> None:
        self._matcher, self._hidden, self._size = matcher, hidden, size

    def mask(self, logits_V: Tensor) -> None:
        """Put -inf, in place, where a token cannot come next."""
        if self._matcher.is_terminated():
            return
        began = time.perf_counter()
        bits = xgrammar.allocate_token_bitmask(1, self._size)
        self._matcher.fill_next_token_bitmask(bits)
        bits &= self._hidden
        if not bits.any():
            raise Unfollowable("no token of the vocabulary can come next")
        if time.perf_counter() - began > _STEP_SECONDS:
            raise Unfollowable("the next token takes too long to find")
        own = logits_V[: self._size]
        xgrammar.apply_token_bitmask_inplace(own[None], bits.to(own.device), vocab_size=own.shape[0])
        logits_V[self._size :] = -torch.inf

    def accept(self, token: int) -> None:
        """Go on with the token that was picked."""
        if not self._matcher.accept_token(token):
            raise Unfollowable(f"token {token} does not fit")


class Grammars:
    """Compiles grammars for one model's vocabulary."""

    def __init__(self, tokenizer: Any, size: int, ends: Collection[int]) -> None:
        """Get ready; the vocabulary is read with the first grammar.

        Args:
            tokenizer: the model's.
            size: of the model's logits.
            ends: tokens that end an answer.
        """
        self._tokenizer, self._size, self._ends = tokenizer, size, frozenset(ends)
        self._threads = DaemonThreads(_MOST_STUCK)
        self._compilers: dict[tuple[int, ...], Any] = {}  # by the tokens that end an answer: adapters have their own

    async def grammar(
        self,
        format: dict[str, Any] | Callable[[], dict[str, Any]],
        words: Iterable[str] = (),
        ends: Collection[int] | None = None,
    ) -> Grammar:
        """The grammar of a structural tag's format.

        Args:
            format: the format, or what makes it.
            words: special tokens that the format is made of: they can come.
            ends: tokens that end the answer, where they are not the model's.

        Raises:
            ConfigError: it is none, or takes too long.
        """
        stops = tuple(sorted(end for end in (self._ends if ends is None else ends) if end < self._size))
        if not stops:
            raise ConfigError("This model has no token that ends an answer, which a form of the answer needs.")
        visible_ids = frozenset(self._tokenizer.convert_tokens_to_ids(word) for word in words)
        return await self.made(self._compile, format, visible_ids, stops)

    async def made(self, make: Callable[..., T], *args: Any) -> T:
        """What is made of a stranger's form, beside the event loop, and within a time.

        Raises:
            ConfigError: it makes no sense, or takes too long.
        """
        if self._threads.abandoned >= _MOST_STUCK:
            raise ConfigError(f"{_MOST_STUCK} grammars take too long to compile; none is begun until one of them ends.")
        try:
            return await asyncio.wait_for(self._threads(make, *args), _COMPILE_SECONDS)
        except TimeoutError as error:
            raise ConfigError(
                f"The grammar takes more than {_COMPILE_SECONDS:g} s to compile; expected a simpler one."
            ) from error

    def _compile(
        self,
        format: dict[str, Any] | Callable[[], dict[str, Any]],
        visible_ids: frozenset[int],
        stops: tuple[int, ...],
    ) -> Grammar:
        tag = json.dumps({"type": "structural_tag", "format": format() if callable(format) else format})
        if len(tag) > _MOST_CHARACTERS:
            raise ConfigError(f"The tools and the form have more than {_MOST_CHARACTERS} characters together.")
        compiler = self._compilers.get(stops)
        if compiler is None:
            info = xgrammar.TokenizerInfo.from_huggingface(
                self._tokenizer, vocab_size=self._size, stop_token_ids=list(stops)
            )
            compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=_CACHE)
            self._compilers[stops] = compiler
        try:
            compiled = compiler.compile_structural_tag(tag)
        except Exception as error:  # of several kinds
            raise ConfigError(f"The grammar cannot be compiled: {_LOG_HEADER.sub('', str(error)).strip()}") from error
        hidden = set(self._tokenizer.all_special_ids) - visible_ids - set(stops)
        return Grammar(compiled, _bits(self._size, hidden), self._size)


def format_of(form: StructuredOutputs) -> dict[str, Any]:
    """A request's form as the format of a structural tag.

    Raises:
        ConfigError: it makes no sense, or asks for what would not be kept to.
    """
    if form.whitespace_pattern is not None:
        raise ConfigError("whitespace_pattern: not supported by this server; disable_any_whitespace is")
    name = form.form
    if name in ("json", "json_object"):
        schema = {"type": "object"} if name == "json_object" else _schema(form.json_)
        return _json(schema, form.disable_any_whitespace)
    if name == "regex":
        check_size(form.regex, "The expression")
        check_optional([form.regex or ""], "The expression")
        return {"type": "regex", "pattern": form.regex}
    if name == "choice":
        if not form.choice:
            raise ConfigError("choice is empty; expected at least one text.")
        check_size(form.choice, "choice")
        return {"type": "or", "elements": [{"type": "const_string", "value": text} for text in form.choice]}
    if name == "grammar":
        check_size(form.grammar, "The grammar")
        assert form.grammar is not None
        check_optional([form.grammar], "The grammar")
        return {"type": "grammar", "grammar": form.grammar, "syntax": "ebnf" if "::=" in form.grammar else "lark"}
    return tag_format(form.structural_tag or "")


def _json(schema: Any, compact: bool) -> dict[str, Any]:
    if not compact:
        return json_format(schema)
    try:
        grammar = xgrammar.Grammar.from_json_schema(json.dumps(schema), any_whitespace=False)
    except Exception as error:
        raise ConfigError(f"The schema cannot be compiled: {_LOG_HEADER.sub('', str(error)).strip()}") from error
    return {"type": "grammar", "grammar": str(grammar)}


def tag_format(given: str | dict[str, Any]) -> dict[str, Any]:
    """The format within a structural tag, or within the older form of one (structures and triggers).

    Raises:
        ConfigError: it is none.
    """
    check_size(given, "The structural tag")
    try:
        tag = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"The structural tag is no JSON: {error}") from error
    check_size(tag, "The structural tag")
    if isinstance(tag, dict) and isinstance(tag.get("format"), dict):
        return tag["format"]
    if not isinstance(tag, dict) or not isinstance(tag.get("structures"), list):
        raise ConfigError("The structural tag has no format; expected an object with one, or structures and triggers.")
    if len(tag["structures"]) > _MOST_TAGS:
        raise ConfigError(f"The structural tag has {len(tag['structures'])} structures; expected at most {_MOST_TAGS}.")
    tags = [
        {
            "begin": structure.get("begin", ""),
            "content": json_format(structure.get("schema", {})),
            "end": structure.get("end", ""),
        }
        for structure in tag["structures"]
        if isinstance(structure, dict)
    ]
    return {"type": "triggered_tags", "triggers": tag.get("triggers") or [], "tags": tags}


def _schema(given: Any) -> Any:
    if isinstance(given, str):
        check_size(given, "The schema")
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"The schema is no JSON: {error}") from error
    check_size(given, "The schema")
    if not isinstance(given, dict | bool):
        raise ConfigError(f"The schema is {type(given).__name__}; expected an object.")
    return enforceable(given)


def _bits(size: int, without: Iterable[int]) -> Tensor:
    """A mask of all tokens but some, as xgrammar packs them."""
    bits = torch.full((1, -(-size // 32) * 32), True)
    bits[0, [token for token in without if 0 <= token < bits.shape[1]]] = False
    powers = torch.tensor([1 << n for n in range(31)] + [-(1 << 31)], dtype=torch.int64)
    return (bits.view(1, -1, 32).long() * powers).sum(-1).to(torch.int32)
