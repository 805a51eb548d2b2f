"""`export_adapter`: an adapter in the form that another program reads, compared with the original before it counts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from theodora.adapters import load_adapter
from theodora.adapters.models import load_model
from theodora.adapters.save import save_adapter
from theodora.adapters.save_mlx import save_mlx
from theodora.errors import CheckpointError, ConfigError, TheodoraError, UsageError
from theodora.export.comparison import Verification, verify
from theodora.export.forms import quiet
from theodora.export.gguf_files import UnreadArchitecture, require_gguf
from theodora.export.gguf_lora import check_gguf_lora, write_gguf_lora
from theodora.export.gguf_model import (
    check_gguf,
    convert_with_llama_cpp,
    converter_of,
    gguf_dtype,
    has_converter,
    write_gguf,
)
from theodora.export.gguf_quantise import check_kind, find_quantiser, quantise
from theodora.export.places import check_output, is_one_file
from theodora.export.served import check_served, write_served
from theodora.files.adapter import AdapterFile, read_adapter
from theodora.files.adapter_folder import stamp_of
from theodora.files.atomic import atomic_directory, atomic_write, scratch_directory
from theodora.files.base_model import BaseCheckpoint, find_base
from theodora.files.distrust import expanded
from theodora.files.folder import Place
from theodora.files.generation import copy_manners, ends_elsewhere
from theodora.files.model_folder import DTYPES
from theodora.files.names import CONFIG_NAME, WEIGHTS_NAME
from theodora.files.ours import mark_written
from theodora.files.peft_config import check_continues_text, read_peft_config
from theodora.files.read_back import copy_file, write_json
from theodora.locks import temporary_folder
from theodora.merging.checkpoint import merge_checkpoint
from theodora.merging.fit import FitReport
from theodora.merging.onto import find_start, quantised_base
from theodora.merging.to_lora import folder_to_lora


@dataclass(frozen=True)
class ExportReport:
    """What `export_adapter` wrote."""

    form: str
    output: Path
    adapter: Path
    bytes: int
    verification: Verification | None
    """How far the export is from the adapter on its base; None where that was not measured."""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return {
            "form": self.form,
            "output": str(self.output),
            "adapter": str(self.adapter),
            "bytes": self.bytes,
            "verification": None if self.verification is None else self.verification.to_dict(),
            "notes": list(self.notes),
        }


class VerificationFailed(CheckpointError):
    """An export differs from its adapter by more than the bounds; it was not kept."""

    def __init__(self, message: str, verification: Verification) -> None:
        super().__init__(message)
        self.verification = verification


@dataclass(frozen=True)
class Approximation:
    """A plain LoRA made of a DoRA adapter, before it is exported."""

    fit: FitReport
    """Rank and error of each layer: of W' − W, relative, in the Frobenius norm."""
    verification: Verification
    """How far it is from the adapter itself on the probe text; its bounds are infinite."""


@dataclass(frozen=True)
class Job:
    """What the writers of the forms get."""

    file: AdapterFile
    output: Path
    """Where the export will stand; only its name may be used."""
    base_model: str | None
    dtype: str | None
    llama_cpp: Path | None
    trust_remote_code: bool
    quantize: str | None = None
    """What llama.cpp quantises a GGUF file to."""

    @property
    def base_name(self) -> str:
        """Folder or hub name of the base. A folder as from the root: what is written is read from elsewhere."""
        name = self.base_model or self.file.base_model or ""
        return str(expanded(name).absolute()) if name and expanded(name).is_dir() else name

    def base(self) -> BaseCheckpoint:
        """The base's files; from the hub those of the commit that the adapter notes, as a merge takes them."""
        revision = None if self.base_model else self.file.base_revision
        folder = find_base(self.base_name, revision=revision, download=True)
        return BaseCheckpoint(folder, trust_remote_code=self.trust_remote_code)


def _write_hf(job: Job, place: Path) -> list[str]:
    # In a folder of the final name, which the model card takes as its heading; then one step up.
    inner = place / job.output.name
    with _told_as(inner, str(job.output)):
        report = merge_checkpoint(
            job.file.path,
            inner,
            base_model=job.base_model,
            dtype=job.dtype,
            trust_remote_code=job.trust_remote_code,
        )
    for file in inner.iterdir():
        file.rename(place / file.name)
    inner.rmdir()
    return list(report.notes)


def _write_peft(job: Job, place: Path) -> list[str]:
    if not job.file.mlx:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            copy_file(job.file.path / name, place / name)
        with Place(job.file.path).open() as folder:
            if stamp_of(folder) != job.file.stamp:  # else what was copied may not be what was checked
                raise CheckpointError(f"{job.file.path} changed while it was exported. Export it again.")
        copy_manners(job.file.path, place)
        if job.base_model:
            # The commit that PEFT noted is of another base.
            fields = read_peft_config(place) | {"base_model_name_or_path": job.base_name, "revision": None}
            write_json(place / CONFIG_NAME, fields, sort_keys=True)
        return []
    with quiet():
        save_adapter(load_adapter(load_model(job.base_name), job.file.path), place)
    return []


def _write_mlx(job: Job, place: Path) -> list[str]:
    with quiet():
        save_mlx(load_adapter(load_model(job.base_name), job.file.path), place)
    return ends_elsewhere(job.file.path, job.base().folder, "mlx_lm.generate --extra-eos-token")


def _write_served(job: Job, place: Path) -> list[str]:
    write_served(job.file, job.base(), place, job.base_name)
    notes = ["g stands here in place of m: this is no PEFT folder, and only loaders that know the form may read it."]
    return notes + ends_elsewhere(job.file.path, job.base().folder, "the loader")


def _write_gguf(job: Job, place: Path) -> list[str]:
    with scratch_directory(job.output) as folder, _told_as(folder / "merged", f"the model merged for {job.output}"):
        merged = folder / "merged"
        merge_checkpoint(
            job.file.path,
            merged,
            base_model=job.base_model,
            dtype="float32",
            trust_remote_code=job.trust_remote_code,
        )
        if job.quantize is None:
            _write_one_gguf(job, merged, place, job.dtype)
            return []
        whole = folder / "whole.gguf"
        _write_one_gguf(job, merged, whole, job.dtype or "fp32")  # so that numbers are rounded once
        shutil.rmtree(merged)  # which is as large
        stored = quantise(find_quantiser(job.llama_cpp), whole, place, job.quantize)
    return [f"{job.quantize} by llama.cpp: of the matrices {stored}"]


def _write_one_gguf(job: Job, merged: Path, place: Path, dtype: str | None) -> None:
    if job.llama_cpp is not None and has_converter(job.llama_cpp):
        convert_with_llama_cpp(job.llama_cpp, merged, place, dtype)
    else:
        write_gguf(merged, place, job.output.stem, dtype)


def _write_gguf_lora(job: Job, place: Path) -> list[str]:
    base = job.base()
    write_gguf_lora(job.file, base, place, job.output.stem)
    return ends_elsewhere(job.file.path, base.folder, "llama.cpp (as a stop sequence)")


WRITERS: dict[str, Callable[[Job, Path], list[str]]] = {
    "hf": _write_hf,
    "peft": _write_peft,
    "mlx": _write_mlx,
    "gguf": _write_gguf,
    "gguf-lora": _write_gguf_lora,
    "served": _write_served,
}
"""Form -> what writes it to a folder (GGUF: to a file), and gives notes."""
_WITH_DTYPE = ("hf", "gguf")


def export_adapter(
    adapter: str | Path,
    output: str | Path,
    form: str = "hf",
    *,
    base_model: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    lora_rank: int | None = None,
    max_loss: float = 0.5,
    llama_cpp: str | Path | None = None,
    overwrite: bool = False,
    check: bool = True,
    text: str | None = None,
    tokens: int | None = None,
    bound: float | None = None,
    kl_bound: float | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] | None = None,
    approximated: Callable[[Approximation], None] | None = None,
) -> ExportReport:
    """Write an adapter in another form; it gets its name only if `verify` finds the same predictions.

    Example:
        `export_adapter("runs/first", "merged", "hf", dtype="bf16").verification.difference.kl_mean`

    Args:
        adapter: the adapter's folder (PEFT's or MLX's files).
        output: the folder or file to write; it appears whole or not at all.
        form: one of `WRITERS`.
        base_model: folder or hub name of the base. Default: the one that the adapter names.
        dtype: of the exported weights, for hf and gguf: fp32, bf16 or fp16; q8_0 for gguf. Default: as in the base, for
            gguf fp16.
        quantize: of the form gguf: one of `gguf_files.FILE_TYPES` (q4_k_m, q5_k_m, q6_k, …), by llama.cpp's quantiser
            (`gguf_quantise.find_quantiser`) from a file in `dtype`, by default float32. q8_0 is written without it.
        lora_rank: make a plain LoRA of at most this rank first, by SVD of what the adapter really changes.
        max_loss: how much of the adapter's effect that LoRA may lose, as a share of the mean KL from the base.
        llama_cpp: a folder of llama.cpp, whose converter (of a checkout) writes the GGUF file then, and whose quantiser
            quantises it.
        overwrite: replace an earlier export at `output`: a folder whose `theodora_files.json` lists all that is in it,
            or a GGUF file.
        check: whether to end with `verify`.
        text, tokens, bound, kl_bound: see `verify`.
        trust_remote_code: run Python code that comes with the model.
        progress: called with a line before each long step.
        approximated: called with what `lora_rank` costs, before anything is written.

    Raises:
        UsageError: the output is taken, or is, holds or lies within the base or the adapter; an unknown form or dtype.
        CheckpointError: adapter and base do not fit, or a file is damaged. Nothing is written.
        VerificationFailed: what was written differs by more than the bounds, and was removed; or the LoRA of
            `lora_rank` loses too much, and nothing was written.
    """
    say = progress or (lambda _line: None)
    dtype, quantize = _in_few_bits(form, dtype, quantize)
    _check_options(form, dtype, lora_rank, llama_cpp)
    output = Path(output).expanduser().absolute()
    file = read_adapter(adapter)
    check_continues_text(adapter)
    base_model = base_model or _original(file, form)
    check_output(output, form, overwrite, {"adapter": file.path, **_known_base(base_model or file.base_model)})
    job = Job(file, output, base_model, dtype, Path(llama_cpp) if llama_cpp else None, trust_remote_code, quantize)
    _check_form(form, job, as_lora=lora_rank is not None)
    asked: dict[str, Any] = {
        "base_model": base_model,
        "text": text,
        "tokens": tokens,
        "trust_remote_code": trust_remote_code,
    }
    name, lora = str(adapter), f"{adapter} as LoRA of rank {lora_rank}"
    with temporary_folder("export") as folder, _told_as(folder / "lora", lora):
        if lora_rank is not None:
            say(f"making a LoRA of rank {lora_rank}")
            fit = folder_to_lora(file.path, folder / "lora", lora_rank, base_model=base_model)
            job = replace(job, file=read_adapter(folder / "lora"))
            name = lora
            loss = verify(str(file.path), str(job.file.path), bound=float("inf"), kl_bound=float("inf"), **asked)
            loss = replace(loss, a=str(adapter), b=name)
            if approximated is not None:
                approximated(Approximation(fit, loss))
            _check_loss(loss, lora_rank, max_loss)
        with _place(form, output, overwrite) as place, _told_as(place, str(output)):
            say(f"writing {output}")
            notes = WRITERS[form](job, place)
            verification = None
            if check:
                verification = _verified(
                    job, place, name, form, notes, {**asked, "bound": bound, "kl_bound": kl_bound}, say
                )
            if not is_one_file(form):
                mark_written(place, form, onto="original" if form == "hf" else None)
            if overwrite:  # meanwhile a training run, say, may have begun there: it must not be replaced
                check_output(output, form, overwrite, {})
            files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
            size = sum(path.stat().st_size for path in files)
    return ExportReport(form, output, file.path, size, verification, tuple(notes))


def _original(file: AdapterFile, form: str) -> str | None:
    """The unquantised base, where the adapter names a quantised folder; every form but PEFT's own holds or wants it.

    Raises:
        CheckpointError: it is not at hand.
    """
    if form == "peft" or quantised_base(file) is None:
        return None
    return find_start(file, "original").name


def _check_form(form: str, job: Job, *, as_lora: bool) -> None:
    """Refuse what cannot be written in this form, before the work of a merge or of an SVD."""
    if is_one_file(form):
        require_gguf()
    if form == "served":
        check_served(job.file, job.base())
    elif form == "gguf-lora":
        check_gguf_lora(job.file, job.base(), as_lora=as_lora)
    elif form == "gguf":
        gguf_dtype(job.dtype)
        if job.quantize is not None:
            find_quantiser(job.llama_cpp)
        if job.llama_cpp is None or (job.quantize is not None and not has_converter(job.llama_cpp)):
            check_gguf(job.file, job.base())
        else:
            converter_of(job.llama_cpp)


@contextmanager
def _told_as(hidden: Path, name: str) -> Iterator[None]:
    """Errors name `name` in place of a hidden folder, which is gone when they are read."""
    try:
        yield
    except TheodoraError as error:
        error.args = (str(error).replace(str(hidden), name), *error.args[1:])
        raise


def _known_base(name: str | None) -> dict[str, Path]:
    """The base's folder where it is on this machine; elsewhere no output can touch it."""
    try:
        return {"base model": find_base(name)}
    except CheckpointError:
        return {}


def _check_loss(loss: Verification, rank: int, most: float) -> None:
    effect = loss.effect.kl_mean if loss.effect is not None else 0.0
    if effect > 0 and loss.difference.kl_mean > most * effect:
        raise VerificationFailed(
            f"A LoRA of rank {rank} is {loss.difference.kl_mean / effect:.0%} as far from the adapter as the base is "
            f"(mean KL); {most:.0%} is allowed. Nothing was written: raise the rank, or allow more with --max-loss.",
            loss,
        )


def _verified(
    job: Job, place: Path, name: str, form: str, notes: list[str], asked: dict[str, Any], say: Callable[[str], None]
) -> Verification | None:
    """Compare the export, which has no name yet, with the adapter on its base."""

    def line(text: str) -> None:
        say(text.replace(str(place), str(job.output)))

    asked = asked | {"base_model": asked["base_model"] or job.base_name}
    try:
        verification = verify(str(job.file.path), str(place), progress=line, **asked)
    except UnreadArchitecture:
        notes.append(
            "transformers does not read GGUF files of this architecture, so only the tensors were read back, not "
            "run. Compare in llama.cpp: llama-server -m FILE, then theodora verify ADAPTER http://localhost:8080/v1."
        )
        return None
    verification = replace(verification, a=name, b=str(job.output))
    if not verification.passed:
        raise VerificationFailed(
            f"The export differs from {name} by more than the bounds, and was not kept. If the difference is "
            "wanted, allow it with --bound and --kl-bound.",
            verification,
        )
    return verification


def _in_few_bits(form: str, dtype: str | None, quantize: str | None) -> tuple[str | None, str | None]:
    """The dtype to write, and what llama.cpp is to quantise that to; q8_0 is a dtype here."""
    if quantize is None:
        return dtype, None
    kind = check_kind(quantize)
    if form != "gguf":
        raise UsageError(f"--quantize {kind} is for the form gguf, and the form is {form}")
    if dtype == "q8_0":
        raise UsageError(f"--dtype q8_0 and --quantize {kind} are both given: numbers would be rounded twice")
    return ("q8_0", None) if kind == "q8_0" and dtype is None else (dtype, kind)


def _place(form: str, output: Path, overwrite: bool) -> AbstractContextManager[Path]:
    return (atomic_write if is_one_file(form) else atomic_directory)(output, overwrite=overwrite)


def _check_options(form: str, dtype: str | None, lora_rank: int | None, llama_cpp: str | Path | None) -> None:
    if form not in WRITERS:
        raise ConfigError(f"form is {form!r}; expected one of {', '.join(WRITERS)}")
    if form == "hf" and dtype not in (None, *DTYPES, *DTYPES.values()):
        also = " (q8_0 is of the form gguf)" if dtype == "q8_0" else ""
        raise ConfigError(f"dtype is {dtype!r}; the form hf has one of {', '.join(DTYPES)}{also}")
    if dtype is not None and form not in _WITH_DTYPE:
        raise UsageError(f"The form {form} keeps the adapter's own dtype; --dtype is for {' and '.join(_WITH_DTYPE)}")
    if lora_rank is not None and form in _WITH_DTYPE:
        raise UsageError(f"The form {form} holds the whole change of the weights: it needs no --lora-rank")
    if llama_cpp is not None and form != "gguf":
        raise UsageError("--llama-cpp is for the form gguf")
