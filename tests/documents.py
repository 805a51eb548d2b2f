"""The blocks of README.md, of pages in docs/ and of the notebook, run as a reader would: on a tiny model, a few rows.

The blocks are taken as they stand. Names on the hub become a tiny random model, long runs become short ones (SHORTER),
and the rest is what a reader would type. A block or a command of a kind that is not known here fails, so that nothing
on such a page goes untested by accident.
"""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser
from transformers import AutoTokenizer

import scripts
from chat_shapes import TRL_TEMPLATES
from theodora.cli.main import main

ROOT = Path(__file__).parents[1]

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_NAMES = {HUB_NAME: None, "HuggingFaceTB/SmolLM2-135M": None, "Qwen/Qwen3-0.6B": "qwen3"}
"""Name on the hub -> whose chat template its stand-in has. Default: ChatML's."""
# Appended to a command, by its first words. argparse and the recipe take the last of two values.
SHORTER = {
    "theodora conformance": "--workers 1",
    "theodora train": "--max-steps 2 --per-device-train-batch-size 2 --eval-steps 1 --save-steps 2",
    "theodora bench": "--rounds 1 --batch 1 --length 16 --methods lora",
    "theodora chat": "--max-new-tokens 4",
    "theodora evaluate": "--batch-size 4 --max-new-tokens 4",
    "theodora compare": "--dry-run",
    "python recipes/sft_loop.py": "--steps 2 --batch-size 2",
}
SHORTER_PYTHON = {
    "max_steps=30": "max_steps=2, per_device_train_batch_size=2, max_length=128",
    "max_steps=20,": "max_steps=2, per_device_train_batch_size=2, max_length=128, use_cpu=True, bf16=False,",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    before: str
    """What the page says until there."""

    @property
    def file(self) -> str | None:
        """The file that it shows: named in its first line, or in code before rows."""
        if self.language == "jsonl":
            return re.findall(r"`(\w+\.jsonl)`", self.before)[-1]
        named = re.match(r"# (\S+\.(?:py|yaml))\n", self.text)
        return named[1] if named else None

    @property
    def commands(self) -> list[str]:
        """The commands of a shell's block."""
        if self.language not in ("bash", "sh", "console"):
            return []
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]


def blocks(page: str) -> list[Block]:
    """The blocks of a page, by its path in the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], text[: match.start()]) for match in found]


def furnish(folder: Path, tiny_model_dir) -> None:
    """Put into a folder what pages take for granted: models under their hub names, and files of rows."""
    for name, template in HUB_NAMES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        model = tiny_model_dir("llama", tied=True)
        if template is None:
            (folder / name).symlink_to(model)
            continue
        shutil.copytree(model, folder / name)
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        config["max_position_embeddings"] = 4096  # tools are long, in bytes
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(model, model_max_length=4096)
        tokenizer.chat_template = TRL_TEMPLATES[template].read_text(encoding="utf-8")
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": f"What comes after {i}?", "completion": f"{i + 1}"} for i in range(24)]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "none"} for row in rows[:20]]
    for name, part in (("train.jsonl", rows[:20]), ("held_out.jsonl", rows[20:]), ("pairs.jsonl", pairs)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    (folder / "rewards.py").write_text("def kinds(answer, reference):\n    return len(set(answer)) / 8\n")
    study = {"model": HUB_NAME, "output": "runs/methods", "data": {"own": "train.jsonl"}}
    (folder / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    (folder / "recipes").symlink_to(ROOT / "recipes")


def write_files(page: str, folder: Path) -> None:
    """Write the files that a page shows; of rows also those that it says are like them."""
    for block in blocks(page):
        if block.language == "jsonl":
            rows = [_varied(json.loads(line), copy) for copy in range(8) for line in block.text.splitlines()]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / str(block.file)).write_text(text, encoding="utf-8")
            (folder / str(block.file).replace(".jsonl", ".test.jsonl")).write_text(block.text, encoding="utf-8")
        elif block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")


def _varied(row: dict, copy: int) -> dict:
    """Another row of the same kind, since identical ones are held out together."""
    where, key = (
        (row["messages"][0], "content") if "messages" in row else (row, "prompt" if "prompt" in row else "text")
    )
    where[key] += f" ({copy})"
    return row


def run_page(page: str, monkeypatch, capsys) -> None:
    """Run the blocks of a page, in their order."""
    namespace: dict[str, object] = {}
    for block in blocks(page):
        if block.language == "python" and not block.file:
            exec(compile(shortened_python(block.text), page, "exec"), namespace)
        for command in block.commands:
            run(command, monkeypatch, capsys)


def run(command: str, monkeypatch, capsys) -> str:
    """Run one command line in this process, as a new one would import for seconds, and give what it printed."""
    words = shlex.split(command)
    words += next((shlex.split(more) for start, more in SHORTER.items() if command.startswith(start)), [])
    if words[:2] == ["theodora", "train"] and "--max-length" not in words:
        words += ["--max-length", "128"]
    if "grpo" in words:  # of a random model no answer is right
        words += shlex.split("--num-generations 2 --max-completion-length 8 --reward rewards.py:kinds")
    if words[0] == "theodora":
        if words[1] == "serve":  # until it serves; tests/serve has the rest
            monkeypatch.setattr("theodora.serve.run.serve", lambda engine, *_, **__: (engine.start(), engine.stop()))
        if words[1] == "chat":
            monkeypatch.setattr("builtins.input", say_goodbye(["Hello"]))
        capsys.readouterr()
        code = main(words[1:])
        output = capsys.readouterr()
        assert code == 0, f"{command}\n{output.out}\n{output.err}"
        if "--json" in words:
            json.loads(output.out)
        return output.out
    if words[:2] == ["pip", "install"]:
        check_pip_arguments(words[2:])
    elif words[0] == "torchrun":  # one of the processes that it would start, by itself; tests/train has the rest
        started = get_args_parser().parse_args(words[1:])
        assert started.module
        run(shlex.join([started.training_script, *started.training_script_args]), monkeypatch, capsys)
    elif words[0] == "python":
        scripts.run(monkeypatch, *words[1:])
    else:
        pytest.fail(f"There is a command that this does not know how to run: {command}")
    return ""


def say_goodbye(lines: list[str]):
    """`input` as from a person who types `lines` and then Ctrl-D."""
    left = iter(lines)

    def answer(prompt: str = "") -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return answer


def check_pip_arguments(arguments: list[str]) -> None:
    """The files named are there; installing is what `make test` has just done."""
    assert "-e" in arguments
    for flag, value in pairwise(arguments):
        if flag == "-c":
            assert (ROOT / value).is_file()


def shortened_python(text: str) -> str:
    """A block with short runs instead of long ones."""
    for long, short in SHORTER_PYTHON.items():
        text = text.replace(long, short)
    return text
