"""Operations that put adapters into the weights, and take them out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from theodora.conformance.cases import KINDS, Specimen, base_numbers, build, stored_weight
from theodora.conformance.formula import adapted_weight, walk_merge
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
        results = subject.model(*x)
    yield from trial.merged_outputs(results, x, trial.numbers["one"], "merged output")
    if "tied_head" in trial.kinds:
        yield trial.same("tied_head", "lookup that shared its weight", results[len(KINDS)], lookup)


@operation("merge-disk", "merge on disk", MERGE, ours_only=True)
def merge_disk(trial: Trial) -> Iterator[Check]:
    """`merge_checkpoint` writes a plain model: W' of the unquantised base, rounded once."""
    from theodora.merging import merge_checkpoint

    subject, x = trial.subject(), trial.inputs()
    base, numbers = build(trial.dtype), trial.numbers["one"]
    plain = base_numbers(base)
    numbers = {kind: replace(n, weight_OI=plain[kind].weight_OI, rounds="") for kind, n in numbers.items()}
    with torch.no_grad(), trial.folder() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a float8 base is a little way off
        subject.save(folder / "adapter", "one")
        base.save_pretrained(folder / "base")
        merge_checkpoint(folder / "adapter", folder / "merged", base_model=folder / "base")
        model: Any = Specimen.from_pretrained(folder / "merged", dtype=trial.torch_dtype)
        model.to(trial.device).eval()
        for kind in trial.kinds:
            bound = walk_merge(numbers[kind], trial.torch_dtype).bound()
            result = stored_weight(model.get_submodule(kind))
            yield trial.check(kind, "merged weight", result, adapted_weight(numbers[kind]), bound)
        outputs = model(*x)
    yield from trial.merged_outputs(outputs, x, numbers, "merged output")
    if "tied_head" in trial.kinds:
        yield trial.same(
            "tied_head", "lookup that shared its weight", model.tied_lookup.weight, base.tied_lookup.weight
        )


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
