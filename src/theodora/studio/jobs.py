"""Commands with an end and a result: inspect, export, merge, combine, verify.

What they make stands where it was asked for. Whether one came to its end is told by what it writes last.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theodora.cli.combine import METHODS
from theodora.cli.export import FORMS
from theodora.cli.merge import ONTO
from theodora.errors import UsageError
from theodora.studio.bodies import Mistyped
from theodora.studio.metrics import log_text, read, tail
from theodora.studio.sources import source_of
from theodora.studio.works import LOG, Work, Works

REPORT, FIGURES = "report.json", "figures"
"""What inspect writes into the job's folder."""
_FLOATS = ("fp32", "bf16", "fp16")
DTYPES = {"hf": _FLOATS, "merge": _FLOATS, "gguf": (*_FLOATS, "q8_0")}
"""Of weights, by what is made."""
COMBINATIONS = tuple(method for method in METHODS if method != "cat")
"""Ways to combine adapters; `cat` is another word for linear."""
_KEPT = 100  # jobs
_MOST_RUNS = 8


@dataclass
class Job(Work):
    """What was asked."""

    kind: str
    """inspect, export, merge, combine or verify."""
    title: str
    """For people."""
    result: str = ""
    """The file or folder that is there once all went well; empty: the log tells it."""

    def has_result(self, folder: Path) -> bool:
        """Whether it is there; of verify whether it has said that both predict the same."""
        if self.kind == "verify":
            return b"The two forms agree." in tail(folder / LOG, 4096)
        return os.path.lexists(self.result)


class Jobs:
    """All that are kept.

    Args:
        folder: for them.
    """

    def __init__(self, folder: Path) -> None:
        self.works = Works(folder, Job, _KEPT, "work")

    def start(self, kind: str, typed: Mapping[str, Any]) -> str:
        """Begin one; its id.

        Raises:
            Mistyped: naming every field that makes no sense.
            UsageError: there is no such kind, or another of its kind is at work.
        """
        checks: dict[str, Callable[[_Typed, Path], Job]] = {
            "inspect": _inspect,
            "export": _export,
            "merge": _merge,
            "combine": _combine,
            "verify": _verify,
        }
        if kind not in checks:
            raise UsageError(f"{kind[:40]} is nothing that can be begun here; expected one of {', '.join(checks)}.")
        folder, given = self.works.place(), _Typed(typed)
        job = checks[kind](given, folder)
        if given.problems:
            raise Mistyped(given.problems)
        if any(each.kind == kind and each.at_work(place) for place, each in self.works):
            raise UsageError(f"Another {kind} is at work. Stop it, or wait for its end.")
        self.works.begin(folder, job)
        return folder.name

    def one(self, id: str) -> dict[str, Any]:
        """How one stands, what its process says, and of inspect its report and figures.

        Raises:
            NotKnown: there is none of that id.
        """
        folder, job = self.works.of(id)
        found = {"state": self.works.state(folder, job), "log": log_text(folder / LOG)}
        if job.kind == "inspect":
            found |= {"report": _report(folder), "figures": _figures(folder)}
        return found

    def figure(self, id: str, name: str) -> bytes:
        """A picture of inspect's, as PNG; empty where there is none of that name."""
        folder, _ = self.works.of(id)
        return read(folder / FIGURES / name) if name in _figures(folder) else b""


class _Typed:
    """What was typed, and what is wrong with it, by name of field."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given
        self.problems: dict[str, str] = {}

    def text(self, name: str) -> str:
        return str(self._given.get(name) or "").strip()

    def wrong(self, name: str, told: str) -> str:
        self.problems.setdefault(name, told)
        return ""

    def one_of(self, name: str, choices: Sequence[str], default: str = "") -> str:
        text = self.text(name) or default
        return text if text in ("", *choices) else self.wrong(name, f"expected one of {', '.join(choices)}")

    def number(self, name: str) -> str:
        text = self.text(name)
        right = not text or (re.fullmatch(r"\d{1,6}", text) and int(text) > 0)
        return text if right else self.wrong(name, "expected a whole number above 0")

    def source(self, name: str, *, adapter: bool | None = None) -> str:
        """A run, an adapter or a model; an adapter alone, or a model alone, if that is said."""
        try:
            found = source_of(self.text(name))
        except UsageError as error:
            return self.wrong(name, str(error))
        if adapter is not None and found.is_adapter != adapter:
            return self.wrong(name, f"{found.name} is {'no' if adapter else 'an'} adapter")
        return found.name

    def sources(self, name: str) -> list[str]:
        given = self._given.get(name)
        typed = [str(each).strip() for each in given if str(each).strip()] if isinstance(given, list) else []
        if not 0 < len(typed) <= _MOST_RUNS:
            self.wrong(name, f"expected one to {_MOST_RUNS} runs, adapters or models")
        found = []
        for each in typed:
            path = Path(os.path.abspath(os.path.expanduser(each)))
            if path.is_dir():
                found.append(str(path))
            else:
                self.wrong(name, f"{path} is no folder of this machine")
        return found

    def free(self, name: str) -> str:
        """A path at which nothing stands."""
        text = self.text(name)
        if not text:
            return self.wrong(name, "is empty; expected a name that is free")
        path = os.path.abspath(os.path.expanduser(text))
        return path if not os.path.lexists(path) else self.wrong(name, f"{path} is there already; nothing is replaced")

    def flags(self, **given: str) -> list[str]:
        """`--name value` of each that has one."""
        return [word for name, value in given.items() if value for word in (f"--{name.replace('_', '-')}", value)]

    @property
    def base(self) -> str:
        """The base model, if one was typed."""
        return self.source("base_model", adapter=False) if self.text("base_model") else ""


def _inspect(typed: _Typed, folder: Path) -> Job:
    runs = typed.sources("runs")
    words = ["inspect", *runs, *typed.flags(base_model=typed.base)]
    words += ["--report", str(folder / REPORT), "--figures", str(folder / FIGURES)]
    title = ", ".join(Path(run).name for run in runs)
    return Job("inspect", title, str(folder / REPORT), words=words)


def _export(typed: _Typed, _: Path) -> Job:
    adapter, form, output = (
        typed.source("adapter", adapter=True),
        typed.one_of("form", FORMS, "hf"),
        typed.free("output"),
    )
    dtype = typed.one_of("dtype", DTYPES.get(form, ()))
    if form == "gguf-lora" and not typed.text("lora_rank"):
        typed.wrong("lora_rank", "is empty; llama.cpp reads LoRA alone, so say the rank to make one of")
    if form.startswith("gguf") and output and not output.endswith(".gguf"):
        typed.wrong("output", "expected a name that ends in .gguf")
    words = ["export", adapter, "--to", form, "--output", output]
    words += typed.flags(base_model=typed.base, dtype=dtype, lora_rank=typed.number("lora_rank"))
    return Job("export", f"{Path(adapter).name} as {form}", output, words=words)


def _merge(typed: _Typed, _: Path) -> Job:
    adapter, output = typed.source("adapter", adapter=True), typed.free("output")
    onto, dtype = typed.one_of("onto", tuple(ONTO)), typed.one_of("dtype", DTYPES["merge"])
    words = ["merge", adapter, "--output", output, *typed.flags(base_model=typed.base, onto=onto, dtype=dtype)]
    return Job("merge", f"{Path(adapter).name} merged", output, words=words)


def _combine(typed: _Typed, _: Path) -> Job:
    adapters, output = typed.sources("adapters"), typed.free("output")
    if len(adapters) < 2:
        typed.wrong("adapters", "expected two or more, one a line")
    weights = typed.text("weights").split()
    if weights and not all(re.fullmatch(r"-?\d{1,9}(\.\d{1,9})?", each) for each in weights):
        typed.wrong("weights", "expected numbers, such as 0.7 0.3")
    elif weights and len(weights) != len(adapters):
        typed.wrong("weights", f"{len(weights)} for {len(adapters)} adapters; expected one for each")
    density = typed.text("density")
    if density and not re.fullmatch(r"0?\.\d{1,9}|1", density):
        typed.wrong("density", "expected a share above 0 and at most 1")
    words = ["combine", *adapters, "--output", output, *(["--weights", *weights] if weights else [])]
    words += typed.flags(method=typed.one_of("method", COMBINATIONS), rank=typed.number("rank"), density=density)
    title = " + ".join(Path(adapter).name for adapter in adapters)
    return Job("combine", title, output, words=[*words, *typed.flags(base_model=typed.base)])


def _verify(typed: _Typed, _: Path) -> Job:
    forms = []
    for name in ("a", "b"):
        text = typed.text(name)
        path = os.path.abspath(os.path.expanduser(text))
        if text.endswith(".gguf"):
            forms.append(path if os.path.isfile(path) else typed.wrong(name, f"{path} is no file of this machine"))
        else:
            forms.append(typed.source(name))
    words = ["verify", *forms, *typed.flags(base_model=typed.base)]
    return Job("verify", " and ".join(Path(form).name for form in forms), words=words)


def _report(folder: Path) -> Any:
    try:
        return json.loads(read(folder / REPORT, 256 << 20))
    except (ValueError, RecursionError):
        return None


def _figures(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder / FIGURES) if re.fullmatch(r"[a-z_]{1,40}\.png", name))
    except OSError:
        return []
