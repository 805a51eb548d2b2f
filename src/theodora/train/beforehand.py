"""What is settled before a model loads, from its configuration: how processes hold its weights, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from transformers import PreTrainedConfig

from theodora import plan
from theodora.adapters.quantized import stored_quantization
from theodora.config import TrainConfig
from theodora.errors import CheckpointError, ConfigError
from theodora.files.adapter import read_adapter
from theodora.plan.fits import read_config, size
from theodora.train.expert_loads import trained_experts
from theodora.train.flattened import lengths_of
from theodora.train.grpo_loss import PolicySettings
from theodora.train.objectives import completion_length, kept_plain, settings_of
from theodora.train.processes import Processes
from theodora.train.sharding import OF_EXPERTS, OF_FLOAT8, why_not

# How `quantize` would leave the weights, as a configuration says it. (NF4 is loaded so that it can be cut.)
_AS_LOADED = {
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "int4": {"quant_method": "torchao"},
}


@dataclass(frozen=True)
class Settled:
    """What there is to say, and who goes on."""

    processes: Processes
    """With the sharding that was chosen."""
    notes: list[str]


def look_ahead(config: TrainConfig, processes: Processes) -> PreTrainedConfig | None:
    """The model's configuration; None where it cannot be read, which loading explains.

    Raises:
        ConfigError: its weights, as they will be loaded, cannot be cut as the processes were told to.
    """

    def read() -> PreTrainedConfig | None:
        try:
            return read_config(config)
        except Exception:  # whatever a damaged file leads transformers to
            return None

    found = read() if Path(config.model).exists() else processes.one_here_first(read)  # which downloads it
    if processes.sharding is not None and (reason := why_not_cut(config, found, processes.sharding)) is not None:
        raise ConfigError(reason)
    return found


def why_not_cut(config: TrainConfig, model_config: PreTrainedConfig | None, how: str) -> str | None:
    """Why the weights that will be loaded cannot be sharded; None if they can."""
    if "fp8" in (config.base_dtype, config.quantize):
        return OF_FLOAT8
    if _adapts_experts(config, model_config):
        return OF_EXPERTS
    try:
        stored = None if model_config is None else stored_quantization(model_config)
    except CheckpointError:  # loading says the same
        return None
    return why_not(SimpleNamespace(quantization_config=stored or _AS_LOADED.get(config.quantize or "")), how)


def _adapts_experts(config: TrainConfig, model_config: PreTrainedConfig | None) -> bool:
    """Whether the adapter is going to be on fused experts, as far as that can be told before the model loads."""
    adapter = config.adapter
    if config.from_adapter is not None:
        return any(tensors.a.dim() == 3 for tensors in read_adapter(config.from_adapter).modules.values())
    if adapter.experts or model_config is None or adapter.experts is False or adapter.targets == "all-linear":
        return bool(adapter.experts)
    try:
        model = plan.PaperModel(model_config, adapter, trust_remote_code=config.trust_remote_code).model
    except Exception:  # loading says what is wrong
        return False
    return bool(trained_experts(model))


def settle(
    config: TrainConfig, model_config: PreTrainedConfig | None, device: torch.device, dtype: str, rows: Dataset
) -> Settled:
    """Choose the sharding where that was left open, and look whether a step will fit.

    Every process calls it. On GPUs the weights are cut if whole ones do not fit; on the CPU they are whole.

    Args:
        config: the run.
        model_config: of its model; None: nothing is known, and nothing said.
        device: of this process.
        dtype: of the weights that are not quantised.
        rows: to train on, with `labels`.

    Raises:
        ConfigError: not even one row at once fits into this process' share of the machine.
    """
    processes = Processes.here()
    if model_config is None or device.type not in ("cuda", "cpu"):
        return Settled(processes, [])
    # On paper it is a language model, which has no head that scores.
    config = replace(config, adapter=replace(config.adapter, modules_to_save=kept_plain(config)))
    length, plain = int(lengths_of(rows)[0].max()) + completion_length(config), getattr(torch, dtype)

    taken = _share_of_vllm(config)

    def verdict_of(how: str) -> plan.Verdict | str:
        return _judged(
            lambda: plan.fits(
                replace(config, sharding=how),
                _beside_vllm(machine_of(processes, device.type, how), taken),
                length=length,
                dtype=plain,
                model_config=model_config,
            )
        )

    notes: list[str] = []
    found = verdict_of(processes.sharding or "none")
    left_open = config.objective == "sft" and config.sharding == "auto" and processes.sharding is None
    if (
        left_open
        and device.type == "cuda"
        and not processes.alone
        and processes.any(_too_large(found))
        and why_not_cut(config, model_config, "fsdp2") is None
    ):
        cut = verdict_of("fsdp2")
        if all(processes.gather(_better(cut, found))):
            processes = Processes.cut_from_here("fsdp2")
            notes.append(_said(found, processes))
            found = cut
    if isinstance(found, str):
        return Settled(processes, [*notes, f"whether a step fits could not be computed beforehand: {found}"])
    beside = f" (vLLM has {taken:.0%} of it by vllm_gpu_memory_utilization.)" if taken and found.message else ""
    if not found.fits and not found.splits:
        raise ConfigError(found.message + beside)
    return Settled(processes, [*notes, found.message + beside] if found.message else notes)


def machine_of(processes: Processes, device: str, how: str) -> plan.Machine:
    """What this process may take, and among how many weights are cut."""
    sharing = processes.count_here if how == "hsdp" else processes.count
    found = plan.machine(gpus=sharing, device=device)
    # Main memory is the machine's: each of its processes has a share.
    return replace(found, memory=found.memory // processes.count_here) if device == "cpu" else found


def _share_of_vllm(config: TrainConfig) -> float:
    """What vLLM takes of the device's memory, where it draws the completions."""
    settings = settings_of(config)
    by_vllm = settings.vllm if isinstance(settings, PolicySettings) else None
    return 0.0 if by_vllm is None else by_vllm.gpu_memory_utilization


def _beside_vllm(found: plan.Machine, taken: float) -> plan.Machine:
    return replace(found, memory=int(found.memory * (1 - taken)))


def _judged(look: Callable[[], plan.Verdict]) -> plan.Verdict | str:
    """A verdict, or why there is none: what does not work on paper may well run, or else loading says why not."""
    try:
        return look()
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _too_large(verdict: plan.Verdict | str) -> bool:
    return not isinstance(verdict, str) and not verdict.fits


def _better(cut: plan.Verdict | str, whole: plan.Verdict | str) -> bool:
    """Whether cut weights make the step fit; or at least one row, where whole ones do not leave room for that."""
    if isinstance(cut, str):
        return False
    return cut.fits or (cut.splits and not isinstance(whole, str) and not whole.fits and not whole.splits)


def _said(whole: plan.Verdict | str, processes: Processes) -> str:
    taken = ""
    if isinstance(whole, plan.Verdict) and whole.estimate is not None:
        memory = machine_of(processes, "cuda", "none").memory
        taken = f" (about {size(whole.estimate.taken)} of {size(memory)})"
    return (
        f"sharding auto is fsdp2: with whole weights a step does not fit one GPU{taken}, so each process holds a part "
        "of them; --sharding none leaves them whole"
    )
