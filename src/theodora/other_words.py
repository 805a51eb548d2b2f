"""What recipes of other tools call our options: Axolotl, LLaMA-Factory, Unsloth, ms-swift, torchtune, mlx-lm, PEFT.

Nothing is translated in silence: the error for such a name says which line to write instead. Only names that neither
we nor `trl.SFTConfig` have are listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from theodora.errors import shown

NAMES = {
    # PEFT, and most tools
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "targets",
    "lora_target": "targets",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "lora_modules_to_save": "modules_to_save",
    "additional_target": "modules_to_save",
    "use_rslora": "rslora",
    "peft_use_rslora": "rslora",
    "init_lora_weights": "init",
    "peft_init_lora_weights": "init",
    # models and data
    "model_name_or_path": "model",
    "model_name": "model",
    "base_model": "model",
    "model_id": "model",
    "model_revision": "revision",
    "adapter_name_or_path": "from_adapter",
    "lora_model_dir": "from_adapter",
    "adapters": "from_adapter",
    "resume_adapter_file": "from_adapter",
    "dataset": "data",
    "datasets": "data",
    "dataset_name": "data",
    "train_data": "data",
    "train_file": "data",
    "data_path": "data",
    "eval_dataset": "eval_data",
    "val_dataset": "eval_data",
    "test_datasets": "eval_data",
    "validation_file": "eval_data",
    "val_set_size": "held_out",
    "val_size": "held_out",
    "split_dataset_ratio": "held_out",
    "adapter_path": "output",
    "project_name": "output",
    "reward_funcs": "reward",
    "sequence_len": "max_length",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "max_seq_len": "max_length",
    "sample_packing": "packing",
    "neat_packing": "packing",
    # optimisation
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "iters": "max_steps",
    "micro_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "grad_accumulation_steps": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "optimizer_type": "optim",
    "evaluation_strategy": "eval_strategy",
    "steps_per_eval": "eval_steps",
    "steps_per_report": "logging_steps",
    "save_every": "save_steps",
    "save_every_n_steps": "save_steps",
    "enable_activation_checkpointing": "gradient_checkpointing",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "grad_checkpoint": "gradient_checkpointing",
    "gradient_clipping": "max_grad_norm",
    "clip_grad_norm": "max_grad_norm",
    "overwrite_output_dir": "overwrite",
    "random_state": "seed",
    "compile": "torch_compile",
}
"""Their name → ours, or SFTConfig's, with the same value."""

_METHODS = {"lora": "method: lora", "dora": "method: dora"}
_QLORA = "write method: lora (or dora) and quantize: nf4"
_BITS = {"4": "nf4", "8": "int8"}
_CHAT = "leave it out; the tokenizer's own template is used, and chat_template_path: FILE takes another"
_ATTENTION = "leave it out; attention is chosen by itself, and model_init_kwargs: {attn_implementation: …} overrules"
_NOT_HERE = {
    "template": _CHAT,
    "chat_template": _CHAT,
    "chat_template_jinja": _CHAT,
    "model_type": "leave it out; the model's own config.json says it",
    "tokenizer_type": "leave it out; the model's own files say it",
    "tokenizer_name": "leave it out; the tokenizer is the model's",
    "tokenizer_config": "leave it out; the tokenizer is the model's",
    "tokenizer": "leave it out; the tokenizer is the model's",
    "checkpointer": "write model: FOLDER for its checkpoint_dir, and output: FOLDER for its output_dir",
    "metric_logger": "write report_to: tensorboard, or pass --report-to wandb; metrics.jsonl is written in any case",
    "profiler": "leave it out",
    "loss": "leave it out; it is cross entropy",
    "dataset_dir": "leave it out; data: takes the path of the file",
    "dataset_prepared_path": "leave it out; data is prepared at each start",
    "overwrite_cache": "leave it out; there is no cache of prepared data",
    "preprocessing_num_workers": "leave it out; data is prepared in one process",
    "dataset_processes": "leave it out; data is prepared in one process",
    "max_samples": "cut the file; all rows are trained on",
    "plot_loss": "leave it out; loss.png is always drawn",
    "flash_attention": _ATTENTION,
    "flash_attn": _ATTENTION,
    "attn_impl": _ATTENTION,
    "attn_implementation": _ATTENTION,
    "sdp_attention": _ATTENTION,
    "xformers_attention": _ATTENTION,
    "flex_attention": _ATTENTION,
    "pad_to_sequence_len": "leave it out; rows are padded as far as their batch needs",
    "eval_sample_packing": "write eval_packing",
    "lora_fan_in_fan_out": "leave it out; it is seen from the layers",
    "lora_on_cpu": "leave it out",
    "strict": "leave it out; unknown options are always refused",
    "torch_dtype": "write bf16: true or false; the dtype of the base follows",
    "dtype": "write bf16: true or false; the dtype of the base follows",
    "device": "leave it out; the accelerator is found by itself, and use_cpu: true keeps to the CPU",
    "device_map": "leave it out; each process has one device",
    "group_by_length": "write train_sampling_strategy: group_by_length",
    "use_wandb": "pass --report-to wandb",
    "wandb_project": "pass --report-to wandb, and set WANDB_PROJECT in the environment",
    "wandb_entity": "pass --report-to wandb, and set WANDB_ENTITY in the environment",
    "wandb_name": "write run_name",
    "wandb_run_id": "pass --report-to wandb, and set WANDB_RUN_ID in the environment",
    "wandb_watch": "leave it out",
    "wandb_log_model": "leave it out",
    "evals_per_epoch": "write eval_steps; below 1 it is a share of all steps",
    "saves_per_epoch": "write save_steps; below 1 it is a share of all steps",
    "max_steps_per_epoch": "write max_steps",
    "lora_parameters": "write rank, alpha (scale times rank), dropout and targets by themselves",
    "lora_mlp_kernel": "leave it out; fast kernels are used by themselves (kernels: auto)",
    "lora_qkv_kernel": "leave it out; fast kernels are used by themselves (kernels: auto)",
    "lora_o_kernel": "leave it out; fast kernels are used by themselves (kernels: auto)",
    "use_unsloth": "leave it out; fast kernels are used by themselves (kernels: auto)",
    "lora_attn_modules": "write targets with the names of the layers, or leave it out: all linear ones",
    "apply_lora_to_mlp": "write targets with the names of the layers, or leave it out: all linear ones",
    "apply_lora_to_output": "write targets with the names of the layers, lm_head among them",
    "num_layers": "write targets as an expression that names the layers, or leave it out: all of them",
    "lora_layers": "write targets as an expression that names the layers, or leave it out: all of them",
    "layers_to_transform": "write targets as an expression that names the layers, or leave it out: all of them",
    "peft_layers_to_transform": "write targets as an expression that names the layers, or leave it out: all of them",
    "bias": "leave it out; biases stay frozen",
    "task_type": "leave it out",
    "peft_type": "leave it out; method says it",
    "use_peft": "leave it out; an adapter is all that is trained",
    "loraplus_lr_ratio": "leave it out; A and B learn at one rate",
    "roles_to_train": "leave it out; assistants' turns are trained on, or all with train_on: all",
    "train_on_eos": "leave it out; the end of each trained turn is among what is learned",
    "shuffle_merged_datasets": "leave it out; rows are shuffled",
    "special_tokens": "leave it out; eos_token and pad_token are options of their own",
    "tokens": "leave it out",
    "plugins": "leave it out; no file runs Python here",
    "external_plugins": "leave it out; no file runs Python here",
    "custom_register_path": "leave it out; no file runs Python here",
    "unfrozen_parameters": "write modules_to_save with the names of modules",
    "local_files_only": "set HF_HUB_OFFLINE=1 in the environment",
    "hf_hub_token": "set HF_TOKEN in the environment",
    "system": "write the system message into the rows",
    "default_system": "write the system message into the rows",
}
"""Their name → what to do; there is no option of one meaning."""


def advice(name: str, value: Any) -> str | None:
    """What to write instead of an option of another tool; None for a name that is none of theirs.

    Example:
        `advice("lora_r", 32)` is "it is called rank here: write rank: 32".
    """
    special = _by_value(name, value)
    if special is not None:
        return special
    if name in _NOT_HERE:
        return _NOT_HERE[name]
    if name not in NAMES:
        return None
    ours = NAMES[name]
    line = _line(ours, value)
    return f"it is called {ours} here" + (f": write {line}" if line else "")


def called(name: str) -> str | None:
    """What stands for another tool's option here, if it is one."""
    return NAMES.get(name) or ("method" if name in _METHOD_NAMES else None)


_METHOD_NAMES = (
    "use_dora",
    "peft_use_dora",
    "finetuning_type",
    "adapter",
    "train_type",
    "tuner_type",
    "fine_tune_type",
)
_TRAIN_ON = {"train_on_inputs": True, "train_on_prompt": True, "mask_prompt": False}


def _by_value(name: str, value: Any) -> str | None:
    """Advice that depends on what stands there."""
    text = str(value).lower()
    if name in ("use_dora", "peft_use_dora"):
        return "write method: dora" if text == "true" else "write method: lora"
    if name in _METHOD_NAMES:
        return (
            f"write {_METHODS[text]}"
            if text in _METHODS
            else _QLORA
            if text == "qlora"
            else "write method: lora or dora"
        )
    if name in ("load_in_4bit", "load_in_8bit"):
        return f"write quantize: {_BITS[name[8]]}" if text == "true" else "leave it out"
    if name in ("quantization_bit", "quant_bits"):
        known = f"write quantize: {_BITS[text]}" if text in _BITS else "write quantize: nf4, int8 or int4"
        return "leave it out" if text in ("false", "none", "0") else known
    if name in ("quantization", "gptq"):
        loads = "a model that is quantised already is loaded as it is; to quantise one, write quantize: nf4"
        return "leave it out" if text in ("false", "none", "0") else loads
    if name in _TRAIN_ON:
        everything = (text == "true") is _TRAIN_ON[name]
        return f"write train_on: {'all' if everything else 'completion'}"
    if name == "lora_target_linear":
        return (
            "leave it out; targets: all-linear is the default" if text == "true" else "write targets with their names"
        )
    if name in ("lora_target", "lora_target_modules", "target_modules") and text in ("all", "['all-linear']"):
        return "write targets: all-linear"
    if name == "pissa_init":
        return "write init: pissa" if text == "true" else "leave it out"
    if name in ("stage", "rl", "rlhf_type", "task"):
        supervised = text in ("sft", "llm-sft", "none")
        return (
            "leave it out" if supervised else "only supervised training; TRL's trainers take a model of inject_adapter"
        )
    if name == "model" and isinstance(value, Mapping):
        return "write model: FOLDER (or a hub name), and rank, alpha and targets beside it"
    return None


def _line(ours: str, value: Any) -> str:
    """The line to write; empty where the value is no plain one."""
    if ours == "data" or ours == "eval_data":
        first = value[0] if isinstance(value, list) and value else value
        path = first.get("path", first.get("source")) if isinstance(first, Mapping) else first
        more = isinstance(value, list) and len(value) > 1
        return (f"{ours}: {path}" if isinstance(path, str) else f"{ours}: PATH") + (", one file of all" if more else "")
    if isinstance(value, Mapping):
        return ""
    if isinstance(value, list):
        return f"{ours}: [{', '.join(map(str, value))}]" if len(value) < 9 else ""
    if isinstance(value, bool):
        return f"{ours}: {str(value).lower()}"
    return f"{ours}: {value}" if len(shown(value)) < 80 else ""
