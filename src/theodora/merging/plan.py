"""What a merged checkpoint will hold, decided and checked before the first byte is written."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from theodora.adapters.merge_check import weight_excess
from theodora.adapters.renamed import left_out_note, under_names
from theodora.errors import CheckpointError, bullet_list
from theodora.files.adapter import AdapterFile, AdapterTensors
from theodora.files.base_model import BaseCheckpoint
from theodora.files.distrust import FLOAT_DTYPES
from theodora.files.fingerprint import SAME_BASE, check_fingerprint, fingerprint_of_rows, weight_fingerprint
from theodora.files.in_full import missing_in_full
from theodora.files.model_folder import StoredTensor
from theodora.files.pieces import Piece
from theodora.files.token_rows import RowTensors
from theodora.functional import merged_weight, wide_dtype
from theodora.layers.experts import named_places
from theodora.layers.kinds import token_ends
from theodora.paths import nearest

_MISSES_TOLD = 20


@dataclass(frozen=True)
class Change:
    """What an adapter does to one parameter: replace it, update it, or both in this order; or replace rows of it."""

    full: Tensor | None = None
    low_rank: AdapterTensors | None = None
    rows: RowTensors | None = None
    """Rows of single tokens that are replaced last."""

    def same_as(self, other: Change | None) -> bool:
        """Whether both replace a parameter by equal values."""
        if other is None or self.low_rank is not None or other.low_rank is not None:
            return False
        if self.rows is not None and not self.rows.same_as(other.rows):
            return False
        if (self.rows is None) is not (other.rows is None) or (self.full is None) is not (other.full is None):
            return False
        return self.full is None or torch.equal(self.full, cast(Tensor, other.full))


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the merged checkpoint."""

    key: str
    source: StoredTensor
    """The base tensor it is made from."""
    parameter: str | None
    """Its name in the model; None for stored tensors that the model does not load."""
    change: Change | None
    transposed: bool
    """Whether it is stored (in, out)."""
    dtype: torch.dtype | None
    """What it is written in; None: as stored."""
    is_buffer: bool = False
    """Whether it is no parameter of the model: a mask or a bound, which may be infinite by intent."""
    piece: Piece | None = None
    """What it holds of the parameter, where it is not the whole."""

    @property
    def place(self) -> str | None:
        """The parameter, and which part of it."""
        if self.piece is None:
            return self.parameter
        rows = f"{self.piece.rows.start}:" if isinstance(self.piece.rows, slice) else "turned"
        return f"{self.parameter}[{'' if self.piece.expert is None else self.piece.expert}, {rows}]"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as written."""
        full = self.change.full if self.change is not None else None
        return self.source.shape if full is None else tuple(full.shape)

    def nbytes(self) -> int:
        """Size as written."""
        bits = self.dtype.itemsize * 8 if self.dtype is not None else _stored_bits(self.source.dtype)
        return math.prod(self.shape) * bits // 8

    def values(self, base: BaseCheckpoint) -> tuple[Tensor, Tensor]:
        """The base values, and the values after the change in full precision (the same tensor without a change)."""
        stored = base.read(self.source.key)
        if len(parts := self.parts()) == 1:
            return stored, self.merged(stored)
        return stored, torch.stack([part.merged(w) for part, w in zip(parts, stored, strict=True)])

    def merged(self, stored: Tensor) -> Tensor:
        """The values after the change in full precision, given the base's."""
        if self.change is None:
            return stored
        start = stored if self.change.full is None else self.change.full
        work = start.to(wide_dtype(stored.dtype))
        update = self.change.low_rank
        if update is not None:
            w = _matrix(work, self.transposed, update.a.dim() == 3)
            w = merged_weight(w, update.a, update.b, update.scale, update.magnitude)
            work = w.mT if self.transposed else w.view(work.shape)
        if self.change.rows is not None:
            work = self.change.rows.put_into(work)
        return work.contiguous()

    def parts(self) -> list[OutputTensor]:
        """The same for each of several experts that are stored as one; else itself alone."""
        update = self.change.low_rank if self.change is not None else None
        if self.change is None or self.change.full is not None or update is None or update.a.dim() == 2:
            return [self]
        return [replace(self, change=Change(low_rank=update.of(e))) for e in range(len(update.a))]

    def excess(self, stored: Tensor, written: Tensor) -> float:
        """How far the written weight is from the unmerged formula, as a share of what rounding allows."""
        update = self.change.low_rank if self.change is not None else None
        if self.change is None or update is None:
            return 0.0
        w, merged = (stored if self.change.full is None else self.change.full), written
        w_OI, merged_OI = (_matrix(t, self.transposed, update.a.dim() == 3) for t in (w, merged))
        return weight_excess(w_OI, update.a, update.b, update.scale, update.magnitude, merged_OI)

    def written_dtype(self, stored: Tensor) -> torch.dtype:
        """The dtype in the merged file."""
        return stored.dtype if self.dtype is None else self.dtype


@dataclass(frozen=True)
class MergePlan:
    """The tensors to write, in order, and what changes beside them."""

    outputs: list[OutputTensor]
    untied: bool = False
    """The output head no longer shares the embedding's values."""
    vocabulary: int | None = None
    """New number of tokens, where the adapter brings resized embeddings."""
    notes: list[str] = field(default_factory=list[str])


def plan_merge(
    base: BaseCheckpoint, adapter: AdapterFile, dtype: torch.dtype | None, *, other_base: bool = False
) -> MergePlan:
    """Match every tensor of the adapter with a tensor of the base.

    Args:
        base: the base.
        adapter: the adapter.
        dtype: of the merged weights; None: as they are stored.
        other_base: whether it is known that the adapter was trained on other weights (on quantised ones), whose
            distance is told elsewhere.

    Raises:
        CheckpointError: listing every tensor of the adapter that has no place in the base, or another shape.
    """
    adapter = _in_names_of(base, adapter)
    changes, unknown = _changes(base, adapter)
    untied, inseparable = _untied(base, changes)
    plan = MergePlan(_outputs(base, changes, untied, dtype), untied=bool(untied))
    misshapen = _shape_problems(base, plan)
    vocabulary, disagreeing = _vocabulary(base, plan)
    problems = [*unknown, *inseparable, *misshapen, *disagreeing, *_unplaced(base, changes, plan)]
    if problems:
        raise CheckpointError(
            f"The adapter {adapter.path} does not fit the base model {base.folder}. Was it trained on another one? "
            "Name the right one with --base-model." + bullet_list(problems, _MISSES_TOLD)
        )
    notes = [left_out_note(adapter)] if adapter.left_out else []
    distance = check_fingerprint(adapter, lambda path: fingerprint_on_disk(base, path))
    if distance > SAME_BASE and not other_base:
        notes.append(
            f"The base weights are {distance:.1%} away from those the adapter was trained on (quantised, or trained "
            "further?): the merged model may not do what the adapted one did."
        )
    if untied:
        notes.append(
            "Only one side of the tied embedding and output head was adapted, or each differently: the merged model "
            f"stores both ({', '.join(sorted(untied))}), and its config.json says tie_word_embeddings=false."
        )
    if vocabulary is not None:
        notes.append(f"The adapter brings embeddings for {vocabulary} tokens; config.json says so.")
    return replace(plan, vocabulary=vocabulary, notes=notes)


def weight_on_disk(base: BaseCheckpoint, path: str) -> Tensor | None:
    """The base weight at a path, (O, I), of experts (E, O, I); None if the base does not store it as one tensor."""
    name = base.weight_name(path)
    weight = base.read_whole(name) if name is not None else None
    if name is None or weight is None:
        return None
    return _matrix(weight, base.is_transposed(name), name == base.model_name(path))


def _matrix(stored: Tensor, transposed: bool, experts: bool) -> Tensor:
    """A weight as it is stored, as (O, I) or (E, O, I); of a convolution I is all that one output reads."""
    if transposed:
        return stored.mT
    return stored if experts else stored.flatten(1)


def fingerprint_on_disk(base: BaseCheckpoint, path: str) -> list[float] | None:
    """`weight_fingerprint` of a module's base weight, or None if the base does not store it."""
    name = base.weight_name(path)
    pieces = base.pieces_of(name) if name is not None and base.key_of(name) is None else {}
    if name is not None and pieces:
        experts, outputs, inputs = base.experts()[name]
        return fingerprint_of_rows((experts * outputs, inputs), lambda at: _rows(base, pieces, at, outputs))
    w_OI = weight_on_disk(base, path)
    if w_OI is None or w_OI.dim() == 2:
        return None if w_OI is None else weight_fingerprint(w_OI)
    outputs = w_OI.shape[1]
    return fingerprint_of_rows((len(w_OI) * outputs, w_OI.shape[2]), lambda at: w_OI[at // outputs, at % outputs])


def _rows(base: BaseCheckpoint, pieces: dict[str, Piece], at: Tensor, outputs: int) -> Tensor:
    """Output rows of experts, counted through all of them, from those of the pieces that hold one."""
    rows: dict[int, Tensor] = {}
    for key, piece in pieces.items():
        found = {row: place for row in at.tolist() if (place := piece.row(row // outputs, row % outputs)) is not None}
        if found:
            stored = base.read(key)
            rows |= {row: (stored.mT if piece.transposed else stored)[place] for row, place in found.items()}
    return torch.stack([rows[row] for row in at.tolist()])


def _in_names_of(base: BaseCheckpoint, adapter: AdapterFile) -> AdapterFile:
    """The adapter under the model's names, and under the file's for what the model's class does not load."""
    unloaded = base.unloaded()
    modules = list(named_places(base.model))
    parameters = [path for path, _ in base.model.named_parameters(remove_duplicate=False)]
    return under_names(adapter, modules + [key.rpartition(".")[0] for key in unloaded], parameters + unloaded)


def _changes(base: BaseCheckpoint, adapter: AdapterFile) -> tuple[dict[str, Change], list[str]]:
    """Parameter of the model -> what the adapter does to it; and complaints about parameters that are not there."""
    changes: dict[str, Change] = {}
    problems: list[str] = []
    parameters = [name for name, _ in base.model.named_parameters()]
    for path, full in adapter.full.items():
        name = base.model_name(path)
        if name is None:
            problems.append(f"{path}: {_unknown(path, parameters)}")
        else:
            changes[name] = Change(full=full)
    problems += missing_in_full(adapter, parameters, changes)
    for path, copy in adapter.base_copies.items():
        name = base.model_name(path)
        if name is None:
            problems.append(f"{path}: {_unknown(path, parameters)}")
        elif _differs(base, name, copy):
            # PEFT loads such a copy into the base weight itself, so everything tied to that weight follows.
            for member in (name, *base.tied_to(name)):
                changes.setdefault(member, Change(full=copy))
    for path, tensors in adapter.modules.items():
        experts = tensors.a.dim() == 3
        name = base.weight_name(path)
        if name is None:
            problems.append(f"{path}: {_unknown(path if experts else f'{path}.weight', parameters)}")
        elif (problem := _other_experts(base, name, tensors)) is not None:
            problems.append(f"{name}: {problem}")
        else:
            changes[name] = replace(changes.get(name, Change()), low_rank=tensors)
    for path, rows in adapter.token_rows.items():
        name = base.model_name(f"{path}.weight")
        if name is None:
            problems.append(f"{path}: {_unknown(f'{path}.weight', parameters)}")
            continue
        embedding = base.model.get_submodule(path) is token_ends(base.model)[0]
        for member in (name, *(base.tied_to(name) if embedding else ())):
            has_its_own = member.removesuffix(".weight") in adapter.token_rows or member in adapter.full
            if member == name or not has_its_own:
                changes[member] = replace(changes.get(member, Change()), rows=rows)
    return changes, problems


def _other_experts(base: BaseCheckpoint, name: str, tensors: AdapterTensors) -> str | None:
    """Why an adapter of experts does not fit a parameter, or one of a module a parameter of experts."""
    whole = base.experts().get(name)
    if tensors.a.dim() == 2 and whole is None:
        return None
    if tensors.a.dim() == 2 or whole is None:
        return "the adapter and the base disagree whether this holds several experts"
    adapted = tensors.weight_shape
    expected = (whole[0], *whole[:0:-1]) if base.is_transposed(name) else whole
    return None if adapted == expected else f"(experts, out, in) is {adapted} in the adapter, {expected} in the base"


def _unplaced(base: BaseCheckpoint, changes: dict[str, Change], plan: MergePlan) -> list[str]:
    """Complaints about changes that no tensor of the output holds."""
    placed = {output.parameter for output in plan.outputs if output.change is not None}
    problems = []
    for name, change in changes.items():
        if name in base.converted and name not in placed:
            parts = ", ".join(base.converted[name][:2])
            problems.append(
                f"{name}: stored in other pieces ({parts}, …), which streaming cannot merge; load base and adapter "
                "in Python, then merge_adapter(model) and model.save_pretrained(...)"
            )
        elif name not in placed and not any(change.same_as(changes.get(other)) for other in base.tied_to(name)):
            problems.append(f"{name}: not stored in the base")
    return problems


def changed_copies_on_disk(base: BaseCheckpoint, adapter: AdapterFile) -> list[str]:
    """Paths of copies beside the adapter that differ from the base's weights: in values, or in the number of tokens.

    A form that has no place for them would lose them.
    """
    names = {path: base.model_name(path) for path in adapter.base_copies if path not in adapter.full}
    return [path for path, name in names.items() if name is None or _differs(base, name, adapter.base_copies[path])]


def _differs(base: BaseCheckpoint, parameter: str, copy: Tensor) -> bool:
    """Whether a copy beside the adapter differs from the base's weight by more than rounding."""
    key = base.key_of(parameter)
    if key is None or base.tensors[key].shape != tuple(copy.shape) or base.tensors[key].dtype not in FLOAT_DTYPES:
        return True
    return not torch.allclose(base.read(key).float(), copy.float(), rtol=1e-2, atol=1e-6)


def _unknown(name: str, names: list[str]) -> str:
    close = nearest(name, names)[:1]
    return "no such parameter in the base" + (f" (the nearest is {close[0]})" if close else "")


def _untied(base: BaseCheckpoint, changes: dict[str, Change]) -> tuple[set[str], list[str]]:
    """Parameters that shared their values in the base and no longer do; and complaints about those that always do."""
    untied: set[str] = set()
    problems: list[str] = []
    ends = set(map(id, token_ends(base.model)))
    for name, change in changes.items():
        others = base.tied_to(name)
        if not others or all(change.same_as(changes.get(other)) for other in others):
            continue
        family = {name, *others}
        if {id(base.model.get_submodule(member.rpartition(".")[0])) for member in family} != ends:
            problems.append(
                f"{name}: shares its values with {', '.join(others)}, which cannot be undone in config.json"
            )
        untied |= family
    return untied, problems


def _outputs(
    base: BaseCheckpoint, changes: dict[str, Change], untied: set[str], dtype: torch.dtype | None
) -> list[OutputTensor]:
    parameter_of = {key: name for name, key in base.keys.items()}
    parameter_of |= {key: name for name, keys in base.converted.items() for key in keys}
    floating, buffers = _castable(base, dtype), {name for name, _ in base.model.named_buffers()}

    def output(key: str, source: StoredTensor, name: str | None) -> OutputTensor:
        cast = dtype if name in floating and source.dtype in FLOAT_DTYPES else None
        if key in changes and key not in base.keys:
            name = key  # the adapter names the stored tensor itself: see BaseCheckpoint.model_name
        change, piece = changes.get(name) if name is not None else None, base.pieces.get(key)
        if name in base.converted:
            update = change.low_rank if change is not None and change.full is None else None
            change = Change(low_rank=update.of(*piece.at)) if piece is not None and update is not None else None
        transposed = change is not None and change.low_rank is not None and base.is_transposed(name or "")
        written = cast or FLOAT_DTYPES.get(source.dtype)
        return OutputTensor(
            key,
            source,
            name,
            change,
            transposed or (piece is not None and piece.transposed),
            written,
            is_buffer=name is None or name in buffers,
            piece=piece,
        )

    outputs = [output(key, stored, parameter_of.get(key)) for key, stored in base.tensors.items()]
    for name in sorted(untied - base.keys.keys()):
        source = base.key_of(name)
        if source is not None:
            outputs.append(output(base.new_key(name), base.tensors[source], name))
    return outputs


def _castable(base: BaseCheckpoint, dtype: torch.dtype | None) -> set[str]:
    """Parameters that take the dtype asked for: not buffers, nor those that the model class keeps in float32."""
    model = base.model
    wide = set(model._keep_in_fp32_modules_strict or ())  # pyright: ignore[reportPrivateUsage]
    if dtype == torch.float16:
        wide |= set(model._keep_in_fp32_modules or ())  # pyright: ignore[reportPrivateUsage]
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name for name in names if not any(re.search(rf"(^|\.){part}($|\.)", name) for part in wide)}


def _shape_problems(base: BaseCheckpoint, plan: MergePlan) -> list[str]:
    problems: list[str] = []
    embeddings = _embeddings(base)
    for output in plan.outputs:
        change, stored = output.change, output.source
        if change is None:
            continue
        if stored.dtype not in FLOAT_DTYPES:
            problems.append(
                f"{output.parameter}: stored as {stored.dtype}, so the base is quantised, and its config.json does not "
                "say how; expected floats, or a quantization_config"
            )
        resizable = output.parameter in embeddings and output.shape[1:] == stored.shape[1:]
        if output.shape != stored.shape and not resizable:
            problems.append(f"{output.parameter}: {output.shape} in the adapter, {stored.shape} in the base")
        if change.rows is not None and (
            max(change.rows.ids) >= output.shape[0] or change.rows.rows.shape[1:] != output.shape[1:]
        ):
            problems.append(
                f"{output.parameter}: {output.shape} in the base; the adapter brings rows of "
                f"{tuple(change.rows.rows.shape[1:])} for tokens up to {max(change.rows.ids)}"
            )
        if change.low_rank is not None:
            adapted, shape = change.low_rank.weight_shape, output.shape
            expected = (*shape[:-2], *shape[:-3:-1]) if output.transposed else shape
            if adapted != expected:
                problems.append(f"{output.parameter}: (out, in) is {adapted} in the adapter, {expected} in the base")
    return problems


def _embeddings(base: BaseCheckpoint) -> set[str]:
    """Parameters that have one row per token: they may be resized."""
    ends = [end for end in token_ends(base.model) if end is not None]
    return {
        name
        for name, _ in base.model.named_parameters(remove_duplicate=False)
        if any(base.model.get_submodule(name.rpartition(".")[0]) is end for end in ends)
    }


def _vocabulary(base: BaseCheckpoint, plan: MergePlan) -> tuple[int | None, list[str]]:
    """The new vocabulary size if the adapter brings one; and a complaint if it brings two."""
    ends = _embeddings(base)
    sizes = {output.parameter: output.shape[0] for output in plan.outputs if output.parameter in ends}
    if all(output.shape == output.source.shape for output in plan.outputs if output.parameter in ends):
        return None, []
    rows = ", ".join(f"{name} has {size} rows" for name, size in sizes.items())
    problems = [f"embeddings and output head disagree: {rows}"] if len(set(sizes.values())) > 1 else []
    return next(iter(sizes.values())), problems


def _stored_bits(name: str) -> int:
    """Bits of an element, from the digits in its safetensors name (BF16, I64, F8_E4M3, BOOL)."""
    digits = re.match(r"[A-Z]+(\d+)", name)
    return int(digits.group(1)) if digits else 8
