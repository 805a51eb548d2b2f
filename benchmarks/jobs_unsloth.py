"""The script that a user of Unsloth would write for a job of benchmarks/jobs.py: plain, and nothing tuned.

python benchmarks/jobs_unsloth.py --model folder --data rows.jsonl --output out --method dora --steps 100 --batch 16
"""

from __future__ import annotations

import argparse
from typing import Any

# Before transformers and TRL, which it changes.
from unsloth import FastLanguageModel  # pyright: ignore  # isort: skip

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

LONGEST = 1024  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--method", choices=("lora", "dora"), required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    args = parser.parse_args()
    loaded: Any = FastLanguageModel.from_pretrained(
        model_name=args.model,
        max_seq_length=LONGEST,
        dtype=torch.bfloat16,
        load_in_4bit=False,
        use_exact_model_name=True,  # a folder, and no model of the hub
    )
    model, tokenizer = loaded
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=0,
        bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing=False,
        use_dora=args.method == "dora",
    )

    def tokens(row: dict[str, str]) -> dict[str, list[int]]:
        """Loss on the completion alone, as the other ways have it; Unsloth takes rows with labels as they are."""
        asked: list[int] = tokenizer(row["prompt"])["input_ids"]
        whole: list[int] = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        whole = [*whole[: LONGEST - 1], tokenizer.eos_token_id]
        labels = [-100] * len(asked) + whole[len(asked) :]
        return {"input_ids": whole, "attention_mask": [1] * len(whole), "labels": labels[: len(whole)]}

    rows: Any = load_dataset("json", data_files=args.data, split="train")
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=rows.map(tokens, remove_columns=rows.column_names),
        args=SFTConfig(
            output_dir=args.output,
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=1,
            max_steps=args.steps,
            max_length=LONGEST,
            packing=False,
            learning_rate=2e-4,
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=False,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
