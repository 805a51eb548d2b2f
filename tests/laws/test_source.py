"""What the source may not say, and what it must."""

import ast
from functools import cache
from pathlib import Path

import theodora

SOURCE = Path(theodora.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))


@cache
def trees() -> dict[Path, ast.Module]:
    return {module: ast.parse(module.read_text(encoding="utf-8")) for module in MODULES}


@cache
def nodes() -> list[tuple[Path, ast.AST]]:
    return [(module, node) for module, tree in trees().items() for node in ast.walk(tree)]


# Reads back what it has just pickled itself, in memory; random states of a run's own checkpoint, which are tensors and
# numbers alone (`weights_only`), as transformers reads those of a single process.
OWN_BYTES = {"conformance/copies.py", "train/trainer_checkpoints.py"}


def name_of(module: Path) -> str:
    return str(module.relative_to(SOURCE))


def test_no_code_of_strangers_runs_unasked():
    """No pickles, which run code when opened, and remote code only where the caller passes the permission on."""
    wrong = []
    for module, node in nodes():
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.split(".")[0] for alias in node.names} | {getattr(node, "module", None)}
            if names & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}:
                wrong.append((name_of(module), node.lineno, "imports a pickle"))
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            # Without the argument transformers asks at the terminal, where a pipe may say yes.
            if called.startswith("Auto") and called.endswith((".from_pretrained", ".from_config")):
                passed = {keyword.arg for keyword in node.keywords}
                if not passed & {"trust_remote_code", None}:
                    wrong.append((name_of(module), node.lineno, "leaves open whether remote code is trusted"))
            if called in {"torch.load", "eval", "exec"} and name_of(module) not in OWN_BYTES:
                wrong.append((name_of(module), node.lineno, f"calls {called}"))
            if any(
                keyword.arg == "trust_remote_code" and getattr(keyword.value, "value", None) is True
                for keyword in node.keywords
            ):
                wrong.append((name_of(module), node.lineno, "trusts remote code without being asked to"))
    assert not wrong


def test_everything_public_says_what_it_does():
    """As ruff's D1 asks, except that no `noqa` helps here and an empty docstring does not count."""
    silent = []
    for module, tree in trees().items():
        public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
        silent += [
            f"{module}:{getattr(node, 'lineno', 1)}: {getattr(node, 'name', 'the module')}"
            for node in (tree, *public)
            if not (ast.get_docstring(node) or "").strip()
        ]
    assert not silent, "\n".join(silent)


def test_files_stay_small_enough_to_read():
    lines = {name_of(module): len(module.read_text(encoding="utf-8").splitlines()) for module in MODULES}
    assert {name: count for name, count in lines.items() if count > 500} == {}


def test_foreign_text_reaches_a_terminal_by_one_way():
    """Through `theodora.terminal`, which reads no markup in strings and lets no escape sequence through."""
    wrong = []
    for module, call in nodes():
        if not isinstance(call, ast.Call):
            continue
        called = ast.unparse(call.func)
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if called.rpartition(".")[2] in {"Console", "get_console"}:
            wrong.append((name_of(module), call.lineno, "makes a console that is no Terminal"))
        if called.rpartition(".")[2] in {"from_markup", "from_ansi", "render_markup"}:
            wrong.append((name_of(module), call.lineno, f"{called} reads markup in text"))
        if called == "TextColumn" and getattr(keywords.get("markup"), "value", None) is not False:
            wrong.append((name_of(module), call.lineno, "a TextColumn reads markup unless markup=False"))
        titles = [keywords[name] for name in ("title", "subtitle") if called == "Panel" and name in keywords]
        if any(not isinstance(title, ast.Constant | ast.Call) for title in titles):
            wrong.append((name_of(module), call.lineno, "a Panel reads markup in its title; expected a Text"))
        if called == "print" and name_of(module) not in {"cli/main.py", "cli/console.py"}:
            wrong.append((name_of(module), call.lineno, "prints past the Terminal"))
    assert not wrong


def sets_arguments(tree: ast.AST) -> list[int]:
    """Lines that set a field of something called `args` or `arguments`."""
    lines = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            targets = [ast.Attribute(node.args[0], "any")]
        for target in targets:
            for part in ast.walk(target) if target is not None else ():
                if isinstance(part, ast.Attribute) and ast.unparse(part.value).split(".")[-1] in {"args", "arguments"}:
                    lines.append(node.lineno)
    return lines


def test_arguments_of_a_run_are_finished_in_one_place():
    """Whoever wonders why the trainer has a setting reads train/arguments.py, and no file after it."""
    wrong = {name_of(module): sets_arguments(trees()[module]) for module in MODULES if module.parent.name == "train"}
    assert {name: lines for name, lines in wrong.items() if lines and name != "train/arguments.py"} == {}
    assert sets_arguments(ast.parse("a.args.b = 1\nself.args.b += 1\nx, arguments.c = y\nsetattr(args, n, v)")) == [
        1, 2, 3, 4,
    ]  # fmt: skip
