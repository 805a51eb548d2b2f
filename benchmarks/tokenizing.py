"""How many rows a second a core turns into tokens and labels: chat template, tokens and mask, by CPU time.

    python benchmarks/tokenizing.py                                       # 4,000 rows of each kind
    python benchmarks/tokenizing.py --rows 1000000 --kinds chats-qwen3    # whether memory stays flat
    python benchmarks/tokenizing.py --tokenizer FOLDER                    # a real tokenizer, whose template is not used

Each kind of row is read and tokenised in a process of its own, which says how many CPU seconds each took (those of its
worker processes too), and how much memory at most. Without `--tokenizer` a byte-level BPE is trained on the words of
the rows. The templates are those that TRL ships for Qwen3 and Llama 3, and SmolLM2's ChatML.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VOCABULARY = 8_000
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# SmolLM2-135M-Instruct's.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROLS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
# Prose with some code in it, as chats have it.
WORDS = " ".join(str(module.__doc__) for module in (argparse, json, random, subprocess, tempfile)).split()

Row = dict[str, Any]


def words(chance: random.Random, count: int) -> str:
    """Some words of this file, and a number, so that rows differ."""
    return " ".join([*chance.choices(WORDS, k=chance.randint(count // 2, count * 3 // 2)), str(chance.random())])


def text_row(chance: random.Random) -> Row:
    return {"text": words(chance, 60)}


def pair_row(chance: random.Random) -> Row:
    return {"prompt": words(chance, 10), "completion": words(chance, 10)}


def chat_row(chance: random.Random) -> Row:
    """One to five questions and answers, every third conversation with a system turn."""
    turns = [{"role": "system", "content": words(chance, 10)}] if chance.random() < 0.33 else []
    for _ in range(chance.randint(1, 5)):
        turns += [{"role": "user", "content": words(chance, 15)}, {"role": "assistant", "content": words(chance, 40)}]
    return {"messages": turns}


def tool_row(chance: random.Random) -> Row:
    """A question, a call of one of a few tools on offer, its result and an answer."""
    names = [f"tool_{chance.randrange(500)}" for _ in range(chance.randint(1, 4))]
    keys = [f"key_{chance.randrange(50)}" for _ in range(3)]
    tools = [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": words(chance, 8),
                "parameters": {
                    "type": "object",
                    "properties": {key: {"type": "string", "description": words(chance, 4)} for key in keys},
                },
            },
        }
        for name in names
    ]
    arguments = {key: chance.choice([words(chance, 2), chance.randrange(1000), True]) for key in dict.fromkeys(keys)}
    call = {"type": "function", "function": {"name": names[0], "arguments": arguments}}
    turns = [
        {"role": "user", "content": words(chance, 15)},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": names[0], "content": words(chance, 10)},
        {"role": "assistant", "content": words(chance, 20)},
    ]
    return {"messages": turns, "tools": tools}


# The kind of row, and the chat template: text, or the name of a file of TRL's.
KINDS: dict[str, tuple[Callable[[random.Random], Row], str | None]] = {
    "text": (text_row, None),
    "pairs-chatml": (pair_row, CHATML),
    "chats-qwen3": (chat_row, "qwen3.jinja"),
    "chats-llama3": (chat_row, "llama3.jinja"),
    "tools-qwen3": (tool_row, "qwen3.jinja"),
}


def main() -> None:
    args = parse_args()
    if args.inside:
        print(json.dumps(measure(Path(args.inside), args)))
        return
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="theodora-tokenizing-") as scratch:
        tokenizer = args.tokenizer or train_tokenizer(Path(scratch) / "tokenizer")
        for kind in args.kinds:
            path = Path(scratch) / f"{kind}.jsonl"
            write_rows(path, kind, args.rows)
            rows[kind] = run_inside(path, kind, tokenizer, args)
            path.unlink()
            print_row(kind, rows[kind])
    if args.output:
        settings = {name: str(value) for name, value in vars(args).items() if name not in ("output", "inside")}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"settings": settings, "kinds": rows}, indent=1) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000, help="rows of each kind (default 4,000)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="which kinds (default all)")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--tokenizer", type=Path, help="a folder with a fast tokenizer (default: one trained here)")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_rows(path: Path, kind: str, count: int) -> None:
    """A file of rows, the same for the same count."""
    chance = random.Random(0)
    make, _ = KINDS[kind]
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(make(chance)) + "\n" for _ in range(count))


def train_tokenizer(folder: Path) -> Path:
    """A byte-level BPE of this file's words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    chance = random.Random(1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(CONTROLS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((words(chance, 40) for _ in range(5000)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|endoftext|>",
        extra_special_tokens=list(CONTROLS[1:]),
    )
    fast.save_pretrained(folder)
    return folder


def run_inside(path: Path, kind: str, tokenizer: Path, args: argparse.Namespace) -> dict[str, float]:
    """One kind in a process of its own."""
    command = [sys.executable, __file__, "--inside", str(path), "--kinds", kind, "--tokenizer", str(tokenizer)]
    command += ["--max-length", str(args.max_length), "--rows", str(args.rows)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(path: Path, args: argparse.Namespace) -> dict[str, float]:
    """CPU and wall seconds of reading and of tokenising, and memory (MB) before and at most.

    `own` memory is what the process holds beside files that are mapped into it, which the system takes away as it
    likes: rows and tokens are such files.
    """
    import trl
    from transformers import AutoTokenizer

    from theodora.data import load_examples, tokenize

    _, template = KINDS[args.kinds[0]]
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if template is not None and template.endswith(".jinja"):
        template = (Path(trl.__file__).parent / "chat_templates" / template).read_text(encoding="utf-8")
    tokenizer.chat_template = template
    before, began, clock = peak_mb(), cpu_seconds(), time.perf_counter()
    with watched_memory() as own:
        examples = load_examples(path)
        read, read_by = cpu_seconds(), time.perf_counter()
        tokens = tokenize(examples, tokenizer, max_length=args.max_length)
        done, done_by = cpu_seconds(), time.perf_counter()
    return {
        "rows": len(examples),
        "tokens": sum(len(chunk.flatten()) for chunk in tokens.data.column("input_ids").chunks),
        "reading_cpu_seconds": read - began,
        "reading_seconds": read_by - clock,
        "tokenising_cpu_seconds": done - read,
        "tokenising_seconds": done_by - read_by,
        "rows_a_second_a_core": len(examples) / (done - read),
        "megabytes_before": before,
        "megabytes_at_most": peak_mb(),
        "own_megabytes_before": own[0],
        "own_megabytes_at_most": max(own),
    }


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def peak_mb() -> float:
    """The most memory that this process held. ru_maxrss is in KiB, on macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)


def own_mb() -> float:
    """The memory that this process holds beside mapped files; 0 where the system does not say (Linux does)."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon")), 0.0)


@contextmanager
def watched_memory() -> Iterator[list[float]]:
    """Looks every 20 ms at how much memory of its own this process holds."""
    seen, done = [own_mb()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            seen.append(own_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def print_row(kind: str, row: dict[str, float]) -> None:
    print(
        f"{kind:14} {row['rows_a_second_a_core']:9,.0f} rows a second a core "
        f"({row['tokenising_cpu_seconds']:.2f} s, and {row['reading_cpu_seconds']:.2f} s of reading); "
        f"{row['megabytes_at_most']:,.0f} MB at most, {row['megabytes_before']:,.0f} before; "
        f"{row['own_megabytes_at_most']:,.0f} and {row['own_megabytes_before']:,.0f} without mapped files",
        flush=True,
    )


if __name__ == "__main__":
    main()
