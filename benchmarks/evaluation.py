"""Tokens per second of the loss that `evaluate` computes, beside a bare loop of forward passes over the same rows.

    python benchmarks/evaluation.py --model out/study-small/SmolLM2-135M-Instruct --data held_out.jsonl

The bare loop takes the rows as they come, in batches of the same size, padded on the right; a second one takes them
sorted by length. It does nothing but `model(input_ids)` without gradients. In alternating rounds; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from theodora.adapters.models import load_model_and_tokenizer
from theodora.data import load_examples
from theodora.evaluate.batches import pad
from theodora.evaluate.questions import questions
from theodora.evaluate.scores import score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bf16")
    arguments = parser.parse_args()
    model, tokenizer = load_model_and_tokenizer(arguments.model, dtype=arguments.dtype)
    examples = load_examples(arguments.data)
    examples = examples.with_dataset(examples.dataset.select(range(min(arguments.rows, len(examples)))))
    asked = questions(examples, tokenizer, max_length=512, answered=False)
    size = arguments.batch_size

    def bare(rows: list[list[int]]) -> None:
        with torch.inference_mode():
            for at in range(0, len(rows), size):
                model(input_ids=pad(rows[at : at + size], 0).to(model.device), use_cache=False)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    ways: dict[str, Callable[[], object]] = {
        "evaluate": lambda: score(model, tokenizer, asked, batch_size=size, exact_match=False),
        "bare loop": lambda: bare(asked.input_ids),
        "bare loop, sorted": lambda: bare(sorted(asked.input_ids, key=len)),
    }
    tokens = sum(map(len, asked.input_ids))
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if turn:  # the first round warms up
                rates[name].append(tokens / (time.perf_counter() - start))
    for name, found in rates.items():
        ratios = [a / b for a, b in zip(rates["evaluate"], found, strict=True)]
        print(
            f"{name:18} {statistics.median(found):8,.0f} tokens/s; evaluate is {statistics.median(ratios):.2f} × that"
        )


if __name__ == "__main__":
    main()
