"""What Theodora needs, what its extras bring, and what else it works with: one table, which pyproject.toml is held to.

Nothing is imported to find out what is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

CORE = (
    *("torch>=2.11", "transformers>=5.17", "trl>=1.16", "accelerate>=1.15", "datasets>=5.0", "safetensors>=0.8"),
    *("regex>=2025.10", "pyyaml>=6", "rich>=14", "matplotlib>=3.9"),
)
"""Requirements without which no command works."""
_LINUX = "; platform_system == 'Linux'"


@dataclass(frozen=True, kw_only=True)
class Extra:
    """Packages that some feature needs."""

    needs: tuple[str, ...]
    gives: str
    """What works with them."""


EXTRAS = {
    "completion": Extra(needs=("shtab>=1.8",), gives="theodora completion: names and values by Tab in bash, zsh, fish"),
    "demo": Extra(needs=("gguf>=0.19",), gives="theodora demo in full, export --to gguf, verify on GGUF files"),
    "gpu": Extra(
        needs=(f"liger-kernel>=0.8{_LINUX}",), gives="fast kernels on GPUs (it brings Triton), --use-liger-kernel"
    ),
    "quant": Extra(
        needs=("bitsandbytes>=0.50", f"torchao>=0.18{_LINUX}"), gives="quantised bases: --quantize nf4, int8, int4"
    ),
    "ray": Extra(needs=("ray[train]>=2.60",), gives="--launcher ray: many machines"),
    "serve": Extra(
        needs=("fastapi>=0.115", "uvicorn>=0.34", "prometheus-client>=0.21", "xgrammar>=0.2.9"),
        gives="theodora serve: HTTP as OpenAI has it, grammars, metrics",
    ),
    "studio": Extra(needs=("fastapi>=0.115", "uvicorn>=0.34"), gives="theodora studio: a page in the browser"),
}
"""Extra → what it brings: pip install 'theodora[NAME]'. Those for developing Theodora (test, dev, …) are not listed."""

OTHERS = {
    "peft": "accelerate_peft, and PEFT's rows in bench and conformance",
    "tensorboard": "--report-to tensorboard",
    "wandb": "--report-to wandb",
    "trackio": "--report-to trackio",
    "deepspeed": "--deepspeed FILE",
    "gptqmodel": "bases in GPTQ's and AWQ's form",
    "compressed-tensors": "bases in compressed-tensors' form",
    "hqq": "bases in HQQ's form",
    "vllm": "the plug-in that teaches vLLM DoRA, --use-vllm in grpo",
}
"""Packages that no extra brings, and what they are for."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package that is needed for something."""

    name: str
    needs: str
    """The versions that do, as `>=2.11`; empty: any."""
    installed: str | None
    """Its version; None: it is not there."""
    fits: bool
    """Whether it is there, in such a version."""


def pip_line(extra: str) -> str:
    """What to type for an extra."""
    return f"pip install 'theodora[{extra}]'"


def packages(requirements: tuple[str, ...]) -> list[Package]:
    """The packages of requirements that concern this machine, and what is installed of them."""
    return list(_packages(requirements))


def missing_in(extra: str) -> list[Package]:
    """What an extra needs and is not there."""
    return [package for package in packages(EXTRAS[extra].needs) if not package.fits]


def installed(name: str) -> str | None:
    """The version of a package, if it is there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _packages(requirements: tuple[str, ...]) -> Iterator[Package]:
    from packaging.requirements import Requirement  # transformers brings it

    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        found = installed(requirement.name)
        fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        yield Package(name=requirement.name, needs=str(requirement.specifier), installed=found, fits=fits)
