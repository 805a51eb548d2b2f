"""LLaMA-Factory's YAML and JSON (its documented fields of 2024 to 2026), and the dataset_info.json beside it → ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from theodora.errors import shown
from theodora.foreign import sources
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
    to,
    when_on,
    words,
)
from theodora.parse import parse_json

TOOL = "LLaMA-Factory"
MARKS = {
    *(
        "model_name_or_path",
        "stage",
        "finetuning_type",
        "lora_rank",
        "lora_target",
        "dataset",
        "template",
        "cutoff_len",
    ),
    *("dataset_dir", "preprocessing_num_workers", "overwrite_cache", "plot_loss", "quantization_bit", "neat_packing"),
    *("do_train", "max_samples", "val_size", "pref_loss", "pref_beta", "train_on_prompt", "adapter_name_or_path"),
}
"""Fields by which its files are known."""

_KERNELS = "fast kernels are used by themselves (kernels: auto)"
_CACHE = "rows are prepared at each start, and nothing is kept"
_LATER = "theodora evaluate and theodora chat generate from the finished adapter"
_INFO = "dataset_info.json"
# Where the file says nothing, and ours would do otherwise.
_DEFAULTS = {
    "method": "lora",
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.0,
    "max_length": 2048,
    "held_out": 0,
    "output": "saves",
}
_OF_ADAPTERS = (
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "use_rslora", "use_dora"),
    *("pissa_init", "pissa_iter", "pissa_convert", "create_new_adapter", "loraplus_lr_ratio", "loraplus_lr_embedding"),
)
_PREFERENCES = {"sigmoid": "dpo", "hinge": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}


def read_llama_factory(reading: Reading, given: Mapping[str, Any], beside: Path) -> None:
    """Read a whole file.

    Args:
        reading: where to.
        given: its fields.
        beside: the folder that it stands in, from which its data sets are looked for, too.
    """
    _stage(reading, given)
    _method(reading, given)
    _data(reading, given, beside)
    done = ("stage", "finetuning_type", "use_dora", "pref_loss", "dataset", "eval_dataset", "dataset_dir")
    done += ("packing", "neat_packing", "train_on_prompt")
    done += _OF_ADAPTERS if reading.options.get("method") == "full" else ()
    read_fields(reading, given, RULES, done)
    for name, value in _DEFAULTS.items():
        if name != "held_out" or "eval_data" not in reading.options:
            reading.default(name, value)
    if reading.options.get("objective") in ("dpo", "kto", "orpo", "simpo", "ipo"):
        reading.default("beta", 0.1)


def _stage(reading: Reading, given: Mapping[str, Any]) -> None:
    stage = given.get("stage", "sft")
    loss = given.get("pref_loss", "sigmoid")
    every = stage == "pt" or is_on(given.get("train_on_prompt"))
    if stage in ("sft", "pt"):
        if "stage" in given and stage == "sft":
            reading.note("held", "stage", stage, "training is supervised")
        for name in ("stage", "train_on_prompt"):
            if name in given and (name == "train_on_prompt" or stage == "pt"):
                reading.set("train_on", "all" if every else "completion", name, given[name])
    elif stage == "dpo" and loss in _PREFERENCES:
        reading.set("objective", _PREFERENCES[loss], "stage", stage)
        if loss == "hinge":
            reading.set("loss_type", ["hinge"], "pref_loss", loss)
    elif stage == "kto":
        reading.set("objective", "kto", "stage", stage)
    elif stage == "rm":
        there = "score reads the last state, in PEFT's files for sequence classification; there it is a value head"
        reading.set("objective", "reward", "stage", stage, there)
    elif stage == "dpo":
        reading.refuse(f"pref_loss is {shown(loss)}; expected one of {', '.join(_PREFERENCES)}")
    else:
        reading.refuse(f"stage is {shown(stage)}; expected one of sft, pt, dpo, kto, rm, which is what is learned here")
    if stage not in ("sft", "pt") and "train_on_prompt" in given:
        reading.note("held", "train_on_prompt", given["train_on_prompt"], "answers alone are compared")
    if "pref_loss" in given and loss != "hinge":
        reading.note("translated" if stage == "dpo" else "held", "pref_loss", loss, "the objective is of that loss")
    packs, neatly = is_on(given.get("packing", stage == "pt")), is_on(given.get("neat_packing"))
    for name in ("packing", "neat_packing"):
        if name in given or (name == "packing" and stage == "pt"):
            crosses = packs and not neatly and name == "packing"
            differs = "attention stays within each row here; there it crosses them" if crosses else ""
            reading.set("packing", packs or neatly, name, given.get(name), differs)


def _method(reading: Reading, given: Mapping[str, Any]) -> None:
    kind = given.get("finetuning_type", "lora")
    if kind == "full":
        reading.set("method", "full", "finetuning_type", kind)
        note_of_adapters(reading, given, _OF_ADAPTERS)
        return
    if kind != "lora":
        what = "would train some weights of the model" if kind == "freeze" else "is another kind of adapter"
        reading.refuse(f"finetuning_type is {shown(kind)}, which {what}; expected lora or full")
        return
    method = "dora" if is_on(given.get("use_dora")) else "lora"
    for name in ("finetuning_type", "use_dora"):
        if name in given:
            reading.set("method", method, name, given[name])


def _data(reading: Reading, given: Mapping[str, Any], beside: Path) -> None:
    folder = given.get("dataset_dir", "data")
    found = _dataset_info(str(folder), beside)
    if "dataset_dir" in given:
        told = f"{_INFO} there says what each data set is" if found else f"there is no {_INFO} to be found there"
        reading.note("held", "dataset_dir", folder, told)
    for origin, option in (("dataset", "data"), ("eval_dataset", "eval_data")):
        names = list(sources.listed(given[origin])) if given.get(origin) is not None else []
        places: list[str] = []
        for name in names:
            places.append(_place(reading, origin, str(name), str(folder), found))
        sources.take(reading, option, origin, places)
    if "data" not in reading.options and given.get("stage") in (None, "sft", "pt", "dpo", "kto", "rm"):
        reading.refuse("dataset is missing; expected the names of data sets")


def _dataset_info(folder: str, beside: Path) -> tuple[Path, Mapping[str, Any]] | None:
    """The file that says what data sets there are: from where one works, or from the recipe's folder or one above."""
    for start in (Path(), beside, *beside.resolve().parents):
        place = start / folder
        try:
            info = parse_json((place / _INFO).read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(info, dict):
            return place, info
    return None


def _place(reading: Reading, origin: str, name: str, folder: str, found: tuple[Path, Mapping[str, Any]] | None) -> str:
    entry = found[1].get(name) if found else None
    if not isinstance(entry, Mapping) or found is None:
        where = f"{found[0] / _INFO} has no entry for it" if found else f"no {_INFO} was found in {folder}"
        reading.missing(f"{origin}.{name}", name, f"would be the data set of that name, and {where}; write its file")
        return str(Path(folder) / f"{name}.json")
    _read_entry(reading, f"{origin}.{name}", entry)
    if isinstance(file := entry.get("file_name"), str):
        return str(found[0] / file)
    hub = next((entry[key] for key in ("hf_hub_url", "ms_hub_url", "om_hub_url") if entry.get(key)), None)
    if isinstance(hub, str):
        if "hf_hub_url" not in entry:
            reading.missing(f"{origin}.{name}", hub, "would come from another hub than Hugging Face's; download it")
        return sources.hub_name(hub, entry.get("subset"))
    reading.missing(f"{origin}.{name}", dict(entry), "would be built by a script or read from a bucket; write its file")
    return str(found[0] / name)


_COLUMNS = {
    "prompt": ("instruction", "prompt", "question", "text"),
    "query": ("input", "context"),
    "response": ("output", "response", "answer", "completion"),
    "history": ("history",),
    "messages": sources.TURNS,
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "kto_tag": ("kto_tag", "label"),
}
_TAGS = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool", "function_response"),
    "function_tag": ("function_call", "tool_call"),
    "system_tag": ("system",),
}


def _read_entry(reading: Reading, origin: str, entry: Mapping[str, Any]) -> None:
    """What dataset_info.json says of a data set, besides where it is."""
    for key, value in entry.items():
        field = f"{origin}.{key}"
        if key in ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "subset"):
            continue
        if key in ("columns", "tags"):
            names = value if isinstance(value, Mapping) else {}
            sources.name_columns(reading, field, names, _COLUMNS if key == "columns" else _TAGS)
        elif key in ("formatting", "ranking") or (key == "split" and value == "train"):
            reading.note("held", field, value, "rows are recognised by their columns")
        elif key == "num_samples" and not is_off(value):
            reading.missing(field, value, "would draw so many rows; cut the file")
        else:
            reading.missing(field, value, "would choose among the rows; write those that are meant into a file")


def _quantised(reading: Reading, origin: str, given: Any) -> None:
    kinds = {4: "nf4", 8: "int8"}
    bits = int(given) if str(given) in ("4", "8") else 0
    if bits in kinds:
        reading.set("quantize", kinds[bits], origin, given)
    else:
        missing("would quantise the base to so many bits; quantize takes nf4, int8, int4 and fp8")(
            reading, origin, given
        )


def _targets(reading: Reading, origin: str, given: Any) -> None:
    names = [str(name) for name in sources.listed(given)]
    reading.set("targets", "all-linear" if names == ["all"] else names, origin, given)


def _names(option: str) -> Rule:
    def rule(reading: Reading, origin: str, given: Any) -> None:
        reading.set(option, [str(name) for name in sources.listed(given)], origin, given)

    return rule


def _adapters(reading: Reading, origin: str, given: Any) -> None:
    names = [str(name) for name in sources.listed(given)]
    if len(names) == 1:
        reading.set("from_adapter", names[0], origin, given)
    else:
        reading.refuse(f"{origin} names {len(names)} adapters; expected one: `theodora merge` combines several")


def _reference(reading: Reading, origin: str, given: Any) -> None:
    if origin == "ref_model_adapters":
        reading.set("reference", given, origin, given)
    else:
        reading.missing(origin, given, "would compare with another model; reference takes base, or an adapter's folder")


def _recomputes(reading: Reading, origin: str, given: Any) -> None:
    reading.set("gradient_checkpointing", not is_on(given), origin, given)


_FREE = "would train it otherwise; no option here changes what is trained beside the adapter"
RULES: dict[str, Rule] = {
    "model_name_or_path": to("model"),
    "adapter_name_or_path": _adapters,
    "model_revision": to("revision"),
    "trust_remote_code": flag("--trust-remote-code", "a file cannot grant that others' code runs"),
    "cache_dir": missing("would keep downloads there; set HF_HOME in the environment"),
    "use_fast_tokenizer": held("the model's own files say it"),
    "low_cpu_mem_usage": held("weights are loaded piece by piece"),
    "resize_vocab": to("resize_embeddings"),
    "split_special_tokens": missing("would part special tokens in the rows' text"),
    "add_tokens": missing(
        "would add tokens; save a tokenizer that has them with the model, and resize_embeddings: true"
    ),
    "new_special_tokens": missing("would add tokens; save a tokenizer that has them, and resize_embeddings: true"),
    "add_special_tokens": missing("would add tokens; save a tokenizer that has them, and resize_embeddings: true"),
    "rope_scaling": missing("would stretch the model's positions; write it into the model's config.json"),
    "shift_attn": missing("would shift attention in groups (LongLoRA)"),
    "mixture_of_depths": missing("would make the model one of mixed depths"),
    "flash_attn": held("attention is chosen by itself"),
    "use_unsloth": held(_KERNELS),
    "use_unsloth_gc": missing("would keep activations in main memory"),
    "enable_liger_kernel": held(_KERNELS),
    "disable_gradient_checkpointing": _recomputes,
    "use_reentrant_gc": held("how activations are recomputed is chosen by itself"),
    "upcast_layernorm": held("norms are computed in float32 where the model's code does"),
    "upcast_lmhead_output": held("the loss is computed in float32"),
    "moe_aux_loss_coef": to("router_aux_loss_coef"),
    "hf_hub_token": missing("would log in to the hub; set HF_TOKEN in the environment"),
    "ms_hub_token": missing("would log in to ModelScope's hub; download from there"),
    "quantization_bit": _quantised,
    "quantization_method": words("", {"bnb": None, "bitsandbytes": None}, "would quantise with another library"),
    "quantization_type": words("", {"nf4": None}, "would quantise to another type of four bits"),
    "double_quantization": lambda reading, origin, given: (
        reading.note("held", origin, given, "nf4 is double-quantised")
        if is_on(given)
        else reading.missing(origin, given, "would keep the quantisation's scales in float32")
    ),
    "do_train": held("theodora train trains"),
    "do_eval": held("held-out rows are evaluated where there are some"),
    "do_predict": missing(f"would predict afterwards; {_LATER}"),
    "predict_with_generate": missing(f"would generate in evaluations; {_LATER}"),
    "compute_accuracy": held("the accuracy of tokens is logged"),
    "lora_rank": to("rank"),
    "lora_alpha": to("alpha"),
    "lora_dropout": to("dropout"),
    "lora_target": _targets,
    "additional_target": _names("modules_to_save"),
    "use_rslora": to("rslora"),
    "pissa_init": when_on("init", "pissa"),
    "pissa_iter": lambda reading, origin, given: (
        reading.note("held", origin, given, "the singular vectors are exact")
        if str(given) == "-1"
        else reading.missing(origin, given, "would approximate the singular vectors; here they are exact")
    ),
    "pissa_convert": missing("would save the adapter of the unchanged base; theodora export does"),
    "create_new_adapter": missing(
        "would begin a new adapter on the one that is merged; theodora merge, then train on that"
    ),
    "loraplus_lr_ratio": missing("would let B learn faster than A by that factor; here they learn at one rate"),
    "loraplus_lr_embedding": missing("would give embeddings a rate of their own"),
    "freeze_vision_tower": held("text alone is trained"),
    "freeze_multi_modal_projector": held("text alone is trained"),
    "freeze_trainable_layers": missing(_FREE),
    "freeze_trainable_modules": missing(_FREE),
    "use_galore": missing("would train all weights by projected gradients"),
    "use_apollo": missing("would train all weights by projected gradients"),
    "use_badam": missing("would train the weights block by block"),
    "use_adam_mini": missing("would train with Adam-mini"),
    "use_muon": missing("would train with Muon"),
    "use_llama_pro": missing(_FREE),
    "pure_bf16": when_on("bf16", True, differs="adapters stay in adapter_dtype, weights that are trained in float32"),
    "bf16": bf16,
    "pref_beta": to("beta"),
    "pref_ftx": missing(
        "would add that much of the loss of the better answer (loss_type: [sigmoid, sft], loss_weights)"
    ),
    "dpo_label_smoothing": to("label_smoothing"),
    "simpo_gamma": to("simpo_gamma"),
    "kto_chosen_weight": to("desirable_weight"),
    "kto_rejected_weight": to("undesirable_weight"),
    "ref_model": _reference,
    "ref_model_adapters": _reference,
    "reward_model": missing("would give rewards"),
    "template": missing(
        "would word conversations in that template; here the tokenizer's own does, if it has one, and "
        "chat_template_path: FILE takes another"
    ),
    "tool_format": missing("would word tools in that form; here the tokenizer's chat template does"),
    "default_system": missing("would be the system's turn of rows without one; write a column system"),
    "enable_thinking": missing("would add an empty thought to answers without one; here the chat template decides"),
    "media_dir": missing("would be where pictures are; text alone is read"),
    "cutoff_len": to("max_length"),
    "mask_history": missing("would learn the last answer alone; here all answers of a conversation are"),
    "streaming": held("rows are kept as files, not in memory"),
    "buffer_size": held("all rows are shuffled"),
    "mix_strategy": words("", {"concat": None}, "would draw from the data sets in turn"),
    "interleave_probs": missing("would draw from the data sets with these probabilities"),
    "overwrite_cache": held(_CACHE),
    "tokenized_path": held(_CACHE),
    "data_shared_file_system": held(_CACHE),
    "preprocessing_batch_size": held("rows are prepared piece by piece"),
    "preprocessing_num_workers": held("rows are prepared in one process"),
    "max_samples": missing("would read that many rows of each data set; cut the file"),
    "ignore_pad_token_for_loss": held("padding is not learned"),
    "val_size": to("held_out"),
    "eval_on_each_dataset": missing("would evaluate each data set by itself"),
    "disable_shuffling": missing("would keep the rows in their order (train_sampling_strategy: sequential)"),
    "output_dir": to("output"),
    "overwrite_output_dir": held("a run begins in an empty folder; --overwrite deletes the one that is there"),
    "plot_loss": held("loss.png is always drawn"),
    "report_to": sources.report_to,
    "early_stopping_steps": to("early_stopping_patience"),
    "include_effective_tokens_per_second": held("tokens per second are logged"),
    "include_num_input_tokens_seen": held("tokens are counted"),
    "deepspeed": flag("--deepspeed {}", "its file may name modules to import; sharding: fsdp2 needs none"),
    "ray_run_name": held("theodora train --launcher ray names nothing"),
    "ray_num_workers": flag("--launcher ray --num-workers {}", "how a run is started is said by flags"),
    "use_mca": missing("would train with Megatron"),
}
