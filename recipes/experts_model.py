"""A small mixture of experts, trained from scratch for some minutes, to compare adapters on.

    python recipes/study_data.py --output out/experts/data
    python recipes/experts_model.py --data out/experts/data --output out/experts/model --minutes 6
    theodora compare recipes/study-experts.yaml

No mixture of experts comes in a package. This one has Qwen3-MoE's parts (4 blocks, 16 experts of which each token goes
to 4, 9 million parameters) and a tokenizer of its own. It trains on a GPU where there is one. It reads Wikipedia
introductions and the domains' questions without their answers, so that the answers are left to learn.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

END, START = "<|im_end|>", "<|im_start|>"
TEMPLATE = (
    "{% for message in messages %}" + START + "{{ message.role }}\n{{ message.content }}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + START + "assistant\n{% endif %}"
)
ROWS, LENGTH, VOCABULARY = 8, 128, 8192  # of a batch; tokens of a row; tokens there are
PEAK, WARMUP = 2e-3, 50  # learning rate; steps until it is reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="what study_data.py wrote")
    parser.add_argument("--output", required=True, type=Path, help="folder for model and tokenizer")
    parser.add_argument("--minutes", type=float, default=6, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    texts = texts_of(arguments.data)
    tokenizer = tokenizer_of(texts)
    tokens = torch.cat([torch.tensor([*tokenizer(text).input_ids, tokenizer.eos_token_id]) for text in texts])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokens = Qwen3MoeForCausalLM(config_of(tokenizer)).to(device), tokens.to(device)
    print(f"{len(texts):,} texts, {len(tokens):,} tokens, {model.num_parameters():,} parameters")
    train(model, tokens, 60 * arguments.minutes)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


def texts_of(folder: Path) -> list[str]:
    """General texts, and the questions of all domains."""
    general = [json.loads(line)["text"] for line in (folder / "general.jsonl").open(encoding="utf-8")]
    files = sorted(folder.glob("*.train.jsonl"))
    rows = [json.loads(line)["prompt"] for file in files for line in file.open(encoding="utf-8")]
    chats = ["".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in prompt) for prompt in rows]
    return general + chats


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the texts."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END, START], initial_alphabet=alphabet, show_progress=False
    )
    own.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token=END, pad_token=END)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def config_of(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=160,
        norm_topk_prob=True,
        output_router_logits=True,  # with the loss that keeps experts balanced
        router_aux_loss_coef=0.01,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train(model: Qwen3MoeForCausalLM, tokens: torch.Tensor, seconds: float) -> None:
    """Rows from anywhere in the texts, until the time is over; the learning rate falls with it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.1)
    model.train()
    bar = Progress(TextColumn("loss {task.fields[loss]:.2f}"), BarColumn(), TimeElapsedColumn())
    with bar:
        job, began, step = bar.add_task("", total=seconds, loss=float("nan")), time.monotonic(), 0
        while (elapsed := time.monotonic() - began) < seconds:
            for group in optimizer.param_groups:
                group["lr"] = PEAK * min(1, (step + 1) / WARMUP, 1.05 - elapsed / seconds)
            starts = torch.randint(len(tokens) - LENGTH, (ROWS,))
            ids = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update(job, completed=elapsed, loss=loss.item())
    model.eval()
    print(f"{step} steps of {ROWS * LENGTH} tokens, loss {loss.item():.2f}")


if __name__ == "__main__":
    main()
