"""Operations that make one adapter out of others: combinations, conversion to LoRA, hot swaps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from theodora.conformance import formula
from theodora.conformance.cases import RANK
from theodora.conformance.formula import Numbers
from theodora.conformance.mixture import EXPERTS, blocked, blocks, diagonal
from theodora.conformance.operations.registry import COMPILED, operation
from theodora.conformance.operations.running import fresh_compiler
from theodora.conformance.rounding import F64, roundoff
from theodora.conformance.trial import Check, Library, Trial, run_backward

MAKE = "Make of others"
SWAP = "Swap"
WEIGHTS = (0.7, -0.4)
SHARE = 0.5
"""TIES's and DARE's density."""


@operation("combine-linear", "combination: linear", MAKE)
def combine_linear(trial: Trial) -> Iterator[Check]:
    """W' = W + Σ wᵢ (W'ᵢ − W)."""
    yield from _summed(trial, "linear")


@operation("combine-cat", "combination: concatenation", MAKE)
def combine_cat(trial: Trial) -> Iterator[Check]:
    """The same, by factors one beside the other."""
    yield from _summed(trial, "cat")


@operation("combine-svd", "combination: SVD", MAKE)
def combine_svd(trial: Trial) -> Iterator[Check]:
    """The nearest of a lower rank: for LoRA that very one, for DoRA, whose row scales cost no rank, one as near."""
    subject = _two(trial)
    subject.combine(("one", "two"), WEIGHTS, "both", "svd", rank=RANK)
    subject.merge("both")
    for kind in trial.kinds:
        both, result = [trial.numbers[name][kind] for name in ("one", "two")], subject.weight(kind)
        if kind != "experts":
            yield _nearest(trial, kind, both, result)
            continue
        for *own, block in zip(*map(blocks, both), diagonal(result), strict=True):
            yield _nearest(trial, kind, own, block)


def _nearest(trial: Trial, kind: str, both: list[Numbers], result: Tensor) -> Check:
    target = formula.summed(both, list(WEIGHTS))
    wanted = formula.adapted_weight(target)
    low = formula.row_scale(target)[:, None] * (formula.direction(target) - target.weight_OI)
    best = formula.best_of_rank(low, RANK)
    rounding = formula.walk_merge(target, trial.torch_dtype).bound()
    if trial.variant.method == "dora":
        bound = float((low - best).norm() / wanted.norm()) + rounding
        return trial.check(kind, "distance from the sum", result, wanted, bound)
    # Singular vectors computed in float32 turn by u·σ₁ over the gap behind the last one that stays.
    sigma = torch.linalg.svdvals(low)
    turned = float(sigma[0] / (sigma[RANK - 1] - sigma[RANK])) if len(sigma) > RANK else 1.0
    slack = turned * roundoff(torch.float32) * len(sigma) ** 0.5 * float(low.norm() / wanted.norm())
    return trial.check(kind, "nearest of its rank", result, target.weight_OI + best, rounding + slack)


@operation("combine-ties", "combination: TIES", MAKE)
def combine_ties(trial: Trial) -> Iterator[Check]:
    """Trimmed, signs elected, averaged; on the changes of the weights, without a loss of rank."""
    subject, weights = _two(trial), [0.6, 0.6]
    subject.combine(("one", "two"), weights, "both", "ties", density=SHARE)

    def wanted(kind: str, changes: list[Tensor], expert: int | None) -> Tensor:
        return formula.ties(changes, weights, subject.trimmed(changes[0].numel(), SHARE))

    yield from _dense(trial, subject, wanted)


@operation("combine-dare", "combination: DARE", MAKE)
def combine_dare(trial: Trial) -> Iterator[Check]:
    """DARE with the draws that were made: each element stays by chance and is scaled up; of full rank."""
    subject = _two(trial)
    subject.combine(("one", "two"), WEIGHTS, "both", "dare", density=SHARE)

    def wanted(kind: str, changes: list[Tensor], expert: int | None) -> Tensor:
        masks = [subject.drawn(kind, name, changes[0].shape, SHARE).to(F64) for name in ("one", "two")]
        masks = masks if expert is None else [diagonal(mask)[expert] for mask in masks]
        return sum(w * k * c / SHARE for w, k, c in zip(WEIGHTS, masks, changes, strict=True))  # pyright: ignore

    yield from _dense(trial, subject, wanted)


@operation("to-lora", "conversion to LoRA", MAKE)
def to_lora(trial: Trial) -> Iterator[Check]:
    """A plain LoRA that does what the adapter does, magnitudes and all."""
    subject, x = trial.subject(), trial.inputs()
    subject.to_lora("one", "plain")
    numbers = {kind: formula.dense(n, formula.change(n)) for kind, n in trial.numbers["one"].items()}
    yield from trial.outputs(subject.model(*x), x, numbers)
    for kind in trial.kinds:
        yield trial.demand(kind, "still has magnitudes", "m" not in subject.parameters(kind, "plain"))


def _two(trial: Trial) -> Library:
    return trial.subject(one=1, two=2)


def _summed(trial: Trial, method: str) -> Iterator[Check]:
    subject, x = _two(trial), trial.inputs()
    subject.combine(("one", "two"), WEIGHTS, "both", method)
    numbers = {
        kind: formula.summed([trial.numbers[name][kind] for name in ("one", "two")], list(WEIGHTS))
        for kind in trial.kinds
    }
    yield from trial.outputs(subject.model(*x), x, numbers)


def _dense(
    trial: Trial, subject: Library, wanted: Callable[[str, list[Tensor], int | None], Tensor]
) -> Iterator[Check]:
    x = trial.inputs()
    numbers: dict[str, Numbers] = {}
    for kind in trial.kinds:
        both = [trial.numbers[name][kind] for name in ("one", "two")]
        changes = [formula.change(n) for n in both]
        if kind == "experts":
            each = zip(range(EXPERTS), *map(diagonal, changes), strict=True)
            change = blocked(torch.stack([wanted(kind, own, e) for e, *own in each]))
        else:
            change = wanted(kind, changes, None)
        numbers[kind] = formula.dense(both[0], change, dora=trial.variant.method == "dora")
    yield from trial.outputs(subject.model(*x), x, numbers)


@operation("swap", "hot swap, running model", SWAP)
def swap(trial: Trial) -> Iterator[Check]:
    """Another adapter's numbers take the place of one's own: the tensors stay where they are, nothing is stale."""
    subject, x, second = _ready(trial)
    with trial.folder() as folder:
        _save_second(trial, folder)
        with torch.no_grad():
            subject.model(*x)
            places = {kind: _places(subject, kind) for kind in trial.kinds}
            subject.swap(folder / "two", "one")
            yield from trial.outputs(subject.model(*x), x, second)
    for kind in trial.kinds:
        yield trial.demand(kind, "tensors moved", _places(subject, kind) == places[kind])
    trial.numbers["one"] = second
    outputs, leaves, dy = run_backward(subject, x)
    yield from trial.outputs(outputs, x, second, "output with gradients")
    yield from trial.gradients(subject, "one", leaves, dy)


@operation("swap-compiled", "hot swap, compiled model", SWAP, cost=1, sample=COMPILED)
def swap_compiled(trial: Trial) -> Iterator[Check]:
    """The compiled code takes the new numbers, and is not compiled again."""
    subject, x, second = _ready(trial)
    with trial.folder() as folder, torch.no_grad(), fresh_compiler():
        _save_second(trial, folder)
        trial.subject().swap(folder / "two", "one")  # what cannot be swapped at all need not be compiled first
        compiles = _Counting()
        run: Any = torch.compile(subject.model, backend=compiles)
        for _ in range(2):
            run(*x)
        before = compiles.count
        subject.swap(folder / "two", "one")
        result = run(*x)
        again = compiles.count - before
    yield from trial.outputs(result, x, second)
    for kind in trial.kinds:
        yield Check(kind, "compiled again", float(again), 0.0)


class _Counting:
    """A backend of torch.compile that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, example_inputs: list[Tensor]) -> Any:
        self.count += 1
        return graph.forward


def _ready(trial: Trial) -> tuple[Library, tuple[Tensor, ...], dict[str, Numbers]]:
    trial.subject(two=2)
    second = trial.numbers["two"]
    return trial.subject(), trial.inputs(), second


def _save_second(trial: Trial, folder: Any) -> None:
    trial.subject(two=2).save(folder / "two", "two")


def _places(subject: Library, kind: str) -> list[int]:
    return [parameter.data_ptr() for parameter in subject.parameters(kind, "one").values()]
