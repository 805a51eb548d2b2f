"""Operations that run an adapted model: forward and backward in every mode that people train and answer in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from theodora.conformance import formula
from theodora.conformance.cases import KINDS, flat, trained_values
from theodora.conformance.mixture import EXPERTS, IN, as_held, experts_of, shaped
from theodora.conformance.operations.registry import COMPILED, operation
from theodora.conformance.rounding import F64
from theodora.conformance.trial import Check, Library, Trial, run_backward, with_values

RUN = "Run and train"


@operation("forward", "forward", RUN)
def forward(trial: Trial) -> Iterator[Check]:
    """The outputs, with gradients on."""
    subject, x = trial.subject(), trial.inputs()
    yield from trial.outputs(subject.model(*x), x, trial.numbers["one"])


@operation("backward", "backward", RUN)
def backward(trial: Trial) -> Iterator[Check]:
    """The gradients of inputs, A, B and m."""
    subject = trial.subject()
    outputs, leaves, dy = run_backward(subject, trial.inputs())
    yield from trial.outputs(outputs, leaves, trial.numbers["one"])
    yield from trial.gradients(subject, "one", leaves, dy)


@operation("inference", "inference: prompt, then tokens", RUN)
def inference(trial: Trial) -> Iterator[Check]:
    """What is cached between passes without gradients changes nothing."""
    subject, numbers = trial.subject(), trial.numbers["one"]
    with torch.inference_mode():
        for batch, seed in (((3, 4), 1), ((3, 1), 2), ((3, 1), 3)):
            x = trial.inputs(batch=batch, seed=seed)
            yield from trial.outputs(subject.model(*x), x, numbers, f"output of {batch[1]} tokens")


@operation("changed", "after a change of weights", RUN)
def changed(trial: Trial) -> Iterator[Check]:
    """Nothing cached is stale: after writes in place, through `.data`, and by an optimizer."""
    subject, x = trial.subject(), trial.inputs()
    with torch.no_grad():
        subject.model(*x)
    for seed, way in ((5, "in place"), (6, ".data"), (7, "optimizer")):
        numbers = dict(trial.numbers["one"])
        for kind in trial.kinds:
            wanted = trained_values(numbers[kind].base(), trial.variant, kind, seed)
            values = _write(subject, kind, wanted, way)
            numbers[kind] = with_values(numbers[kind], values, trial.variant.scale(kind))
        with torch.no_grad():
            yield from trial.outputs(subject.model(*x), x, numbers, f"output after a write {way}")
        yield from trial.outputs(subject.model(*x), x, numbers, f"output after a write {way}, with gradients")


@operation("autocast", "autocast", RUN)
def autocast(trial: Trial) -> Iterator[Check]:
    """Forward and backward under autocast to bfloat16 (float16 for a float16 model)."""
    subject = trial.subject()
    dtype = torch.float16 if trial.dtype == "fp16" else torch.bfloat16

    def call(*x: Tensor) -> Any:
        with torch.autocast(trial.device, dtype=dtype):
            return subject.model(*x)

    outputs, leaves, dy = run_backward(subject, trial.inputs(), call)
    yield from trial.outputs(outputs, leaves, trial.numbers["one"], dtype=dtype)
    yield from trial.gradients(subject, "one", leaves, dy, dtype)


@operation("checkpointing", "activation checkpointing", RUN)
def checkpointing(trial: Trial) -> Iterator[Check]:
    """Recomputed activations give the same gradients."""
    yield from _checkpointed(trial, reentrant=False)


@operation("checkpointing-reentrant", "checkpointing, reentrant", RUN)
def checkpointing_reentrant(trial: Trial) -> Iterator[Check]:
    """The older way, which calls backward within backward."""
    yield from _checkpointed(trial, reentrant=True)


@operation("accumulation", "gradient accumulation", RUN)
def accumulation(trial: Trial) -> Iterator[Check]:
    """Two micro-batches add up to the whole batch's gradients."""
    subject = trial.subject()
    x1, x2 = trial.inputs(batch=(3, 4), seed=1), trial.inputs(batch=(2, 5), seed=8)
    outputs, leaves, dys = [], [], []
    for x in (x1, x2):
        y, leaf, dy = run_backward(subject, x)
        outputs.append(y)
        leaves.append(leaf)
        dys.append(dy)
    both = [_joined(a, b) for a, b in zip(*leaves, strict=True)]
    dy = [_joined(a, b) for a, b in zip(*dys, strict=True)]
    yield from trial.gradients(subject, "one", both, dy)


@operation("dropout", "dropout", RUN)
def dropout(trial: Trial) -> Iterator[Check]:
    """y = g ⊙ (x Wᵀ + s·(x̃ Aᵀ) Bᵀ) + bias, with x̃ what dropout leaves of x; nothing is dropped in eval mode.

    Each library is judged by its own definition.
    """
    subject = trial.subject()
    x = trial.inputs()
    subject.set_dropout(0.5)
    subject.model.train()
    for kind in trial.kinds:
        i = KINDS.index(kind)
        n, rows = trial.numbers["one"][kind], flat(x[i], kind)
        if kind == "embed_tokens" and not subject.drops_lookups:
            continue
        torch.manual_seed(11)
        y = subject.layer(kind)(x[i])
        torch.manual_seed(11)
        if kind == "embed_tokens":  # there is no x to drop from: of A's looked-up columns elements are dropped
            factors = n.factors()
            assert factors is not None
            mask = F.dropout(torch.ones(len(rows), len(factors[0]), device=trial.device), 0.5).to("cpu", F64)
            exact, walked = formula.masked_output(n, rows, mask), formula.walk(n, rows, trial.torch_dtype, None, mask)
        else:
            dropped = flat(_dropped_by_expert(x[i]) if kind == "experts" else F.dropout(x[i], 0.5), kind)
            by = formula.output_of_dropped_base if subject.drops_scaled_base else formula.output
            exact, walked = by(n, rows, dropped), formula.walk(n, rows, trial.torch_dtype, dropped)
        bound = walked.y.bound()
        yield trial.check(kind, "output in training", y.reshape(-1, y.shape[-1]), exact, bound)
    subject.model.eval()
    yield from trial.outputs(subject.model(*x), x, trial.numbers["one"], "output in eval mode")


def _dropped_by_expert(x: Tensor) -> Tensor:
    """Dropout as it is drawn for experts: of their rows, one expert's after the other's."""
    rows, chosen = x.reshape(-1, EXPERTS, IN), experts_of(x)
    order, at = chosen.argsort(stable=True), torch.arange(len(rows), device=x.device)
    own = rows[at, chosen]
    own[order] = F.dropout(own[order], 0.5)
    return torch.zeros_like(rows).index_put((at, chosen), own).view(x.shape)


@operation("dropout-cost", "dropout: one base product", RUN, not_kinds=("experts",))
def dropout_cost(trial: Trial) -> Iterator[Check]:
    """Counted: products of the base weight's size in one forward pass."""
    subject, x = trial.subject(), trial.inputs()
    subject.set_dropout(0.5)
    subject.model.train()
    for kind in trial.kinds:
        if kind == "embed_tokens":
            continue
        n = trial.numbers["one"][kind].weight_OI
        with _BaseProducts(tuple(n.shape)) as products:
            subject.layer(kind)(x[KINDS.index(kind)])
        yield Check(kind, "base products, but for one", float(abs(products.count - 1)), 0.0)


@operation("compile", "torch.compile", RUN, cost=1, sample=COMPILED)
def compiled(trial: Trial) -> Iterator[Check]:
    """Traced whole, forward and backward (AOTAutograd; the code is not generated)."""
    yield from _compiled(trial, "aot_eager")


@operation("compile-inductor", "torch.compile, generated code", RUN, cost=2, sample=("dora",))
def compiled_inductor(trial: Trial) -> Iterator[Check]:
    """The same with TorchInductor's own kernels."""
    yield from _compiled(trial, "inductor")


@operation("mixed-batch", "many adapters in one batch", RUN, not_kinds=("experts",))
def mixed_batch(trial: Trial) -> Iterator[Check]:
    """Each sequence of a batch is the formula with its own adapter, or the base."""
    subject, x = trial.subject(one=1, two=2), trial.inputs()
    names = ("two", None, "one")
    results = subject.mixed(names, x)
    for i, name in enumerate(names):
        numbers = trial.numbers["one"] if name is None else trial.numbers[name]
        if name is None:
            numbers = {kind: n.base() for kind, n in numbers.items()}
        own = [t[i : i + 1] for t in x]
        yield from trial.outputs([y[i : i + 1] for y in results], own, numbers, f"output of {name or 'the base'}")


@operation("reference", "reference path", RUN, ours_only=True)
def reference(trial: Trial) -> Iterator[Check]:
    """`theodora.kernels.reference()`: plain torch, line by line."""
    from theodora import kernels

    with kernels.reference():
        yield from backward(trial)


@operation("accelerate", "fast path of a whole model", RUN, ours_only=True)
def accelerated(trial: Trial) -> Iterator[Check]:
    """`theodora.accelerate(model)`."""
    from theodora.fastpath.accelerate import accelerate

    subject = trial.subject()
    accelerate(subject.model)
    outputs, leaves, dy = run_backward(subject, trial.inputs())
    yield from trial.outputs(outputs, leaves, trial.numbers["one"])
    yield from trial.gradients(subject, "one", leaves, dy)


def _checkpointed(trial: Trial, reentrant: bool) -> Iterator[Check]:
    subject = trial.subject()
    subject.model.train()

    def call(*x: Tensor) -> Any:
        return checkpoint(subject.model, *x, use_reentrant=reentrant)

    outputs, leaves, dy = run_backward(subject, trial.inputs(), call)
    yield from trial.outputs(outputs, leaves, trial.numbers["one"])
    yield from trial.gradients(subject, "one", leaves, dy)


def _compiled(trial: Trial, backend: str) -> Iterator[Check]:
    subject = trial.subject()
    with fresh_compiler():
        outputs, leaves, dy = run_backward(subject, trial.inputs(), torch.compile(subject.model, backend=backend))
    yield from trial.outputs(outputs, leaves, trial.numbers["one"])
    yield from trial.gradients(subject, "one", leaves, dy)


class fresh_compiler:
    """torch.compile without what it remembers of other models, before and after."""

    def __enter__(self) -> None:
        torch.compiler.reset()

    def __exit__(self, *_: object) -> None:
        torch.compiler.reset()


def _joined(one: Tensor, other: Tensor) -> Tensor:
    """The tokens of two batches as one; token ids are (…,), anything else (…, features)."""
    features = one.shape[-1:] if one.is_floating_point() else ()
    return torch.cat([one.detach().reshape(-1, *features), other.detach().reshape(-1, *features)])


def _write(subject: Library, kind: str, values: dict[str, Tensor], way: str) -> dict[str, Tensor]:
    """Change an adapter's numbers, and say what they are now."""
    parameters = subject.parameters(kind, "one")
    for part, value in values.items():
        parameter = parameters[part]
        value = as_held(part, value, parameter) if kind == "experts" else value
        if way == "in place":
            with torch.no_grad():
                parameter.copy_(value)
        elif way == ".data":
            parameter.data.copy_(value)
        else:
            parameter.grad = parameter.detach() - value.to(parameter)
            torch.optim.SGD([parameter], lr=1.0).step()
            parameter.grad = None
    now = {part: parameters[part].detach().to("cpu", copy=True) for part in values}
    return {part: shaped(part, value) for part, value in now.items()} if kind == "experts" else now


class _BaseProducts(TorchDispatchMode):
    """Counts matrix products with a factor of the base weight's shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shapes, self.count = {shape, shape[::-1]}, 0

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(word in name for word in ("mm", "linear", "float8_linear", "float8_product")):
            # bitsandbytes' product is told the shape of its packed weight in numbers.
            shapes = [tuple(a.shape if isinstance(a, Tensor) else a) for a in args if isinstance(a, Tensor | Sequence)]
            self.count += bool(self.shapes & set(shapes[1:])) and len(shapes[0]) <= 3
        return func(*args, **(kwargs or {}))
