"""What `make mutants` is told names files and tests of today: a pattern that finds nothing would go unnoticed."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutmut"]


def wider() -> dict[str, list[str]]:
    """Files below src/theodora → the slower tests that concern them (read, because the script imports mutmut)."""
    script = ast.parse((ROOT / ".ci" / "mutants.py").read_text(encoding="utf-8"))
    values = {ast.unparse(node.targets[0]): node.value for node in script.body if isinstance(node, ast.Assign)}
    triton = ast.unparse(values["_TRITON"])
    texts = ast.parse(ast.unparse(values["WIDER"]).replace("_TRITON", triton), mode="eval").body
    assert isinstance(texts, ast.Dict)
    each = {ast.literal_eval(key): words_of(value) for key, value in zip(texts.keys, texts.values, strict=True) if key}
    return {f"src/theodora/{file}": words for file, words in each.items()}


def words_of(text: ast.expr) -> list[str]:
    strings = [node.value for node in ast.walk(text) if isinstance(node, ast.Constant)]
    return [word for string in strings for word in string.split() if "=" not in word]


def files(pattern: str) -> set[Path]:
    return set(ROOT.glob(pattern))


def test_every_pattern_finds_files():
    assert [pattern for pattern in [*SETTINGS["only_mutate"], *wider()] if not files(pattern)] == []


def test_files_with_slower_tests_are_changed():
    changed = set().union(*map(files, SETTINGS["only_mutate"]))
    assert {file for pattern in wider() for file in files(pattern)} <= changed


def test_every_test_is_there():
    tests = {*SETTINGS["pytest_add_cli_args_test_selection"], *(word for words in wider().values() for word in words)}
    assert [test for test in sorted(tests) if not (ROOT / test).exists()] == []


def test_every_formula_layer_file_and_adapter_is_changed():
    """What moves to a folder that no pattern names would be left out without a word."""
    changed = set().union(*map(files, SETTINGS["only_mutate"]))
    folders = ("layers", "fastpath", "files", "adapters", "merging")
    assert set().union(*(files(f"src/theodora/{folder}/*.py") for folder in folders)) <= changed
    assert {f"tests/{folder}" for folder in folders} <= {*SETTINGS["pytest_add_cli_args_test_selection"]}
