"""One step of DPO on a GPU: the frozen model with the same passes, PEFT's LoRA with TRL's loss, and ours.

    python benchmarks/preference_step.py                # Llama-3-8B's shape, 8 layers, 4 pairs of 1,024 tokens
    python benchmarks/preference_step.py --layers 1 --hidden 64 --length 64 --pairs 2 --vocabulary 256     # on a CPU

A step is one pass of the policy over all eight sequences (better and worse in one batch), one of the reference without
gradients, and the backward pass. The second half of each sequence is the answer. Weights are random. Variants take
turns in processes of their own (see `train_step.py`, whose columns these are; `% of peak` does not count the
reference).

The floor is the model without an adapter, decoder blocks under torch.compile, with our cross entropy at the positions
of the answers, and gradients that flow to the embeddings' output; it runs both passes, too. Ours takes the reference
from the policy's own layers with the adapter switched off, as `theodora train --objective dpo` does, and the whole step
is one CUDA graph. PEFT's is TRL's DPOTrainer with `peft_config`: its loss, its fused head, the adapter disabled for the
reference; with Liger's kernels where it says so. `dora-beforehand` has the reference's log-likelihoods already
(precompute_ref_log_probs), and `floor-beforehand` does without that pass.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from train_step import base_workload, say, without_gpu, write_report

from theodora.bench import Job, Runner, Variant, Workload, describe_machine, make_rows, plain_rows, step_table, timings

RESULTS = Path("benchmarks/results/preference_step.json")
BETA = 0.1


# What runs in a process -----------------------------------------------------------------------------------------------


def build(workload: Workload, variant: Variant, beforehand: bool = False) -> tuple[Any, Any]:
    """In the place of `theodora.bench.build.build`: the frozen model, and what makes a step of it."""
    from theodora.bench.models import load_base

    model = load_base(workload)
    if variant.library == "peft":
        return model, partial(trls_step, model, workload, variant)
    return model, partial(our_step, model, workload, variant, beforehand)


def build_beforehand(workload: Workload, variant: Variant) -> tuple[Any, Any]:
    return build(workload, variant, beforehand=True)


def labels_of(ids_BT: Any) -> Any:
    labels_BT = ids_BT.clone()
    labels_BT[:, : ids_BT.shape[1] // 2] = -100
    return labels_BT


def our_step(model: Any, workload: Workload, variant: Variant, beforehand: bool) -> Any:
    """Of the frozen model, or with our adapter on it."""
    import torch

    from theodora.bench import build as usual
    from theodora.train.fused_loss import Head, Learned, select_learned
    from theodora.train.preference_loss import Answers, Settings, pair_losses
    from theodora.train.reference import Reference

    step = usual.prepare(model, workload, variant)
    ids_BT = usual.random_batch(workload, model.config.get_text_config().vocab_size)
    targets_N, positions_N = select_learned(labels_of(ids_BT))
    learned = Learned(
        targets=targets_N,
        positions=positions_N,
        tokens=ids_BT.numel(),
        maskless=True,
        packed=False,
        bounds=None,
        longest=0,
        real=None,
        sequences=len(ids_BT),
    )
    head, settings = Head(maskless=True), Settings(objective="dpo", beta=BETA)
    reference = Reference(model, None) if variant.library == "theodora" else None

    def losses() -> Any:
        return head.loss(model, learned, input_ids=ids_BT)

    def frozen() -> Any:
        if reference is None:
            with torch.no_grad():
                return -losses().nats
        with reference.running():
            return -losses().nats

    known = frozen() if beforehand else None

    def loss() -> Any:
        own = losses()
        logps, of_reference = -own.nats, frozen() if known is None else known
        better, worse = (Answers(logps[n::2], own.count[n::2], of_reference[n::2]) for n in (0, 1))
        return pair_losses(better, worse, settings).mean()

    return replace(step, loss=loss)


def trls_step(model: Any, workload: Workload, variant: Variant) -> Any:
    """TRL's trainer with PEFT's adapter."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    from theodora.bench import build as usual
    from theodora.bench.build import Step, use_liger_kernels

    if variant.liger == "all":
        use_liger_kernels(model)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "<end>": 3}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<end>", eos_token="<end>")
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    cuda = workload.device == "cuda"
    arguments = DPOConfig(
        tempfile.mkdtemp(),
        beta=BETA,
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=False,
        report_to=[],
        max_length=None,
    )
    config = LoraConfig(
        r=workload.rank,
        lora_alpha=2 * workload.rank,
        target_modules="all-linear",
        use_dora=variant.method == "dora",
        task_type="CAUSAL_LM",
    )
    trainer = DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config)
    if variant.bf16_adapter:
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.to(model.dtype)
    wrapped = trainer.accelerator.prepare_model(trainer.model).train()
    ids_BT = usual.random_batch(workload, model.config.get_text_config().vocab_size)
    order = [*range(0, len(ids_BT), 2), *range(1, len(ids_BT), 2)]  # TRL has all better ones first
    mask_BT = torch.ones_like(ids_BT)
    batch = {"input_ids": ids_BT[order], "attention_mask": mask_BT}
    batch["completion_mask"] = (labels_of(ids_BT) != -100).long()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    return Step(lambda: trainer.compute_loss(wrapped, dict(batch)), trained)


# What is measured -----------------------------------------------------------------------------------------------------

OURS = partial(Variant, library="theodora", accelerate=True, graph=True, build=build)
TRLS = partial(Variant, library="peft", build=build)
FLOOR = Variant(label="floor: no adapter, compiled blocks, both passes", compiled=True, build=build)
VARIANTS = {
    "floor": FLOOR,
    "floor-eager": replace(FLOOR, label="floor, eager, Liger kernels", compiled=False, liger="all"),
    "trl-lora": TRLS(label="TRL + PEFT LoRA", method="lora"),
    "trl-lora-liger": TRLS(
        label="TRL + Liger + PEFT LoRA, bf16 adapters", method="lora", liger="all", bf16_adapter=True
    ),
    "trl-dora": TRLS(label="TRL + PEFT DoRA", method="dora"),
    "lora": OURS(label="Theodora LoRA", method="lora"),
    "dora": OURS(label="Theodora DoRA", method="dora"),
    "floor-beforehand": replace(FLOOR, label="floor, one pass", build=build_beforehand),
    "dora-beforehand": OURS(label="Theodora DoRA, reference beforehand", method="dora", build=build_beforehand),
}


def main() -> None:
    args = parse_args()
    workload = base_workload(args)
    jobs: list[Job] = []
    for name in args.variants or VARIANTS:
        variant = VARIANTS[name]
        if workload.device == "cpu":
            if name == "trl-lora-liger":
                continue
            variant = without_gpu(variant)
        jobs.append(Job(name=name, variant=variant, workload=workload))
    floor = jobs[0].name
    cuda = workload.device == "cuda"
    measured = Runner(
        jobs, floor=floor, rounds=args.rounds, warm_up=1 if cuda else 0, steps=args.steps, progress=say
    ).run()
    for name, m in measured.items():
        if m.failure and m.failure.traceback and not m.failure.out_of_memory:
            say(f"{name}:\n{m.failure.traceback[-2500:]}")
    rows = make_rows(measured, against=[floor])
    model: Any = workload.model
    heading = (
        f"One step of DPO, {model['model_type']} of hidden size {model['hidden_size']}, {model['num_hidden_layers']} "
        f"layers, {args.pairs} pairs of {args.length} tokens, rank {workload.rank}, {workload.dtype}"
    )
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=140)).print(step_table(rows, title=heading, floor=floor))
    report = {
        "title": heading,
        "floor": floor,
        "machine": describe_machine() | ({"commit": args.commit} if args.commit else {}),
        "rows": plain_rows(rows),
        "seconds": timings(measured),
    }
    write_report(args.output, report)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--layers", type=int, help="default: 8")
    parser.add_argument("--hidden", type=int, help="another shape: 2048, 5120, 8192, or any small number for a test")
    parser.add_argument("--vocabulary", type=int, help="default: the family's")
    parser.add_argument("--pairs", type=int, default=4, help="default: 4")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each sequence; default: 1024")
    parser.add_argument("--rank", type=int, default=16, help="default: 16")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute each block (not TRL's rows)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant; default: 5")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a turn; default: 2")
    parser.add_argument("--commit", help="to be noted where the code is not in a checkout")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file; default: {RESULTS}")
    args = parser.parse_args()
    args.batch = 2 * args.pairs
    return args


if __name__ == "__main__":
    main()
