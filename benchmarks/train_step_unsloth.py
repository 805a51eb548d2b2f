"""Unsloth's rows of train_step.py: it loads its models itself, so it gets a folder of the same shape."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.machinery import PathFinder
from typing import Any

from random_folder import save_random_model

from theodora.bench import Variant, Workload


def unsloth_variant(variant: Variant, workload: Workload, args: argparse.Namespace) -> Variant:
    folder = args.scratch / f"model-{abs(hash(repr(workload.model)))}"
    places = [args.unsloth_path] if args.unsloth_path else None
    if not folder.exists() and PathFinder.find_spec("unsloth", places):
        save_random_model(workload, folder)
    environment = {
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(args.scratch / "unsloth"),
        "HF_HUB_OFFLINE": "1",
    }
    path = (args.unsloth_path,) if args.unsloth_path else ()
    build = partial(build_unsloth, folder=str(folder))
    return replace(variant, build=build, python_path=path, environment=environment)


def build_unsloth(workload: Workload, variant: Variant, folder: str) -> tuple[Any, Callable[[], Any]]:
    """As `theodora.bench.build.build`; bf16 autocast, under which Unsloth's trainers run."""
    import torch

    from theodora.errors import ConfigError

    if workload.quantize not in (None, "nf4", "int8"):
        raise ConfigError(f"Unsloth quantises to nf4 and int8, and this table is of {workload.quantize}")
    from unsloth import FastLanguageModel  # pyright: ignore

    from theodora.bench.build import Step, random_batch

    model, _ = FastLanguageModel.from_pretrained(
        folder,
        load_in_4bit=workload.quantize == "nf4",
        load_in_8bit=workload.quantize == "int8",
        dtype=torch.bfloat16,
        max_seq_length=workload.length,
        use_exact_model_name=True,
    )

    def prepare() -> Step:
        checkpointing = "unsloth" if workload.gradient_checkpointing else False
        all_linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        adapted = FastLanguageModel.get_peft_model(
            model,
            r=workload.rank,
            lora_alpha=2 * workload.rank,
            lora_dropout=0,
            bias="none",
            target_modules=all_linear if workload.targets == "all-linear" else list(workload.targets),
            use_gradient_checkpointing=checkpointing,
            use_dora=variant.method == "dora",
        )
        adapted.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
        FastLanguageModel.for_training(adapted, use_gradient_checkpointing=checkpointing)
        ids_BT = random_batch(workload, adapted.config.vocab_size)

        def loss() -> Any:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return adapted(input_ids=ids_BT, labels=ids_BT).loss

        return Step(loss, [p for p in adapted.parameters() if p.requires_grad])

    return model, prepare
