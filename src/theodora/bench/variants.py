"""Variants of a training step that can be measured: plain values, to be sent to a process. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from theodora.errors import ConfigError, bullet_list
from theodora.files.trained_on import KINDS


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The model and the batch of a step.

    Raises:
        ConfigError: naming every number that makes no sense.
    """

    model: str | Mapping[str, Any]
    """Folder or hub name of a causal language model; or the settings of its configuration, with `model_type`."""
    random_weights: bool = False
    """Weights drawn at random instead of loaded: nothing but the configuration is read."""
    layers: int | None = None
    """Keep only the first so many decoder layers. Default: all."""
    dtype: str = "bfloat16"
    quantize: str | None = None
    """What the linear layers are quantised to as the model is built or loaded: a kind of
    `theodora.files.trained_on.KINDS`. Default: they stay in `dtype`."""
    device: str = "cpu"
    batch: int = 4
    """Sequences in a batch."""
    length: int = 512
    """Tokens in a sequence."""
    rank: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    """What is adapted: all-linear (all linear layers but the output head), or names of modules."""
    gradient_checkpointing: bool = False
    optimizer: bool = False
    """Whether the step includes an AdamW update of the adapter."""
    sharded: bool = False
    """Whether the weights are going to be cut over processes, which packed ones are stored for."""
    memory_limit: float | None = None
    """GiB of the GPU that PyTorch's allocator may take, as if there were no more. Default: all."""
    seed: int = 0
    """Of random weights and of the batch."""
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("batch", "length", "rank", "layers")}
        wrong = [f"{n} is {v!r}; expected at least 1" for n, v in counts.items() if v is not None and v < 1]
        if self.length == 1:
            wrong.append("length is 1; expected at least 2, because a token is predicted from those before it")
        if self.quantize not in (None, "none", *KINDS):
            wrong.append(f"quantize is {self.quantize!r}; expected one of none, {', '.join(KINDS)}")
        if self.memory_limit is not None and not self.memory_limit > 0:
            wrong.append(f"memory_limit is {self.memory_limit}; expected GiB, more than 0")
        if self.memory_limit is not None and not self.device.startswith("cuda"):
            wrong.append(
                f"memory_limit is {self.memory_limit}, and device is {self.device}; only a GPU's can be limited"
            )
        if wrong:
            raise ConfigError("What is to be measured:" + bullet_list(wrong))

    @property
    def tokens(self) -> int:
        """Tokens in a batch."""
        return self.batch * self.length


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the step: whose adapter on the model, and what makes it fast."""

    label: str
    library: Literal["none", "peft", "theodora"] = "none"
    """Whose adapter; none is the frozen model."""
    method: Literal["lora", "dora"] | None = None
    experts: bool = False
    """Whether parameters of fused experts are adapted beside the workload's targets."""
    bf16_adapter: bool = False
    """Store A, B and the magnitude in the model's dtype instead of float32."""
    liger: Literal["none", "loss", "all"] = "none"
    """What comes from Liger-Kernel: nothing, the output head fused with the cross entropy, or all its kernels too."""
    accelerate: bool = False
    """Theodora's fast path, with its own fused cross entropy."""
    base_dtype: str | None = None
    """Storage of the frozen weights, where it is not the model's dtype: fp8."""
    compiled: bool = False
    """Each decoder block under torch.compile."""
    graph: bool = False
    """The whole step as one CUDA graph (where there is CUDA)."""
    build: Callable[[Workload, Variant], tuple[Any, Callable[[], Any]]] | None = None
    """Replaces `theodora.bench.build.build`. A function at the top of a module, because it travels by its name."""
    imports: tuple[str, ...] = ()
    """Modules that want to be imported before torch and transformers are."""
    python_path: tuple[str, ...] = ()
    """Folders to import from first, in this variant's process alone."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """Environment variables of this variant's process, set before it imports anything large."""

    @property
    def modules(self) -> list[str]:
        """What it imports before any clock runs."""
        peft = ["peft"] if self.library == "peft" else []
        liger = ["liger_kernel.transformers"] if self.liger != "none" else []
        return [*self.imports, *peft, *liger]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A variant on a workload, under a name that is its own in a run."""

    name: str
    variant: Variant
    workload: Workload


VARIANTS = {
    "floor": Variant(label="frozen model"),
    "peft-lora": Variant(label="PEFT LoRA", library="peft", method="lora"),
    "peft-dora": Variant(label="PEFT DoRA", library="peft", method="dora"),
    "lora": Variant(label="Theodora LoRA", library="theodora", method="lora"),
    "dora": Variant(label="Theodora DoRA", library="theodora", method="dora"),
    "dora-fp8": Variant(label="Theodora DoRA, fp8 base", library="theodora", method="dora", base_dtype="fp8"),
}
"""What every machine can measure. Gradients flow to the embeddings' output in all of them."""
