"""Merge an adapter into its base model on disk, one shard at a time.

The result is a plain Hugging Face folder: no trace of an adapter, loadable by any engine. Memory holds one output
shard and one layer, however large the model. Every weight is computed in float32 (float64 if the base is), rounded
once, and read back before the folder gets its name.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from torch import Tensor

from theodora.config import METHOD_NAMES
from theodora.errors import CheckpointError, ConfigError, bullet_list
from theodora.files.adapter import AdapterFile, read_adapter
from theodora.files.atomic import atomic_directory
from theodora.files.base_model import BaseCheckpoint
from theodora.files.distrust import expanded
from theodora.files.finite import finite
from theodora.files.generation import TOKENIZER_FILES, write_ends
from theodora.files.model_folder import DTYPES, INDEX, has_tokenizer
from theodora.files.ours import check_outside, check_replaceable, mark_written, why_not_ours
from theodora.files.read_back import copy_file, same_bits, save_tensors, write_json, write_text
from theodora.merging.drift import Drift
from theodora.merging.heads import NOTE, describe_head
from theodora.merging.logits import LogitsReport
from theodora.merging.onto import Onto, as_onto, find_start
from theodora.merging.plan import MergePlan, OutputTensor, plan_merge
from theodora.merging.requantised import LayerError, check_reads_again, write_requantised
from theodora.merging.rounding import KindReport, RoundedPart, Rounding
from theodora.paths import layer_kinds

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and the key of the tensor just done."""

# What is copied from the base beside its weights and its tokenizer.
_MODEL_FILES = ("generation_config.json", "*processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
_DISK_MARGIN = 64 << 20  # beside the weights: tokenizer, configuration, index, rounding up to disk blocks
_SPOT_CHECKS = 16  # tensors that are merged once more after writing and compared value by value


@dataclass(frozen=True)
class MergeReport:
    """What `merge_checkpoint` wrote."""

    output: Path
    adapter: Path
    base_model: str
    method: str
    dtype: str
    """Of the merged weights: float32, bfloat16, …; several if the base mixes them."""
    tensors: int
    changed: int
    """How many of the tensors the adapter changed."""
    bytes: int
    files: int
    kinds: tuple[KindReport, ...]
    notes: tuple[str, ...]
    seconds: float
    onto: str = "original"
    """Which weights it was merged onto: original, dequantised or quantised."""
    quantisation: str | None = None
    """How the base was quantised while the adapter was trained, as far as is known."""
    layers: tuple[LayerError, ...] = ()
    """Every changed layer where a quantised base is in play, the worst first: how far what was written is from W' of
    the weights that the adapter was trained on."""
    logits: LogitsReport | None = None
    """The same of the predictions; None where it was not measured."""
    scores: bool = False
    """Whether the model scores texts, rather than continue them."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return asdict(self) | {"output": str(self.output), "adapter": str(self.adapter)}


def merge_checkpoint(
    adapter: str | Path,
    output: str | Path,
    *,
    base_model: str | Path | None = None,
    onto: str = "original",
    quantize: str | None = None,
    dtype: str | torch.dtype | None = None,
    max_error: float | None = None,
    max_loss: float = 0.5,
    check_logits: bool = True,
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write base model and adapter as one plain model folder, streaming.

    Where the adapter was trained on a quantised base, `onto` says which weights it is added to, and the report how far
    each layer and the predictions are from what was trained.

    Example:
        `merge_checkpoint("runs/first", "merged", dtype="bfloat16")`

    Args:
        adapter: the adapter's folder (PEFT's files).
        output: the folder to write; it appears whole or not at all.
        base_model: folder or hub name of the base. Default: the one that the adapter names.
        onto: original: the unquantised weights, found by the name that a quantised folder gives for them, if the
            adapter was trained on one; dequantised: the numbers that training multiplied by, written as an ordinary
            model; quantised: those, quantised again in the same format.
        quantize: how the base was quantised as it was loaded for the training (nf4, int8, int4, fp8), if the adapter
            does not say so.
        dtype: of the merged weights: float32, bfloat16, float16 (or fp32, bf16, fp16). Default: as in the base.
        max_error: for quantised: the largest relative error of a layer. Default: 0.2 for formats of 4 bits, 0.05 of 8.
        max_loss: for quantised: how much of the adapter's effect may be lost, as a share of the mean KL from the base.
        check_logits: whether the predictions are compared where a quantised base is in play: three passes over the
            model, a module at a time.
        overwrite: replace a model folder that stands at `output`.
        max_shard_size: largest weight file, such as "5GB"; a single tensor may exceed it.
        trust_remote_code: run Python code that comes with the base model.
        progress: called after every tensor.

    Raises:
        UsageError: the output is taken, or is the base or the adapter; an unknown dtype or size.
        ConfigError: an unknown `onto` or `quantize`, or one that does not fit the base.
        CheckpointError: adapter and base do not fit, a file is damaged, the original of a quantised base is not at
            hand, the library of one is not installed, the error is beyond its bounds, or the disk is too small. Nothing
            is written.
    """
    start = time.monotonic()
    wanted, way = _dtype(dtype), as_onto(onto)
    if way == "quantised" and wanted is not None:
        raise ConfigError("dtype is given, but onto is quantised: the weights are stored as the base stores them")
    file = read_adapter(adapter)
    found = find_start(file, way, base_model=base_model, quantize=quantize)
    output = expanded(output).absolute()
    trained = {} if found.trained is None else {"base model of the training": found.trained[0]}
    _check_output(output, overwrite, {"adapter": file.path, "base model": found.folder, **trained})
    base = found.open(trust_remote_code=trust_remote_code, heads=file.heads)
    if base.scores and way == "quantised":
        raise ConfigError(
            f"onto is quantised, and {file.path} scores texts, with a head that is new. Merge with --onto dequantised, "
            "or onto the original weights."
        )
    plan = plan_merge(base, file, wanted, other_base=found.trained is not None or found.quantised_as is not None)
    shards = _shards(plan.outputs, max_shard_size)
    total = sum(tensor.nbytes() for tensor in plan.outputs)
    _check_disk(output, total if way != "quantised" else _size_of_files(base))

    kinds = _kinds(base, plan)
    roundings = {kind: Rounding() for kind in kinds.values()}
    drift = Drift.of(found, base, plan, file, trust_remote_code=trust_remote_code)
    with atomic_directory(output, overwrite=overwrite) as partial:
        done = 0

        def told(tensor: OutputTensor) -> None:
            nonlocal done
            done += tensor.nbytes()
            if progress is not None:
                progress(done, total, tensor.key)

        def plain(tensor: OutputTensor) -> Tensor:
            written = _merge_one(base, tensor, roundings.get(kinds.get(tensor.key, "")))
            drift.add(tensor, written)
            return written

        if way == "quantised":

            def packed(tensor: OutputTensor, weights: tuple[Tensor, Tensor, Tensor] | None) -> None:
                if weights is not None:
                    roundings[kinds[tensor.key]].add([RoundedPart.of(*weights)])
                told(tensor)

            quantised = write_requantised(
                partial, base, plan, plain, max_shard_size=max_shard_size, max_error=max_error, done=packed
            )
            drift.layers += quantised.layers
            files, total = quantised.shards, quantised.bytes
        else:
            for shard_name, tensors in shards.items():
                shard: dict[str, Tensor] = {}
                for tensor in tensors:
                    shard[tensor.key] = plain(tensor)
                    told(tensor)
                base.close()
                save_tensors(shard, partial / shard_name, {"format": "pt"}, checked=True)
            files = {name: [tensor.key for tensor in tensors] for name, tensors in shards.items()}
        if len(files) > 1:
            _write_index(partial, files, total)
        _write_config(partial, base, plan, wanted, way)
        _copy_files(partial, file, base)
        if base.scores:
            describe_head(partial, base)
        notes = [*found.notes, *plan.notes, *drift.notes()]
        if base.scores:
            notes.append(NOTE)
        else:
            notes += write_ends(partial, file.path, trust_remote_code=trust_remote_code)
        logits = None
        if check_logits and drift.measures and not base.scores:
            logits, why_not = drift.logits(partial, way == "quantised", max_loss, trust_remote_code=trust_remote_code)
            notes += why_not
        report = MergeReport(
            output=output,
            adapter=file.path,
            base_model=found.name,
            method=file.config.method,
            dtype=_stored_as(base, plan, way),
            tensors=len(plan.outputs),
            changed=sum(tensor.change is not None for tensor in plan.outputs),
            bytes=total,
            files=len(files),
            kinds=tuple(rounding.report(kind) for kind, rounding in roundings.items()),
            notes=tuple(notes),
            seconds=time.monotonic() - start,
            onto=way,
            quantisation=found.method,
            layers=tuple(drift.worst_first()),
            logits=logits,
            scores=base.scores,
        )
        write_text(partial / "README.md", _model_card(report, file))
        if way == "quantised":
            check_reads_again(partial, base, trust_remote_code=trust_remote_code)
        else:
            _verify(partial, shards, base)
        mark_written(partial, "merged", onto=way)
        if overwrite:  # meanwhile a training run, say, may have begun there: it must not be replaced
            _check_output(output, overwrite, {})
    return replace(report, seconds=time.monotonic() - start)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    name = DTYPES.get(name, name)
    if name not in DTYPES.values():
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join([*DTYPES, *DTYPES.values()])}")
    return getattr(torch, name)


def _check_output(output: Path, overwrite: bool, inputs: dict[str, Path]) -> None:
    check_outside(output, inputs)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        check_replaceable(output, overwrite, "merge", why_not_ours(output))


def _shards(outputs: list[OutputTensor], max_shard_size: str | int) -> dict[str, list[OutputTensor]]:
    """File name -> its tensors, in the order of the base."""
    by_key = {tensor.key: tensor for tensor in outputs}
    try:
        split = split_state_dict_into_shards_factory(
            by_key,
            get_storage_size=OutputTensor.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"max_shard_size is {max_shard_size!r}; expected a size such as 5GB or 500MB") from error
    return {name: [by_key[key] for key in keys] for name, keys in split.filename_to_tensors.items()}


def _check_disk(output: Path, needed: int) -> None:
    place = next(parent for parent in output.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed + _DISK_MARGIN:
        raise CheckpointError(
            f"The disk of {place} has {free / 1e9:.1f} GB free; the merged model needs {needed / 1e9:.1f} GB. "
            "Free some space, choose another --output, or a smaller --dtype."
        )


def _merge_one(base: BaseCheckpoint, tensor: OutputTensor, rounding: Rounding | None = None) -> Tensor:
    """One tensor as it is written, experts one after the other; what that did to its values is noted in `rounding`."""
    stored, parts = base.read(tensor.source.key), tensor.parts()
    whole = len(parts) == 1
    written = torch.empty(stored.shape, dtype=tensor.written_dtype(stored)) if not whole else stored
    noted: list[RoundedPart] = []
    for e, part in enumerate(parts):
        before = stored if whole else stored[e]
        merged = part.merged(before)
        after = merged.to(part.written_dtype(before))
        _check_finite(part, before, merged, after)
        if rounding is not None:
            noted.append(RoundedPart.of(before, merged, after))
            _check_excess(part, before, after)
        if whole:
            written = after
        else:
            written[e] = after
    if rounding is not None:
        rounding.add(noted)
    return written


def _check_excess(tensor: OutputTensor, stored: Tensor, written: Tensor) -> None:
    excess = tensor.excess(stored, written)
    if not excess <= 1:
        raise CheckpointError(
            f"{tensor.key}: the merged weight does not do what base and adapter do together: their outputs differ "
            f"by {excess:.3g} times what rounding allows. Nothing was written. This is a fault of Theodora or of "
            "the hardware, and worth a report."
        )


def _check_finite(tensor: OutputTensor, stored: Tensor, merged: Tensor, written: Tensor) -> None:
    """Raise a CheckpointError for values that are not finite, which says whose they are.

    (A buffer, such as the bounds of a clamp, may be infinite by intent, never NaN.)
    """
    if finite(written) or (tensor.change is None and tensor.is_buffer and not bool(stored.isnan().any())):
        return
    dtype = str(written.dtype).removeprefix("torch.")
    if not finite(stored):
        why = "the base model's own weight holds NaN or infinite values. Bring its file back as it was published"
    elif not finite(merged):
        why = "the merged weight holds NaN or infinite values, and the base's own does not: the adapter overflows"
    else:
        largest = float(merged.abs().max())
        why = f"values beyond the range of {dtype} (the largest is {largest:.3g}). Merge with --dtype "
        why += "bf16 or fp32 instead" if written.dtype == torch.float16 else "fp32 instead"
    raise CheckpointError(f"{tensor.key}: {why}. Nothing was written.")


def _kinds(base: BaseCheckpoint, plan: MergePlan) -> dict[str, str]:
    """Key of each changed tensor -> its kind of layer, in the model's order."""
    changed = {t.key: t.parameter.removesuffix(".weight") for t in plan.outputs if t.change and t.parameter}
    model_order = [name.removesuffix(".weight") for name, _ in base.model.named_parameters(remove_duplicate=False)]
    of_changed = set(changed.values())
    kinds = layer_kinds(dict.fromkeys([*(name for name in model_order if name in of_changed), *of_changed]))
    place = {name: at for at, name in enumerate(kinds)}
    return {key: kinds[changed[key]] for key in sorted(changed, key=lambda key: place[changed[key]])}


def _write_index(folder: Path, files: dict[str, list[str]], total: int) -> None:
    weight_map = {key: name for name, keys in files.items() for key in keys}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)


def _write_config(folder: Path, base: BaseCheckpoint, plan: MergePlan, dtype: torch.dtype | None, onto: Onto) -> None:
    config = copy.deepcopy(base.config)
    parts = [config, *(part for part in (config.get("text_config"),) if isinstance(part, dict))]
    if onto == "dequantised":
        for part in parts:
            part.pop("quantization_config", None)
    elif onto == "quantised" and base.quantised is not None and not base.quantised.stored:
        config["quantization_config"] = base.quantised.config
    for part in parts:
        # `torch_dtype` is what transformers before 4.56 and other engines call it.
        for name in ("dtype", "torch_dtype"):
            if dtype is not None and (name in part or (name == "dtype" and part is config)):
                part[name] = str(dtype).removeprefix("torch.")
        if plan.untied and ("tie_word_embeddings" in part or part is config):
            part["tie_word_embeddings"] = False
        if plan.vocabulary is not None and "vocab_size" in part:
            part["vocab_size"] = plan.vocabulary
    write_json(folder / "config.json", config, ensure_ascii=False)


def _copy_files(folder: Path, file: AdapterFile, base: BaseCheckpoint) -> None:
    """Copy what belongs to a model beside its weights. The tokenizer is the adapter's own, if it has one."""
    tokenizer = file.path if has_tokenizer(file.path) else base.folder
    own_code = ("*.py",) if "auto_map" in base.config else ()
    for source, patterns in ((tokenizer, TOKENIZER_FILES), (base.folder, _MODEL_FILES + own_code)):
        for path in sorted({path for pattern in patterns for path in source.glob(pattern) if path.is_file()}):
            real = _no_link_out(path, source)
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            copy_file(real, target)


def _no_link_out(path: Path, source: Path) -> Path:
    """The file that a path leads to; a CheckpointError if a link leads out of the model's folder, to anything at all.

    The hub's cache stores files as `blobs` beside its snapshots, which link to them: those links are followed.
    """
    real, home = path.resolve(), source.resolve()
    if not real.is_relative_to(home) and not real.is_relative_to(home.parent.parent / "blobs"):
        raise CheckpointError(
            f"{path} is a link to {real}, outside the folder, and would be copied into the merged model. If it "
            "belongs there, put the file itself in its place."
        )
    return real


def _verify(folder: Path, shards: dict[str, list[OutputTensor]], base: BaseCheckpoint) -> None:
    """Read back what was written: every name, shape and dtype, and the values of some tensors."""
    problems: list[str] = []
    everything = [tensor for tensors in shards.values() for tensor in tensors]
    step = max(1, len(everything) // _SPOT_CHECKS)
    checked = {tensor.key for tensor in everything[::step]}
    for name, tensors in shards.items():
        with safe_open(folder / name, framework="pt") as written:
            if set(written.keys()) != {tensor.key for tensor in tensors}:
                problems.append(f"{name}: other tensors than were merged")
                continue
            for tensor in tensors:
                if tuple(written.get_slice(tensor.key).get_shape()) != tensor.shape:
                    problems.append(f"{tensor.key}: another shape than was merged")
                elif tensor.key in checked:
                    again, read = _merge_one(base, tensor), written.get_tensor(tensor.key)
                    if not same_bits(again, read):
                        problems.append(f"{tensor.key}: other values than were merged")
    base.close()
    if problems:
        raise CheckpointError("What was written does not read back right (a failing disk?):" + bullet_list(problems))


def _stored_as(base: BaseCheckpoint, plan: MergePlan, onto: Onto) -> str:
    """The dtypes of the changed weights, or the format that they are quantised in again."""
    if onto == "quantised" and base.quantised is not None:
        return base.quantised.packed.method
    used = [str(t.dtype).removeprefix("torch.") for t in plan.outputs if t.change is not None and t.dtype is not None]
    return ", ".join(dict.fromkeys(used))


def _size_of_files(base: BaseCheckpoint) -> int:
    return sum(file.stat().st_size for file in {tensor.file for tensor in base.stored.values()})


_CARD_QUANTISED = "It is quantised as its base is: load it like that."
_CARD_ONTO = {
    "original": "The adapter was trained on quantised weights ({}), and is merged onto the original ones.",
    "dequantised": "It holds the dequantised weights ({}) that the adapter was trained on, merged.",
    "quantised": "The weights that the adapter changed were dequantised, merged, and quantised again ({}).",
}


def _card_of_training(report: MergeReport) -> list[str]:
    if report.quantisation is None:
        return []
    lines = ["", _CARD_ONTO[report.onto].format(report.quantisation)]
    if report.layers:
        worst = report.layers[0]
        mean = math.fsum(layer.error for layer in report.layers) / len(report.layers)
        lines.append(f"Its layers are {mean:.2%} from what was trained (worst: {worst.path}, {worst.error:.2%}).")
    if report.logits is not None:
        kl, effect = report.logits.kl_mean, report.logits.kl_effect
        lines.append(f"Mean KL of its predictions from what was trained: {kl:.2g} nats; from the base: {effect:.2g}.")
    return lines


def _how_to_load(report: MergeReport, file: AdapterFile) -> str:
    if file.heads is not None:
        return "It scores texts: load it with transformers' AutoModelForSequenceClassification."
    return _CARD_QUANTISED if report.onto == "quantised" else "It is a plain model: load it like its base."


def _model_card(report: MergeReport, file: AdapterFile) -> str:
    # A path of the machine that merged says nothing to others: only its last part is written.
    local = Path(report.base_model).expanduser().exists()
    base_name = Path(report.base_model).expanduser().resolve().name if local else report.base_model
    config = file.config
    rows = [
        f"| {kind.kind} | {kind.tensors} | {kind.change:.2%} | {kind.rounding_mean:.2e} | {kind.rounding_max:.2e} |"
        for kind in report.kinds
    ]
    tag = "text-generation" if file.heads is None else "text-classification"
    front = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {tag}",
        "tags: [theodora, merged]",
    ]
    front += [] if local else [f"base_model: {base_name}"]
    return "\n".join(
        [
            *front,
            "---",
            "",
            f"# {report.output.name}",
            "",
            f"{base_name} with a {METHOD_NAMES[config.method]} adapter "
            f"(rank {config.rank}, alpha {config.alpha:g}) merged into its weights by Theodora, in {report.dtype}.",
            _how_to_load(report, file),
            *_card_of_training(report),
            "",
            "Relative to the base weights, per kind of layer: what the adapter changed, and what rounding to "
            f"{report.dtype} added.",
            "",
            "| layers | tensors | change | rounding, mean | rounding, largest |",
            "|---|---:|---:|---:|---:|",
            *rows,
            "",
            *(f"{note}\n" for note in report.notes),
        ]
    )
