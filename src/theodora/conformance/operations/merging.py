"""Operations that put adapters into the weights, and take them out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch

from theodora.conformance.cases import KINDS
from theodora.conformance.operations.registry import operation
from theodora.conformance.trial import Check, Trial

MERGE = "Merge"


@operation("merge", "merge", MERGE)
def merge(trial: Trial) -> Iterator[Check]:
    """W' is rounded once, the model answers with it, and a weight that was tied to a merged one stays as it was."""
    subject, x = trial.subject(), trial.inputs()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ours says that a float8 base was widened
        lookup = trial.bare()(*x)[len(KINDS)]
        subject.merge("one")
        yield from trial.weights(subject, trial.numbers["one"])
        found = subject.model(*x)
    yield from trial.merged_outputs(found, x, trial.numbers["one"], "merged output")
    if "tied_head" in trial.kinds:
        yield trial.same("tied_head", "lookup that shared its weight", found[len(KINDS)], lookup)


@operation("unmerge", "unmerge", MERGE)
def unmerge(trial: Trial) -> Iterator[Check]:
    """The base weights and the adapter's outputs are back bit for bit, with another adapter on the model as well."""
    subject, x = trial.subject(one=1, two=2), trial.inputs()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = subject.model(*x)
        subject.merge("one")
        subject.unmerge()
        yield from trial.base_intact(subject.holder, "base weight")
        yield from trial.same_outputs(subject.model(*x), first, "output afterwards")
        subject.activate("two")
        yield from trial.outputs(subject.model(*x), x, trial.numbers["two"], "output of the other adapter")
