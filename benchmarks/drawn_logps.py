"""By how much log-probabilities of drawn tokens differ: those of drawing, those of a training pass, and the truth.

    python benchmarks/drawn_logps.py --model out/study/SmolLM2-135M-Instruct --data out/study/data/medical.test.jsonl

A model in bfloat16 with a DoRA adapter whose tensors are moved at random answers prompts at temperature 1, as
`--objective grpo` draws. The pass that learns from the answers computes the log-probability of each token anew, by
other kernels, and the same weights in float32 say what both round. Differences are in nats of a token.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_step import say, write_report
from transformers import AutoModelForCausalLM

from theodora import inject_adapter
from theodora.adapters.state import trained_tensors
from theodora.bench import describe_machine
from theodora.config import AdapterConfig
from theodora.data import load_examples, tokenize_prompts
from theodora.evaluate.batches import pad
from theodora.files.tokenizer import load_tokenizer
from theodora.train.rollouts import Completion, Drawing, Rollouts

RESULTS = Path("benchmarks/results/drawn_logps.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="rows as for --objective grpo")
    parser.add_argument("--rows", type=int, default=64, help="prompts; default: 64")
    parser.add_argument("--length", type=int, default=64, help="tokens of an answer at most; default: 64")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file; default: {RESULTS}")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(args.model)
    examples = load_examples(args.data, kind="prompts")
    prompts = tokenize_prompts(examples, tokenizer, max_prompt=512)["input_ids"][: args.rows]
    model = model_of(args.model, torch.bfloat16, device)
    rollouts = Rollouts(model, Drawing(), [tokenizer.eos_token_id], args.length)
    answers = rollouts(prompts, seed=0)
    rollouts.release()
    trained, drawn = logps(model, prompts, answers), torch.cat([torch.tensor(a.logps) for a in answers]).double()
    del model
    exact = logps(model_of(args.model, torch.float32, device), prompts, answers)
    pairs = {
        "drawing and training pass": (drawn, trained),
        "drawing and float32": (drawn, exact),
        "training pass and float32": (trained, exact),
    }
    found = {name: figures(one, other) for name, (one, other) in pairs.items()}
    for name, values in found.items():
        say(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in values.items()))
    settings = {"rows": args.rows, "length": args.length, "tokens": len(drawn), "way": rollouts.way}
    write_report(args.output, {"machine": describe_machine(), "settings": settings, "nats of a token": found})


def model_of(name: str, dtype: torch.dtype, device: str) -> Any:
    """The model with an adapter whose values are those of bfloat16, whatever the dtype."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
    inject_adapter(model, AdapterConfig(rank=16, method="dora"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, tensor in trained_tensors(model).items():
            size = 0.01 * float(tensor.abs().mean()) if "magnitude" in path else 0.002
            tensor.add_((size * torch.randn(tensor.shape, generator=generator)).to(tensor))
    return model.train()


@torch.no_grad()
def logps(model: Any, prompts: list[list[int]], answers: list[Completion], rows: int = 16) -> Tensor:
    """Of all tokens of the answers, (tokens,) float64, by padded passes in training mode."""
    found: list[Tensor] = []
    for start in range(0, len(prompts), rows):
        some = answers[start : start + rows]
        whole = [prompt + answer.tokens for prompt, answer in zip(prompts[start:], some, strict=False)]
        ids = pad(whole, 0).to(model.device)
        mask = pad([[1] * len(row) for row in whole], 0).to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row_TV, row, answer in zip(logits, whole, some, strict=True):
            of_answer = row_TV[len(row) - len(answer.tokens) - 1 : len(row) - 1].float().log_softmax(-1)
            tokens = torch.tensor(answer.tokens, device=model.device)
            found.append(of_answer.gather(1, tokens[:, None])[:, 0].double().cpu())
    return torch.cat(found)


def figures(one: Tensor, other: Tensor) -> dict[str, float]:
    difference = (one - other).abs()
    return {"mean": float(difference.mean()), "median": float(difference.median()), "max": float(difference.max())}


if __name__ == "__main__":
    main()
