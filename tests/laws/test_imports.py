"""Imports run one way, and each heavy library is known in one place only. Read from the source, not by importing."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import theodora
from theodora.cli.main import COMMANDS

SOURCE = Path(theodora.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))

# Floors of the house, lowest first. A module imports from lower floors and from its own part; parts that share a
# floor stand side by side and do not know each other, except where BESIDE says so.
FLOORS = [
    {
        "errors",
        "coerce",
        "other_words",
        "trust",
        "naming",
        "paths",
        "metered",
        "adapter_config",
        "config",
        "parse",
        "ends",
        "kept",
        "extras",
    }
    | {"locks", "main_memory", "patches", "safe_text", "synonyms", "terminal"},
    {"functional", "autocast"},
    {"kernels"},
    {"layers"},
    {"fastpath", "files"},
    {"adapters"},
    {"merging", "data"},
    {"plan"},
    {"train", "evaluate", "serve", "analysis", "bench", "conformance", "export", "vllm_plugin", "foreign"},
    {"compare"},
    {"launch"},
    {"demo", "studio", "cli"},
]
BESIDE = {
    "coerce": {"errors"},
    "other_words": {"errors"},
    "trust": {"errors", "safe_text"},
    "paths": {"errors"},
    "metered": {"errors"},
    "ends": {"metered"},
    "adapter_config": {"errors", "coerce", "paths"},
    "config": {"errors", "adapter_config", "coerce", "other_words", "trust", "naming", "paths"},
    "terminal": {"safe_text"},
    "functional": {"autocast"},
    "conformance": {"serve"},  # what is served is held to the formula, too
    "evaluate": {"serve"},  # many prompts are answered in the batches that serve
    # the run's report scores the held-out rows; completions to learn from are drawn in the batches that serve, or by
    # vLLM with the plug-in
    "train": {"evaluate", "serve", "vllm_plugin"},
    "cli": {"demo", "studio"},  # `theodora demo`, `theodora studio`
    "studio": {"cli"},  # its form has the flags of `theodora train`
}

# Library -> the only parts that import it.
ONLY_IN = {
    "triton": {"kernels"},
    "bitsandbytes": {"layers"},
    "torchao": {"layers"},
    "trl": {"train"},
    "accelerate": {"train"},
    # accelerate_peft, and the rows to compare with; its files are read without it
    "peft": {"fastpath", "bench", "conformance"},
    "gguf": {"export"},
    "fastapi": {"serve", "studio", "cli"},
    "uvicorn": {"serve", "studio", "cli"},
    "prometheus_client": {"serve", "cli"},
    "xgrammar": {"serve", "cli"},
    "shtab": {"cli"},
    "vllm": {"vllm_plugin"},
    "ray": {"launch"},
}

# Importing these takes a second or more: commands import them when they run.
HEAVY = {"torch", "transformers", "trl", "accelerate", "datasets", "matplotlib", "safetensors", "pandas", "pyarrow"}
HEAVY |= {"fastapi", "pydantic", "uvicorn", "ray"}


def part_of(module: Path) -> str:
    """`train` for src/theodora/train/report.py, `errors` for src/theodora/errors.py."""
    return module.relative_to(SOURCE).with_suffix("").parts[0]


@cache
def imports(module: Path, *, at_import_time: bool = False) -> list[tuple[int, str]]:
    """Line and dotted name of everything that `module` imports, but not of what only type checkers see."""
    found: list[tuple[int, str]] = []
    package = ("theodora", *module.relative_to(SOURCE).parent.parts)
    stack: list[ast.AST] = [ast.parse(module.read_text(encoding="utf-8"))]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*above, *filter(None, [node.module])))
            found.extend((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            stack.extend(node.orelse)
        elif not (at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            stack.extend(ast.iter_child_nodes(node))
    return found


def allowed_parts(part: str) -> set[str]:
    floor = next(index for index, parts in enumerate(FLOORS) if part in parts)
    return {part}.union(*FLOORS[:floor], BESIDE.get(part, ()))


def test_imports_run_one_way():
    front_doors = {SOURCE / "__init__.py", SOURCE / "__main__.py"}  # the public names and `python -m theodora`
    modules = [module for module in MODULES if module not in front_doors]
    homeless = {part_of(module) for module in modules}.difference(*FLOORS)
    assert not homeless, f"{', '.join(homeless)} has no floor: give it one in {Path(__file__).name}"
    nothing([told for module in modules for told in upward(module)])


def upward(module: Path) -> list[str]:
    part = part_of(module)
    return [
        f"{module}:{line}: {part} imports {name}"
        for line, name in imports(module)
        if name.startswith("theodora.") and name.split(".")[1] not in allowed_parts(part) | {"__version__"}
    ]


def nothing(wrong: list[str]) -> None:
    assert not wrong, "\n".join(wrong)


def test_contributors_read_of_the_same_floors():
    text = (SOURCE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    told = text.split("imports run downwards only", 1)[1].split("\n\n")[1]
    assert [set(re.findall(r"\w+", floor)) for floor in told.split("←")] == FLOORS


def test_each_library_is_known_in_one_place():
    nothing([told for module in MODULES for told in out_of_place(module)])


def out_of_place(module: Path) -> list[str]:
    return [
        f"{module}:{line}: {name} may be imported only in {ONLY_IN[library] or 'the tests'}"
        for line, name in imports(module)
        if (library := name.split(".")[0]) in ONLY_IN and part_of(module) not in ONLY_IN[library]
    ]


def test_matplotlib_is_imported_where_a_figure_is_drawn():
    wrong = [
        f"{module}:{line}: import {name} inside the function that draws"
        for module in MODULES
        for line, name in imports(module, at_import_time=True)
        if name.split(".")[0] == "matplotlib"
    ]
    nothing(wrong)


def test_no_command_imports_what_is_heavy_before_it_runs():
    """`theodora train --help` is as instant as `theodora --help`, and a mistyped flag is reported at once."""
    modules = [module for group in COMMANDS.values() for module, _ in group.values()]
    script = f"import sys, {', '.join(modules)}; print(*({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split() == []


def test_no_files_import_each_other_in_a_circle():
    """Whoever reads a file can stop at what it imports. Imports inside functions count: they only hide a circle."""
    names = {
        ".".join(("theodora", *module.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): module
        for module in MODULES
        if module.parent != SOURCE or module.name not in {"__init__.py", "__main__.py"}  # the front doors
    }
    below: dict[str, set[str]] = {}
    for name, module in names.items():
        found = {imported for _, imported in imports(module)}
        files = {each if each in names else each.rpartition(".")[0] for each in found}  # of a name in it: its file
        below[name] = (files & names.keys()) - {name}
    while free := [name for name, needs in below.items() if not needs & below.keys()]:
        for name in free:
            del below[name]
    assert not below, "\n".join(
        f"{name} imports {', '.join(sorted(needs & below.keys()))}" for name, needs in below.items()
    )


def test_the_law_sees_what_it_forbids(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    (tmp_path / "layers").mkdir()
    module = tmp_path / "layers" / "linear.py"
    module.write_text("import trl\ndef f():\n    from ..adapters import inject\n    from theodora import cli\n")
    assert sorted(imports(module)) == [(1, "trl"), (3, "theodora.adapters.inject"), (4, "theodora.cli")]
    assert imports(module, at_import_time=True) == [(1, "trl")]
    assert [told.partition(": ")[2] for told in upward(module)] == [
        "layers imports theodora.cli",
        "layers imports theodora.adapters.inject",
    ]
    (told,) = out_of_place(module)
    assert "trl may be imported only in" in told
    with pytest.raises(AssertionError, match="trl"):
        nothing([told])
