"""A script or notebook of Unsloth's → our options, from the literal arguments of its calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from theodora.errors import in_line, shown
from theodora.foreign import sources
from theodora.foreign.calls import Call, Computed
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

TOOL = "Unsloth"
_LOADERS = ("FastLanguageModel", "FastModel", "FastVisionModel", "FastTextModel")
_OBJECTIVES = {
    "SFTConfig": "sft",
    "TrainingArguments": "sft",
    "UnslothTrainingArguments": "sft",
    "DPOConfig": "dpo",
    "KTOConfig": "kto",
    "ORPOConfig": "orpo",
    "CPOConfig": "simpo",
}
_TRAINERS = ("SFTTrainer", "UnslothTrainer", "DPOTrainer", "KTOTrainer", "ORPOTrainer", "CPOTrainer")
_ELSEWHERE = ("GRPOConfig", "GRPOTrainer", "RewardConfig", "RewardTrainer", "PPOTrainer")
_LOADED = "the model's own files say it"
_KERNELS = "fast kernels are used by themselves (kernels: auto)"
_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What its classes take where the script says nothing, and ours would do otherwise (unsloth of 2026).
_OF_ADAPTER = {"rank": 16, "alpha": 16.0, "targets": _LINEAR}
_OF_TRAINING = {
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-5,
    "weight_decay": 0.01,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
}


def is_unsloth(calls: Sequence[Call]) -> bool:
    """Whether a script loads a model as Unsloth's do."""
    return any(call.name == "from_pretrained" and call.owner.rpartition(".")[2] in _LOADERS for call in calls)


def read_unsloth(reading: Reading, calls: Sequence[Call]) -> dict[str, Any]:
    """Read all calls that say how a model is trained.

    Returns:
        Every argument that was there, by `call.argument`.
    """
    loads = [c for c in calls if c.name == "from_pretrained" and c.owner.rpartition(".")[2] in _LOADERS]
    adapts = [c for c in calls if c.name == "get_peft_model" and c.owner.rpartition(".")[2] in _LOADERS]
    sets_up = [c for c in calls if c.name in _OBJECTIVES]
    trains = [c for c in calls if c.name in _TRAINERS]
    for name, found in (("from_pretrained", loads), ("get_peft_model", adapts), ("its configuration", sets_up)):
        if len(found) > 1:
            lines = in_line([str(call.line) for call in found], 9)
            reading.refuse(f"there are {len(found)} calls of {name}, in lines {lines}; expected one: which is meant?")
    others = [call.name for call in calls if call.name in _ELSEWHERE]
    if others:
        reading.refuse(f"it calls {others[0]}, whose rewards are Python; write objective: grpo and reward by hand")
    full = bool(loads) and is_on(loads[0].arguments.get("full_finetuning"))
    if not adapts and not full:
        reading.refuse(
            "it calls no get_peft_model, and full_finetuning is not on; expected one of them: is it an adapter that is "
            "trained, or are it all weights?"
        )
    reading.check()
    objective = next((_OBJECTIVES[call.name] for call in sets_up), "sft")
    if objective != "sft":
        reading.set("objective", objective, sets_up[0].name, sets_up[0].name)
    every: dict[str, Any] = {}
    _read(reading, loads[0], _MODEL | (_IN_FULL if full else {}), ("model_name", "max_seq_length"), every)
    reading.default("max_length", 2048)
    if not full and not {"load_in_8bit", "load_in_16bit", "load_in_4bit"} & loads[0].arguments.keys():
        reading.default("quantize", "nf4")
    if full:  # then get_peft_model does nothing there
        for call in adapts:
            note_of_adapters(reading, call.arguments, call.arguments, "get_peft_model.")
            every |= {f"get_peft_model.{name}": value for name, value in call.arguments.items()}
    else:
        reading.set("method", "dora" if is_on(adapts[0].arguments.get("use_dora")) else "lora", "get_peft_model", "")
        _read(reading, adapts[0], _ADAPTER, ("model",), every)
        for name, value in _OF_ADAPTER.items():
            reading.default(name, value)
    _read_data(reading, calls)
    for call in sets_up + trains:
        _read(reading, call, _TRAINING, ("model",) if call in trains else (), every)
    for name, value in _OF_TRAINING.items():
        reading.default(name, value)
    if objective == "sft":
        _learned(reading, calls)
    if "eval_data" not in reading.options:
        reading.default("held_out", 0)
    reading.default("output", "outputs")
    return every


def _read(
    reading: Reading, call: Call, rules: Mapping[str, Rule], positional: Sequence[str], every: dict[str, Any]
) -> None:
    """The arguments of one call; those without a name have the given ones, in their order."""
    arguments = dict(zip(positional, call.positional, strict=False)) | call.arguments
    extra = call.positional[len(positional) :]
    arguments |= {f"argument {number}": value for number, value in enumerate(extra, len(positional) + 1)}
    every |= {f"{call.name}.{name}": value for name, value in arguments.items()}
    for name, value in arguments.items():
        if name in _OBJECTS:
            continue
        if isinstance(value, Computed):
            _computed(reading, name, value)
        else:
            read_fields(reading, {name: value}, rules)


# Arguments that hold objects of the script, which are read where they are made, or are ours to make.
_OBJECTS = (
    "model",
    "tokenizer",
    "processing_class",
    "args",
    "train_dataset",
    "eval_dataset",
    "data_collator",
    "ref_model",
)


def _computed(reading: Reading, name: str, value: Computed) -> None:
    if name in ("bf16", "fp16") and "bf" in value.source.lower():
        reading.note("held", name, value, "bfloat16 is used where the hardware computes in it")
    elif name == "dtype":
        reading.note("held", name, value, "bf16 says it; by default it is used where the hardware computes in it")
    else:
        reading.missing(name, value, "is known only when the script runs; write the option by hand")


def _read_data(reading: Reading, calls: Sequence[Call]) -> None:
    """The data sets that are loaded, and what a script does to their rows."""
    loads = [call for call in calls if call.name == "load_dataset" and not call.owner]
    if not loads:
        reading.set("data", "train.jsonl", "load_dataset", None)
        reading.missing("load_dataset", None, "no rows are loaded by load_dataset; write them into a file, and name it")
    places: list[str] = []
    for call in loads:
        where = f"load_dataset (line {call.line})"
        arguments = dict(zip(("path", "name"), call.positional, strict=False)) | call.arguments
        path, files = arguments.pop("path", None), arguments.pop("data_files", None)
        config, split = arguments.pop("name", None), arguments.pop("split", None)
        named = list(files.values()) if isinstance(files, Mapping) else list(sources.listed(files)) if files else []
        found = [place for place in named or [path] if isinstance(place, str)]
        places += found if named else [sources.hub_name(place, config) for place in found]
        if not found:
            reading.missing(where, path if not named else files, "which rows these are is known only when it runs")
        if split is not None and split != "train":
            reading.missing(f"{where}.split", split, f"would read {shown(split)}; write these rows into a file")
        for name, value in arguments.items():
            reading.missing(f"{where}.{name}", value, "would say how rows are read; write them into a file")
    if loads and not places:
        places = ["train.jsonl"]
    if loads:
        sources.take(reading, "data", "load_dataset", places)
    for name, text in _STEPS.items():
        for call in calls:
            if call.name == name:
                kind, what = text
                shape = call.arguments.get("chat_template") or (call.positional[1:] or ("",))[0]
                (reading.missing if kind == "missing" else _held(reading))(name, shape, what)
    maps = [call for call in calls if call.name in ("map", "filter") and call.owner]
    if maps:
        lines = in_line([str(call.line) for call in maps], 9)
        reading.missing(
            "map", f"line {lines}", "Python of the script would change the rows; write them as they are meant"
        )
    if any("eval_dataset" in call.arguments for call in calls if call.name in _TRAINERS):
        reading.missing("eval_dataset", "", "would evaluate these rows; write eval_data: FILE, or held_out: 0.05")


def _held(reading: Reading) -> Callable[[str, Any, str], None]:
    return lambda origin, given, text: reading.note("held", origin, given, text)


_STEPS = {
    "get_chat_template": (
        "missing",
        "would word conversations in that template; here the tokenizer's own does, if it has one, and "
        "chat_template_path: FILE takes another",
    ),
    "standardize_sharegpt": ("held", "ShareGPT is recognised"),
    "standardize_data_formats": ("held", "ShareGPT is recognised"),
    "save_pretrained": ("held", "the adapter is saved in output"),
    "save_pretrained_merged": ("held", "theodora merge writes the merged model"),
    "save_pretrained_gguf": ("held", "theodora export --to gguf writes it"),
    "push_to_hub": ("missing", "would upload the model; --push-to-hub NAME does"),
    "push_to_hub_merged": ("missing", "would upload the model; --push-to-hub NAME does"),
    "to_sharegpt": ("missing", "would make conversations of columns; here columns are recognised by name"),
}


def _learned(reading: Reading, calls: Sequence[Call]) -> None:
    """Every token is learned, unless the script masks what users say."""
    asked = next((call for call in calls if call.name == "train_on_responses_only"), None)
    if asked is not None:
        reading.set("train_on", "completion", "train_on_responses_only", "")
        for name, value in asked.arguments.items():
            reading.note("held", f"train_on_responses_only.{name}", value, "where answers begin is found by itself")
    elif "train_on" not in reading.options:
        reading.default("train_on", "all")


def _targets(reading: Reading, origin: str, given: Any) -> None:
    names = [str(name) for name in sources.listed(given)]
    reading.set("targets", "all-linear" if names == ["all-linear"] else names, origin, given)


def _checkpointing(reading: Reading, origin: str, given: Any) -> None:
    differs = "it would also keep activations in main memory; here they are recomputed" if given == "unsloth" else ""
    reading.set("gradient_checkpointing", not is_off(given), origin, given, differs)


_MODEL: dict[str, Rule] = {
    "model_name": to("model"),
    "max_seq_length": to("max_length"),
    "load_in_4bit": when_on("quantize", "nf4", "the base stays as it is stored"),
    "load_in_8bit": when_on("quantize", "int8", "the base stays as it is stored"),
    "load_in_16bit": held("the base stays as it is stored"),
    "full_finetuning": when_on("method", "full", "an adapter is trained"),
    "dtype": held("bf16 says it; by default it is used where the hardware computes in it"),
    "token": missing("would log in to the hub; set HF_TOKEN in the environment"),
    "device_map": held("each process has one device"),
    "trust_remote_code": flag("--trust-remote-code", "a file cannot grant that others' code runs"),
    "use_gradient_checkpointing": _checkpointing,
    "fix_tokenizer": held(_LOADED),
    "rope_scaling": missing("would stretch the model's positions; write it into the model's config.json"),
    "resize_model_vocab": missing(
        "would give the embedding more rows; resize_embeddings: true fits it to the tokenizer"
    ),
    "random_state": held("the seed is the run's"),
    "revision": to("revision"),
    "attn_implementation": held("attention is chosen by itself"),
    "fast_inference": missing("would generate through vLLM"),
    "gpu_memory_utilization": missing("would leave memory to vLLM"),
    "float8_kv_cache": missing("would generate through vLLM"),
    "max_lora_rank": held("the rank is the adapter's"),
    "use_exact_model_name": missing("would load the named model; its bitsandbytes copy may be another"),
    "unsloth_force_compile": held(_KERNELS),
}
_IN_FULL: dict[str, Rule] = dict.fromkeys(
    ("load_in_4bit", "load_in_8bit"), held("full_finetuning switches it off there, too")
)
_ADAPTER: dict[str, Rule] = {
    "r": to("rank"),
    "lora_alpha": to("alpha"),
    "lora_dropout": to("dropout"),
    "target_modules": _targets,
    "bias": words("", {"none": None}, "would train biases; here they stay frozen"),
    "use_gradient_checkpointing": _checkpointing,
    "random_state": held("the seed is the run's"),
    "use_rslora": to("rslora"),
    "use_dora": lambda reading, origin, given: reading.set("method", "dora" if is_on(given) else "lora", origin, given),
    "loftq_config": missing("would start A and B from the base's quantisation error (LoftQ)"),
    "init_lora_weights": words(
        "init",
        {"true": None, "gaussian": "gaussian", "pissa": "pissa", "olora": "olora", "orthogonal": "orthogonal"},
        "would start A and B in that way",
    ),
    "modules_to_save": to("modules_to_save"),
    "layers_to_transform": missing("would adapt these layers alone; write targets as an expression that names them"),
    "layers_pattern": missing("would name the layers to adapt; write targets as an expression"),
    "max_seq_length": to("max_length"),
    "use_reentrant": held("how activations are recomputed is chosen by itself"),
    "finetune_language_layers": held("targets says which layers are adapted"),
    "finetune_attention_modules": held("targets says which layers are adapted"),
    "finetune_mlp_modules": held("targets says which layers are adapted"),
    "finetune_vision_layers": missing("would adapt the part that sees; text alone is trained"),
    "temporary_location": held("nothing is written on the way"),
}
_TRAINING: dict[str, Rule] = {
    "output_dir": to("output"),
    "max_seq_length": to("max_length"),
    "max_length": to("max_length"),
    "bf16": bf16,
    "report_to": sources.report_to,
    "embedding_learning_rate": missing("would give embeddings a rate of their own"),
    "dataset_text_field": words("", {"text": None}, "would read the rows from that column; call it text"),
    "dataset_num_proc": held("rows are prepared in one process"),
    "dataset_kwargs": held("rows are tokenised before TRL sees them"),
    "formatting_func": missing("Python of the script would word the rows; write them as they are meant"),
    "remove_unused_columns": held("columns are chosen by itself"),
    "max_prompt_length": missing("would cut prompts; max_length is of prompt and answer together"),
    "max_completion_length": missing("would cut answers; max_length is of prompt and answer together"),
    "callbacks": missing("Python of the script would run while training"),
    "compute_metrics": missing("Python of the script would score"),
    "gradient_checkpointing": _checkpointing,
    "gradient_checkpointing_kwargs": held("how activations are recomputed is chosen by itself"),
    "loss_type": lambda reading, origin, given: (
        reading.note("held", origin, given, "the objective is of that loss")
        if given == "simpo"
        else reading.set("loss_type", given, origin, given)
    ),
    "assistant_only_loss": lambda reading, origin, given: reading.set(
        "train_on", "completion" if is_on(given) else "all", origin, given
    ),
    "completion_only_loss": lambda reading, origin, given: reading.set(
        "train_on", "completion" if is_on(given) else "all", origin, given
    ),
    "push_to_hub": missing("would upload the model; --push-to-hub NAME does"),
}
