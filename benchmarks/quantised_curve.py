"""Do adapters on a base in four bits learn as PEFT's QLoRA does? Loss curves of all, seed by seed.

    python benchmarks/quantised_curve.py --model path/to/SmolLM2-135M-Instruct --data findings.jsonl
    python benchmarks/quantised_curve.py --draw benchmarks/results/quantised_curve.json        # the picture again

For each seed three runs on a base that bitsandbytes has quantised to NF4, double quantisation and all: LoRA by PEFT,
in TRL's SFTTrainer; LoRA and DoRA by `theodora train`. They share the rows, their tokens and order, the start of A,
rank, alpha, rate, schedule, optimizer and clipping: PEFT's trainer is given the rows that `theodora train` would train
on, and its arguments. That the rows came in the same order is checked, by a hash of every batch. A and B are float32
everywhere, as PEFT has them by default (TRL would round them to bfloat16, losing small steps). curves.py says what
"within the seed-to-seed spread" is. Nothing is downloaded. (`theodora demo` leaves model and rows behind.)

`--ways` leaves out some, or adds `peft-dora`. On a CPU a run of SmolLM2-135M takes half an hour.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import curves

REFERENCE = "peft-lora"
NAMES = {
    REFERENCE: "PEFT QLoRA",
    "lora": "Theodora LoRA",
    "dora": "Theodora DoRA",
    "peft-dora": "PEFT QDoRA",
}
COLOURS = {"lora": "#8a5a00", "dora": "#1f7a5c", "peft-dora": "#3b6fb6"}
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "quantised_curve.png"


def main() -> None:
    args = parse_args()
    report = curves.report_of(args, REFERENCE, args.ways, run)
    check_order(report["runs"])
    curves.print_table(report, REFERENCE, NAMES)
    print(f"\n{statement(report)}.")
    curves.draw(report, args.figure, REFERENCE, NAMES, COLOURS, statement(report), "adapters on NF4")


def parse_args() -> argparse.Namespace:
    parser = curves.parser_of(__doc__ or "", "quantised_curve", FIGURE)
    others = [way for way in NAMES if way != REFERENCE]
    parser.add_argument("--ways", nargs="+", choices=others, default=others[:2], help="beside PEFT's LoRA")
    return curves.parsed(parser)


def run(cell: curves.Cell) -> curves.Run:
    """One run, in a process of the pool."""
    from theodora import AdapterConfig, TrainConfig

    args, _, way, _ = cell
    adapter = AdapterConfig(method="dora" if way.endswith("dora") else "lora", rank=args.rank, alpha=2 * args.rank)
    config = TrainConfig(**curves.train_options(cell), adapter=adapter, quantize="nf4")
    with batches_noted() as order:
        found = peft_trained(config) if way.startswith("peft") else curves.trained(config)
    return found | {"order": order.hexdigest()}


def peft_trained(config: Any) -> curves.Run:
    """The run with PEFT's adapter, by TRL's trainer as it is."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed
    from transformers.trainer_callback import PrinterCallback
    from trl.trainer.sft_trainer import SFTTrainer

    from theodora.adapters.models import load_model
    from theodora.train.arguments import finish_arguments, sft_arguments
    from theodora.train.prepare import prepare
    from theodora.train.quiet import quiet_libraries

    unfinished = sft_arguments(config, Path(config.output) / "checkpoints")
    unfinished.save_strategy = "no"
    with quiet_libraries():
        prepared = prepare(config, unfinished)  # rows, tokenizer, precision; and a model that carries our adapter
        base: Any = load_model(
            config.model,
            dtype=prepared.precision.dtype,
            quantize=config.quantize,
            compute=torch.bfloat16,
            device=unfinished.device,
            adapted=True,
        )
        arguments = finish_arguments(
            unfinished,
            prepared.config,
            model=base,
            tokenizer=prepared.tokenizer,
            precision=prepared.precision,
            balances_experts=prepared.balances_experts,
            evaluates=True,
            evaluates_first=True,
        )
        set_seed(config.seed)
        adapter = config.adapter
        peft: Any = LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            target_modules="all-linear",
            use_dora=adapter.method == "dora",
            task_type="CAUSAL_LM",
        )
        model: Any = get_peft_model(base, peft)
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=prepared.train_rows,
            eval_dataset=prepared.held_out_rows,
            processing_class=prepared.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        start_alike(model, prepared.model)
        del prepared.model
        if arguments.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        trainer.train()
    peak = torch.cuda.max_memory_allocated() if arguments.device.type == "cuda" else 0
    return curves.losses_in(trainer.state.log_history) | {"seconds": time.monotonic() - started, "peak_memory": peak}


def start_alike(peft: Any, ours: Any) -> None:
    """Give PEFT's model the A of ours, as the seed drew it. B is zero in both."""
    from theodora.adapters.state import trained_tensors

    drawn = {name: tensor for name, tensor in trained_tensors(ours).items() if name.endswith("lora_A")}
    assert drawn
    for name, tensor in drawn.items():
        path = name.rpartition(".")[0]
        peft.get_submodule(f"base_model.model.{path}").lora_A["default"].weight.data.copy_(tensor.data)


@contextmanager
def batches_noted() -> Iterator[Any]:
    """A hash of the rows of every training batch, in their order, while the block runs."""
    from torch.utils import data

    loaders: Any = data.DataLoader
    digest, before = hashlib.sha256(), loaders.__init__

    def noting(loader: Any, *args: Any, **kwargs: Any) -> None:
        before(loader, *args, **kwargs)
        collate = loader.collate_fn
        # Of the loaders that transformers makes, that of training alone has this. Accelerate makes them anew.
        if kwargs.get("worker_init_fn") is None or isinstance(collate, Noted):
            return
        loader.collate_fn = Noted(digest, collate)

    loaders.__init__ = noting
    try:
        yield digest
    finally:
        loaders.__init__ = before


class Noted:
    """A collator that notes what it is given."""

    def __init__(self, digest: Any, collate: Any) -> None:
        self.digest, self.collate = digest, collate

    def __call__(self, rows: Sequence[Any]) -> Any:
        self.digest.update(repr([list(row["input_ids"]) for row in rows]).encode())
        return self.collate(rows)


def check_order(runs: Sequence[curves.Run]) -> None:
    """Runs of a seed compare nothing but the adapter if they saw the same rows in the same order."""
    for seed in {run["seed"] for run in runs}:
        orders = {run["order"] for run in runs if run["seed"] == seed}
        if len(orders) > 1:
            raise SystemExit(f"the runs of seed {seed} saw their rows in {len(orders)} different orders")


def statement(report: dict[str, Any]) -> str:
    judged = report["judgement"]
    found = {way: all(loss["within_the_spread"] for loss in losses.values()) for way, losses in judged.items()}
    within = " and ".join(NAMES[way] for way in judged if found[way])
    beyond = " and ".join(NAMES[way] for way in judged if not found[way])
    parts = [f"{within} within" if within else "", f"{beyond} beyond" if beyond else ""]
    return f"On NF4: {', '.join(filter(None, parts))} the seed-to-seed spread of {NAMES[REFERENCE]}"


if __name__ == "__main__":
    main()
