"""Every command and every Python block of the README, of the guide, of docs/python.md and of the recipes by task runs,
in its order, on a tiny model and a few rows (`documents.py`)."""

import re
import subprocess

import pytest
import yaml

import scripts
from documents import HUB_NAME, ROOT, SHORTER, SHORTER_PYTHON, blocks, furnish, run, run_page, write_files
from theodora.cli.main import COMMANDS
from undrawn import leave_losses_blank

README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/recipes/*.md"))
PAGES = ["README.md", "docs/guide.md", "docs/python.md", *RECIPES]
BLOCKS = [block for page in PAGES for block in blocks(page)]
# Runs of other pages that a page goes on from.
BEFORE = {"docs/python.md": f"theodora train --model {HUB_NAME} --data train.jsonl --output runs/first"}
# What stands in the folder afterwards.
LEFT = {
    "README.md": [
        "runs/first/adapter_model.safetensors",
        "runs/by-hand/adapter_model.safetensors",
        "merged/model.safetensors",
    ],
    "docs/guide.md": [
        *(
            f"runs/{name}/adapter_model.safetensors"
            for name in ("first", "preferred", "rewarded", "second", "fp8", "many")
        ),
        "merged/model.safetensors",
    ],
    "docs/python.md": [f"runs/{name}/adapter_model.safetensors" for name in ("by-hand", "third", "recipe")],
}


@pytest.fixture
def reader(tmp_path, tiny_model_dir, monkeypatch):
    """A folder with what the pages take for granted."""
    furnish(tmp_path, tiny_model_dir)
    monkeypatch.chdir(tmp_path)
    scripts.measure_here(monkeypatch)
    leave_losses_blank(monkeypatch)
    return tmp_path


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:torch")  # TRL 1.16
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_run_in_order(page, reader, monkeypatch, capsys):
    write_files(page, reader)
    if page in BEFORE:
        run(BEFORE[page], monkeypatch, capsys)
    run_page(page, monkeypatch, capsys)
    assert [name for name in LEFT.get(page, []) if not (reader / name).is_file()] == []


def test_every_kind_of_block_is_tested():
    assert {block.language for block in BLOCKS} <= {"bash", "python", "yaml", "jsonl"}
    python = "".join(block.text for block in BLOCKS if block.language == "python")
    assert all(long in python for long in SHORTER_PYTHON)
    commands = [command for block in BLOCKS for command in block.commands]
    assert all(any(command.startswith(start) for command in commands) for start in SHORTER)


def test_every_command_is_reached_from_the_readme():
    missing = [name for group in COMMANDS.values() for name in group if not re.search(rf"theodora {name}\b", README)]
    assert missing == ["demo"]  # which is `make demo` there
    assert "make demo" in README


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z-]+)", README))))
def test_the_make_targets_exist(target):
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_the_extras_that_the_pages_name_exist():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for page in PAGES:
        for extra in re.findall(r"(?:`\.|'\.|theodora)\[(\w+)\]", (ROOT / page).read_text(encoding="utf-8")):
            assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE)


def test_the_yaml_blocks_are_valid():
    for block in BLOCKS:
        if block.language == "yaml":
            assert isinstance(yaml.safe_load(block.text), dict)
