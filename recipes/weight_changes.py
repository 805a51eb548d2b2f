"""Figure 2 of the DoRA paper at your size: train all weights, LoRA and DoRA on the same rows, and look at the changes.

    python recipes/weight_changes.py --model path/to/model --data data.jsonl --output runs/changes
    theodora inspect runs/changes/full runs/changes/lora runs/changes/dora --base-model path/to/model --figures figures

`--model` is a folder or hub name that transformers loads, `--data` has {"prompt", "completion"} or {"text"} per line.
Every method sees the same rows in the same order, and leaves several checkpoints. The loss counts on every token.
Full checkpoints are whole models: they need that much disk.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from theodora import AdapterConfig, inject_adapter, save_adapter

parser = argparse.ArgumentParser(description="Train all weights, LoRA and DoRA alike, and keep checkpoints.")
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True, type=Path)
parser.add_argument("--output", required=True, type=Path)
parser.add_argument("--methods", nargs="+", default=["full", "lora", "dora"], choices=["full", "lora", "dora"])
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--checkpoints", type=int, default=4)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--max-length", type=int, default=64)
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--lr", type=float, default=1e-3, help="of the adapters")
parser.add_argument("--full-lr", type=float, default=5e-5)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
device = "cuda" if torch.cuda.is_available() else "cpu"


def plain(part: str | list[dict]) -> str:
    return part if isinstance(part, str) else part[-1]["content"]  # of messages, the last


def encode(row: dict) -> list[int]:
    text = row.get("text") or f"{plain(row['prompt'])}\n{plain(row['completion'])}"
    return [*tokenizer(text, add_special_tokens=False)["input_ids"][: args.max_length - 1], tokenizer.eos_token_id]


def batch(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    T = max(map(len, rows))
    ids = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def train(method: str, rows: list[list[int]]) -> None:
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    if method != "full":
        inject_adapter(model, AdapterConfig(method=method, rank=args.rank))
    trained = [p for p in model.parameters() if p.requires_grad]
    lr = args.full_lr if method == "full" else args.lr
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)  # decay would shrink rows by itself
    print(f"\n{method}: {sum(p.numel() for p in trained):,} parameters, learning rate {lr:g}")
    warmup, began = max(1, args.steps // 10), time.perf_counter()
    for step in range(1, args.steps + 1):
        at = (step - 1) * args.batch_size
        rate = min(step / warmup, (args.steps + 1 - step) / (args.steps + 1 - warmup))
        optimizer.param_groups[0]["lr"] = lr * rate
        loss = model(**batch([rows[i % len(rows)] for i in range(at, at + args.batch_size)])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, args.steps // 10) == 0:
            print(
                f"step {step:4d}/{args.steps}  loss {loss.item():.4f}  {time.perf_counter() - began:.0f} s", flush=True
            )
        if step in saves:
            folder = args.output / method / f"checkpoint-{step}"
            model.save_pretrained(folder) if method == "full" else save_adapter(model, folder)


lines = args.data.read_text(encoding="utf-8").splitlines()
encoded = [encode(json.loads(line)) for line in lines if line.strip()]
order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(args.seed)).tolist()
saves = {round(args.steps * part / args.checkpoints) for part in range(1, args.checkpoints + 1)}
for name in args.methods:
    train(name, [encoded[i] for i in order])
folders = " ".join(str(args.output / name) for name in args.methods)
print(f"\ntheodora inspect {folders} --base-model {args.model} --figures {args.output / 'figures'}")
