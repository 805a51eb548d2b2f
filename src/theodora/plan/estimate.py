"""What each setting of a run takes, part by part, and the one to choose."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from theodora.plan.devices import Machine
from theodora.plan.paper import PaperModel, Step, Stored

MIB = 2**20
WORKSPACE = 64 * MIB
"""What cuBLAS takes of torch's allocator, on its own stream and on a graph's."""
CONTEXT = 600 * MIB
"""CUDA's own, with the kernels of torch and ours, outside torch's allocator: half a GiB on an H100."""
SLACK = 0.08
"""What the allocator holds beyond the peak, as a share of it: 3 to 9 % in benchmarks/results/train_step.json, and 15 in
one row of 21."""
PROCESS = 900 * MIB
"""A process on a CPU with torch, transformers and TRL imported."""
# Numbers that an optimizer keeps for each trained one, in bytes; AdamW's and most others' are two of float32.
_STATES = {"sgd": 0.0, "adafactor": 0.1, "lion": 4.0, "rmsprop": 4.0, "adagrad": 4.0}
_SHARDED_STORES = ("plain", "nf4")
_FAST_TOKENS = 4096
"""Tokens in a pass from which a GPU is about as busy as it gets."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run."""

    stored: Stored = "plain"
    recomputes: bool = False
    """Whether activations are recomputed in the backward pass."""
    batch: int = 8
    """Rows in a pass, in each process."""
    length: int = 1024
    """Tokens of a row."""
    accumulation: int = 1
    """Passes in an optimizer step."""
    sharding: str = "none"
    """none (each process has the whole base) or fsdp2."""
    cpu_offload: bool = False

    @property
    def tokens(self) -> int:
        """In a pass, of each process."""
        return self.batch * self.length


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a setting takes on each device, in bytes."""

    setting: Setting
    weights: int
    """The frozen base, as it is stored; of a sharded one the process's share, and the blocks at work."""
    adapter: int
    gradients: int
    """Of the adapter; those of the pass at hand are part of `passing`."""
    optimizer: int
    activations: int
    """What the forward pass keeps for the backward pass."""
    passing: int
    """What comes and goes beside it at the worst moment: the loss, gradients of activations, dequantised weights."""
    workspace: int
    peak: int
    """All of the above: what torch.cuda.max_memory_allocated() will say; on a CPU, tensors."""
    taken: int
    """Of the device's memory: with what the allocator holds beyond, and the CUDA context; on a CPU the process."""
    traced: bool
    """Whether the step's own code was counted; else it is a coarse estimate."""

    def fits(self, memory: int) -> bool:
        """Whether a device of so many bytes is enough."""
        return self.taken <= memory

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


Models = Callable[[Stored], PaperModel]
"""The model on paper, as it is stored; made once for each."""


def estimate(model: PaperModel, setting: Setting, gpus: int = 1, optimizer: str = "adamw") -> Estimate:
    """What a setting takes.

    Args:
        model: on paper, stored as the setting says.
        setting: the way to run.
        gpus: processes.
        optimizer: its name, as transformers has it.
    """
    step = _step(model, setting)
    several, accumulates = gpus > 1, setting.accumulation > 1
    # Gradients of earlier passes, which the next are added to; and those that are sent, flattened.
    gradients = model.trained_bytes * (accumulates + several)
    workspace = WORKSPACE if model.device == "cuda" else 0
    states = round(model.trained * bytes_of_state(optimizer))
    weights = _weights(model, setting, gpus)
    peak = weights + model.trained_bytes + gradients + states + step.peak + workspace
    taken = peak + PROCESS if model.device == "cpu" else round(peak * (1 + SLACK)) + CONTEXT
    return Estimate(
        setting=setting,
        weights=weights,
        adapter=model.trained_bytes,
        gradients=gradients,
        optimizer=states,
        activations=step.kept,
        passing=step.peak - step.kept,
        workspace=workspace,
        peak=peak,
        taken=taken,
        traced=step.traced,
    )


def largest_batch(
    model: PaperModel, setting: Setting, machine: Machine, optimizer: str = "adamw", most: int = 4096
) -> int:
    """Rows that fit into a pass at most, by a line through two batches; 0 if not even one does."""
    sizes = (1, max(2, setting.batch))
    few, more = (estimate(model, replace(setting, batch=n), machine.gpus, optimizer).taken for n in sizes)
    if few > machine.memory:
        return 0
    return min(most, 1 + int((machine.memory - few) * (sizes[1] - 1) / max(1, more - few)))


def candidates(
    base: Setting, machine: Machine, *, stores: Iterable[Stored], recomputes: Iterable[bool], shardings: Iterable[str]
) -> Iterator[Setting]:
    """Every way to run the batch as it is, the fastest first."""
    for sharding, stored, again in itertools.product(shardings, stores, recomputes):
        if sharding != "none" and (machine.gpus == 1 or stored not in _SHARDED_STORES):
            continue
        yield replace(base, stored=stored, recomputes=again, sharding=sharding)


def recommend(
    models: Models, settings: Iterable[Setting], machine: Machine, optimizer: str = "adamw"
) -> Estimate | None:
    """The setting to take: the fastest that fits, with the base as precise as possible.

    A batch that does not fit is cut into passes of fewer rows, with as many more of them in a step: the same steps.
    Plain weights go before a sharded base, and that before one in few bits.
    """
    kinds: dict[tuple[float, bool], list[Setting]] = {}
    for setting in settings:
        kinds.setdefault((-_precision(setting), setting.sharding != "none"), []).append(setting)
    for _, alike in sorted(kinds.items()):
        cut = [found for setting in alike if (found := _cut(models(setting.stored), setting, machine, optimizer))]
        if cut:
            return max(cut, key=lambda found: _speed(found.setting))
    return None


def _cut(model: PaperModel, setting: Setting, machine: Machine, optimizer: str) -> Estimate | None:
    """The setting with as many passes in a step as it takes to fit; None if one row does not."""
    rows = min(setting.batch, largest_batch(model, setting, machine, optimizer, setting.batch))
    for passes in range(-(-setting.batch // max(rows, 1)), setting.batch + 1 if rows else 0):
        if setting.batch % passes:
            continue
        cut = replace(setting, batch=setting.batch // passes, accumulation=setting.accumulation * passes)
        if (found := estimate(model, cut, machine.gpus, optimizer)).fits(machine.memory):
            return found
    return None


def _precision(setting: Setting) -> float:
    """Of the base: plain first, then eight bits, then four."""
    return {"plain": 4, "fp8": 3, "int8": 2, "nf4": 1, "int4": 0}[setting.stored]


def _speed(setting: Setting) -> float:
    """How fast a setting is about, relative to others: recomputing costs a third, few tokens do not fill a GPU."""
    return (0.75 if setting.recomputes else 1.0) * min(1.0, 0.4 + 0.6 * setting.tokens / _FAST_TOKENS)


def _step(model: PaperModel, setting: Setting) -> Step:
    return model.step(setting.batch, setting.length, setting.recomputes)


def _weights(model: PaperModel, setting: Setting, gpus: int) -> int:
    if setting.sharding == "none" or gpus == 1 or not model.block_bytes:
        return model.weight_bytes
    # The root's weights stay gathered while a step runs; of the blocks one is at work, one on its way, and one is being
    # taken out of the buffer that it came in.
    at_work = model.root_bytes + 3 * max(model.block_bytes)
    share = 0 if setting.cpu_offload else -(-model.weight_bytes // gpus)
    return min(share + at_work, model.weight_bytes + 2 * max(model.block_bytes))


def bytes_of_state(optimizer: str) -> float:
    """What an optimizer, by transformers' name, keeps for each trained number."""
    name = optimizer.lower()
    known = next((size for key, size in _STATES.items() if name.startswith(key)), 8.0)
    if "8bit" in name or "4bit" in name:
        return known / 4
    return known
