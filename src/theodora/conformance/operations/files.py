"""Operations that go through files: ours, PEFT's and MLX's; and files that must be refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from theodora.conformance import formula
from theodora.conformance.cases import ALPHA, ALPHA_PATTERN, RANK, RANK_PATTERN, base_numbers, trained_values, weight_of
from theodora.conformance.formula import Numbers
from theodora.conformance.mixture import PARAMETER, as_held, blocked, shaped
from theodora.conformance.operations.registry import operation
from theodora.conformance.rounding import F64
from theodora.conformance.trial import Check, Trial, run_backward, with_values
from theodora.errors import TheodoraError

FILES = "Files"
_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@operation("save-load", "save and load", FILES)
def save_load(trial: Trial) -> Iterator[Check]:
    """On a fresh model the loaded adapter is the formula with the saved numbers, bit for bit the outputs of before."""
    subject, x = trial.subject(), trial.inputs()
    with torch.no_grad(), trial.folder() as folder:
        first = subject.model(*x)
        subject.save(folder / "one", "one")
        other = trial.library(trial.bare(), trial.variant, trial.kinds)
        other.load(folder / "one", "one")
        results = other.model(*x)
    yield from trial.outputs(results, x, trial.numbers["one"])
    yield from trial.same_outputs(results, first, "output of before")


@operation("load-beside", "load beside other adapters", FILES)
def load_beside(trial: Trial) -> Iterator[Check]:
    """A model that carries two adapters already takes a third from a file, and the others stay what they are."""
    source, x = trial.subject(three=3), trial.inputs()
    with torch.no_grad(), trial.folder() as folder:
        source.save(folder / "three", "three")
        third = trial.numbers["three"]
        subject = trial.subject(one=1, two=2)
        subject.load(folder / "three", "three")
        subject.activate("three")
        yield from trial.outputs(subject.model(*x), x, third, "output of the loaded one")
        subject.activate("one")
        yield from trial.outputs(subject.model(*x), x, trial.numbers["one"], "output of another one")


@operation("load-transformers", "load by transformers", FILES)
def load_transformers(trial: Trial) -> Iterator[Check]:
    """By the one line that users of transformers write; with PEFT that is `model.load_adapter(folder)`."""
    subject, x = trial.subject(), trial.inputs()
    with torch.no_grad(), trial.folder() as folder:
        subject.save(folder / "one", "one")
        model = trial.bare()
        subject.load_by_transformers(model, folder / "one")
        yield from trial.outputs(model(*x), x, trial.numbers["one"])


@operation("train-loaded", "train on after loading", FILES)
def train_loaded(trial: Trial) -> Iterator[Check]:
    """A loaded adapter has the same gradients."""
    subject = trial.subject()
    with trial.folder() as folder:
        subject.save(folder / "one", "one")
        other = trial.library(trial.bare(), trial.variant, trial.kinds)
        other.load(folder / "one", "one", trainable=True)
    outputs, leaves, dy = run_backward(other, trial.inputs())
    yield from trial.outputs(outputs, leaves, trial.numbers["one"])
    yield from trial.gradients(other, "one", leaves, dy)


@operation("gathered", "save a gathered state dict", FILES, ours_only=True)
def gathered(trial: Trial) -> Iterator[Check]:
    """What sharded training gathers is what is saved, not the tensors that happen to lie in this process."""
    from theodora.adapters import save_adapter

    subject, x = trial.subject(), trial.inputs()
    state = {key: tensor.clone() for key, tensor in subject.model.state_dict().items()}
    for kind in trial.kinds:
        for parameter in subject.parameters(kind, "one").values():
            parameter.data.zero_()
    with torch.no_grad(), trial.folder() as folder:
        save_adapter(subject.model, folder / "one", "one", state_dict=state)
        other = trial.library(trial.bare(), trial.variant, trial.kinds)
        other.load(folder / "one", "one")
        yield from trial.outputs(other.model(*x), x, trial.numbers["one"])


@operation("export-peft", "export: PEFT's files", FILES, ours_only=True)
def export_peft(trial: Trial) -> Iterator[Check]:
    """The file, read by the letter of PEFT's format, and by PEFT itself where it is installed."""
    subject, x = trial.subject(), trial.inputs()
    with torch.no_grad(), trial.folder() as folder:
        subject.save(folder / "one", "one")
        read = _read_peft(folder / "one", trial.kinds, trial.numbers["one"])
        for kind in trial.kinds:
            exact = formula.adapted_weight(trial.numbers["one"][kind])
            yield trial.check(kind, "weight by the file", formula.adapted_weight(read[kind]), exact, 1e-12)
        if find_spec("peft") is not None and trial.dtype != "float8":
            from theodora.conformance.peers import Peft

            saved = folder / "one"
            if trial.variant.method == "dora" and "experts" in trial.kinds:
                peer = Peft(trial.bare(), trial.variant, trial.kinds)
                refused = _refuses(lambda peer=peer: peer.load(folder / "one", "one"), ValueError)
                yield trial.demand("experts", "PEFT takes DoRA of experts", refused)
                others = tuple(kind for kind in trial.kinds if kind != "experts")
                if not others:
                    return
                trial = replace(trial, kinds=others, numbers={})
                trial.subject().save(folder / "others", "one")
                saved = folder / "others"
            peer = Peft(trial.bare(), trial.variant, trial.kinds)
            peer.load(saved, "one")
            results = peer.model(*x)
            sound = [kind for kind in trial.kinds if kind != "zero_rows" or trial.variant.method == "lora"]
            yield from replace(trial, kinds=tuple(sound)).outputs(results, x, trial.numbers["one"], "output in PEFT")


@operation("import-peft", "import: PEFT's files", FILES, ours_only=True)
def import_peft(trial: Trial) -> Iterator[Check]:
    """A file written by the letter of PEFT's format, and one written by PEFT where it is installed."""
    x, base = trial.inputs(), base_numbers(trial.bare())
    with torch.no_grad(), trial.folder() as folder:
        numbers = _write_peft(folder / "letter", trial, base)
        subject = trial.library(trial.bare(), trial.variant, trial.kinds)
        subject.load(folder / "letter", "one")
        yield from trial.outputs(subject.model(*x), x, numbers)
        if find_spec("peft") is None or trial.dtype == "float8" or trial.variant.init in ("pissa", "olora"):
            return  # (PEFT's own PiSSA files need its changed base, and are refused)
        from theodora.conformance.peers import Peft

        if trial.variant.method == "dora" or trial.variant.init == "orthogonal":  # which PEFT has not on experts
            trial = replace(trial, kinds=tuple(kind for kind in trial.kinds if kind != "experts"))
        if not trial.kinds:
            return
        theirs = replace(trial, library=Peft, numbers={})
        peer = theirs.subject()
        peer.save(folder / "peft", "one")
        subject = trial.library(trial.bare(), trial.variant, trial.kinds)
        subject.load(folder / "peft", "one")
        yield from trial.outputs(subject.model(*x), x, theirs.numbers["one"], "output of a file by PEFT")


@operation("export-mlx", "export: MLX's files", FILES, ours_only=True)
def export_mlx(trial: Trial) -> Iterator[Check]:
    """The file, read by the letter of MLX's format; what MLX has no words for is refused."""
    from theodora.adapters.save_mlx import save_mlx

    fit = tuple(kind for kind in trial.kinds if _mlx_can_say(trial, kind))
    for kind in trial.kinds:
        alone = replace(trial, kinds=(kind,), numbers={})
        if kind not in fit:
            with trial.folder() as folder:
                subject = alone.subject()
                refused = _refuses(lambda s=subject, f=folder: save_mlx(s.model, f / "one", "one"))
            yield trial.demand(kind, "written, although MLX would compute something else", refused)
    if not fit:
        return
    alone = replace(trial, kinds=fit, numbers={})
    with trial.folder() as folder:
        save_mlx(alone.subject().model, folder / "one", "one")
        config = json.loads((folder / "one" / _CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / "one" / "adapters.safetensors")
    for kind in fit:
        n = alone.numbers["one"][kind]
        a, b = tensors[f"{kind}.lora_a"].to(F64).T, tensors[f"{kind}.lora_b"].to(F64).T
        m = tensors[f"{kind}.m"].to(F64) if config["fine_tune_type"] == "dora" else None
        scale = config["lora_parameters"]["scale"]
        read = replace(n, a_RI=a, b_OR=b, magnitude_O=m, scale=scale, start=None)
        bound = formula.walk_merge(n, torch.float32).bound()  # one scale for all: the others go into B, which rounds
        yield trial.check(kind, "weight by the file", formula.adapted_weight(read), formula.adapted_weight(n), bound)


@operation("import-mlx", "import: MLX's files", FILES, ours_only=True)
def import_mlx(trial: Trial) -> Iterator[Check]:
    """A file written by the letter of MLX's format: one rank and one scale for all modules."""
    x, v = trial.inputs(), trial.variant
    base, rank, scale = base_numbers(trial.bare()), 6, 1.75
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Numbers] = {}
    kinds = tuple(kind for kind in trial.kinds if kind != "embed_tokens" or v.method == "lora")
    kinds = tuple(kind for kind in kinds if kind != "experts")
    for kind in kinds:
        values = trained_values(base[kind], v, kind, 4)
        a, b = torch.zeros(rank, values["A"].shape[1]), torch.zeros(values["B"].shape[0], rank)
        a[: v.rank(kind)], b[:, : v.rank(kind)] = values["A"], values["B"]
        tensors |= {f"{kind}.lora_a": a.T.contiguous(), f"{kind}.lora_b": b.T.contiguous()}
        if "m" in values:
            tensors[f"{kind}.m"] = values["m"]
        numbers[kind] = with_values(base[kind], {**values, "A": a, "B": b}, scale)
    config = {
        "fine_tune_type": v.method,
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": list(kinds)},
    }
    if not kinds:
        return
    with torch.no_grad(), trial.folder() as folder:
        save_file(tensors, folder / "adapters.safetensors")
        (folder / _CONFIG).write_text(json.dumps(config), encoding="utf-8")
        subject = trial.library(trial.bare(), v, kinds)
        subject.load(folder, "one")
        yield from replace(trial, kinds=kinds).outputs(subject.model(*x), x, numbers)


def _mlx_can_say(trial: Trial, kind: str) -> bool:
    """Experts are not written for it; it has no head of its own where it is tied, gives DoRA's embeddings other
    magnitudes, and divides by ‖V‖ = 0."""
    return kind not in ("tied_head", "experts") and (
        trial.variant.method == "lora" or kind not in ("embed_tokens", "zero_rows")
    )


@operation("refuse", "files to be refused", FILES, ours_only=True)
def refuse(trial: Trial) -> Iterator[Check]:
    """DoRA without magnitudes, LoRA with them, NaN, a wrong shape, a wrong rank, another base: an error, no change."""
    x = trial.inputs()
    with torch.no_grad(), trial.folder() as folder:
        subject = trial.subject()
        subject.save(folder / "good", "one")
        expected = subject.model(*x)
        for what, damage in _damages(trial):
            bad = folder / what.replace(" ", "-")
            bad.mkdir()
            config = json.loads((folder / "good" / _CONFIG).read_text(encoding="utf-8"))
            with safe_open(folder / "good" / _WEIGHTS, framework="pt") as file:
                metadata = file.metadata()
            tensors = load_file(folder / "good" / _WEIGHTS)
            damage(config, tensors)
            save_file(tensors, bad / _WEIGHTS, metadata)
            (bad / _CONFIG).write_text(json.dumps(config), encoding="utf-8")
            refused = _refuses(lambda bad=bad: subject.load(bad, "bad"))
            for kind in trial.kinds:
                yield trial.demand(kind, f"{what} was taken", refused)
        other = trial.bare()
        plain = [w for kind in trial.kinds if (w := weight_of(other.get_submodule(kind)).plain()) is not None]
        for weight_OI in plain:
            weight_OI.copy_(weight_OI.flip(0))
        if plain and trial.dtype != "float8":
            strange = trial.library(other, trial.variant, trial.kinds)
            refused = _refuses(lambda: strange.load(folder / "good", "bad"))
            for kind in trial.kinds:
                yield trial.demand(kind, "an adapter of another base was taken", refused)
        yield from trial.same_outputs(subject.model(*x), expected, "output after all that")


def _damages(trial: Trial) -> Iterator[tuple[str, Callable[[dict[str, Any], dict[str, Tensor]], None]]]:
    def every(tensors: dict[str, Tensor], ending: str) -> list[str]:
        return [key for key in tensors if key.endswith(ending)]

    def first(tensors: dict[str, Tensor], part: str) -> str:
        return next(key for key in sorted(tensors) if part in key)

    def no_magnitudes(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for key in every(tensors, "lora_magnitude_vector"):
            del tensors[key]

    def one_magnitude_less(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del tensors[every(tensors, "lora_magnitude_vector")[0]]

    def said_to_be_lora(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["use_dora"] = False

    def said_to_be_dora(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["use_dora"] = True

    def nan(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[first(tensors, "_A")].view(-1)[0] = float("nan")

    def another_rank(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["r"], config["rank_pattern"] = config["r"] + 1, {}

    def another_shape(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        key = first(tensors, "_B")
        tensors[key] = tensors[key][:-1].clone()

    def half(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del tensors[first(tensors, "_B")]

    def lora_bias(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["lora_bias"] = True

    if trial.variant.method == "dora":
        yield "DoRA without its magnitudes", no_magnitudes
        yield "DoRA that lacks one magnitude", one_magnitude_less
        yield "DoRA that says it is LoRA", said_to_be_lora
    else:
        yield "LoRA that says it is DoRA", said_to_be_dora
    yield "NaN", nan
    yield "a rank that the tensors have not", another_rank
    yield "another shape", another_shape
    yield "A without B", half
    yield "lora_bias", lora_bias


def _refuses(call: Callable[[], None], how: type[Exception] = TheodoraError) -> bool:
    try:
        call()
    except how:
        return True
    return False


def _read_peft(folder: Path, kinds: tuple[str, ...], numbers: dict[str, Numbers]) -> dict[str, Numbers]:
    """The adapter as PEFT's format has it, read without any of our readers: base numbers and the file's."""
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    tensors = load_file(folder / _WEIGHTS)
    loaded: dict[str, Numbers] = {}
    for kind in kinds:
        middle = "lora_embedding_{}" if kind == "embed_tokens" else "lora_{}.weight"
        path = PARAMETER.rpartition(".")[0] if kind == "experts" else kind
        a, b = (tensors[f"{_PREFIX}{path}.{middle.format(part)}"].to(F64) for part in "AB")
        m = tensors[f"{_PREFIX}{path}.lora_magnitude_vector"].to(F64) if config["use_dora"] else None
        if kind == "experts":
            a, b, m = blocked(shaped("A", a)), blocked(shaped("B", b)), None if m is None else blocked(m)
        rank = config["rank_pattern"].get(kind, config["r"])
        alpha = config["alpha_pattern"].get(kind, config["lora_alpha"])
        scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
        loaded[kind] = replace(numbers[kind], a_RI=a, b_OR=b, magnitude_O=m, scale=scale, start=None)
    return loaded


def _write_peft(folder: Path, trial: Trial, base: dict[str, Numbers]) -> dict[str, Numbers]:
    """A folder in PEFT's format, written without any of our writers; the numbers in it."""
    v = trial.variant
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Numbers] = {}
    for kind in trial.kinds:
        values = trained_values(base[kind], v, kind, 4)
        middle = "lora_embedding_{}" if kind == "embed_tokens" else "lora_{}.weight"
        path = PARAMETER.rpartition(".")[0] if kind == "experts" else kind
        for part in "AB":
            value = values[part]
            value = as_held(part, value, value[0]) if kind == "experts" else value
            tensors[f"{_PREFIX}{path}.{middle.format(part)}"] = value.contiguous()
        if "m" in values:
            tensors[f"{_PREFIX}{path}.lora_magnitude_vector"] = values["m"]
        numbers[kind] = with_values(base[kind], values, v.scale(kind))
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": [kind for kind in trial.kinds if kind != "experts"],
        "target_parameters": [PARAMETER] if "experts" in trial.kinds else None,
        "use_dora": v.method == "dora",
        "use_rslora": v.rslora,
        "rank_pattern": {k: r for k, r in RANK_PATTERN.items() if k in trial.kinds} if v.patterns else {},
        "alpha_pattern": {k: a for k, a in ALPHA_PATTERN.items() if k in trial.kinds} if v.patterns else {},
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    folder.mkdir()
    save_file(tensors, folder / _WEIGHTS)
    (folder / _CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return numbers
