"""`theodora doctor`: what is installed, what this machine can do, and what is missing for which feature.

example:
  theodora doctor
  theodora doctor --json

Of the packages only torch is imported; the others are looked up. The exit code is 0 unless what every command needs is
missing, too old or broken.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from theodora.extras import CORE, EXTRAS, OTHERS, Package, installed, missing_in, packages, pip_line

if TYPE_CHECKING:
    from theodora.cli.this_machine import Here

GIB = 2**30
_LEAST_DISK = 10 * GIB
State = Literal["yes", "slow", "no"]


@dataclass(frozen=True, kw_only=True)
class Feature:
    """Something that this machine can do, or cannot."""

    name: str
    state: State
    """yes; slow: it works, and something better is missing; no."""
    why: str
    mend: str = ""
    """What to type, if that helps."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `theodora doctor`."""
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(args: argparse.Namespace) -> int:
    """Look, and say."""
    from theodora.cli.console import print_json, stdout

    core = packages(CORE)
    here, broken = _look()
    features = list(_features(here)) if here is not None else []
    works = broken is None and all(package.fits for package in core)
    if args.json:
        print_json(_as_json(core, here, broken, features, works))
    else:
        _print(stdout(), core, here, broken, features)
    return 0 if works else 1


def _look() -> tuple[Here | None, str | None]:
    """This machine, or why torch does not tell."""
    from theodora.cli.this_machine import look

    try:
        return look(), None
    except Exception as error:  # a build for another machine, a library that is not there
        return None, f"torch cannot be used: {type(error).__name__}: {error}"


def _features(here: Here) -> Iterator[Feature]:
    """What follows from what is installed and what the machine is."""
    gpu = bool(here.gpus)
    if here.gpu_unused is not None:
        yield Feature(name="GPU", state="no", why=f"there is one, and {here.gpu_unused}")
    bf16 = any(each.bf16 for each in here.gpus) if gpu else here.bf16
    yield Feature(
        name="bfloat16",
        state="yes" if bf16 else "slow",
        why="computed in, and chosen by itself" if bf16 else "no instructions for it here: float32 is used",
    )
    if gpu:
        yield _kernels(here)
        fp8 = all(each.fp8 for each in here.gpus)
        yield Feature(
            name="--base-dtype fp8",
            state="yes" if fp8 else "slow",
            why="products of float8"
            if fp8
            else "emulated: half the memory, no faster (from compute capability 8.9 on)",
        )
    yield _compile(here)
    for folder, what in ((here.cache, "models"), (here.temporary, "rows while a run prepares them")):
        if not folder.writable or folder.free < _LEAST_DISK:
            how = f"{folder.free / GIB:.1f} GiB are free" if folder.writable else "it cannot be written to"
            name = "HF_HOME" if folder is here.cache else "TMPDIR"
            yield Feature(name=f"disk for {what}", state="slow", why=f"{folder.path}: {how}", mend=f"{name}=FOLDER")


def _kernels(here: Here) -> Feature:
    triton = installed("triton") or installed("pytorch-triton-rocm")
    lacking = (
        "a C compiler" if here.compiler is None else "Python's headers (python3-dev)" if not here.headers else None
    )
    if triton is None:
        return Feature(name="fast kernels", state="slow", why="Triton is not installed", mend=pip_line("gpu"))
    if lacking is not None:
        why = f"Triton {triton} builds its kernels with what is missing here: {lacking}"
        return Feature(name="fast kernels", state="no", why=why, mend="apt install gcc python3-dev, or the like")
    return Feature(name="fast kernels", state="yes", why=f"Triton {triton}")


def _compile(here: Here) -> Feature:
    found = here.compiler is not None
    return Feature(
        name="--torch-compile",
        state="yes" if found else "no",
        why=here.compiler or "there is no C compiler",
        mend="" if found else "apt install gcc g++, or the like",
    )


def _as_json(
    core: list[Package], here: Here | None, broken: str | None, features: list[Feature], works: bool
) -> dict[str, Any]:
    from theodora import __version__

    return {
        "theodora": __version__,
        "works": works,
        "problem": broken,
        "core": [asdict(package) for package in core],
        "extras": {
            name: {
                "gives": extra.gives,
                "packages": [asdict(package) for package in packages(extra.needs)],
                "installed": not missing_in(name),
                "pip": pip_line(name),
            }
            for name, extra in EXTRAS.items()
        },
        "others": {name: {"gives": gives, "installed": installed(name)} for name, gives in OTHERS.items()},
        "machine": None if here is None else asdict(here),
        "features": [asdict(feature) for feature in features],
    }


def _print(console: Any, core: list[Package], here: Here | None, broken: str | None, features: list[Feature]) -> None:
    from rich import box
    from rich.table import Table

    from theodora import __version__

    console.print(f"Theodora {__version__}", style="bold")
    console.print(" · ".join(f"{package.name} {package.installed or '—'}" for package in core))
    for package in core:
        if not package.fits:
            found = f"{package.installed} is installed" if package.installed else "it is not installed"
            line = f"pip install --upgrade '{package.name}{package.needs}'"
            console.print(f"{package.name}: {found}; expected {package.needs}: {line}", style="red")
    if broken is not None:
        console.print(broken, style="red")
    if here is not None:
        _print_machine(console, here)
    if features:
        table = Table(box=box.SIMPLE_HEAD)
        for heading in ("feature", "", "what, or why not", "to mend it"):
            table.add_column(heading, no_wrap=heading in ("feature", ""), overflow="fold")
        for feature in features:
            table.add_row(feature.name, _mark(feature.state), feature.why, feature.mend)
        console.print(table)
    _print_extras(console)


def _print_extras(console: Any) -> None:
    """Every extra with the line that installs it, and what no extra brings."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("extra", "", "for", "pip install"):
        table.add_column(heading, no_wrap=heading != "for")
    for name, extra in EXTRAS.items():
        lacking = missing_in(name)
        told = ", ".join(package.name + (f" {package.needs}" if package.installed else "") for package in lacking)
        table.add_row(
            name,
            _mark("no" if lacking else "yes"),
            extra.gives + (f" (missing: {told})" if told else ""),
            pip_line(name).removeprefix("pip install "),
        )
    for name, gives in OTHERS.items():
        table.add_row("", _mark("yes" if installed(name) else "no"), gives, name)
    console.print(table)


def _mark(state: State) -> Any:
    from rich.text import Text

    sign, style = {"yes": ("✓", "green"), "slow": ("~", "yellow"), "no": ("—", "red")}[state]
    return Text(sign, style=style)


def _print_machine(console: Any, here: Here) -> None:
    console.print(f"Python {here.python} on {here.system}")
    instructions = ", ".join(here.instructions) or "no vector instructions that are used"
    console.print(f"CPU: {here.cpu}, {here.cores} cores; {instructions}")
    console.print(f"Memory: {here.memory / GIB:.1f} GiB that a run can have")
    for index, gpu in enumerate(here.gpus):
        capability = ".".join(map(str, gpu.capability))
        memory = f"{gpu.free / GIB:.1f} of {gpu.memory / GIB:.1f} GiB free"
        console.print(f"GPU {index}: {gpu.name}, compute capability {capability}, {memory}; CUDA {here.cuda}")
    if not here.gpus:
        console.print("GPU: none" + ("" if here.cuda else " (torch is a build for CPUs)"))
    offline = "; offline (HF_HUB_OFFLINE)" if here.offline else ""
    console.print(f"Models: {here.cache.path}, {here.cache.free / GIB:.1f} GiB free{offline}")
