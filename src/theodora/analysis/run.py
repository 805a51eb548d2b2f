"""`inspect_run`: how training changed a model, module by module, at every checkpoint of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from theodora.analysis.change import WeightChange, adapter_change, tuned_change
from theodora.analysis.correlation import Correlation, correlate
from theodora.analysis.experts import ExpertChange, experts_change
from theodora.analysis.inspection import check_base, plain
from theodora.analysis.states import State, find_states
from theodora.analysis.tuned import in_order, matching_modules, stored_dtypes
from theodora.errors import CheckpointError
from theodora.files import run_files
from theodora.files.adapter import AdapterFile, read_adapter
from theodora.files.base_model import BaseCheckpoint, find_base
from theodora.merging.plan import plan_merge, weight_on_disk
from theodora.parse import parse_yaml
from theodora.paths import layer_index, layer_kinds

FULL = "full"
_ANOTHER_MODEL = 0.5  # mean ‖W' − W‖ / ‖W‖; a model further away than this was hardly trained from that base


Change = tuple[WeightChange, tuple[ExpertChange, ...]]
"""Of a weight, and of each of its experts, if it is one of several."""


@dataclass(frozen=True)
class ModuleChange:
    """What happened to the weight of one module."""

    path: str
    kind: str
    layer: int | None
    shape: tuple[int, ...]
    """(out, in), or (experts, out, in)."""
    magnitude: float
    """ΔM: mean change of the rows' length, without sign."""
    relative_magnitude: float
    """ΔM against the mean length of a base row."""
    direction: float
    """ΔD: mean of 1 − cos between rows before and after."""
    size: float
    """‖W' − W‖ / ‖W‖."""
    effective_rank: float | None
    """Of W' − W; None if it was not asked for, or the weight is too large. Of LoRA's experts the mean."""
    experts: tuple[ExpertChange, ...] = ()
    """Of fused experts, each by itself."""


@dataclass(frozen=True)
class Checkpoint:
    """One moment of a run."""

    label: str
    step: int | None
    folder: str
    modules: tuple[ModuleChange, ...]


@dataclass(frozen=True)
class RunReport:
    """How far a run moved its base, checkpoint by checkpoint."""

    path: str
    method: str
    """lora, dora, or full (all weights trained)."""
    base_folder: str
    checkpoints: tuple[Checkpoint, ...]
    """In the order of training."""
    correlations: tuple[Correlation, ...]
    """Of ΔM and ΔD, for each kind of module that stands in numbered layers."""
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def last(self) -> Checkpoint:
        """The newest checkpoint."""
        return self.checkpoints[-1]

    @property
    def kinds(self) -> list[str]:
        """The kinds of modules, in the model's order."""
        return list(dict.fromkeys(module.kind for module in self.last.modules))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON: NaN becomes None."""
        return plain(asdict(self))


def inspect_run(
    path: str | Path,
    base_model: str | Path | None = None,
    *,
    rank: bool = True,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> RunReport:
    """Say how far every module moved from its base, in magnitude and direction, at each checkpoint of a run.

    Each base weight is read once; nothing is downloaded.

    Example:
        `inspect_run("runs/first").correlations`

    Args:
        path: output folder of a run with checkpoint-*/ folders, an adapter, or a fully tuned model.
        base_model: folder or hub name of the base. Default: the one that the adapter names; a fully tuned model names
            none.
        rank: whether to compute effective ranks. For DoRA and full tuning that is most of the work: an
            eigendecomposition for each weight.
        trust_remote_code: run Python code that comes with a model.
        progress: called with modules done and modules in all.

    Raises:
        CheckpointError: a folder is damaged, or does not fit the base.
    """
    folder, states, notes = find_states(path)
    with ExitStack() as stack:
        sources = [_open(state, trust_remote_code, stack) for state in states]
        heads = next((source.heads for source in sources if isinstance(source, AdapterFile)), None)
        if heads is not None:
            notes.append("The head that scores texts is not the base's: its change is from the first checkpoint on.")
        base = BaseCheckpoint(
            _base_folder(folder, sources, base_model), trust_remote_code=trust_remote_code, heads=heads
        )
        stack.callback(base.close)
        warnings: list[str] = []
        wanted = [_modules(base, state, source, notes, warnings) for state, source in zip(states, sources, strict=True)]
        paths = in_order(base, {name for names in wanted for name in names})
        if not paths:
            raise CheckpointError(f"{folder} changed no weight of a layer, so there is nothing to compare.")
        kinds = layer_kinds(paths)
        changes: list[list[ModuleChange]] = [[] for _ in states]
        for done, name in enumerate(paths):
            if progress is not None:
                progress(done, len(paths))
            w_OI = weight_on_disk(base, name)
            if w_OI is None:
                raise CheckpointError(f"{base.folder} does not store the weight of {name} as one tensor.")
            for modules, names, source in zip(changes, wanted, sources, strict=True):
                if name in names:
                    change, experts = _change(source, name, w_OI, rank)
                    where = name, kinds[name], layer_index(name), tuple(w_OI.shape)
                    modules.append(ModuleChange(*where, **vars(change), experts=experts))
    checkpoints = [
        Checkpoint(state.label, state.step, str(state.folder), tuple(modules))
        for state, modules in zip(states, changes, strict=True)
    ]
    checkpoints = _without_twins(checkpoints, notes)
    warnings += _suspicions(checkpoints)
    last = sources[-1]
    return RunReport(
        path=str(folder),
        method=last.config.method if isinstance(last, AdapterFile) else FULL,
        base_folder=str(base.folder),
        checkpoints=tuple(checkpoints),
        correlations=tuple(_correlations(checkpoints)),
        notes=tuple(dict.fromkeys(notes)),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def largest_movers(checkpoint: Checkpoint, count: int) -> list[ModuleChange]:
    """The modules whose weight changed most for its size, ‖W' − W‖ / ‖W‖."""
    known = [module for module in checkpoint.modules if math.isfinite(module.size)]
    return sorted(known, key=lambda module: -module.size)[:count]


def _open(state: State, trust_remote_code: bool, stack: ExitStack) -> AdapterFile | BaseCheckpoint:
    if state.is_adapter:
        return read_adapter(state.folder)
    source = BaseCheckpoint(state.folder, trust_remote_code=trust_remote_code)
    stack.callback(source.close)
    return source


def _base_folder(folder: Path, sources: list[AdapterFile | BaseCheckpoint], base_model: str | Path | None) -> Path:
    named = {source.base_model for source in sources if isinstance(source, AdapterFile)} - {None}
    if base_model is None and not named and (said := _said_by_run(folder)) is not None:
        return find_base(said)
    if base_model is None and not named:
        raise CheckpointError(
            f"{folder} does not say which model it was trained from. Name that model with --base-model."
        )
    if base_model is None and len(named) > 1:
        raise CheckpointError(
            f"The checkpoints in {folder} name different base models: {', '.join(sorted(map(str, named)))}. Name one "
            "with --base-model, or inspect them one by one."
        )
    return find_base(str(base_model or named.pop()))


def _said_by_run(folder: Path) -> str | None:
    """The model that a run of ours trained whole, as its record says; None where none does."""
    run = folder.parent.parent if folder.parent.name == run_files.CHECKPOINTS else folder
    try:
        record = (run / run_files.CONFIG_FILE).read_text(encoding="utf-8")
        options = parse_yaml(record) if record.startswith(run_files.RECORD_HEAD) else None
    except (OSError, ValueError):
        return None
    model = options.get("model") if isinstance(options, dict) and options.get("method") == FULL else None
    return model if isinstance(model, str) and model else None


def _modules(
    base: BaseCheckpoint,
    state: State,
    source: AdapterFile | BaseCheckpoint,
    notes: list[str],
    warnings: list[str],
) -> set[str]:
    """The modules that a state may have changed, checked against the base."""
    if isinstance(source, BaseCheckpoint):
        if stored_dtypes(source) != stored_dtypes(base):
            notes.append(
                f"The base is stored in {stored_dtypes(base)}, {state.label} in {stored_dtypes(source)}: what rounding "
                "did is part of the change."
            )
        return matching_modules(base, source, notes)
    plan_merge(base, source, None)
    check_base(source, base, f"that {state.label}", notes, warnings)
    return {*source.modules, *_trained_in_full(base, source, notes)}


def _trained_in_full(base: BaseCheckpoint, file: AdapterFile, notes: list[str]) -> set[str]:
    """The modules whose weights an adapter replaces, beside those that it updates."""
    replaced: set[str] = set()
    for name, tensor in file.full.items():
        module = name.removesuffix(".weight")
        w_OI = weight_on_disk(base, module) if name.endswith(".weight") and tensor.ndim == 2 else None
        if w_OI is None or module in file.modules:
            continue
        if w_OI.numel() == tensor.numel():
            replaced.add(module)
        else:
            notes.append(f"{name} has another shape than in the base (new tokens?): left out.")
    return replaced


def _change(source: AdapterFile | BaseCheckpoint, name: str, w_OI: Any, rank: bool) -> Change:
    if isinstance(source, AdapterFile):
        if name in source.modules and w_OI.dim() == 3:
            return experts_change(w_OI, source.modules[name], rank=rank)
        if name in source.modules:
            return adapter_change(w_OI, source.modules[name], rank=rank), ()
        tuned = source.full[f"{name}.weight"]
        # Stored as in the model: the other way round for embeddings and Conv1D.
        return tuned_change(w_OI, tuned if tuned.shape == w_OI.shape else tuned.T, rank=rank), ()
    tuned = weight_on_disk(source, name)
    if tuned is None:
        raise CheckpointError(f"{source.folder} does not store the weight of {name} as one tensor.")
    return tuned_change(w_OI, tuned, rank=rank), ()


def _without_twins(checkpoints: list[Checkpoint], notes: list[str]) -> list[Checkpoint]:
    """The checkpoints, each once: trainers save the result beside an equal checkpoint, and it would count twice."""
    distinct: list[Checkpoint] = []
    for checkpoint in checkpoints:
        twin = next((other for other in distinct if other.modules == checkpoint.modules), None)
        if twin is None or not any(module.size for module in checkpoint.modules):
            distinct.append(checkpoint)
        else:
            notes.append(f"{checkpoint.label} is the same as {twin.label}: counted once.")
    return distinct


def _correlations(checkpoints: list[Checkpoint]) -> list[Correlation]:
    kinds = dict.fromkeys(m.kind for checkpoint in checkpoints for m in checkpoint.modules if m.layer is not None)
    return [
        correlate(
            kind,
            [
                [(m.direction, m.magnitude) for m in checkpoint.modules if m.kind == kind and m.layer is not None]
                for checkpoint in checkpoints
            ],
        )
        for kind in kinds
    ]


def _suspicions(checkpoints: list[Checkpoint]) -> list[str]:
    warnings = []
    for checkpoint in checkpoints:
        sizes = [module.size for module in checkpoint.modules]
        broken = [module.path for module in checkpoint.modules if not math.isfinite(module.size)]
        if broken:
            warnings.append(
                f"{checkpoint.label}: {len(broken)} modules hold NaN or infinite values, {broken[0]} first."
            )
        elif not any(sizes):
            warnings.append(f"{checkpoint.label}: nothing changed.")
        elif math.fsum(sizes) / len(sizes) > _ANOTHER_MODEL:
            warnings.append(
                f"{checkpoint.label}: weights are {math.fsum(sizes) / len(sizes):.0%} away from the base. Was it "
                "trained from another model?"
            )
    return warnings
