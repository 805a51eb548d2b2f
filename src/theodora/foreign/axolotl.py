"""Axolotl's YAML (its documented fields of 2024 to 2026) → our options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from theodora.errors import shown
from theodora.foreign import sources
from theodora.foreign.axolotl_data import chat_template, read_datasets
from theodora.foreign.reading import (
    Reading,
    Rule,
    bf16,
    flag,
    held,
    is_off,
    is_on,
    missing,
    note_of_adapters,
    read_fields,
    read_under,
    to,
    when_on,
    words,
)

TOOL = "Axolotl"
MARKS = {
    *(
        "base_model",
        "datasets",
        "sequence_len",
        "micro_batch_size",
        "num_epochs",
        "adapter",
        "lora_r",
        "sample_packing",
    ),
    *("lora_target_linear", "lora_target_modules", "val_set_size", "dataset_prepared_path", "lr_scheduler", "rl"),
    *("train_on_inputs", "evals_per_epoch", "saves_per_epoch", "load_in_4bit", "flash_attention", "special_tokens"),
}
"""Fields by which its files are known."""

_KERNELS = "fast kernels are used by themselves (kernels: auto)"
_ATTENTION = "attention is chosen by itself"
_LOADED = "the model's own files say it"
_CACHE = "rows are prepared at each start, and nothing is kept"
_OBJECTIVES = {"dpo": "dpo", "ipo": "ipo", "kto": "kto", "orpo": "orpo", "simpo": "simpo"}
_PLUGINS = {
    "LigerPlugin": _KERNELS,
    "CutCrossEntropyPlugin": "the loss is computed without all logits at once by itself",
}
# Where the file says nothing, and ours would do otherwise.
_DEFAULTS = {
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 1,
    "max_length": 512,
    "held_out": 0,
    "output": "./model-out",
}
_OF_ADAPTERS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_linear", "lora_target_modules", "lora_modules_to_save"),
    *("lora_target_parameters", "lora_fan_in_fan_out", "lora_on_cpu", "peft_use_dora", "peft_use_rslora", "peft"),
    *("peft_layers_to_transform", "peft_init_lora_weights", "loraplus_lr_ratio", "loraplus_lr_embedding"),
    *("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"),
)


def read_axolotl(reading: Reading, given: Mapping[str, Any]) -> None:
    """Read a whole file."""
    if not is_off(given.get("rl")):  # which says what the rows are
        _objective(reading, "rl", given["rl"])
    if is_on(given.get("reward_model")):
        reading.set("objective", "reward", "reward_model", given["reward_model"])
    _adapter(reading, given)
    _quantisation(reading, given)
    _batches(reading, given)
    _intervals(reading, given)
    _schedule(reading, given)
    done = tuple(
        name for name in ("rl", "reward_model") if "objective" in reading.options and not is_off(given.get(name))
    )
    done += ("adapter", "peft_use_dora", "load_in_4bit", "load_in_8bit", "lora_target_linear", "lora_target_modules")
    done += ("micro_batch_size", "batch_size", "gradient_accumulation_steps", "evals_per_epoch", "saves_per_epoch")
    done += ("lr_scheduler", "cosine_min_lr_ratio", "lr_scheduler_kwargs")
    done += _OF_ADAPTERS if reading.options.get("method") == "full" else ()
    read_fields(reading, given, RULES, done)
    for name, value in _DEFAULTS.items():
        if name != "held_out" or "eval_data" not in reading.options:
            reading.default(name, value)


def _adapter(reading: Reading, given: Mapping[str, Any]) -> None:
    kind, dora = given.get("adapter"), given.get("peft_use_dora")
    if is_off(kind):
        reading.set("method", "full", "adapter", kind)
        note_of_adapters(reading, given, _OF_ADAPTERS)
        return
    if kind not in ("lora", "qlora"):
        reading.refuse(f"adapter is {shown(kind)}, another kind of adapter; expected lora, qlora or none")
        return
    method = "dora" if is_on(dora) else "lora"
    reading.set("method", method, "adapter", kind)
    if "peft_use_dora" in given:
        reading.set("method", method, "peft_use_dora", dora)
    linear, names = given.get("lora_target_linear"), given.get("lora_target_modules")
    if is_on(linear):
        reading.set("targets", "all-linear", "lora_target_linear", linear)
        if not is_off(names):
            reading.note("held", "lora_target_modules", names, "targets: all-linear has them already")
    elif not is_off(names):
        every = names in ("all-linear", ["all-linear"])
        reading.set("targets", "all-linear" if every else names, "lora_target_modules", names)
    else:
        reading.refuse("neither lora_target_modules nor lora_target_linear is given; expected one of them")
    for name, value in (("lora_target_linear", linear), ("lora_target_modules", names)):
        if name in given and is_off(value):
            reading.note("unset", name, value, "the other one of the two says it")


def _quantisation(reading: Reading, given: Mapping[str, Any]) -> None:
    in_4, in_8 = (is_on(given.get(f"load_in_{bits}bit")) for bits in (4, 8))
    if in_4 and in_8:
        reading.refuse("load_in_4bit and load_in_8bit are both on; expected one of them")
    elif given.get("adapter") == "qlora" and not in_4 and not in_8 and is_off(given.get("gptq")):
        reading.set("quantize", "nf4", "adapter", given.get("adapter"))
    for name, on, kind in (("load_in_4bit", in_4, "nf4"), ("load_in_8bit", in_8, "int8")):
        if on and not (in_4 and in_8):
            reading.set("quantize", kind, name, given[name])
        elif name in given and not on:
            reading.note("held", name, given[name], "the base stays as it is stored")


def _batches(reading: Reading, given: Mapping[str, Any]) -> None:
    micro, whole, times = (given.get(n) for n in ("micro_batch_size", "batch_size", "gradient_accumulation_steps"))
    if micro is not None:
        reading.set("per_device_train_batch_size", micro, "micro_batch_size", micro)
    if times is not None:
        reading.set("gradient_accumulation_steps", times, "gradient_accumulation_steps", times)
    if isinstance(whole, int) and isinstance(micro, int) and micro and whole % micro == 0:
        reading.set("gradient_accumulation_steps", whole // micro, "batch_size", whole)
    elif whole is not None:
        reading.refuse(f"batch_size is {shown(whole)}, the rows of a step; expected a multiple of micro_batch_size")


def _intervals(reading: Reading, given: Mapping[str, Any]) -> None:
    """So many times in each epoch: as a share of all steps, which one epoch alone cannot be."""
    epochs = given.get("num_epochs", _DEFAULTS["num_train_epochs"])
    for kind in ("eval", "save"):
        name = f"{kind}s_per_epoch"
        times = given.get(name)
        if times is None:
            continue
        if is_off(times):
            reading.set(f"{kind}_strategy", "no", name, times)
        elif given.get("max_steps") not in (None, -1) or not isinstance(epochs, int | float) or not epochs * times > 0:
            reading.missing(
                name, times, f"would {kind} {times} times in an epoch; write {kind}_steps, a number of steps"
            )
        elif epochs * times > 1:
            reading.set(f"{kind}_steps", round(1 / (epochs * times), 6), name, times)
        else:
            reading.set(f"{kind}_strategy", "epoch", name, times)


def _schedule(reading: Reading, given: Mapping[str, Any]) -> None:
    kind, least, options = (given.get(n) for n in ("lr_scheduler", "cosine_min_lr_ratio", "lr_scheduler_kwargs"))
    if least is not None and kind in (None, "cosine", "cosine_with_min_lr"):
        reading.set("lr_scheduler_type", "cosine_with_min_lr", "cosine_min_lr_ratio", least)
        reading.set("lr_scheduler_kwargs", {"min_lr_rate": least}, "cosine_min_lr_ratio", least)
        if kind is not None:
            reading.note("translated", "lr_scheduler", kind, "lr_scheduler_type: 'cosine_with_min_lr'")
    else:
        if kind is not None:
            reading.set("lr_scheduler_type", kind, "lr_scheduler", kind)
        if least is not None:
            reading.missing("cosine_min_lr_ratio", least, f"would end the rate at {least} of its peak")
    if options is not None:
        reading.set("lr_scheduler_kwargs", options, "lr_scheduler_kwargs", options)


def _objective(reading: Reading, origin: str, given: Any) -> None:
    if str(given) not in _OBJECTIVES:
        reading.refuse(f"{origin} is {shown(given)}; expected one of {', '.join(_OBJECTIVES)}, or supervised training")
    else:
        reading.set("objective", _OBJECTIVES[given], origin, given)


def _labels(reading: Reading, origin: str, given: Any) -> None:
    if given == 1:
        reading.note("held", origin, given, "a reward model gives one number")
    else:
        reading.missing(origin, given, "would be a classifier; here a model scores with one number")


def _inputs(reading: Reading, origin: str, given: Any) -> None:
    reading.set("train_on", "all" if is_on(given) else "completion", origin, given)


def _tokens(reading: Reading, origin: str, given: Any) -> None:
    for name, token in given.items() if isinstance(given, Mapping) else []:
        if name == "eos_token":
            reading.set(name, token, f"{origin}.{name}", token)
        elif name == "pad_token":
            reading.note("held", f"{origin}.{name}", token, "padding is chosen by itself, and not learned")
        else:
            reading.missing(
                f"{origin}.{name}", token, "would change the tokenizer; save one that has it with the model"
            )
    if not isinstance(given, Mapping):
        reading.missing(
            origin, given, "would add tokens to the tokenizer; save it so, and write resize_embeddings: true"
        )


def _plugins(reading: Reading, origin: str, given: Any) -> None:
    for plugin in sources.listed(given):
        known = _PLUGINS.get(str(plugin).rpartition(".")[2])
        if known:
            reading.note("held", origin, plugin, known)
        else:
            reading.missing(origin, plugin, "would run a plug-in; no file runs Python here")


def _fsdp(reading: Reading, origin: str, given: Any) -> None:
    asked = [word for item in sources.listed(given) for word in str(item).split()]
    for word in asked:
        if word in ("full_shard", "hybrid_shard"):
            reading.set("sharding", "fsdp2" if word == "full_shard" else "hsdp", origin, word)
        elif word == "offload":
            reading.set("cpu_offload", True, origin, word)
        elif word == "auto_wrap":
            reading.note("held", origin, word, "blocks are wrapped by themselves")
        else:
            reading.missing(origin, word, "would share the weights in that way; sharding takes fsdp2 or hsdp")


def _fsdp_config(reading: Reading, origin: str, given: Any) -> None:
    for key, value in given.items() if isinstance(given, Mapping) else [("", given)]:
        name = str(key).removeprefix("fsdp_")
        where = f"{origin}.{key}"
        if name == "offload_params" and is_on(value):
            reading.set("cpu_offload", True, where, value)
        elif is_off(value):
            reading.note("held", where, value, "it is off here, too")
        elif name in ("version", "fsdp_version"):
            reading.note("held", where, value, "weights are shared as in FSDP2")
        elif name in ("auto_wrap_policy", "transformer_layer_cls_to_wrap", "use_orig_params", "sync_module_states"):
            reading.note("held", where, value, "blocks are found and wrapped by themselves")
        elif name in ("reshard_after_forward", "cpu_ram_efficient_loading", "state_dict_type"):
            reading.note("held", where, value, "weights are read, given back and saved in that manner by themselves")
        else:
            reading.missing(where, value, "would tune how weights are shared; there is no option for it")


def _checkpointing(reading: Reading, origin: str, given: Any) -> None:
    differs = (
        "" if isinstance(given, bool) else f"{given} would also keep activations elsewhere; here they are recomputed"
    )
    reading.set("gradient_checkpointing", not is_off(given), origin, given, differs)


def _trackers() -> dict[str, Rule]:
    environment = {"wandb_project": "WANDB_PROJECT", "wandb_entity": "WANDB_ENTITY", "wandb_run_id": "WANDB_RUN_ID"}
    report = "a file cannot send what a run logs to others"
    rules = {name: flag(f"{env}={{}} --report-to wandb", report) for name, env in environment.items()}
    rules["use_wandb"] = rules["wandb_mode"] = flag("--report-to wandb", report)
    rules["wandb_name"] = to("run_name")
    rules["wandb_watch"] = rules["wandb_log_model"] = missing("would send more to W&B; metrics alone are sent")
    for tool in ("mlflow", "comet"):
        for name in (f"use_{tool}", f"{tool}_tracking_uri", f"{tool}_experiment_name", f"{tool}_project_name"):
            rules[name] = flag(f"--report-to {'comet_ml' if tool == 'comet' else tool}", report)
    rules["use_tensorboard"] = when_on("report_to", ["tensorboard"])
    return rules


_INIT = {"true": None, "gaussian": "gaussian", "pissa": "pissa", "olora": "olora", "orthogonal": "orthogonal"}
RULES: dict[str, Rule] = {
    "base_model": to("model"),
    "base_model_config": held(_LOADED),
    "model_type": held(_LOADED),
    "tokenizer_type": held(_LOADED),
    "tokenizer_use_fast": held(_LOADED),
    "tokenizer_legacy": missing("would choose another version of the tokenizer"),
    "tokenizer_config": missing("would take another tokenizer; here it is the model's"),
    "is_llama_derived_model": held(_LOADED),
    "is_mistral_derived_model": held(_LOADED),
    "is_falcon_derived_model": held(_LOADED),
    "revision_of_model": to("revision"),
    "trust_remote_code": flag("--trust-remote-code", "a file cannot grant that others' code runs"),
    "resize_token_embeddings_to_32x": missing("would pad the embedding; here it stays"),
    "overrides_of_model_config": missing("would change the model's config.json; change it in the model's folder"),
    "overrides_of_model_kwargs": to("model_init_kwargs"),
    "bnb_config_kwargs": missing("would quantise otherwise; nf4 is double-quantised and computes in the model's dtype"),
    "gptq": held("a model that is quantised already is loaded as it is"),
    "rl": held("training is supervised"),
    "rl_beta": to("beta"),
    "orpo_alpha": to("beta"),
    "dpo_beta": to("beta"),
    "dpo_label_smoothing": to("label_smoothing"),
    "kto_desirable_weight": to("desirable_weight"),
    "kto_undesirable_weight": to("undesirable_weight"),
    "reward_model": held("answers are learned"),
    "center_rewards_coefficient": to("center_rewards_coefficient"),
    "num_labels": _labels,
    "process_reward_model": missing("would reward each step of an answer; here it has one score"),
    "trl": lambda reading, origin, given: read_under(reading, origin, given, {"beta": to("beta")}),
    "datasets": read_datasets,
    "test_datasets": read_datasets,
    "pretraining_dataset": lambda reading, origin, given: read_datasets(reading, "datasets", given),
    "chat_template": chat_template,
    "chat_template_jinja": missing("would be the chat template; write it into a file, and chat_template_path: FILE"),
    "default_system_message": missing("would be the system's turn of rows without one; write a column system"),
    "train_on_inputs": _inputs,
    "val_set_size": to("held_out"),
    "shuffle_merged_datasets": held("rows are shuffled"),
    "dataset_prepared_path": held(_CACHE),
    "dataset_processes": held("rows are prepared in one process"),
    "dataset_num_proc": held("rows are prepared in one process"),
    "dataset_keep_in_memory": held(_CACHE),
    "dataset_exact_deduplication": missing(
        "would drop rows that stand twice; here each is learned as often as it stands"
    ),
    "dataset_shard_num": missing("would read one part of the rows alone; cut the file"),
    "dataset_shard_idx": missing("would read one part of the rows alone; cut the file"),
    "sequence_len": to("max_length"),
    "excess_length_strategy": missing(
        "would say what becomes of rows that are too long; here they are cut at their end"
    ),
    "min_sample_len": missing("would drop rows that are shorter"),
    "pad_to_sequence_len": held("rows are padded as far as their batch needs"),
    "sample_packing": to("packing"),
    "eval_sample_packing": to("eval_packing"),
    "sample_packing_group_size": held("rows are fitted together by themselves"),
    "sample_packing_bin_size": held("rows are fitted together by themselves"),
    "sample_packing_eff_est": held("steps are counted, not estimated"),
    "total_num_tokens": held("steps are counted, not estimated"),
    "group_by_length": when_on("train_sampling_strategy", "group_by_length"),
    "lora_r": to("rank"),
    "lora_alpha": to("alpha"),
    "lora_dropout": to("dropout"),
    "lora_modules_to_save": to("modules_to_save"),
    "lora_model_dir": to("from_adapter"),
    "lora_fan_in_fan_out": held("it is seen from the layers"),
    "lora_on_cpu": held("the adapter is merged where the model is"),
    "lora_target_parameters": missing(
        "would adapt fused weights of experts; write experts: true, which adapts them all"
    ),
    "peft_layers_to_transform": missing(
        "would adapt these layers alone; write targets as an expression that names them"
    ),
    "peft_use_rslora": to("rslora"),
    "peft_init_lora_weights": words("init", _INIT, "would start A and B in that way"),
    "peft": missing("would tune the start of the adapter (LoftQ)"),
    "loraplus_lr_ratio": missing("would let B learn faster than A by that factor; here they learn at one rate"),
    "loraplus_lr_embedding": missing("would give embeddings a rate of their own"),
    "lora_mlp_kernel": held(_KERNELS),
    "lora_qkv_kernel": held(_KERNELS),
    "lora_o_kernel": held(_KERNELS),
    "unfrozen_parameters": missing("would train these in full; write modules_to_save with the names of modules"),
    "relora_steps": missing("would merge and begin a new adapter every so many steps (ReLoRA)"),
    "num_epochs": to("num_train_epochs"),
    "eval_batch_size": to("per_device_eval_batch_size"),
    "optimizer": to("optim"),
    "noisy_embedding_alpha": to("neftune_noise_alpha"),
    "lr_quadratic_warmup": missing("would let the rate rise by the square"),
    "cosine_constant_lr_ratio": missing("would keep the rate constant from that share of the steps on"),
    "bf16": bf16,
    "bfloat16": bf16,
    "float16": to("fp16"),
    "gradient_checkpointing": _checkpointing,
    "gradient_checkpointing_kwargs": held("how activations are recomputed is chosen by itself"),
    "flash_attention": held(_ATTENTION),
    "sdp_attention": held(_ATTENTION),
    "xformers_attention": held(_ATTENTION),
    "eager_attention": held(_ATTENTION),
    "flex_attention": held(_ATTENTION),
    "attn_implementation": held(_ATTENTION),
    "s2_attention": missing("would shift attention in groups (LongLoRA)"),
    "unsloth_lora_mlp": held(_KERNELS),
    "unsloth_cross_entropy_loss": held(_KERNELS),
    "plugins": _plugins,
    "liger_rope": held(_KERNELS),
    "liger_rms_norm": held(_KERNELS),
    "liger_layer_norm": held(_KERNELS),
    "liger_glu_activation": held(_KERNELS),
    "liger_cross_entropy": held(_KERNELS),
    "liger_fused_linear_cross_entropy": held(_KERNELS),
    "cut_cross_entropy": held(_KERNELS),
    "flash_attn_cross_entropy": held(_KERNELS),
    "flash_attn_rms_norm": held(_KERNELS),
    "auto_resume_from_checkpoints": when_on("resume", "auto", "a run begins anew unless --resume is given"),
    "save_safetensors": held("adapters are safetensors files"),
    "include_tokens_per_second": held("tokens per second are logged"),
    "loss_watchdog_threshold": to("max_loss", "a step above it stops the run at once"),
    "loss_watchdog_patience": held("one step above max_loss stops the run"),
    "special_tokens": _tokens,
    "tokens": _tokens,
    "added_tokens_overrides": missing("would rename tokens of the tokenizer; save one that has them with the model"),
    "fsdp": _fsdp,
    "fsdp_config": _fsdp_config,
    "fsdp_version": held("weights are shared as in FSDP2"),
    "deepspeed": flag("--deepspeed {}", "its file may name modules to import; sharding: fsdp2 needs none"),
    "sequence_parallel_degree": missing("would part long rows among GPUs"),
    "context_parallel_size": missing("would part long rows among GPUs"),
    "hub_model_id": missing("would upload the model; --push-to-hub NAME does"),
    "push_dataset_to_hub": missing("would upload the prepared rows"),
    "hf_use_auth_token": held("HF_TOKEN of the environment is used"),
    "debug": held("--debug shows tracebacks"),
    "strict": held("unknown options are always refused"),
    "eval_table_size": missing("would send samples to W&B; the report has samples from before and after"),
    "eval_max_new_tokens": missing("would bound those samples"),
    "do_causal_lm_eval": missing("would score generations while training; theodora evaluate does afterwards"),
    **_trackers(),
}
