"""Commands with an end and a result: inspect, export, merge, combine, verify, in processes that outlive the studio.

Each has a folder in the studio's own, with what was asked and what its process says; what it makes stands where it was
asked for. Whether it came to its end is told by what it writes last.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from theodora.errors import TheodoraError, UsageError
from theodora.files.atomic import atomic_write
from theodora.safe_text import plain_lines
from theodora.studio.bodies import Mistyped
from theodora.studio.metrics import read, tail
from theodora.studio.processes import ask_to_end, begin, is_alive
from theodora.studio.sources import source_of

REPORT, FIGURES = "report.json", "figures"
"""What inspect writes into the job's folder."""
FORMS = ("hf", "peft", "mlx", "gguf", "gguf-lora", "served")
COMBINATIONS = ("linear", "svd", "ties", "dare_linear", "dare_ties")
_DTYPES = {"hf": ("fp32", "bf16", "fp16"), "gguf": ("fp32", "bf16", "fp16", "q8_0")}
_ONTO = ("original", "dequantised", "quantised")
_ASKED, _LOG = "asked.json", "log"
_KEPT = 100  # jobs; older ones go, and nothing that they made
_MOST_RUNS = 8


class NoSuchJob(TheodoraError):
    """None of that name is known."""


@dataclass
class Job:
    """What was asked, and who is at it."""

    kind: str
    """inspect, export, merge, combine or verify."""
    title: str
    """For people."""
    words: list[str] = field(default_factory=list[str])
    """Of the command."""
    result: str = ""
    """The file or folder that is there once all went well; empty: the log tells it."""
    at: float = 0.0
    """Seconds since the epoch."""
    pid: int = 0
    started: str = ""
    told_to_stop: bool = False


class Jobs:
    """All that are kept.

    Args:
        folder: for them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

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
        id = f"{time.time_ns():x}-{secrets.token_hex(4)}"
        folder, given = self._folder / id, _Typed(typed)
        job = checks[kind](given, folder)
        if given.problems:
            raise Mistyped(given.problems)
        if any(each.kind == kind and _at_work(each) for _, each in self._all()):
            raise UsageError(f"Another {kind} is at work. Stop it, or wait for its end.")
        folder.mkdir(parents=True)
        job.pid, job.started = begin(job.words, folder / _LOG, os.getcwd())
        job.at = time.time()
        _keep(folder, job)
        for old, each in [*self._all()][_KEPT:]:
            if not _at_work(each):
                shutil.rmtree(old, ignore_errors=True)
        return id

    def states(self) -> list[dict[str, Any]]:
        """How all of them stand, the newest first."""
        return [_state(folder, job) for folder, job in self._all()]

    def one(self, id: str) -> dict[str, Any]:
        """How one stands, the command, what its process says, and of inspect its report and figures.

        Raises:
            NoSuchJob: there is none of that id.
        """
        folder, job = self._of(id)
        found = {
            "state": _state(folder, job),
            "command": shlex.join(["theodora", *job.words]),
            "log": plain_lines(tail(folder / _LOG).decode("utf-8", errors="replace").replace("\r\n", "\n")),
        }
        if job.kind == "inspect":
            found |= {"report": _report(folder), "figures": _figures(folder)}
        return found

    def figure(self, id: str, name: str) -> bytes:
        """A picture of inspect's, as PNG; empty where there is none of that name."""
        folder, _ = self._of(id)
        return read(folder / FIGURES / name) if name in _figures(folder) else b""

    def stop(self, id: str) -> None:
        """End one that is at work. What it has not finished is not there."""
        folder, job = self._of(id)
        job.told_to_stop = True
        _keep(folder, job)
        if not ask_to_end(job.pid, job.started):
            raise UsageError("It has ended already.")

    def forget(self, id: str) -> None:
        """Delete what is known of one that has ended; what it made stays."""
        folder, job = self._of(id)
        if _at_work(job):
            raise UsageError("It is at work. Stop it first.")
        shutil.rmtree(folder)

    def _of(self, id: str) -> tuple[Path, Job]:
        for folder, job in self._all():
            if folder.name == id:
                return folder, job
        raise NoSuchJob("There is no such work here.")

    def _all(self) -> Iterator[tuple[Path, Job]]:
        try:
            names = sorted(os.listdir(self._folder), reverse=True)
        except OSError:
            return
        for name in names:
            if (job := _asked(self._folder / name)) is not None:
                yield self._folder / name, job


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
    return Job("inspect", title, words, str(folder / REPORT))


def _export(typed: _Typed, _: Path) -> Job:
    adapter, form, output = (
        typed.source("adapter", adapter=True),
        typed.one_of("form", FORMS, "hf"),
        typed.free("output"),
    )
    dtype = typed.one_of("dtype", _DTYPES.get(form, ()))
    if form == "gguf-lora" and not typed.text("lora_rank"):
        typed.wrong("lora_rank", "is empty; llama.cpp reads LoRA alone, so say the rank to make one of")
    if form.startswith("gguf") and output and not output.endswith(".gguf"):
        typed.wrong("output", "expected a name that ends in .gguf")
    words = ["export", adapter, "--to", form, "--output", output]
    words += typed.flags(base_model=typed.base, dtype=dtype, lora_rank=typed.number("lora_rank"))
    return Job("export", f"{Path(adapter).name} as {form}", words, output)


def _merge(typed: _Typed, _: Path) -> Job:
    adapter, output = typed.source("adapter", adapter=True), typed.free("output")
    onto, dtype = typed.one_of("onto", _ONTO), typed.one_of("dtype", _DTYPES["hf"])
    words = ["merge", adapter, "--output", output, *typed.flags(base_model=typed.base, onto=onto, dtype=dtype)]
    return Job("merge", f"{Path(adapter).name} merged", words, output)


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
    return Job("combine", title, [*words, *typed.flags(base_model=typed.base)], output)


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
    return Job("verify", " and ".join(Path(form).name for form in forms), words)


def _state(folder: Path, job: Job) -> dict[str, Any]:
    alive = _at_work(job)
    there = _passed(folder) if job.kind == "verify" else os.path.lexists(job.result)
    word = "running" if alive else "finished" if there else "stopped" if job.told_to_stop else "failed"
    found = {name: value for name, value in asdict(job).items() if name not in ("words", "pid", "started")}
    return found | {"id": folder.name, "state": word, "seconds": time.time() - job.at if alive else None}


def _at_work(job: Job) -> bool:
    return is_alive(job.pid, job.started)


def _passed(folder: Path) -> bool:
    """Whether `verify` has said that both predict the same."""
    return b"The two forms agree." in tail(folder / _LOG, 4096)


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


def _keep(folder: Path, job: Job) -> None:
    with atomic_write(folder / _ASKED) as file:
        file.write_text(json.dumps(asdict(job), indent=1), encoding="utf-8")


def _asked(folder: Path) -> Job | None:
    """What the file says; None where it is none of ours."""
    try:
        found = Job(**json.loads((folder / _ASKED).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    plain = Job("", "")
    right = all(type(value) is type(getattr(plain, name)) for name, value in vars(found).items())
    return found if right else None
