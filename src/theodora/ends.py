"""Which tokens end an answer: those that the model's settings name, and those that its chat template writes.

A base model whose tokenizer says `<|endoftext|>` and whose template closes turns with `<|im_end|>` is trained to end
with the second. Whoever waits for the first alone waits for ever.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from theodora.metered import meter_templates

_MARK = "\ue000"  # a character for private use, which templates do not hold
_CALL = {"type": "function", "function": {"name": _MARK, "arguments": {"a": _MARK}}}


def end_token_ids(model_generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end an answer, without repetitions: the generation settings', the tokenizer's EOS, the template's.

    Args:
        model_generation_config: a `GenerationConfig`, the same as a mapping, or None.
        tokenizer: of the model or, where there is one, its adapter's own.
    """
    configured = (
        model_generation_config.get("eos_token_id")
        if isinstance(model_generation_config, dict)
        else getattr(model_generation_config, "eos_token_id", None)
    )
    ids = [*as_ids(configured), *as_ids(getattr(tokenizer, "eos_token_id", None)), *template_end_ids(tokenizer)]
    return tuple(dict.fromkeys(id for id in ids if id >= 0))


def length_to_end(tokens: Sequence[int], ends: Collection[int]) -> int:
    """How many tokens an answer has, the first that ends it included; all of them where none does."""
    return next((at + 1 for at, token in enumerate(tokens) if token in ends), len(tokens))


def as_ids(eos_token_id: Any) -> list[int]:
    """`eos_token_id` as a list: configurations hold a number, several, or none. What is no number is left out."""
    if hasattr(eos_token_id, "tolist"):  # generate() makes tensors of them
        eos_token_id = eos_token_id.tolist()
    ids = eos_token_id if isinstance(eos_token_id, list | tuple) else [eos_token_id]
    return [id for id in ids if isinstance(id, int) and not isinstance(id, bool)]


def template_end_ids(tokenizer: Any) -> tuple[int, ...]:
    """The ids with which the tokenizer's chat template ends the model's last turn: one of text, and one with a call.

    A turn is rendered, and what the template writes behind its words is read. It is the last turn of its conversation,
    because gpt-oss's template ends the others with `<|end|>`, as it ends reasoning, and only the last with
    `<|return|>`. None where the template writes none, or writes it in letters.
    """
    if not getattr(tokenizer, "chat_template", None):
        return ()
    control = _control_tokens(tokenizer)
    ends = [*_ends_of_text(tokenizer, control), *_end_of_call(tokenizer, control)] if control else []
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ends]
    return tuple(dict.fromkeys(id for id in ids if isinstance(id, int)))


def _control_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {token.content for token in added if token.content.strip()}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None


def _ends_of_text(tokenizer: Any, control: re.Pattern[str]) -> list[str]:
    """The control tokens right behind the words of an answer.

    Mostly one. Phi-3's template writes `<|end|>` and, where nothing follows, `<|endoftext|>`. One before the last that
    stands within a turn with a call, too, ends a part of it only.
    """
    for content in (_MARK, [{"type": "text", "text": _MARK}]):  # some templates take lists of parts alone
        text = _rendered(tokenizer, {"content": content})
        if _MARK in text:
            tail = text.rpartition(_MARK)[2]
            whole = _rendered(tokenizer, {"content": content, "reasoning_content": "b", "tool_calls": [_CALL]})
            inside = whole.partition(_MARK)[2].removesuffix(tail)
            ends = _leading_tokens(control, tail)
            return [end for end in ends if end == ends[-1] or end not in inside]
    return []


def _end_of_call(tokenizer: Any, control: re.Pattern[str]) -> list[str]:
    """The control token at the end of a turn that calls a tool, unless it is what ends each call (`</tool_call>`)."""
    calls = [_rendered(tokenizer, {"content": "", "tool_calls": [_CALL] * count}) for count in (1, 2)]
    once, twice = (text.partition(_MARK)[2] for text in calls)
    tokens = list(control.finditer(once))
    if not tokens or once[tokens[-1].end() :].strip() or twice.count(tokens[-1][0]) > 1:
        return []
    return [tokens[-1][0]]


def _rendered(tokenizer: Any, answer: dict[str, Any]) -> str:
    """A question and an answer as text, or nothing if the template refuses them."""
    for question in ("a", [{"type": "text", "text": "a"}]):
        turns = [{"role": "user", "content": question}, {"role": "assistant", **answer}]
        try:
            meter_templates()
            return str(tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception:  # a template raises what it likes, over conversations that it was not written for
            continue
    return ""


def _leading_tokens(control: re.Pattern[str], text: str) -> list[str]:
    """The control tokens that `text` begins with; blanks between them do not count."""
    tokens: list[str] = []
    while match := control.match(text := text.lstrip()):
        tokens.append(match[0])
        text = text[match.end() :]
    return tokens
