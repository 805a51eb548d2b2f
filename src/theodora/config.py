"""What can be chosen, and what holds if nothing is: frozen, keyword-only, checked as a whole.

The docstring under each field is also its help on the command line. This module imports no torch, so that
`theodora --help` is instant.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from theodora.errors import ConfigError, bullet_list

Method = Literal["dora", "lora"]
Init = Literal["default", "gaussian", "orthogonal", "pissa", "olora"]
AdapterDtype = Literal["float32", "bfloat16", "float16", "base"]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which weights an adapter touches, and how.

    Example:
        `AdapterConfig(method="dora", rank=16, targets=("q_proj", "v_proj"))`

    Raises:
        ConfigError: naming every field that makes no sense.
    """

    method: Method = "dora"
    """dora splits each weight into magnitude and direction; lora adds a low-rank update only."""
    rank: int = 8
    """Rows of A and columns of B: the size of the adapter."""
    alpha: float | None = None
    """Strength of the update, which is scaled by alpha/rank. Default: twice the rank."""
    rslora: bool = False
    """Scale by alpha/sqrt(rank) instead, so that large ranks keep learning (rsLoRA)."""
    dropout: float = 0.0
    """Probability of dropping an input of the low-rank branch during training."""
    targets: str | tuple[str, ...] = "all-linear"
    """Modules to adapt: all-linear (every linear layer but the output head), names, or one regular expression
    that matches whole module paths."""
    exclude: str | tuple[str, ...] = ()
    """Modules to leave alone although targets matches them: names, or one regular expression."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    """Another rank for modules whose path ends with a key (a name or a regular expression)."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    """Another alpha for modules whose path ends with a key (a name or a regular expression)."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full beside the adapter, and saved with it."""
    init: Init = "default"
    """Start of A and B. Every choice leaves the model's output unchanged: default (Kaiming A, zero B), gaussian,
    orthogonal, pissa (principal singular vectors), olora (QR)."""
    adapter_dtype: AdapterDtype = "float32"
    """Storage of the trained tensors; the products run in the model's dtype. base: the same as the base weight."""

    def __post_init__(self) -> None:
        # Lists and dicts arrive from YAML and JSON; the fields are immutable.
        for name in ("targets", "exclude", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, list | set):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.modules_to_save, str):
            object.__setattr__(self, "modules_to_save", (self.modules_to_save,))
        if self.alpha is None and isinstance(self.rank, int):
            object.__setattr__(self, "alpha", 2.0 * self.rank)
        problems = list(self._problems())
        if problems:
            raise ConfigError("AdapterConfig:" + bullet_list(problems))

    def _problems(self):  # -> Iterator[str]
        yield from wrong_choices(self)
        for what, rank in [("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            if not is_int(rank) or rank < 1:
                yield f"{what} is {rank!r}; expected a whole number of at least 1"
        for what, alpha in [
            ("alpha", self.alpha),
            *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()),
        ]:
            if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
                yield f"alpha is {alpha!r}; expected a positive number".replace("alpha", what, 1)
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            yield f"dropout is {self.dropout!r}; expected at least 0 and less than 1"
        if not self.targets and not self.modules_to_save:
            yield "targets is empty; expected 'all-linear', module names, or a regular expression"
        for what, pattern in [
            *(
                (name, value)
                for name, value in (("targets", self.targets), ("exclude", self.exclude))
                if isinstance(value, str)
            ),
            *(("rank_pattern", key) for key in self.rank_pattern),
            *(("alpha_pattern", key) for key in self.alpha_pattern),
        ]:
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"{what}: {pattern!r} is no regular expression ({error})"
        if self.init == "orthogonal" and any(
            is_int(rank) and rank % 2 for rank in (self.rank, *self.rank_pattern.values())
        ):
            yield "init='orthogonal' needs even ranks (half of them start A, the other half B)"

    def scale(self, rank: int, alpha: float) -> float:
        """The factor s in W + s·B·A: alpha/rank, or alpha/sqrt(rank) with rsLoRA (arXiv 2312.03732)."""
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def is_int(value: object) -> bool:
    """Whether `value` is a whole number (`True` is not)."""
    return isinstance(value, int) and not isinstance(value, bool)


def wrong_choices(config: Any):  # -> Iterator[str]
    """Complaints about fields annotated as `Literal` that hold something else."""
    literals = {"Method": Method, "Init": Init, "AdapterDtype": AdapterDtype}
    for f in fields(config):
        choices = get_args(literals.get(str(f.type), None))
        if choices and getattr(config, f.name) not in choices:
            yield f"{f.name} is {getattr(config, f.name)!r}; expected one of {', '.join(choices)}"
