"""What operations are tried on: one small model with a layer of every kind, its inputs, and adapters' numbers.

All kinds stand in one model, because that is where adapters live: an operation acts on the whole model, and each layer
is judged by itself. Weights, inputs and adapters are drawn so large that nothing can be left out unnoticed: the update
is about 0.6 of its weight, magnitudes are about 30 % away from the norms, biases are of the outputs' size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from theodora.conformance import mixture
from theodora.conformance.formula import Numbers
from theodora.conformance.mixture import Mixture, blocked, spread
from theodora.conformance.rounding import F64
from theodora.kernels.base_weight import BaseWeight
from theodora.kernels.experts_weight import ExpertsWeight
from theodora.layers.base_weights import Unfit, base_weight_of

KINDS = ("linear", "biased", "conv1d", "embed_tokens", "tied_head", "zero_rows", "odd", "experts")
KIND_TITLES = {
    "linear": "Linear",
    "biased": "Linear with bias",
    "conv1d": "Conv1D",
    "embed_tokens": "Embedding",
    "tied_head": "tied head",
    "zero_rows": "rows of zeros",
    "odd": "odd shape",
    "experts": "fused experts",
}
ZERO_ROWS = (0, 5)
"""Rows of W that are zero in the layer `zero_rows`; B's row is zero in the first of them, too."""
VOCABULARY = 40
BATCH = (3, 4)
"""Sequences, and tokens in each."""


@dataclass(frozen=True)
class Variant:
    """A kind of adapter."""

    method: Literal["lora", "dora"]
    rslora: bool = False
    patterns: bool = False
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"

    @property
    def title(self) -> str:
        """As in the table."""
        init = {"default": "", "pissa": "PiSSA", "olora": "OLoRA"}.get(self.init, self.init)
        options = ", ".join(filter(None, ["rsLoRA" * self.rslora, "patterns" * self.patterns, init]))
        return ("DoRA" if self.method == "dora" else "LoRA") + (f" ({options})" if options else "")

    def rank(self, kind: str) -> int:
        """R of one layer."""
        return RANK_PATTERN.get(kind, RANK) if self.patterns else RANK

    def scale(self, kind: str) -> float:
        """s of one layer: alpha / R, or alpha / √R (rsLoRA)."""
        alpha = ALPHA_PATTERN.get(kind, ALPHA) if self.patterns else ALPHA
        rank = self.rank(kind)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


RANK, ALPHA = 4, 6.0
RANK_PATTERN = {"biased": 2, "conv1d": 6, "odd": 3}
ALPHA_PATTERN = {"linear": 3.0, "conv1d": 5.0, "tied_head": 10.0}
_OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "-rslora": {"rslora": True},
    "-patterns": {"patterns": True},
    "-rslora-patterns": {"rslora": True, "patterns": True},
    "-gaussian": {"init": "gaussian"},
    "-orthogonal": {"init": "orthogonal"},
    "-pissa": {"init": "pissa"},
    "-olora": {"init": "olora"},
}
VARIANTS: dict[str, Variant] = {
    f"{method}{suffix}": Variant(method, **options)
    for method in ("lora", "dora")
    for suffix, options in _OPTIONS.items()
}

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "float8": torch.bfloat16,
    "nf4": torch.bfloat16,
    "int8": torch.bfloat16,
    "hqq": torch.bfloat16,
}
"""Name → what the model is stored in; with float8 its linear layers are put into float8 then, with the last three they
are quantised by the library that stores numbers so (`quantised.py`)."""


class SpecimenConfig(PretrainedConfig):
    """Of `Specimen`, which has no options."""

    model_type = "theodora_specimen"


class Specimen(PreTrainedModel):
    """A layer of every kind, side by side; `tied_lookup` shares its weight with `tied_head` and has no adapter."""

    config_class = SpecimenConfig
    _tied_weights_keys = {"tied_head.weight": "tied_lookup.weight"}  # noqa: RUF012

    def __init__(self, config: SpecimenConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(48, 64, bias=False)
        self.biased = nn.Linear(64, 48)
        self.conv1d = Conv1D(96, 32)
        self.embed_tokens = nn.Embedding(VOCABULARY, 32)
        self.tied_head = nn.Linear(32, VOCABULARY, bias=False)
        self.zero_rows = nn.Linear(32, 48)
        self.odd = nn.Linear(13, 7)
        self.tied_lookup = nn.Embedding(VOCABULARY, 32)
        self.experts = Mixture()
        self.post_init()
        self.tied_lookup.weight = self.tied_head.weight

    def get_input_embeddings(self) -> nn.Module:
        """The lookup that the head is tied to."""
        return self.tied_lookup

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.tied_head

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the order of `KINDS`, and last what the tied lookup gives."""
        ids = inputs[KINDS.index("embed_tokens")]
        outputs = [getattr(self, kind)(x) for kind, x in zip(KINDS, inputs, strict=True)]
        return (*outputs, self.tied_lookup(ids))


# So that what builds a model from its folder's config.json finds the class.
AutoConfig.register(SpecimenConfig.model_type, SpecimenConfig, exist_ok=True)
AutoModelForCausalLM.register(SpecimenConfig, Specimen, exist_ok=True)


def build(dtype: str, device: str = "cpu") -> Specimen:
    """A specimen in eval mode, the same each time; the global random state is left alone."""
    generator = torch.Generator().manual_seed(20)
    with torch.random.fork_rng(devices=[]):
        model = Specimen(SpecimenConfig(tie_word_embeddings=True))  # pyright: ignore[reportCallIssue]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("down_proj"):  # the identity
                parameter.copy_(torch.eye(len(parameter[0])).expand_as(parameter))
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            else:
                features = parameter.shape[0 if "conv1d" in name or "embed_tokens" in name else -1]
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(features))
        model.zero_rows.weight[list(ZERO_ROWS)] = 0
    return model.to(device, DTYPES[dtype]).eval()  # pyright: ignore


def inputs(dtype: str, device: str = "cpu", batch: tuple[int, ...] = BATCH, seed: int = 1) -> tuple[Tensor, ...]:
    """One input for each kind, (…, I), or token ids."""
    generator = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    for kind in KINDS:
        if kind == "embed_tokens":
            made.append(torch.randint(VOCABULARY, batch, generator=generator).to(device))
        else:
            x = torch.randn(*batch, FEATURES[kind], generator=generator)
            x = spread(x) if kind == "experts" else x
            made.append(x.to(device, DTYPES[dtype]))
    return tuple(made)


FEATURES = {
    "linear": 48,
    "biased": 64,
    "conv1d": 32,
    "embed_tokens": VOCABULARY,
    "tied_head": 32,
    "zero_rows": 32,
    "odd": 13,
    "experts": mixture.IN,
}


def weight_of(module: nn.Module) -> BaseWeight:
    """The weight of an untouched layer; of experts all of theirs."""
    if isinstance(module, Mixture):
        return ExpertsWeight(module.weight)
    weight = base_weight_of(module)
    if isinstance(weight, Unfit):
        raise TypeError(weight.reason)
    return weight


def stored_weight(module: nn.Module) -> Tensor:
    """The weight of an untouched layer as (O, I) in float64: the numbers that it stands for."""
    dense = weight_of(module).dense(F64).detach().to("cpu")
    return blocked(dense) if isinstance(module, Mixture) else dense


def base_numbers(model: nn.Module) -> dict[str, Numbers]:
    """Kind → numbers of the untouched layer."""
    numbers: dict[str, Numbers] = {}
    for kind in KINDS:
        module: Any = model.get_submodule(kind)
        bias = getattr(module, "bias", None)
        numbers[kind] = Numbers(
            stored_weight(module),
            None if bias is None else bias.detach().to("cpu", F64),
            rounds=_rounds(weight_of(module)),
        )
    return numbers


def _rounds(weight: BaseWeight) -> Literal["", "float8", "int8"]:
    """What the weight's products round x to."""
    if not weight.rounds_input:
        return ""
    return "float8" if weight.stored == "float8" else "int8"


def trained_values(n: Numbers, variant: Variant, kind: str, seed: int) -> dict[str, Tensor]:
    """A, B and m in float32 as training might have left them: far from any start. Of experts (E, …) of each."""
    generator = torch.Generator().manual_seed(1000 * seed + KINDS.index(kind))
    out_features, in_features = n.weight_OI.shape
    experts: tuple[int, ...] = ()
    if kind == "experts":
        experts, out_features, in_features = (mixture.EXPERTS,), mixture.OUT, mixture.IN
    rank = variant.rank(kind)
    a = torch.randn(*experts, rank, in_features, generator=generator) / math.sqrt(in_features)
    b = torch.randn(*experts, out_features, rank, generator=generator) * 0.6 / (variant.scale(kind) * math.sqrt(rank))
    if kind == "zero_rows":
        b[ZERO_ROWS[0]] = 0
    values = {"A": a, "B": b}
    if variant.method == "dora":
        norm = n.weight_OI.square().sum(1).sqrt().view(*experts, out_features)
        drawn = torch.exp(0.3 * torch.randn(*experts, out_features, generator=generator).to(F64))
        values["m"] = (torch.where(norm > 0, norm, 0.5) * drawn).float()
    return values


def flat(x: Tensor, kind: str) -> Tensor:
    """Inputs as (T, I) in float64; token ids as one-hot rows."""
    if kind == "embed_tokens":
        return nn.functional.one_hot(x.to("cpu").reshape(-1), VOCABULARY).to(F64)
    return x.detach().to("cpu", F64).reshape(-1, x.shape[-1])


def output_gradients(outputs: tuple[Tensor, ...], seed: int = 2) -> tuple[Tensor, ...]:
    """∂L/∂y for each output, drawn; zero for the tied lookup's."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs[: len(KINDS)]]
    return (*drawn, *(torch.zeros_like(y) for y in outputs[len(KINDS) :]))
