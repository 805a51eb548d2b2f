"""Which weights an adapter touches, and how: frozen, keyword-only, checked as a whole.

The docstring under each field is also its help on the command line. No torch, so that `theodora --help` is instant.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, TypeGuard

from theodora.coerce import coerce_all, split_names
from theodora.errors import ConfigError, bullet_list, shown
from theodora.paths import MOST_NAMES, Expressions, PathPattern, problems_of

Method = Literal["dora", "lora", "full"]
METHOD_NAMES: dict[str, str] = {"dora": "DoRA", "lora": "LoRA", "full": "full fine-tuning"}
"""How people write them."""
Init = Literal["default", "gaussian", "orthogonal", "pissa", "olora"]
AdapterDtype = Literal["float32", "bfloat16", "float16", "base"]
LARGEST_NUMBER = 2**53
"""Up to here floats tell whole numbers apart, and no count of rows, steps or tokens is larger."""
_LARGEST_ALPHA = 1e12  # its square is still a float32


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which weights an adapter touches, and how.

    Example:
        `AdapterConfig(method="dora", rank=16, targets=("q_proj", "v_proj"))`

    Raises:
        ConfigError: naming every field that makes no sense.
    """

    method: Method = "dora"
    """dora splits each weight into magnitude and direction; lora adds a low-rank update only; full trains all weights
    themselves, without an adapter (a training run alone knows it)."""
    rank: int = 8
    """Rows of A and columns of B: the size of the adapter."""
    alpha: float | None = None
    """Strength of the update, which is scaled by alpha/rank. Default: twice the rank."""
    rslora: bool = False
    """Scale by alpha/sqrt(rank) instead, so that large ranks keep learning (rsLoRA)."""
    dropout: float = 0.0
    """Probability of dropping an input of the low-rank branch during training."""
    targets: str | tuple[str, ...] = "all-linear"
    """Modules to adapt: all-linear (all but the output head), names, or a regular expression for whole module paths."""
    experts: bool | None = None
    """Whether fused experts are adapted, each by a pair and a magnitude of its own. Default: if targets names them."""
    exclude: str | tuple[str, ...] = ()
    """Modules to leave alone although targets matches them: names, or one regular expression."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    """Another rank for modules whose path ends with a key (a name or a regular expression)."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    """Another alpha for modules whose path ends with a key (a name or a regular expression)."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full beside the adapter, and saved with it."""
    trainable_token_indices: tuple[int, ...] | Mapping[str, Sequence[int]] = ()
    """Tokens whose rows are trained beside the adapter, and saved with it: ids, of the input embedding (and of the
    head, if it is tied to it), or, in YAML, a mapping of module names to ids."""
    init: Init = "default"
    """Start of A and B. Every choice leaves the model's output unchanged: default (Kaiming A, zero B), gaussian,
    orthogonal, pissa (principal singular vectors), olora (QR)."""
    adapter_dtype: AdapterDtype = "float32"
    """Storage of the trained tensors; the products run in the model's dtype. base: the same as the base weight."""

    def __post_init__(self) -> None:
        for f in fields(self):  # None is how PEFT's files say "none of them"
            if getattr(self, f.name) is None and f.name not in ("alpha", "experts"):
                default = f.default if f.default_factory is MISSING else f.default_factory()
                object.__setattr__(self, f.name, default)
        values, problems = coerce_all({f.name: getattr(self, f.name) for f in fields(self)}, AdapterConfig)
        for name, value in values.items():
            object.__setattr__(self, name, _with_commas(value) if name in _NAME_LISTS else value)
        object.__setattr__(self, "trainable_token_indices", _token_indices(self.trainable_token_indices))
        if self.alpha is None and is_int(self.rank) and self.rank <= LARGEST_NUMBER:
            object.__setattr__(self, "alpha", 2.0 * self.rank)
        # Ranges can only be judged once every value has the right type.
        if problems or (problems := list(self._problems())):
            raise ConfigError("AdapterConfig:" + bullet_list(problems))

    def _problems(self) -> Iterator[str]:
        for what, rank in [("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            if not is_int(rank) or not 1 <= rank <= LARGEST_NUMBER:
                yield f"{what} is {shown(rank)}; expected a whole number of at least 1, at most {LARGEST_NUMBER:,}"
        for what, alpha in [
            ("alpha", self.alpha),
            *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()),
        ]:
            if not is_number(alpha) or not 0 < alpha <= _LARGEST_ALPHA:
                yield f"{what} is {shown(alpha)}; expected a positive number, at most {_LARGEST_ALPHA:g}"
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            yield f"dropout is {self.dropout!r}; expected at least 0 and less than 1"
        for name in ("targets", "exclude", "modules_to_save"):
            names = getattr(self, name)
            if not isinstance(names, str) and len(names) > MOST_NAMES:
                yield f"{name} holds {len(names):,} names together; expected at most {MOST_NAMES:,}"
            odd = [item for item in names if not isinstance(item, str) or not item]
            if odd:
                yield f"{name} holds {shown(odd[0])}; expected names"
        for name in ("rank_pattern", "alpha_pattern"):
            keys: list[Any] = list(getattr(self, name))
            odd = [key for key in keys if not isinstance(key, str)]
            if odd:
                yield f"{name} has the key {shown(odd[0])}; expected names or regular expressions"
        yield from _token_problems(self.trainable_token_indices)
        if not self.targets:
            yield "targets is empty; expected 'all-linear', module names, or a regular expression"
        yield from problems_of(
            {
                **{name: [value] for name in ("targets", "exclude") if isinstance(value := getattr(self, name), str)},
                **{name: [str(key) for key in getattr(self, name)] for name in ("rank_pattern", "alpha_pattern")},
            }
        )
        if self.method == "full" and (others := self._of_an_adapter()):
            yield f"method is full, which has no adapter, and so no {', '.join(others)}; expected them left out"
        if self.init == "orthogonal" and any(
            is_int(rank) and rank % 2 for rank in (self.rank, *self.rank_pattern.values())
        ):
            yield "init='orthogonal' needs even ranks (half of them start A, the other half B)"

    def _of_an_adapter(self) -> list[str]:
        """Names of the fields that say something of an adapter, other than by default."""
        names = [f.name for f in fields(self) if f.default is not MISSING and getattr(self, f.name) != f.default]
        names += [f.name for f in fields(self) if f.default is MISSING and getattr(self, f.name)]
        usual = {"method"} | ({"alpha"} if is_int(self.rank) and self.alpha == 2.0 * self.rank else set())
        return [name for name in names if name not in usual]

    def scale(self, rank: int, alpha: float) -> float:
        """The factor s in W + s·B·A: alpha/rank, or alpha/sqrt(rank) with rsLoRA (arXiv 2312.03732)."""
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def rank_of(self, path: str) -> int:
        """The rank of the module at `path`, rank_pattern regarded."""
        return self._ranks.get(path, self.rank)

    def alpha_of(self, path: str) -> float:
        """The alpha of the module at `path`, alpha_pattern regarded."""
        return self._alphas.get(path, self.alpha or 0.0)

    @cached_property
    def expressions(self) -> Expressions:
        """The budget of time that all expressions of this configuration share."""
        return Expressions()

    @cached_property
    def _ranks(self) -> PathPattern[int]:
        return PathPattern(self.rank_pattern, self.expressions)

    @cached_property
    def _alphas(self) -> PathPattern[float]:
        return PathPattern(self.alpha_pattern, self.expressions)


def _token_indices(given: Any) -> Any:
    """Token ids as numbers, which a command line gives as text; in lists, which YAML can hold."""
    if isinstance(given, Mapping):
        return {
            name: list(_token_indices(ids)) if isinstance(ids, list | tuple) else ids for name, ids in given.items()
        }
    if isinstance(given, list | tuple):
        return tuple(int(id) if isinstance(id, str) and re.fullmatch("[0-9]{1,15}", id) else id for id in given)
    return given


def _token_problems(indices: Any) -> Iterator[str]:
    names = list(indices) if isinstance(indices, Mapping) else []
    if any(not isinstance(name, str) or not name for name in names):
        yield "trainable_token_indices has a key that is no module's name"
    for ids in indices.values() if isinstance(indices, Mapping) else [indices]:
        if not isinstance(ids, list | tuple) or (not ids and names):
            yield f"trainable_token_indices is {shown(indices)}; expected lists of token ids"
        elif odd := [id for id in ids if not is_int(id) or not 0 <= id <= LARGEST_NUMBER]:
            yield f"trainable_token_indices holds {shown(odd[0])}; expected token ids (whole numbers from 0 on)"


_NAME_LISTS = ("targets", "exclude", "modules_to_save")


def _with_commas(value: Any) -> Any:
    """Names among which commas stand, as other tools want them: no expression or name of a module has one so."""
    if isinstance(value, str):
        return split_names(value) or value
    return tuple(name for item in value for name in ((isinstance(item, str) and split_names(item)) or (item,)))


def is_int(value: object) -> bool:
    """Whether `value` is a whole number (`True` is not)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite number (`True` is not)."""
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))
