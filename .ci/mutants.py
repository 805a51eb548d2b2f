"""Run mutmut on a random sample of the mutants of each file: make mutants.

All mutants of the formulas, the layers, the fast path, the files and the adapters are sixteen thousand, days of two
cores. A sample of each file with a fixed seed finds what a whole run would find in proportion. Left out of the sample
are changes to the words of messages (a string with a space in it), which no test is to pin.

    python .ci/mutants.py --sample 25 --seed 0 'layers/*' adapters/merge.py

First mutmut runs each mutant against those quick tests that execute its function (pyproject.toml names the folders).
What survives meets the slower tests that concern its file (WIDER, below), one process for each. Then a table and the
diffs of the survivors are printed and written to mutants/report.txt.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code

SOURCE = Path("src/theodora")
MUTATED = Path("mutants") / SOURCE
_TRITON = "TRITON_INTERPRET=1 tests/fastpath tests/layers tests/kernels/test_gated.py"
WIDER = {
    "fastpath/peft*.py": "tests/compat " + _TRITON,
    "fastpath/*.py": "tests/train/test_light.py " + _TRITON,
    "kernels/base_weight.py": "tests/kernels " + _TRITON,
    "kernels/flat_layers.py": "tests/kernels " + _TRITON,
    "kernels/notes.py": "tests/kernels " + _TRITON,
    "patches.py": _TRITON,
    "paths.py": "tests/analysis tests/cli/test_inspect.py",
    "files/atomic.py": "tests/train/test_stop.py tests/train/test_trajectories.py tests/crash",
    "files/base_model.py": "tests/fuzz/test_base.py tests/export tests/cli/test_merge.py",
    "files/adapter.py": "tests/compat tests/cli/test_merge.py tests/serve/test_engine.py",
    "files/distrust.py": "tests/fuzz",
    "files/m*.py": "tests/export tests/cli tests/evaluate tests/fuzz/test_base.py tests/train/test_run.py",
    "adapters/inject.py": "tests/compat tests/train/test_run.py tests/train/test_movement.py",
    "adapters/trainer_hooks.py": "tests/compat tests/train/test_trajectories.py",
    "adapters/quantize.py": "tests/train/test_base_dtype.py tests/export",
    "adapters/save.py": "tests/compat tests/train/test_trajectories.py tests/serve/test_engine.py",
    "adapters/m*.py": "tests/export tests/cli tests/evaluate tests/fuzz/test_base.py tests/train/test_run.py",
    "merging/to_lora.py": "tests/export",
    "merging/*.py": "tests/export tests/cli tests/evaluate tests/fuzz/test_base.py tests/train/test_run.py",
    "serve/slotted*.py": "tests/serve",
    "layers/float8.py": "tests/train/test_base_dtype.py tests/kernels/test_float8.py",
    "layers/swap.py": "tests/serve",
    "layers/*.py": "tests/train/test_light.py tests/compat " + _TRITON,
}
_SECONDS, _TIMED_OUT = 300, 36  # mutmut's number for it


def main() -> None:
    """Sample, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=["*"], help="patterns of files below src/theodora")
    parser.add_argument("--sample", type=int, default=25, help="mutants of each file; 0 for all")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--again", action="store_true", help="only what survived the last time")
    options = parser.parse_args()
    if not MUTATED.is_dir():  # one mutant, so that mutmut writes them all and learns which test touches what
        _mutmut("theodora.functional.x_lora_delta__mutmut_1")
    chosen = {
        str(file): names
        for file in sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
        if any(fnmatch.fnmatch(str(file), pattern) for pattern in options.files)
        and (names := sample(file, options.sample, options.seed))
    }
    if options.again:
        chosen = {file: [n for n in names if _status(file, n) != "killed"] for file, names in chosen.items()}
    _mutmut(*(name for names in chosen.values() for name in names))
    for file, names in chosen.items():
        _run_wider(file, [name for name in names if _status(file, name) not in ("killed", "timeout")])
    text = report({file: names for file, names in chosen.items() if names})
    Path("mutants/report.txt").write_text(text, encoding="utf-8")
    print(text)


def _mutmut(*names: str) -> None:
    command = [str(Path(sys.executable).with_name("mutmut")), "run", "--max-children", "1", *names]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        sys.exit(done.stdout[-3000:])


def _run_wider(file: str, names: list[str]) -> None:
    """Run mutants against the slower tests, and write the results where mutmut does."""
    tests = next((tests for pattern, tests in WIDER.items() if fnmatch.fnmatch(file, pattern)), "")
    settings = {"PYTHONPATH": "src", **dict(word.split("=") for word in tests.split() if "=" in word)}
    command = [sys.executable, "-m", "pytest", "--all", "-x", "-q", "-k", "not compile", "-p", "no:cacheprovider"]
    command += [word for word in tests.split() if "=" not in word]
    for name in names if tests else []:
        environment = {**os.environ, **settings, "MUTANT_UNDER_TEST": name}
        try:
            done = subprocess.run(command, env=environment, cwd="mutants", capture_output=True, timeout=_SECONDS)
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = _TIMED_OUT
        if code in (1, _TIMED_OUT):
            meta = MUTATED / f"{file}.meta"
            found = json.loads(meta.read_text())
            found["exit_code_by_key"][name] = code
            meta.write_text(json.dumps(found))


def _results(file: Path | str) -> dict[str, int | None]:
    meta = MUTATED / f"{file}.meta"
    return json.loads(meta.read_text())["exit_code_by_key"] if meta.is_file() else {}


def _status(file: Path | str, name: str) -> str:
    return status_by_exit_code[_results(file)[name]]


def sample(file: Path, count: int, seed: str) -> list[str]:
    """Names of mutants of a file, in the order of their numbers."""
    names = sorted(_results(file))
    if not names:
        return []
    functions = {
        node.name: node
        for node in ast.walk(ast.parse((MUTATED / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    names = [name for name in names if not _changes_words(functions, name.rsplit(".", 1)[1])]
    chosen = names if not count or len(names) <= count else random.Random(f"{seed} {file}").sample(names, count)
    return sorted(chosen, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def _changes_words(functions: dict[str, ast.FunctionDef], name: str) -> bool:
    original = functions.get(re.sub(r"__mutmut_\d+$", "__mutmut_orig", name))
    if original is None or name not in functions:
        return False
    for before, after in zip(ast.walk(original), ast.walk(functions[name]), strict=False):
        if isinstance(before, ast.Constant) and isinstance(after, ast.Constant) and before.value != after.value:
            return isinstance(before.value, str) and " " in before.value.strip()
        if type(before) is not type(after):
            return False
    return False


def report(chosen: dict[str, list[str]]) -> str:
    """A table in Markdown, then the diff of each mutant that was not killed."""
    lines = ["| file | mutants | sampled | killed | timed out | survived | no test |", "|---|---|---|---|---|---|---|"]
    total: Counter[str] = Counter()
    alive: list[str] = []
    for file, names in chosen.items():
        results = _results(file)
        counts = Counter(status_by_exit_code[results[name]] for name in names)
        row = {"mutants": len(results), "sampled": len(names), **counts}
        total.update(row)
        lines.append(_row(f"`{file}`", row))
        for name in names:
            if (status := status_by_exit_code[results[name]]) not in ("killed", "timeout"):
                diff = get_diff_for_mutant(name, path=SOURCE / file).splitlines()
                changed = [line for line in diff if re.match(r"[-+](?![-+])", line)]
                alive.append("\n".join([f"\n{status}: {name}", *changed]))
    return "\n".join([*lines, _row("all", total), *alive]) + "\n"


def _row(title: str, row: Counter[str] | dict[str, int]) -> str:
    columns = ("mutants", "sampled", "killed", "timeout", "survived", "no tests")
    return f"| {title} | " + " | ".join(str(row.get(name, 0)) for name in columns) + " |"


if __name__ == "__main__":
    main()
