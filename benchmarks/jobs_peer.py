"""The script that a user of TRL and PEFT would write for a job of benchmarks/jobs.py: plain, and nothing tuned.

python benchmarks/jobs_peer.py --model folder --data rows.jsonl --output out --method dora --steps 100 --batch 16
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--method", choices=("lora", "dora"), required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    rows: Any = load_dataset("json", data_files=args.data, split="train")
    trainer = SFTTrainer(
        args.model,
        args=SFTConfig(
            output_dir=args.output,
            model_init_kwargs={"dtype": torch.bfloat16 if cuda else torch.float32},
            per_device_train_batch_size=args.batch,
            max_steps=args.steps,
            max_length=1024,
            packing=False,  # the default: rows are padded to the longest of their batch
            learning_rate=2e-4,
            bf16=cuda,
            gradient_checkpointing=False,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules="all-linear",
            use_dora=args.method == "dora",
            task_type="CAUSAL_LM",
        ),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
