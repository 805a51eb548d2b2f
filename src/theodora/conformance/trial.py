"""One trial: a library, a kind of adapter and a dtype; and how what it computes is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from theodora.conformance import formula
from theodora.conformance.cases import (
    DTYPES,
    KINDS,
    Specimen,
    Variant,
    base_numbers,
    build,
    flat,
    inputs,
    output_gradients,
    stored_weight,
    trained_values,
)
from theodora.conformance.formula import Numbers
from theodora.conformance.mixture import as_held, blocked, only_of_own, shaped
from theodora.conformance.quantised import LIBRARIES, quantise
from theodora.conformance.rounding import Rounded, distance
from theodora.locks import temporary_folder


class NotOfferedError(Exception):
    """The library has no such operation."""


class OneKindError(Exception):
    """The operation takes one kind of layer at a time: try each by itself."""


class Library(Protocol):
    """What both columns can be asked to do: a model with adapters on it. What a library lacks is NotOfferedError."""

    drops_lookups: bool
    """Whether dropout acts on embeddings, too."""
    drops_scaled_base: bool
    """Whether DoRA's dropout acts on the base product that is scaled, too (`formula.output_of_dropped_base`)."""
    model: nn.Module
    """What is called: the specimen itself, or the library's wrapper of it."""

    def inject(self, name: str) -> None:
        """Put a new adapter on the model and make it active."""
        ...

    def parameters(self, kind: str, name: str) -> dict[str, nn.Parameter]:
        """A (R, I), B (O, R) and m (O,)."""
        ...

    def start(self, kind: str, name: str) -> tuple[Tensor, Tensor] | None:
        """A₀ and B₀ of an adapter that starts from factors of W."""
        ...

    def layer(self, kind: str) -> nn.Module:
        """The adapted layer."""
        ...

    def set_dropout(self, p: float) -> None:
        """Probability of dropping inputs of the low-rank branches, of all adapters."""
        ...

    def weight(self, kind: str) -> Tensor:
        """The weight that the layer now computes with, as stored, (O, I)."""
        ...

    def holder(self, kind: str) -> nn.Module:
        """The module of the specimen that now holds the weight: a layer of `KINDS`, or `tied_lookup`."""
        ...

    def activate(self, name: str) -> None:
        """Switch to an adapter."""
        ...

    def disabled(self) -> AbstractContextManager[None]:
        """Run the base alone inside the block."""
        ...

    def remove(self) -> nn.Module:
        """Take all adapters off; the bare model."""
        ...

    def merge(self, name: str) -> None:
        """Put an adapter into the weights."""
        ...

    def unmerge(self) -> None:
        """Take it out again."""
        ...

    def save(self, folder: Path, name: str) -> None:
        """Write an adapter's files."""
        ...

    def load(self, folder: Path, name: str, trainable: bool = False) -> None:
        """Put saved files on the model, which may carry nothing yet."""
        ...

    def load_by_transformers(self, model: nn.Module, folder: Path) -> None:
        """Put saved files on a bare model by the shortest way that users of transformers have."""
        ...

    def swap(self, folder: Path, name: str) -> None:
        """Replace the numbers of an adapter on the model by saved ones."""
        ...

    def mixed(self, names: Sequence[str | None], x: Sequence[Tensor]) -> Sequence[Tensor]:
        """Outputs of one batch, without gradients, each of its sequences with its own adapter, or None: the base."""
        ...

    def combine(self, names: Sequence[str], weights: Sequence[float], into: str, method: str, **options: Any) -> None:
        """Make a weighted combination of adapters a new adapter, and make it active.

        `method` is linear, cat, svd (with `rank`), ties or dare (with `density`), the last two without a loss of rank.
        """
        ...

    def drawn(self, kind: str, name: str, shape: Sequence[int], density: float) -> Tensor:
        """Which elements of an adapter's change (O, I) DARE kept."""
        ...

    def trimmed(self, elements: int, density: float) -> int:
        """How many elements TIES keeps."""
        ...

    def to_lora(self, name: str, into: str) -> None:
        """Make a plain LoRA of full rank that does what the adapter does, and make it active."""
        ...


@dataclass(frozen=True)
class Check:
    """One comparison."""

    kind: str
    what: str
    error: float
    bound: float

    @property
    def held(self) -> bool:
        """Whether the error keeps the bound."""
        return self.error <= self.bound

    @property
    def share(self) -> float:
        """Error by bound: which check is the worst."""
        if self.bound > 0:
            return self.error / self.bound
        return 0.0 if self.error == 0 else float("inf")


@dataclass
class Trial:
    """Builds models with adapters of known numbers, and judges what comes out of them."""

    library: Callable[[Specimen, Variant, tuple[str, ...]], Library]
    variant: Variant
    dtype: str
    kinds: tuple[str, ...] = KINDS
    device: str = "cpu"
    numbers: dict[str, dict[str, Numbers]] = field(default_factory=dict)
    """Adapter name → kind → its numbers, as they were put in."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of inputs and outputs."""
        return DTYPES[self.dtype]

    def bare(self) -> Specimen:
        """The specimen without adapters, quantised where the dtype says so."""
        model = build(self.dtype, self.device)
        if self.dtype == "float8":
            from theodora.adapters import quantize_base

            quantize_base(model)
        elif self.dtype in LIBRARIES:
            quantise(model, self.dtype, KINDS)
        return model

    def subject(self, **seeds: int) -> Library:
        """A model with a trained adapter for each of `seeds`, by default one called "one"; the first is active."""
        seeds = seeds or {"one": 1}
        model = self.bare()
        base = base_numbers(model)
        subject = self.library(model, self.variant, self.kinds)
        for name, seed in seeds.items():
            self.add(subject, base, name, seed)
        if len(seeds) > 1:
            subject.activate(next(iter(seeds)))
        return subject

    def add(self, subject: Library, base: dict[str, Numbers], name: str, seed: int) -> None:
        """Inject an adapter and train it, which is to say: write its numbers."""
        torch.manual_seed(seed)
        subject.inject(name)
        self.numbers[name] = {}
        for kind in self.kinds:
            start = subject.start(kind, name)
            values = trained_values(base[kind], self.variant, kind, seed)
            self.write(subject, kind, name, values)
            self.numbers[name][kind] = replace(with_values(base[kind], values, self.variant.scale(kind)), start=start)

    def write(self, subject: Library, kind: str, name: str, values: dict[str, Tensor]) -> None:
        """Set an adapter's numbers, in place."""
        parameters = subject.parameters(kind, name)
        missing = values.keys() ^ parameters.keys()
        assert not missing, f"{kind}: {missing} are not the parameters of both sides"
        with torch.no_grad():
            for part, value in values.items():
                parameters[part].copy_(as_held(part, value, parameters[part]) if kind == "experts" else value)

    def inputs(self, **options: Any) -> tuple[Tensor, ...]:
        """One for each kind."""
        return inputs(self.dtype, self.device, **options)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder of our own, which vanishes."""
        with temporary_folder("conformance") as path:
            yield path

    def rows(self, x: Sequence[Tensor], kind: str) -> Tensor:
        """One kind's input as the formula takes it."""
        return flat(x[KINDS.index(kind)], kind)

    # Judging ---------------------------------------------------------------------------------------------------------

    def outputs(
        self,
        results: Sequence[Tensor],
        x: Sequence[Tensor],
        numbers: dict[str, Numbers],
        what: str = "output",
        dtype: torch.dtype | None = None,
    ) -> Iterator[Check]:
        """Outputs of adapted layers against the formula."""
        for kind in self.kinds:
            n, rows = numbers[kind], flat(x[KINDS.index(kind)], kind)
            y = results[KINDS.index(kind)]
            walked = formula.walk(n, rows, dtype or self.torch_dtype).y
            yield self.check(kind, what, y.reshape(-1, y.shape[-1]), formula.output(n, rows), walked.bound())

    def merged_outputs(
        self, results: Sequence[Tensor], x: Sequence[Tensor], numbers: dict[str, Numbers], what: str
    ) -> Iterator[Check]:
        """Outputs of plain layers that hold merged weights."""
        for kind in self.kinds:
            n, rows = numbers[kind], flat(x[KINDS.index(kind)], kind)
            y = results[KINDS.index(kind)]
            walked = formula.walk_merged(n, rows, self.torch_dtype, self.torch_dtype)
            yield self.check(kind, what, y.reshape(-1, y.shape[-1]), formula.output(n, rows), walked.bound())

    def gradients(
        self,
        subject: Library,
        name: str,
        x: Sequence[Tensor],
        dy: Sequence[Tensor],
        dtype: torch.dtype | None = None,
    ) -> Iterator[Check]:
        """Gradients in `.grad` of the parameters and of `x` against the formula."""
        for kind in self.kinds:
            n, i = self.numbers[name][kind], KINDS.index(kind)
            rows, dy_TO = flat(x[i], kind), dy[i].to("cpu", torch.float64).reshape(-1, dy[i].shape[-1])
            dy_TO = only_of_own(dy_TO, rows) if kind == "experts" else dy_TO
            exact = formula.gradients(n, rows, dy_TO)
            bounds = formula.walk_back(n, rows, dy_TO, dtype or self.torch_dtype)
            gradients: dict[str, Any] = {part: p.grad for part, p in subject.parameters(kind, name).items()}
            if kind == "experts":
                gradients = {p: None if g is None else blocked(shaped(p, g)) for p, g in gradients.items()}
            if x[i].is_floating_point() and x[i].requires_grad:
                gradients["x"] = None if x[i].grad is None else flat(x[i].grad, kind)  # pyright: ignore[reportArgumentType]
            for part, gradient in gradients.items():
                if gradient is None:
                    yield Check(kind, f"no gradient of {part}", float("inf"), bounds[part].bound())
                else:
                    yield self.check(kind, f"gradient of {part}", gradient, exact[part], bounds[part].bound())

    def weights(self, subject: Library, numbers: dict[str, Numbers], what: str = "merged weight") -> Iterator[Check]:
        """Merged weights against the formula."""
        for kind in self.kinds:
            n = numbers[kind]
            walked: Rounded = formula.walk_merge(n, self.torch_dtype)
            yield self.check(kind, what, subject.weight(kind), formula.adapted_weight(n), walked.bound())

    def base_intact(self, holder: Callable[[str], nn.Module], what: str) -> Iterator[Check]:
        """The base weights that `holder(kind)` holds are bit for bit what they were, and so is the tied lookup's."""
        untouched = self.bare()
        for kind in (*self.kinds, *(["tied_lookup"] if "tied_head" in self.kinds else [])):
            now, exact = (stored_weight(module) for module in (holder(kind), untouched.get_submodule(kind)))
            yield self.same("tied_head" if kind == "tied_lookup" else kind, what, now, exact)

    def same_outputs(
        self, results: Sequence[Tensor], expected: Sequence[Tensor], what: str, kinds: Sequence[str] | None = None
    ) -> Iterator[Check]:
        """Outputs are bit for bit those of before."""
        for kind in kinds or self.kinds:
            i = KINDS.index(kind)
            yield self.same(kind, what, results[i], expected[i])

    def check(self, kind: str, what: str, result: Tensor, exact: Tensor, bound: float) -> Check:
        """A value against the formula's."""
        return Check(kind, what, distance(result, exact), bound)

    def same(self, kind: str, what: str, result: Tensor, expected: Tensor) -> Check:
        """A value against an equal one: no error is allowed."""
        if result.dtype == expected.dtype and torch.equal(result, expected):
            return Check(kind, what, 0.0, 0.0)
        return Check(kind, what, distance(result, expected.detach().to("cpu", torch.float64)) or float("inf"), 0.0)

    def demand(self, kind: str, what: str, holds: bool) -> Check:
        """Something that is so or not."""
        return Check(kind, what, 0.0 if holds else float("inf"), 0.0)


def with_values(base: Numbers, values: dict[str, Tensor], scale: float) -> Numbers:
    """A layer's numbers with an adapter's; those of experts, (E, …), become blocks."""
    wide = {part: value.to(torch.float64) for part, value in values.items()}
    if wide["A"].dim() == 3:
        wide = {part: blocked(value) for part, value in wide.items()}
    return replace(base, a_RI=wide["A"], b_OR=wide["B"], magnitude_O=wide.get("m"), scale=scale)


def run_backward(subject: Library, x: Sequence[Tensor], call: Callable[..., Any] | None = None) -> tuple[Any, Any, Any]:
    """Outputs, inputs that ask for gradients, and the gradients of the outputs; the parameters' `.grad` are filled."""
    leaves = tuple(t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in x)
    outputs = (subject.model if call is None else call)(*leaves)
    dy = output_gradients(outputs)
    pairs = [(y, d) for y, d in zip(outputs, dy, strict=True) if y.requires_grad]
    torch.autograd.backward([y for y, _ in pairs], [d for _, d in pairs])
    return outputs, leaves, dy
