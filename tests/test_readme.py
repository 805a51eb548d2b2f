"""Every command and every Python block of the README runs, in its order, on a tiny model and a few rows.

The blocks are taken from README.md as they stand. The model's hub name becomes a tiny random model, long runs become
short ones (SHORTER), and the rest is what a reader would type. A block of a kind that is not known here fails, so
that nothing in the README goes untested by accident.
"""

import json
import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

import scripts
from theodora.cli.main import main
from undrawn import leave_losses_blank

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line
    for language, text in BLOCKS
    if language in ("bash", "sh", "console")
    for line in text.replace("\\\n", " ").splitlines()
    if line.strip()
]

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Appended to a command, by its first words. argparse and the recipe take the last of two values.
SHORTER = {
    "theodora conformance": "--workers 1",
    "theodora train": "--max-steps 2 --per-device-train-batch-size 2 --max-length 128 --eval-steps 1 --save-steps 2",
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


@pytest.fixture
def reader(tmp_path, tiny_model_dir, monkeypatch):
    """A folder with what the README takes for granted: the model under its hub name, and files of rows."""
    (tmp_path / HUB_NAME).parent.mkdir()
    (tmp_path / HUB_NAME).symlink_to(tiny_model_dir("llama", tied=True))
    rows = [{"prompt": f"What comes after {i}?", "completion": f"{i + 1}"} for i in range(24)]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "none"} for row in rows[:20]]
    for name, part in (("train.jsonl", rows[:20]), ("held_out.jsonl", rows[20:]), ("pairs.jsonl", pairs)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    (tmp_path / "rewards.py").write_text("def kinds(answer, reference):\n    return len(set(answer)) / 8\n")
    for language, text in BLOCKS:
        if language == "yaml":
            (tmp_path / text.splitlines()[0].removeprefix("# ")).write_text(text, encoding="utf-8")
    study = {"model": HUB_NAME, "output": "runs/methods", "data": {"own": "train.jsonl"}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:torch")  # TRL 1.16
def test_the_blocks_run_in_order(reader, monkeypatch, capsys):
    scripts.measure_here(monkeypatch)
    leave_losses_blank(monkeypatch)
    namespace: dict[str, object] = {}
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(shortened_python(text), "README.md", "exec"), namespace)
        elif language == "bash":
            for command in text.replace("\\\n", " ").splitlines():
                run(command, monkeypatch, capsys)
    for run_name in ("runs/first", "runs/second", "runs/third", "runs/by-hand", "runs/recipe", "runs/many"):
        assert (reader / run_name / "adapter_model.safetensors").is_file()
    assert (reader / "merged" / "model.safetensors").is_file()


def run(command: str, monkeypatch, capsys) -> None:
    """Run one command line in this process, because every new one costs seconds of imports."""
    words = shlex.split(command)
    words += next((shlex.split(more) for start, more in SHORTER.items() if command.startswith(start)), [])
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
    elif words[:2] == ["pip", "install"]:
        check_pip_arguments(words[2:])
    elif words[0] == "torchrun":  # one of the processes that it would start, by itself; tests/train has the rest
        started = get_args_parser().parse_args(words[1:])
        assert started.module
        run(shlex.join([started.training_script, *started.training_script_args]), monkeypatch, capsys)
    elif words[0] == "python":
        scripts.run(monkeypatch, *words[1:])
    else:
        pytest.fail(f"README.md has a command that this test does not know how to run: {command}")


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
    for long, short in SHORTER_PYTHON.items():
        text = text.replace(long, short)
    return text


def test_every_kind_of_block_is_tested():
    assert {language for language, _ in BLOCKS} <= {"bash", "python", "yaml"}
    assert all(long in README for long in SHORTER_PYTHON)
    assert all(any(command.startswith(start) for command in COMMANDS) for start in SHORTER)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z-]+)", README))))
def test_the_make_targets_exist(target):
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    "name",
    sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]),
)
def test_the_links_between_documents_lead_somewhere(name):
    document = ROOT / name
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8"))
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def test_the_tests_that_the_readme_points_to_exist():
    missing = [path for path in re.findall(r"`(tests/[\w/.]+)`", README) if not (ROOT / path).exists()]
    assert not missing


def test_the_extras_that_the_readme_names_exist():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"`\.\[(\w+)\]`", README):
        assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE)


def test_the_recipe_file_is_valid():
    for language, text in BLOCKS:
        if language == "yaml":
            assert isinstance(yaml.safe_load(text), dict)
