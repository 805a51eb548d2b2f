"""Adapters on disk, in PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.

    base_model.model.<path>.lora_A.weight            (R, I)
    base_model.model.<path>.lora_B.weight            (O, R)
    base_model.model.<path>.lora_magnitude_vector    (O,)     DoRA; without ".weight"
    base_model.model.<path>.lora_embedding_A, _B     (R, V), (O, R)
    base_model.model.<path>.<parameter>              modules trained in full

What adapts the parameters of fused experts is in `experts.py`; tensors of convolutions have other shapes
(`convolutions.py`).

Beside an embedding or output head that was resized and trained in full PEFT writes the same values once more, as
<path>.modules_to_save.<parameter>, and those it replaces, as <path>.original_module.<parameter>.

Rows of single tokens (trainable tokens) are in `token_rows.py`.

Reading needs no model, and believes nothing: names, shapes, ranks and values are checked, and all misses are told at
once. What PEFT has no field for (where training started, a fingerprint of the base weights) stands in the metadata of
the safetensors file, which PEFT leaves alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from theodora.config import AdapterConfig
from theodora.errors import CheckpointError, bullet_list
from theodora.files import convolutions
from theodora.files.adapter_folder import Bounds, Stamp, read_adapter_files, read_adapter_metadata
from theodora.files.experts import experts_by_path
from theodora.files.finite import DTYPES, all_finite_on_gpu, finite
from theodora.files.folder import Place
from theodora.files.names import CONFIG_NAME, FINGERPRINT_KEY, KEY_PREFIX, MLX_WEIGHTS_NAME, WEIGHTS_NAME
from theodora.files.peft_config import checked_base, config_from_peft, layers_named
from theodora.files.peft_options import (
    StartFromWeight,
    added_by_peft,
    biases_trained,
    start_of,
    task_of,
)
from theodora.files.token_rows import BASE_COPY, DELTA, RowTensors, file_rows
from theodora.files.trained_on import TrainedOn, trained_on
from theodora.files.wrapper_names import plain_keys

_MISSES_TOLD = 20
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
}


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of one adapted module."""

    a: Tensor
    """A, (R, I), of experts (E, R, I); for an embedding I is the vocabulary size."""
    b: Tensor
    """B, (O, R), or (E, O, R)."""
    magnitude: Tensor | None
    """m, (O,), or (E, O), for DoRA."""
    scale: float
    """s in W + s·B·A."""
    embedding: bool = False
    """Whether the module is an embedding, whose weight is stored as (V, O)."""
    filter_shape: tuple[int, ...] | None = None
    """(C / groups, k, …) of a convolution, whose A and B are matrices here, too: I = C / groups · k …"""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(O, I) of the weight that this is for; of a convolution (O, C / groups, k, …), of experts (E, O, I)."""
        return *self.b.shape[:-1], *(self.filter_shape or self.a.shape[-1:])

    def of(self, expert: int | slice, rows: slice | Tensor = slice(None)) -> AdapterTensors:
        """What they are for output rows of one expert, or of several."""
        magnitude = None if self.magnitude is None else self.magnitude[expert, rows]
        return AdapterTensors(self.a[expert], self.b[expert, rows], magnitude, self.scale)


@dataclass(frozen=True)
class AdapterFile:
    """A checked adapter folder."""

    path: Path
    config: AdapterConfig
    base_model: str | None
    """Folder or hub name of the base."""
    modules: dict[str, AdapterTensors]
    """Module path in the transformers model → its tensors. After a PiSSA or OLoRA start of ours A and B hold the
    trained and the (negated) start factors one after the other: rank 2R."""
    base_revision: str | None = None
    """Its commit on the hub, where PEFT noted one."""
    full: dict[str, Tensor] = field(default_factory=dict)
    """Parameter path → tensor, for modules trained in full."""
    task: str | None = None
    """What the model is for, as PEFT calls it: CAUSAL_LM, SEQ_CLS, …"""
    full_names: tuple[str, ...] = ()
    """How the configuration names the modules trained in full; in `config` their paths stand instead."""
    base_copies: dict[str, Tensor] = field(default_factory=dict)
    """Parameter path → tensor, where PEFT saved an embedding of the base beside its adapter. If `full` has the same
    path, its tensor counts, and the copy only says how the base looks to other modules that are tied to it or that
    have to be resized."""
    token_rows: dict[str, RowTensors] = field(default_factory=dict)
    """Module path → rows of single tokens that replace the base's. Those of an embedding count for what is tied to
    it, too."""
    added_biases: dict[str, Tensor] = field(default_factory=dict)
    """Module path → the bias of its B (PEFT's `lora_bias`), which adds to the module's own, times the scale."""
    starts_from: StartFromWeight | None = None
    """The start (pissa, olora) that A and B are relative to, if the base's weights tell it."""
    starts: bool = False
    """Whether A and B hold start factors in their second half."""
    fingerprint: dict[str, list[float]] | None = None
    """Module path → some values of its base weight; see `fingerprint.py`."""
    only_layers: tuple[int, ...] | None = None
    """Numbers of the blocks that were adapted, where the configuration names them beside the targets."""
    trained_on: TrainedOn | None = None
    """What base it was trained on, if the file remembers."""
    mlx: bool = False
    """Whether it was read from MLX's files."""
    stamp: Stamp = (None, None)
    """Of the files that all this was read from."""
    left_out: tuple[str, ...] = ()
    """Paths of what the file holds of a vision or audio tower, where the model at hand is its language model alone."""

    @property
    def heads(self) -> dict[str, Tensor] | None:
        """What is trained in full, of an adapter for sequence classification, whose head no language model has."""
        return self.full if self.task == "SEQ_CLS" else None

    @property
    def weights(self) -> Path:
        """The file that holds the tensors."""
        return self.path / (MLX_WEIGHTS_NAME if self.mlx else WEIGHTS_NAME)


def read_adapter(
    path: str | Path | Place, device: torch.device | None = None, for_model: bool = False, bounds: Bounds | None = None
) -> AdapterFile:
    """Read and check an adapter folder, PEFT's or MLX's (or the name of one on the Hugging Face hub).

    The folder and its files are opened once: what is checked is what the result holds, whatever others do to them.

    Args:
        path: the folder, or the name.
        device: a GPU that is to hold the tensors; where None, they are in host memory.
        for_model: whether the base model is at hand to complete it by (`starts_from`, `added_biases`).
        bounds: how large its files may be.

    Raises:
        CheckpointError: files missing, damaged or contradictory, values that are no finite numbers, a DoRA adapter
            without its magnitudes, or options that mean something this library does not compute.
    """
    read = read_adapter_files(path, device, bounds)
    where, weights, metadata = read.folder / CONFIG_NAME, read.weights, read.metadata
    mlx = weights.name == MLX_WEIGHTS_NAME
    if mlx:
        from theodora.files.mlx import peft_from_mlx

        peft, tensors = peft_from_mlx(read.fields, read.tensors, read.folder)
    else:
        peft, tensors = checked_base(read.fields, where), plain_keys(read.tensors, weights)
    config, base = config_from_peft(peft, where, for_model), trained_on(metadata)
    if metadata.get("starts") and any(rank % 2 for rank in (config.rank, *config.rank_pattern.values())):
        raise CheckpointError(f"{where} says an odd rank, but half of it is to be the start that is taken away again")
    return replace(
        adapter_of(tensors, config, weights, peft=peft),
        task=task_of(peft),
        starts_from=start_of(peft),
        base_model=peft.get("base_model_name_or_path") or None,
        base_revision=_revision(peft, base),
        starts=bool(metadata.get("starts")),
        fingerprint=metadata.get(FINGERPRINT_KEY),
        trained_on=base,
        only_layers=layers_named(peft),
        mlx=mlx,
        stamp=read.stamp,
    )


def read_trained_on(path: str | Path | Place) -> TrainedOn | None:
    """What base an adapter folder says that it was trained on; None if it says nothing.

    Raises:
        CheckpointError: there is no such folder.
    """
    return trained_on(read_adapter_metadata(path))


def _revision(peft: Mapping[str, Any], base: TrainedOn | None) -> str | None:
    """The commit of the base: PEFT's note, or ours if it is of the same model."""
    noted = peft.get("revision")
    if isinstance(noted, str):
        return noted
    return base.revision if base is not None and base.model == peft.get("base_model_name_or_path") else None


def adapter_of(
    tensors: Mapping[str, Tensor],
    config: AdapterConfig,
    where: Path,
    any_rank: bool = False,
    peft: Mapping[str, Any] | None = None,
) -> AdapterFile:
    """Sort and check tensors under PEFT's keys.

    Args:
        tensors: key → tensor.
        config: what they have to agree with.
        where: they come from; for messages.
        any_rank: whether the ranks may differ from those of `config`.
        peft: PEFT's own fields, where they say more.

    Raises:
        CheckpointError: with every key that is unknown, missing, of another shape, or that holds no finite numbers.
    """
    by_path = experts_by_path(tensors, config, peft)
    by_role = _by_role(by_path.tensors, config, peft)
    by_role.experts |= by_path.experts
    modules, problems = _checked_modules(by_role, config, any_rank)
    problems = by_path.problems + by_role.problems + problems
    if _adds_biases(peft):
        without = [module for module in by_role.low_rank if module not in by_role.added_biases]
        problems += [f"{module}: lora_bias is set, but its bias is missing" for module in without]
    full = by_role.full
    missing = [name for name in config.modules_to_save if not any(_saved_module(key, (name,)) for key in full)]
    problems += [
        f"modules_to_save names {name!r}, but the file holds no such tensor"
        for name in missing
        if not (full and name in added_by_peft(peft))  # only the model tells whether it has them
    ]
    token_rows, row_problems = file_rows(by_role.rows, config.trainable_token_indices)
    problems += row_problems
    if not modules and not full and not token_rows and not problems:
        problems.append("the file holds no adapter tensors")
    if problems:
        raise CheckpointError(f"{where} cannot be used:" + bullet_list(problems, _MISSES_TOLD))
    return AdapterFile(
        path=where.parent,
        config=replace(config, modules_to_save=tuple(sorted(by_role.saved_modules))),
        base_model=None,
        modules=modules,
        full=full,
        full_names=config.modules_to_save,
        base_copies=by_role.base_copies,
        token_rows=token_rows,
        added_biases=by_role.added_biases,
    )


@dataclass
class _ByRole:
    """The tensors of a file, sorted by what each of them is."""

    low_rank: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    """Module path → a, b and magnitude, as far as the file holds them."""
    embeddings: set[str] = field(default_factory=set[str])
    """Paths of the modules among them that are embeddings."""
    experts: set[str] = field(default_factory=set[str])
    """Paths of the parameters of experts among them."""
    full: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    saved_modules: set[str] = field(default_factory=set[str])
    """Paths of the modules that `full` is of."""
    base_copies: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    rows: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    added_biases: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    problems: list[str] = field(default_factory=list[str])
    """What is wrong with single keys."""


def _by_role(tensors: Mapping[str, Tensor], config: AdapterConfig, peft: Mapping[str, Any] | None) -> _ByRole:
    """Tell by its key what each tensor is; the first rule that fits a key decides."""
    roles, all_finite = _ByRole(), all_finite_on_gpu(tensors.values())
    in_full = config.modules_to_save
    if in_full:  # PEFT also wraps what is tied to these modules (`ensure_weight_tying`), and names it nowhere
        wrapped = (key.removeprefix(KEY_PREFIX).partition(".modules_to_save.") for key in tensors)
        in_full += tuple(sorted({module for module, wrapper, _ in wrapped if wrapper}))
    for key, tensor in tensors.items():
        name = key.removeprefix(KEY_PREFIX)
        part = next((part for part in _PARTS if name.endswith("." + part)), None)
        if not key.startswith(KEY_PREFIX):
            roles.problems.append(f"{key}: unknown key; expected it to begin with {KEY_PREFIX}")
        elif tensor.dtype not in DTYPES:
            roles.problems.append(f"{key}: dtype {tensor.dtype}; expected one of {', '.join(map(str, DTYPES))}")
        elif not (all_finite or finite(tensor)):
            roles.problems.append(f"{key}: holds NaN or infinite values")
        elif part is not None:
            module = name.removesuffix("." + part)
            if _PARTS[part] in roles.low_rank.setdefault(module, {}):
                roles.problems.append(f"{key}: the file holds this twice, as lora_{part[5].upper()} and lora_embedding")
            roles.low_rank[module][_PARTS[part]] = tensor
            if "embedding" in part:
                roles.embeddings.add(module)
        elif (plain := _unwrapped(name, "modules_to_save", in_full)) is not None:
            if not _same(tensor, tensors.get(KEY_PREFIX + plain)):
                roles.problems.append(f"{key}: expected the values of {KEY_PREFIX}{plain}, which PEFT saves twice")
        elif (plain := _unwrapped(name, "original_module", in_full)) is not None:
            roles.base_copies[plain] = tensor
        elif name.endswith("." + DELTA):
            roles.rows[name.removesuffix("." + DELTA)] = tensor
        elif BASE_COPY in name:
            roles.base_copies[name.replace(BASE_COPY, ".")] = tensor
        elif _adds_biases(peft) and name.endswith(".lora_B.bias"):
            roles.added_biases[name.removesuffix(".lora_B.bias")] = tensor
        elif biases_trained(peft) and name.endswith(".bias") and _saved_module(name, in_full) is None:
            roles.full[name.replace(".base_layer.", ".")] = tensor
        elif ".base_layer." in name:
            roles.base_copies[name.replace(".base_layer.", ".")] = tensor
        elif (saved := _saved_module(name, in_full)) is not None:
            roles.full[name] = tensor
            roles.saved_modules.add(saved)
        elif name.rpartition(".")[2] == "weight" and "lora_" not in name:
            roles.base_copies[name] = tensor
        else:
            roles.problems.append(f"{key}: unknown key")
    return roles


def _adds_biases(peft: Mapping[str, Any] | None) -> bool:
    return bool(peft and peft.get("lora_bias"))


def _checked_modules(
    by_role: _ByRole, config: AdapterConfig, any_rank: bool
) -> tuple[dict[str, AdapterTensors], list[str]]:
    """The modules of low rank whose tensors agree with each other and with the configuration; what others lack."""
    modules: dict[str, AdapterTensors] = {}
    problems: list[str] = []
    for module, stored in by_role.low_rank.items():
        parts, filter_shape, experts = stored, None, module in by_role.experts
        if not experts and convolutions.is_convolution(stored) and not convolutions.problem_of(stored):
            parts, filter_shape = convolutions.as_matrices(stored), tuple(stored["a"].shape[1:])
        if problem := _module_problem(module, parts, config, any_rank, experts):
            problems.append(f"{module}: {problem}")
        else:
            scale = config.scale(config.rank_of(module), config.alpha_of(module))
            embedding = module in by_role.embeddings
            modules[module] = AdapterTensors(
                parts["a"], parts["b"], parts.get("magnitude"), scale, embedding, filter_shape
            )
    return modules, problems


def _module_problem(
    module: str, parts: Mapping[str, Tensor], config: AdapterConfig, any_rank: bool, experts: bool
) -> str | None:
    """What is wrong with one module's tensors, if anything."""
    lacking = [name for name in ("a", "b") if name not in parts]
    if lacking:
        return " and ".join(f"lora_{name.upper()}" for name in lacking) + " missing"
    a, b, magnitude = parts["a"], parts["b"], parts.get("magnitude")
    if ".base_layer." in module:
        return (
            "is of nn.MultiheadAttention, which is not supported: load it with PEFT, call merge_and_unload(), save the "
            "model"
        )
    if not experts and convolutions.is_convolution(parts):
        return convolutions.problem_of(parts)
    if not a.numel() or not b.numel():
        return "its tensors are empty, as DeepSpeed's ZeRO-3 leaves them: gather them first (zero_to_fp32.py does)"
    if a.ndim not in (2, 3) or a.ndim != b.ndim or a.shape[-2] != b.shape[-1] or a.shape[:-2] != b.shape[:-2]:
        wanted = "(experts, rank, in) and (experts, out, rank)" if experts else "(rank, in) and (out, rank)"
        return f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}; expected {wanted}"
    if a.shape[-2] != config.rank_of(module) and not any_rank:
        return f"its tensors have rank {a.shape[-2]}, but {CONFIG_NAME} says {config.rank_of(module)}"
    if config.method == "dora" and magnitude is None:
        return "the magnitudes (lora_magnitude_vector) are missing; a DoRA adapter is nothing without them"
    if config.method == "lora" and magnitude is not None:
        return f"holds magnitudes, but {CONFIG_NAME} says use_dora: false; as plain LoRA it would be another model"
    if magnitude is not None and magnitude.shape != b.shape[:-1]:
        return f"magnitudes {tuple(magnitude.shape)}; expected {tuple(b.shape[:-1])}, one for each output row"
    return None


def _saved_module(parameter: str, names: tuple[str, ...]) -> str | None:
    """The module trained in full that the parameter belongs to. PEFT compares endings, also within a name."""
    parts = parameter.split(".")
    modules = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next((module for module in modules if names and module.endswith(names)), None)


def _unwrapped(parameter: str, part: str, names: tuple[str, ...]) -> str | None:
    """The path of a parameter in that `part` of PEFT's wrapper around a module trained in full; None if in none."""
    module, wrapper, rest = parameter.partition(f".{part}.")
    return f"{module}.{rest}" if wrapper and names and module.endswith(names) else None


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.dtype == other.dtype and torch.equal(one, other)
