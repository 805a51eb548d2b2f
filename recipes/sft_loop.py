"""Supervised fine-tuning with DoRA: the whole method in one file, with nothing of Theodora in it.

    python recipes/sft_loop.py --model path/to/model --data data.jsonl --output my-adapter --steps 100

`--model` is a folder (or hub name) that transformers loads, `--data` has one {"prompt": "...", "completion": "..."}
per line. The output folder is an adapter in PEFT's format: PeftModel.from_pretrained and theodora both read it.

Left out, to keep it readable: packing, gradient accumulation, warm-up, a held-out set, resuming, embeddings and
GPT-2's Conv1D layers, the fused backward pass. `theodora train` has all of these.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description="Fine-tune a causal language model with DoRA, written out.")
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True, type=Path)
parser.add_argument("--output", required=True, type=Path)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--max-length", type=int, default=256)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--alpha", type=float, default=16)
args = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
scale = args.alpha / args.rank

# 1. The model. Everything in it is frozen; what we train is added beside it.
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
model.requires_grad_(False)


# 2. DoRA (arXiv 2402.09353). Each output row of a weight W (O, I) is split into its length and its direction:
#     W' = m * (W + s B A) / |W + s B A|        m (O,) trained, starting at |W|; A (R, I) random; B (O, R) zero
# so at the start W' = W, and the model answers exactly as before.
class DoRALinear(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        W = base.weight.float()  # norms in fp32: m/|W| stays within a few per cent of 1, where bf16 has steps of 0.4 %
        self.A = nn.Parameter(torch.empty(args.rank, base.in_features, device=W.device))
        self.B = nn.Parameter(torch.zeros(base.out_features, args.rank, device=W.device))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        self.W_norm_squared = W.square().sum(1)  # (O,), once: W never changes
        self.m = nn.Parameter(self.W_norm_squared.sqrt())

    def forward(self, x):  # (..., I) -> (..., O)
        W, A, B = self.base.weight, self.A.to(x.dtype), self.B.to(x.dtype)
        z = F.linear(x, W) + scale * F.linear(F.linear(x, A), B)
        g = self.m / self.norm()  # a row of W that is all zeros would be 0/0 here; theodora gives it g = 1
        y = (g * z).to(x.dtype)  # g is fp32, so the product is, too
        return y if self.base.bias is None else y + self.base.bias

    @torch.no_grad()  # the paper's section 4.3: the norm counts as a constant in the backward pass
    def norm(self):  # |W + s B A| of each row, multiplied out: the matrix B A, as large as W, never exists
        W, A, B = self.base.weight.float(), self.A, self.B
        cross = (B * (W @ A.T)).sum(1)
        square = (B @ (A @ A.T) * B).sum(1)
        return (self.W_norm_squared + 2 * scale * cross + scale**2 * square).sqrt()


# Every linear layer but the output head gets an adapter.
head = model.get_output_embeddings()
linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
layers = {name: DoRALinear(linear) for name, linear in linears.items()}
for name, layer in layers.items():
    model.set_submodule(name, layer)
trained = [p for p in model.parameters() if p.requires_grad]
print(f"{len(layers)} layers adapted, {sum(p.numel() for p in trained):,} parameters trained")


# 3. The data. The loss counts on the completion only: labels of -100 are skipped.
def encode_prompt(prompt: str) -> list[int]:
    if not tokenizer.chat_template:
        return tokenizer(prompt)["input_ids"]
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written them already


def encode(row: dict[str, str]) -> tuple[list[int], list[int]]:
    prompt = encode_prompt(row["prompt"])
    completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return (prompt + completion)[-args.max_length :], ([-100] * len(prompt) + completion)[-args.max_length :]


def collate(chosen: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    T = max(len(ids) for ids, _ in chosen)  # padded on the right; what stands there is masked out
    batch = {
        "input_ids": [ids + [0] * (T - len(ids)) for ids, _ in chosen],
        "attention_mask": [[1] * len(ids) + [0] * (T - len(ids)) for ids, _ in chosen],
        "labels": [labels + [-100] * (T - len(labels)) for _, labels in chosen],
    }
    return {key: torch.tensor(value, device=device) for key, value in batch.items()}


rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines() if line.strip()]
examples = [encode(row) for row in rows]

# 4. Train. No weight decay: it would pull m towards 0, which means nothing.
optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
model.train()
queue: list[int] = []
for step in range(args.steps):
    while len(queue) < args.batch_size:  # an epoch's order, drawn when the last one runs out
        queue += torch.randperm(len(examples)).tolist()
    chosen, queue = queue[: args.batch_size], queue[args.batch_size :]
    optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
    loss = model(**collate([examples[i] for i in chosen])).loss
    loss.backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1:4d}/{args.steps}  loss {loss.item():.4f}")

# 5. See what it says now.
model.eval()
question = torch.tensor([encode_prompt(rows[0]["prompt"])], device=device)
answer = model.generate(question, attention_mask=torch.ones_like(question), max_new_tokens=32, do_sample=False)
print(f"\nprompt:   {rows[0]['prompt']}\nexpected: {rows[0]['completion']}")
print(f"answer:   {tokenizer.decode(answer[0, question.shape[1] :], skip_special_tokens=True)}")

# 6. Keep it, in PEFT's format: one file of tensors, one that says what they mean.
parts = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "m"}
tensors = {f"base_model.model.{n}.{key}": getattr(d, part) for n, d in layers.items() for key, part in parts.items()}
config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": args.model,
    "r": args.rank,
    "lora_alpha": args.alpha,
    "use_dora": True,
    "target_modules": sorted({name.rsplit(".", 1)[-1] for name in layers}),
}
args.output.mkdir(parents=True, exist_ok=True)
save_file(tensors, args.output / "adapter_model.safetensors")
(args.output / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
print(f"\nadapter written to {args.output}")
