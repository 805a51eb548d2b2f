"""A folder's `quantization_config`, looked at before any library sees it.

Libraries believe what stands there: numbers of bits become `2**bits`, sizes of blocks become divisors and shapes, names
of types are looked up in modules and called, expressions are run on the path of each module by an engine that cannot be
stopped. So numbers have ranges here, types are of a few kinds, and expressions are tried under a budget of time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from theodora.errors import CheckpointError, ConfigError, shown
from theodora.paths import problems_of

# 16 is for scales and activations that stay as they are.
_BITS = re.compile(r"(?:w_)?(?:n?bits|num_bits|bit_width)$")
_MOST_BITS = 64
_SIZES = re.compile(r"(?:group|block|tile|chunk)_?(?:size|structure)$")
"""Of weights that share a scale; -1 and none mean a whole row."""
_LARGEST_SIZE = 1 << 20
_MOST_VALUES, _DEEPEST = 200_000, 24
_LARGEST_NUMBER = 2**53
_EXPRESSIONS = re.compile(r"modules_to_not_convert|llm_int8_skip_modules|skip_modules|ignore|targets|dynamic")
"""Fields whose texts are names or expressions; torchao and compressed-tensors mark the latter with `re:`."""
_WORD = re.compile(r"[\w.+ -]{0,200}", re.ASCII)
# What torchao may make of a name: configurations, what they hold, and enumerations; no layers and no tensors.
_TORCHAO_TYPE = re.compile(
    r"torch\.dtype|Per[A-Z][A-Za-z]+|\w*(?:Config|Kwargs|Format|Algorithm|Preference|Type|Domain|Mode|Choice|Step|Layout"
    r"|ActivationQuantization)"
)
_LONG = 64
"""Letters of a module's path, about."""
_MOST_STEPS = 1 << 22
"""Of all expressions together on one path, as they are bounded by `_steps`."""


def check_quantisation(fields: Mapping[str, Any], where: object) -> None:
    """See that a `quantization_config` can be handed to the library that it names.

    Args:
        fields: as it stands in config.json.
        where: the model, for messages.

    Raises:
        CheckpointError: with the first thing that is wrong, what was found and what was expected.
    """
    try:
        if told := next(_problems(fields), None):
            raise CheckpointError(f"{where}: its quantization_config is not to be used: {told}.")
        _check_expressions(fields)
    except (ConfigError, RecursionError) as error:
        raise CheckpointError(f"{where}: its quantization_config is not to be used: {error}.") from error


def check_named(fields: object) -> None:
    """See that a `quantization_config` is an object with something in it.

    Raises:
        CheckpointError: it is not. (transformers refuses an empty one, too.)
    """
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"config.json says quantization_config: {shown(fields)}; expected an object")
    if not fields:
        raise CheckpointError(
            "config.json says quantization_config: {}, which names no quant_method; expected how the weights are "
            "quantised. If they are plain, take that field out."
        )


def method_named(fields: Mapping[str, Any]) -> str | None:
    """The method that transformers takes a configuration for: `load_in_4bit` and `load_in_8bit` stand above a name."""
    if fields.get("load_in_4bit") or fields.get("load_in_8bit"):
        return "bitsandbytes"
    method = fields.get("quant_method")
    method = getattr(method, "value", method)
    return method if isinstance(method, str) else None


def _problems(fields: Mapping[str, Any]) -> Iterator[str]:
    named = fields.get("quant_method")
    named, method = getattr(named, "value", named), method_named(fields)
    if named is not None and named != method:
        yield f"quant_method is {shown(named)}, but load_in_4bit or load_in_8bit is set, which are of bitsandbytes"
    for count, (path, value) in enumerate(_walk(fields)):
        if count > _MOST_VALUES:
            yield f"it holds more than {_MOST_VALUES:,} values"
            return
        field = next((part for part in reversed(path) if not part.isdigit()), "")
        if isinstance(value, bool) or value is None:
            continue
        if len(path) > _DEEPEST:
            yield f"it is nested more than {_DEEPEST} deep"
            return
        if isinstance(value, int | float) and (told := _why_not_number(field, value)):
            yield f"{'.'.join(path)} is {shown(value)}; expected {told}"
        if isinstance(value, str) and (told := _why_not_text(method, path, field, value)):
            yield f"{'.'.join(path)} is {shown(value)}; expected {told}"
    yield from _odd_sizes(fields, method)


def _walk(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Everything that is no list and no object, with its path; an object once more, to count how deep it is."""
    yield path, value if not isinstance(value, Mapping | list | tuple) else None
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for at, item in enumerate(value):
            yield from _walk(item, (*path, str(at)))


def _why_not_number(field: str, value: float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if _BITS.fullmatch(field):
        whole = value == int(value) and 1 <= value <= _MOST_BITS
        return "" if whole else f"bits, 1 to {_MOST_BITS}"
    if _SIZES.search(field):
        return (
            ""
            if value == -1 or (isinstance(value, int) and 1 <= value <= _LARGEST_SIZE)
            else (f"a whole number from 1 to {_LARGEST_SIZE:,}, or -1")
        )
    if field.endswith("threshold") and value < 0:
        return "a number of at least 0"
    return "" if abs(value) <= _LARGEST_NUMBER else f"a number up to {_LARGEST_NUMBER:,}"


def _why_not_text(method: str | None, path: tuple[str, ...], field: str, value: str) -> str:
    if _BITS.fullmatch(field) or _SIZES.search(field):
        return "a number"
    if method == "torchao" and field == "_type" and not _TORCHAO_TYPE.fullmatch(value):
        return "a configuration of torchao, or what is in one"
    if method == "compressed-tensors" and not any(map(_EXPRESSIONS.fullmatch, path)) and not _WORD.fullmatch(value):
        return "a name"  # its registry takes "folder/file.py:Name" for what it is to import
    if field.endswith("dtype") and method in ("bitsandbytes", "hqq"):
        known = isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype)
        return "" if known else "a dtype of torch"
    return ""


def _odd_sizes(fields: Mapping[str, Any], method: str | None) -> Iterator[str]:
    """What the methods that are read here need to be whole."""
    size = fields.get("weight_block_size")
    if method == "fp8" and size is not None:
        whole = isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
        if not whole:
            yield f"weight_block_size is {shown(size)}; expected the rows and columns of a block"
    if method == "bitsandbytes" and fields.get("load_in_4bit"):
        kind = fields.get("bnb_4bit_quant_type", "fp4")
        if kind not in ("nf4", "fp4"):
            yield f"bnb_4bit_quant_type is {shown(kind)}; expected nf4 or fp4"
    if method == "torchao":
        kinds = fields.get("quant_type")
        if not isinstance(kinds, Mapping) or list(kinds) != ["default"] or not isinstance(kinds["default"], Mapping):
            yield f"quant_type is {shown(kinds)}; expected torchao's configuration under the one name default"
    if method == "hqq" and not isinstance(fields.get("quant_config"), Mapping):
        yield f"quant_config is {shown(fields.get('quant_config'))}; expected hqq's settings"


def _check_expressions(fields: Mapping[str, Any]) -> None:
    """Raise a ConfigError for expressions that could keep Python's engine, which has no limit of time, busy."""
    found: dict[str, list[str]] = {}
    for path, value in _walk(fields):
        # `dynamic` of GPTQ and `fqn_to_config` of torchao have them as keys, which are parts of the path.
        texts = [*(part for part in path if part.startswith(("re:", "+:", "-:")))]
        in_field = any(map(_EXPRESSIONS.fullmatch, path))
        texts += [value] if in_field and isinstance(value, str) else []
        if "dynamic" in path[:-1]:
            texts.append(path[path.index("dynamic") + 1])
        for text in texts:
            found.setdefault(path[0], []).append(re.sub(r"^(?:re|\+|-):", "", text))
    unique = {field: list(dict.fromkeys(texts)) for field, texts in found.items()}
    if problems := problems_of(unique):
        raise ConfigError(problems[0])
    steps = 0
    for text in (text for texts in unique.values() for text in texts):
        if _WORD.fullmatch(text) and "+" not in text:
            continue  # a plain name
        parsed = re._parser.parse(text)  # pyright: ignore[reportAttributeAccessIssue]
        steps += _steps(text, parsed)
        if steps > _MOST_STEPS:
            raise ConfigError(
                f"its expressions may take more than {_MOST_STEPS:,} steps for the path of one module (the last: "
                f"{shown(text)}); expected fewer repetitions and alternatives, or names"
            )


def _steps(expression: str, parsed: Any) -> int:
    """How many ways there are, at most, to lay an expression over the path of a module.

    Paths are made of short words: only what repeats wide sets of letters (`.*`, `[^x]+`) can end at many places.
    """
    wide, others = _choices(expression, parsed, within=False)
    return math.comb(_LONG + wide, wide) * others if wide < 8 else _MOST_STEPS + 1


def _choices(expression: str, parsed: Any, *, within: bool) -> tuple[int, int]:
    """Repetitions of wide sets, and the product of all other choices; none may stand within a repetition."""
    wide, others = 0, 1
    for operation, argument in parsed:
        name, inner = str(operation), _inner(argument)
        repeats = name.endswith("_REPEAT")
        if (repeats or name == "BRANCH") and within:
            raise ConfigError(
                f"{shown(expression)} repeats what repeats itself or has alternatives, which may take for ever; "
                "expected no nested repetitions"
            )
        if repeats and argument[1] == 1:
            others *= 2
        elif repeats:
            narrow = all(str(kind) == "LITERAL" or _is_digits(kind, what) for kind, what in argument[2])
            wide, others = wide + (not narrow), others * (4 if narrow else 1)
        elif name == "BRANCH":
            others *= len(argument[1])
        for part in inner:
            more = _choices(expression, part, within=within or (repeats and argument[1] > 1))
            wide, others = wide + more[0], min(others * more[1], _MOST_STEPS + 1)
    return wide, others


def _inner(argument: Any) -> list[Any]:
    """What stands within a part of an expression, as Python's parser has it."""
    parts = argument if isinstance(argument, tuple | list) else (argument,)
    return [
        one
        for part in parts
        for one in (part if isinstance(part, list) else (part,))
        if hasattr(one, "data") and hasattr(one, "state")
    ]


def _is_digits(kind: Any, what: Any) -> bool:
    if str(kind) != "IN":
        return False
    digits = ("(CATEGORY, CATEGORY_DIGIT)", "(RANGE, (48, 57))")
    return all(str(one) in digits for one in what)
