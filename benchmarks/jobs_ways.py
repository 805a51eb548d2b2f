"""The ways of each job of jobs.py: what runs in turns, and what is taken down of each run."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from jobs_process import HERE, OURS, Place, ProcessFailed, clocked, run_process
from jobs_shapes import Job

Measured = dict[str, Any]
"""Figures of one run: `whole` seconds, and others by the kind of job."""

METHODS = ("dora", "lora")
WAYS = [f"{whose}{method}" for whose in ("", "peft-", "unsloth-") for method in METHODS]
COMPARED = ("a", "d", "e")  # jobs in which an earlier checkout takes turns with this one
DEMO_CORES = 2


@dataclass(frozen=True)
class Way:
    """One way to do a job."""

    measure: Callable[[], Measured]
    skipped: str | None = None
    """Why it cannot run here."""
    once: bool = False
    """In the first round alone."""


@dataclass(frozen=True)
class Ground:
    """What all ways of a job share."""

    folder: Path
    args: argparse.Namespace
    bytecode: Path | None = None

    def place(self, way: str, *imports: Path, **more: Any) -> Place:
        """Where a way runs, with what it keeps for its next start."""
        return Place(self.folder / way.replace(" ", "-"), imports, self.bytecode, **more)

    def checkouts(self, job: str) -> dict[str, Path]:
        """What goes before a way's name → where that Theodora is imported from."""
        before = self.args.before if job in COMPARED else None
        return {"": OURS} | ({"before-": before / "src"} if before else {})


def words(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


# a, b, c: training ----------------------------------------------------------------------------------------------------


def trainings(name: str, job: Job, tokens: float, ground: Ground) -> dict[str, Way]:
    """Training by our command, by the peers' scripts, and what a step costs without a trainer.

    Args:
        name: the job's letter.
        job: what is trained.
        tokens: of a batch, on average.
        ground: `model` and `rows.jsonl` lie in its folder.
    """
    args, model, data = ground.args, ground.folder / "model", ground.folder / "rows.jsonl"
    ways: dict[str, Way] = {}
    for method in METHODS:
        for whose, source in ground.checkouts(name).items():
            way = f"{whose}{method}"
            place = ground.place(way, source)
            ways[way] = Way(_clocked(our_training(model, data, place.folder / "out", job, method, args.steps), place))
        for peer, script in (("peft-", "jobs_peer.py"), ("unsloth-", "jobs_unsloth.py")):
            way = f"{peer}{method}"
            unsloth = (args.unsloth_path,) if args.unsloth_path and peer == "unsloth-" else ()
            place = ground.place(way, *unsloth)
            options = {"model": model, "data": data, "output": place.folder / "out", "method": method}
            program = [str(HERE / script), *words(options | {"steps": args.steps, "batch": job.batch})]
            missing = without_unsloth(args) if peer == "unsloth-" else None
            ways[way] = Way(_clocked(program, place), skipped=missing)
    asked = {way: how for way, how in ways.items() if way.removeprefix("before-") in args.ways}
    if name == "a":
        return asked
    return asked | {"bare": Way(lambda: bare_step(job, tokens, ground.place("bare")))}


def our_training(model: Path, data: Path, output: Path, job: Job, method: str, steps: int) -> list[str]:
    """The arguments of Python that train by our command."""
    options = {
        "model": model,
        "data": data,
        "output": output,
        "method": method,
        "per-device-train-batch-size": job.batch,
        "max-steps": steps,
        "max-length": 1024,
        "rank": 16,
        "alpha": 32,
        "learning-rate": 2e-4,
        "save-steps": 10 * steps,
        "held-out": 0,
    }
    return ["-m", "theodora", "train", *words(options), "--overwrite"]


def _clocked(program: list[str], place: Place) -> Callable[[], Measured]:
    return lambda: clocked(program, place)


def without_unsloth(args: argparse.Namespace) -> str | None:
    """Why Unsloth does not take part, or None if it does."""
    import torch

    folders = [str(args.unsloth_path)] if args.unsloth_path else None
    if PathFinder.find_spec("unsloth", folders) is None:
        return f"not installed{' in --unsloth-path' if folders else ''}"
    return None if torch.cuda.is_available() else "wants a GPU"


def bare_step(job: Job, tokens: float, place: Place) -> Measured:
    """Forward and backward pass of our DoRA alone, on as many rows of the mean length as a batch has; its first steps
    are left out."""
    import torch
    import train_step

    from theodora import bench

    cuda = torch.cuda.is_available()
    variant = train_step.VARIANTS["dora"]
    variant = replace(variant if cuda else train_step.without_gpu(variant), environment=place.kept())
    workload = bench.Workload(
        model=job.shape,
        dtype="bfloat16" if cuda else "float32",
        device="cuda" if cuda else "cpu",
        batch=job.batch,
        length=round(tokens / job.batch),
        rank=16,
    )
    bare = bench.Job(name="bare", variant=variant, workload=workload)
    found = bench.Runner([bare], rounds=3 if cuda else 1, warm_up=3 if cuda else 1, steps=5).run()["bare"]
    if found.failure:
        raise ProcessFailed(found.failure.reason)
    seconds = [each for turn in found.rounds.values() for each in turn]
    return {"step": statistics.median(seconds), "tokens": workload.tokens}


# d: evaluation --------------------------------------------------------------------------------------------------------


def evaluations(ground: Ground) -> dict[str, Way]:
    """`theodora evaluate` of all rows."""
    command = ["-m", "theodora", "evaluate", "--model", str(ground.folder / "model"), "--json"]
    command += ["--data", str(ground.folder / "rows.jsonl")]

    def evaluated(place: Place) -> Measured:
        whole, printed = run_process(command, place)
        scores = json.loads(printed)
        return {
            "whole": whole,
            "before": whole - scores["seconds"],
            "stepping": scores["seconds"],
            "rows": scores["rows"],
        }

    def way(place: Place) -> Way:
        return Way(lambda: evaluated(place))

    checkouts = ground.checkouts("d").items()
    return {f"{whose}evaluate": way(ground.place(f"{whose}evaluate", source)) for whose, source in checkouts}


# e: tokenising --------------------------------------------------------------------------------------------------------


def tokenizings(ground: Ground) -> dict[str, Way]:
    """A tenth of the rows in turns with an earlier checkout, and all of them once, to see whether memory stays flat."""
    args = ground.args
    few = max(1, args.chat_rows // 10)

    def way(name: str, source: Path, count: int, *, once: bool = False) -> Way:
        return Way(lambda: tokenized(ground.place(name, source), args, count), once=once)

    ways = {f"{whose}tokenize": way(f"{whose}tokenize", source, few) for whose, source in ground.checkouts("e").items()}
    return ways | {"tokenize-all": way("tokenize-all", OURS, args.chat_rows, once=True)}


def tokenized(place: Place, args: argparse.Namespace, rows: int) -> Measured:
    """A run of tokenizing.py: its figures by kind of row."""
    output = place.folder / "tokenizing.json"
    command = [str(HERE / "tokenizing.py"), "--kinds", *args.kinds, "--rows", str(rows), "--output", str(output)]
    whole, _ = run_process([*command, *(["--tokenizer", str(args.tokenizer)] if args.tokenizer else [])], place)
    kinds = json.loads(output.read_text(encoding="utf-8"))["kinds"]
    return {"whole": whole, "rows": rows, "kinds": kinds}


# f: the demo ----------------------------------------------------------------------------------------------------------


def demos(ground: Ground) -> dict[str, Way]:
    """The demo on two cores, as the CPU is and as one without AVX-512 and bf16 would run it; fetching is not timed."""
    from theodora.kept import cache_folder

    # What the demo fetched, a model of 540 MB, lies beside what is kept.
    environment = {"CUDA_VISIBLE_DEVICES": "", "THEODORA_CACHE": str(cache_folder())}

    def demonstrated(program: list[str], place: Place) -> Measured:
        output = place.folder / "demo"
        if not (cache_folder() / "SmolLM2-135M-Instruct").is_dir():
            run_process(["-m", "theodora", "demo", "--quick", "--output", str(place.folder / "first")], place)
        quick = ["--quick"] if ground.args.tiny else []
        whole, _ = run_process([*program, "demo", "--output", str(output), "--overwrite", *quick], place)
        results = json.loads((output / "results.json").read_text(encoding="utf-8"))
        noted = {name: results[name] for name in ("dtype", "steps", "training_seconds") if name in results}
        return {"whole": whole, **noted, "exact_match": results["after"]["exact_match"]}

    def way(name: str, *program: str) -> Way:
        place = ground.place(name, OURS, environment=environment, cores=DEMO_CORES)
        return Way(lambda: demonstrated(list(program), place), once=True)

    return {"demo": way("demo", "-m", "theodora"), "demo-avx2": way("demo-avx2", str(HERE / "jobs_avx2.py"))}
