"""One added line in a TRL script: the same losses, in less time and memory.

    python recipes/accelerate_trl.py --model path/to/model --data data.jsonl

runs TRL's SFT with PEFT's DoRA twice, as it stands and with `theodora.accelerate_peft(trainer.model)`, and prints the
losses side by side, then a table of times and (on a GPU) memory. `--model` is a folder or hub name that transformers
loads; `--data` has {"prompt": ..., "completion": ...} or {"messages": [...]} per line (default: some sums to learn).
"""

import argparse
import gc
import statistics
import tempfile
import time

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

import theodora

parser = argparse.ArgumentParser(description="TRL's SFT with PEFT's adapters, before and after accelerate_peft.")
parser.add_argument("--model", required=True)
parser.add_argument("--data")
parser.add_argument("--method", choices=["dora", "lora"], default="dora")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--max-length", type=int, default=1024)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--lr", type=float, default=2e-4)
parser.add_argument("--packing", action="store_true")
parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)  # TRL's default
args = parser.parse_args()

gpu = torch.cuda.is_available()
sums = [{"prompt": f"{i} + {j} =", "completion": f" {i + j}."} for i in range(32) for j in range(32)]
data = load_dataset("json", data_files=args.data, split="train") if args.data else Dataset.from_list(sums)


class Clock(TrainerCallback):
    """Seconds of each optimizer step, the waiting for the device included."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        if gpu:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def train(accelerate: bool) -> tuple[list[float], float, float]:
    """The script. Returns the losses, the median of a step's seconds, and the peak of the GPU's memory in GiB."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16 if gpu else torch.float32),
            args=SFTConfig(
                output_dir=output,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                max_length=args.max_length,
                packing=args.packing,
                learning_rate=args.lr,
                gradient_checkpointing=args.gradient_checkpointing,
                bf16=gpu,
                use_cpu=not gpu,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=data,
            peft_config=LoraConfig(
                r=args.rank,
                lora_alpha=2 * args.rank,
                use_dora=args.method == "dora",
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
            callbacks=[clock],
        )
        if accelerate:
            print(theodora.accelerate_peft(trainer.model))  # the one added line
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = statistics.median(clock.seconds[args.steps // 4 :])  # the first steps warm up
    return losses, seconds, torch.cuda.max_memory_allocated() / 2**30 if gpu else float("nan")


before = train(accelerate=False)
gc.collect()
if gpu:
    torch.cuda.empty_cache()
after = train(accelerate=True)

print(f"\n{'step':>4}  {'PEFT':>8}  {'Theodora':>8}")
for step, (peft_loss, our_loss) in enumerate(zip(before[0], after[0], strict=True), start=1):
    print(f"{step:4d}  {peft_loss:8.4f}  {our_loss:8.4f}")
largest = max(abs(ours - peft) for peft, ours in zip(before[0], after[0], strict=True))
print(f"largest difference of a loss: {largest:.4f}\n")

method = {"dora": "DoRA", "lora": "LoRA"}[args.method]
print(f"{'':<32}{'s/step':>8}{'peak GiB':>10}")
for name, (_, seconds, peak) in ((f"PEFT {method}", before), ("with theodora.accelerate_peft", after)):
    print(f"{name:<32}{seconds:8.3f}{f'{peak:10.2f}' if gpu else '         -'}")
print(f"{'ratio':<32}{after[1] / before[1]:8.2f}{f'{after[2] / before[2]:10.2f}' if gpu else ''}")
