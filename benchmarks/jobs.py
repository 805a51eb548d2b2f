"""Whole jobs as people run them: our command beside its peers, from the shell to the adapter.

    python benchmarks/jobs.py                                           # all jobs, three rounds
    python benchmarks/jobs.py --jobs a --before ../earlier --unsloth-path FOLDER
    python benchmarks/jobs.py --tiny                                    # small, on a CPU, to see that it runs

| job | model | rows | batch |
|---|---|---|---|
| a | SmolLM2-135M's shape | 4,000 prompts and completions of some 64 tokens | 16, unpacked |
| b | Llama-3.2-1B's shape | the same | 16, unpacked |
| c | Llama-3-8B's shape, 8 layers | 1,000 of 64 to 1,024 tokens | 4, unpacked |
| d | a's | `theodora evaluate` of 400 of a's rows, generated answers | its own |
| e | none | tokenizing.py: chats, a million of them once and a tenth in turns | |
| f | the demo's | `theodora demo` on two cores, as the CPU is and as one of AVX2 alone | its own |

Every run is a process of its own, all under one clock (jobs_clock.py), and the ways of a job take turns. The peers are
plain scripts of TRL and PEFT (jobs_peer.py) and of Unsloth (jobs_unsloth.py). The first round finds nothing that was
compiled, tuned or tried out before; later ones find what their own way left. What is said of a way is the median of the
later rounds, with the first beside it. Each job goes into the results file after every round, and other jobs in the
file stay, so that jobs can be run one by one. docs/jobs.md says what the columns are; jobs_report.py prints the tables
of a file, and jobs_figure.py draws it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from jobs_process import OURS, Place, ProcessFailed, compile_bytecode, packages_folder, run_process
from jobs_report import goals, tables
from jobs_shapes import JOBS, job_of, tokenizer_of, write_model, write_rows
from jobs_ways import COMPARED, WAYS, Ground, Way, demos, evaluations, tokenizings, trainings
from train_step import say

from theodora.bench import describe_machine

NAMES = [*JOBS, "d", "e", "f"]
IMPORTS = ["-c", "import torch, transformers, trl"]


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory(prefix="theodora-jobs-") as scratch:
        sources = [OURS, *([args.before / "src"] if args.before else [])]
        packages = [packages_folder(), *([args.unsloth_path] if args.unsloth_path else [])]
        bytecode = compile_bytecode(Path(scratch), sources, packages)
        if args.before:
            check_imports(Place(Path(scratch) / "before", (args.before / "src",), bytecode))
        for name in args.jobs:
            ground = Ground(Path(scratch) / name, args, bytecode)
            ground.folder.mkdir()
            measure(name, ground)
            shutil.rmtree(ground.folder)
    report = read(args.output)
    print(f"{tables(report)}\n\n{goals(report)}")
    if args.figure:
        from jobs_figure import draw

        draw(report, args.figure)
        say(f"drawn to {args.figure}")


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=NAMES, help="default: all; with --tiny all but f")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="of training. Default: all; with --tiny both of DoRA")
    parser.add_argument("--rounds", type=int, help="turns of each way. Default: 3; with --tiny 1")
    parser.add_argument("--steps", type=int, help="optimizer steps. Default: 100; with --tiny 6")
    parser.add_argument("--rows", type=int, help="rows of a to d. Default: the job's; with --tiny 40")
    parser.add_argument("--chat-rows", type=int, help="rows of e. Default: 1,000,000; with --tiny 200")
    parser.add_argument(
        "--kinds", nargs="+", default=["chats-qwen3", "chats-llama3"], help="of rows, in e: tokenizing.py's"
    )
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers in the place of each")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer to give the models, and e")
    parser.add_argument("--before", type=Path, help="an earlier checkout, which takes turns in a, d and e")
    parser.add_argument("--unsloth-path", type=Path, help="folder to import Unsloth and what it needs from")
    parser.add_argument("--add", action="store_true", help="keep the file's other ways of a job, measured alike")
    parser.add_argument("--commit", help="to be noted where the code is not in a checkout")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/jobs.json"), help="JSON file")
    parser.add_argument("--figure", type=Path, help="PNG or SVG of a to d")
    args = parser.parse_args(words)
    small: dict[str, Any] = {"rounds": 1, "steps": 6, "rows": 40, "chat_rows": 200, "jobs": NAMES[:-1]}
    large: dict[str, Any] = {"rounds": 3, "steps": 100, "rows": None, "chat_rows": 1_000_000, "jobs": NAMES}
    chosen = small | {"ways": ["dora", "peft-dora"]} if args.tiny else large | {"ways": WAYS}
    for name, value in chosen.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("tokenizer", "before", "unsloth_path"):  # processes have working directories of their own
        if getattr(args, name):
            setattr(args, name, getattr(args, name).resolve())
    if args.before and not (args.before / "src" / "theodora").is_dir():
        parser.error(f"--before {args.before} is no checkout: it has no src/theodora")
    if args.steps < 2:
        parser.error(f"--steps is {args.steps}; at least 2 are needed")
    return args


def check_imports(place: Place) -> None:
    """Stop unless the earlier checkout is what its processes import: two of the same would be compared."""
    _, printed = run_process(["-c", "import theodora; print(theodora.__file__)"], place)
    if not Path(printed.strip()).is_relative_to(place.imports[0]):
        raise SystemExit(f"--before: {printed.strip()} is imported instead of {place.imports[0]}")


def measure(name: str, ground: Ground) -> None:
    """All rounds of a job, written to the results file after each."""
    args = ground.args
    found: dict[str, Any] = {
        "machine": describe_machine() | ({"commit": args.commit} if args.commit else {}),
        "settings": {key: _plain(value) for key, value in vars(args).items() if key not in ("output", "figure")},
        "bytecode": "beside the packages" if ground.bytecode is None else "compiled before, in a folder of its own",
        "before": (commit_of(args.before) or args.before.name) if args.before and name in COMPARED else None,
        "parts": 1,
        "ways": {},
    }
    ways = prepare(name, ground, found)
    if args.add:
        add_to(args.output, name, found)
    found["ways"] |= {way: {"runs": []} for way in ways}  # what they were measured to be before is forgotten
    for number in range(args.rounds):
        more: dict[str, Any] = {"first": number == 0}
        if name not in "ef":
            more["imports"], _ = run_process(IMPORTS, Place(ground.folder / "imports", bytecode=ground.bytecode))
        for way, how in ways.items():
            taken = found["ways"][way]
            if how.skipped:
                taken["skipped"] = how.skipped
            elif number == 0 or not how.once:
                turn(f"{name} {way}, round {number + 1} of {args.rounds}", how, taken, more)
        save(args.output, name, found)


def commit_of(checkout: Path) -> str | None:
    """The commit that a checkout stands at, or None where git knows of none."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def prepare(name: str, ground: Ground, found: dict[str, Any]) -> dict[str, Way]:
    """Write what the job needs, note what it is, and give its ways."""
    if name in "ef":
        return tokenizings(ground) if name == "e" else demos(ground)
    args = ground.args
    job = job_of(name, tiny=args.tiny, rows=args.rows)
    tokens = job.batch * write_rows(ground.folder / "rows.jsonl", job, tokenizer_of(args.tokenizer))
    write_model(ground.folder / "model", job, args.tokenizer)
    found |= {"rows": job.rows}
    if name == "d":
        return evaluations(ground)
    found |= {"tokens": tokens, "batch": job.batch}
    return trainings(name, job, tokens, ground)


def turn(title: str, way: Way, taken: dict[str, Any], more: dict[str, Any]) -> None:
    """One run of a way, noted with what there is to note of its round; a failure is noted and stops no other."""
    say(f"{title} ...")
    try:
        run = way.measure()
    except ProcessFailed as error:
        taken["failed"] = str(error)
        say(f"{title}: failed: {error}")
        return
    taken["runs"].append(more | run)
    seconds = {key: run[key] for key in ("whole", "before", "step") if run.get(key) is not None}
    say(f"{title}: " + ", ".join(f"{key} {value:.3g} s" for key, value in seconds.items()))


def add_to(path: Path, name: str, found: dict[str, Any]) -> None:
    """Take over the ways that the results file has of a job, if they were measured under the same conditions."""
    earlier = read(path).get("jobs", {}).get(name)
    if earlier is None:
        return
    if different := [what for what, value in conditions(found).items() if conditions(earlier)[what] != value]:
        raise SystemExit(f"--add: job {name} in {path} was measured with other {', '.join(different)}")
    found["ways"], found["parts"] = dict(earlier["ways"]), earlier["parts"] + 1


def conditions(found: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same for figures to stand in one table."""
    machine, settings = found["machine"], found["settings"]
    hardware = [gpu.split(",")[0] for gpu in machine["gpus"]] or [machine["cpu"]]
    alike = {"hardware": hardware, "versions": machine["versions"], "commit": machine["commit"]}
    return alike | {"tokens": found.get("tokens"), "steps": settings["steps"], "earlier checkout": found["before"]}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(path: Path, name: str, found: dict[str, Any]) -> None:
    """Put one job into the results file, and leave the others."""
    report = read(path)
    report.setdefault("jobs", {})[name] = found
    report["jobs"] = dict(sorted(report["jobs"].items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """As JSON takes it; of a folder its name, because where it lies is nobody's business."""
    return value.name if isinstance(value, Path) else value


if __name__ == "__main__":
    main()
