"""Operations that carry adapters about: put on, switched, disabled, taken off, copied."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch

from theodora.conformance import formula
from theodora.conformance.cases import KINDS, base_numbers
from theodora.conformance.copies import pickled
from theodora.conformance.mixture import blocks, shaped
from theodora.conformance.operations.registry import operation
from theodora.conformance.rounding import Rounded, roundoff
from theodora.conformance.trial import Check, Trial, run_backward, with_values

CARRY = "Carry"


@operation("inject", "inject", CARRY)
def inject(trial: Trial) -> Iterator[Check]:
    """Nothing changes until training: the base's outputs, m = ‖W‖, and PiSSA's and OLoRA's starts are what they say."""
    model, x = trial.bare(), trial.inputs()
    base = base_numbers(model)
    torch.manual_seed(0)
    subject = trial.library(model, trial.variant, trial.kinds)
    subject.inject("one")
    results = subject.model(*x)
    for kind in trial.kinds:
        parameters = {part: p.detach().to("cpu") for part, p in subject.parameters(kind, "one").items()}
        if kind == "experts":
            parameters = {part: shaped(part, p) for part, p in parameters.items()}
        n = with_values(base[kind], parameters, trial.variant.scale(kind))
        n = replace(n, start=subject.start(kind, "one"))
        y, rows = results[KINDS.index(kind)], trial.rows(x, kind)
        bound = formula.walk(n, rows, trial.torch_dtype).y.bound()
        exact = formula.output(base[kind], rows)
        yield trial.check(kind, "output", y.reshape(-1, y.shape[-1]), exact, bound)
        if "m" in parameters:
            norm = Rounded.exact(n.weight_OI).row_norm().to(torch.float32)
            if trial.variant.init != "default":  # the factors cancel, up to their own rounding
                norm = Rounded(norm.value, norm.variance + (roundoff(torch.float32) * norm.value).square())
            yield trial.check(kind, "magnitude", parameters["m"].flatten(), norm.value, 4 * norm.bound())
        for each in blocks(n) if kind == "experts" else [n]:
            yield from _start(trial, kind, each)


def _start(trial: Trial, kind: str, n: formula.Numbers) -> Iterator[Check]:
    """Whether s·B₀·A₀ is the best approximation of its rank (PiSSA), or the first columns of Q times R (OLoRA)."""
    if n.start is None or n.a_RI is None:
        return
    rank, w = len(n.a_RI), n.weight_OI
    product = n.start[1] @ n.start[0]
    if trial.variant.init == "pissa":
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        exact, product = (u[:, :rank] * s[:rank]) @ vh[:rank], n.scale * product
        gap = float((s[rank - 1] - s[rank]) / s[0]) if rank < len(s) else 1.0
    else:
        q, r = torch.linalg.qr(w)
        exact, gap = q[:, :rank] @ r[:rank], 1.0
    # Singular vectors move by the rounding of W over the gap to the next singular value (Davis and Kahan).
    size = float(w.norm() / exact.norm()) * sum(w.shape) ** 0.5
    yield trial.check(kind, f"start of {trial.variant.init}", product, exact, size * roundoff(torch.float32) / gap)


@operation("remove", "remove", CARRY)
def remove(trial: Trial) -> Iterator[Check]:
    """The base model is back bit for bit: its weights and what it answers."""
    x = trial.inputs()
    with torch.no_grad():
        expected = trial.bare()(*x)
    subject = trial.subject(one=1, two=2)
    subject.model(*x)
    model = subject.remove()
    yield from trial.base_intact(model.get_submodule, "base weight")
    with torch.no_grad():
        yield from trial.same_outputs(model(*x), expected, "output")


@operation("switch", "switch adapters", CARRY)
def switch(trial: Trial) -> Iterator[Check]:
    """Each of two adapters is the formula with its own numbers, there and back; only the active one trains."""
    subject, x = trial.subject(one=1, two=2), trial.inputs()
    first = subject.model(*x)
    for name in ("two", "one"):
        subject.activate(name)
        outputs, leaves, dy = run_backward(subject, x)
        yield from trial.outputs(outputs, x, trial.numbers[name], f"output of {name}")
        yield from trial.gradients(subject, name, leaves, dy)
        other = "one" if name == "two" else "two"
        for kind in trial.kinds:
            idle = all(p.grad is None for p in subject.parameters(kind, other).values())
            yield trial.demand(kind, f"{other} trains while {name} is active", idle)
        subject.model.zero_grad(set_to_none=True)
    yield from trial.same_outputs(subject.model(*x), first, "output there and back")


@operation("disable", "disable", CARRY)
def disable(trial: Trial) -> Iterator[Check]:
    """Inside the block the base answers, bit for bit; after it the adapter does."""
    x = trial.inputs()
    with torch.no_grad():
        expected = trial.bare()(*x)
        subject = trial.subject()
        first = subject.model(*x)
        with subject.disabled():
            yield from trial.same_outputs(subject.model(*x), expected, "output while disabled")
        yield from trial.same_outputs(subject.model(*x), first, "output afterwards")


@operation("deepcopy", "deep copy", CARRY)
def deepcopy(trial: Trial) -> Iterator[Check]:
    """A copy computes and trains the same, and shares nothing with the original."""
    subject = trial.subject()
    subject.model(*trial.inputs())
    subject.model = copy.deepcopy(subject.model)
    outputs, leaves, dy = run_backward(subject, trial.inputs())
    yield from trial.outputs(outputs, leaves, trial.numbers["one"])
    yield from trial.gradients(subject, "one", leaves, dy)


# (A copy of bitsandbytes' Int8Params by pickle is a plain Parameter of int8.)
@operation("pickle", "pickle of the module", CARRY, not_on=("int8",))
def pickle(trial: Trial) -> Iterator[Check]:
    """What comes back from `torch.save` of a whole module computes and trains the same."""
    subject = trial.subject()
    subject.model(*trial.inputs())
    subject.model = pickled(subject.model)
    outputs, leaves, dy = run_backward(subject, trial.inputs())
    yield from trial.outputs(outputs, leaves, trial.numbers["one"])
    yield from trial.gradients(subject, "one", leaves, dy)


# (bitsandbytes' Linear4bit writes keys into a state_dict that its load_state_dict calls unexpected.)
@operation("state-dict", "state_dict round trip", CARRY, not_on=("nf4",))
def state_dict(trial: Trial) -> Iterator[Check]:
    """Loaded into another model with an adapter of other numbers, all of them arrive."""
    subject, x = trial.subject(), trial.inputs()
    state = {key: tensor.clone() for key, tensor in subject.model.state_dict().items()}
    numbers = trial.numbers["one"]
    other = trial.subject(one=9)
    with torch.no_grad():
        other.model(*x)  # fills the caches
        other.model.load_state_dict(state)
        yield from trial.outputs(other.model(*x), x, numbers)
    for kind in trial.kinds:
        for part, parameter in subject.parameters(kind, "one").items():
            yield trial.same(kind, f"{part} loaded", other.parameters(kind, "one")[part], parameter)
