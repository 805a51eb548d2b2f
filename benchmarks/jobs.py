"""Whole jobs as people run them: the command beside its peer, from the shell to the adapter.

    python benchmarks/jobs.py                                   # on a GPU: rows a, b, c and d, each with its peers
    python benchmarks/jobs.py --jobs a --rounds 3 --steps 100
    python benchmarks/jobs.py --tiny --jobs a --steps 6 --rows 40    # on a CPU, to see that it runs

| job | model | rows | batch |
|---|---|---|---|
| a | SmolLM2-135M's shape | 4,000 prompts and completions of some 64 tokens | 16, unpacked |
| b | Llama-3.2-1B's shape | the same | 16, unpacked |
| c | Llama-3-8B's shape, 8 layers | 64 to 1,024 tokens | 4, unpacked |
| d | a's | `theodora evaluate` of 400 of a's rows, generated answers | its own |

Models have random weights and the tokenizer of --tokenizer (a folder; without one, words of a vocabulary of 252). Every
run is a process of its own under the same clock (jobs_clock.py); ours and the peers take turns. Columns: seconds from
the start of the process to the first step, less the bare imports of torch, transformers and TRL (measured in between);
seconds of a step (the steps after the first ten, by the wall clock from the first's beginning to the last's end);
tokens that a step learns from or reads, padding not counted, a second; the share of that time in which the GPU ran
anything (nvidia-smi, ten times a second); and seconds of the whole process. Everything is the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from theodora.bench import describe_machine

HERE = Path(__file__).parent
WARM_UP = 10  # steps

LLAMA: dict[str, Any] = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
SMOL = LLAMA | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
LLAMA_1B = LLAMA | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
LLAMA_8B = LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


TINY = LLAMA | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


@dataclass(frozen=True)
class Job:
    """What is to be trained on what."""

    shape: dict[str, Any]
    batch: int
    tokens: tuple[int, int]
    """Of a row: least and most, drawn evenly."""
    rows: int = 4000


JOBS = {"a": Job(SMOL, 16, (32, 96)), "b": Job(LLAMA_1B, 16, (32, 96)), "c": Job(LLAMA_8B, 4, (64, 1024), 1000)}


@dataclass(frozen=True)
class Run:
    """What one process did, in seconds."""

    first_step: float
    step: float
    whole: float
    busy: float | None
    """Share of the steps' time."""


def main() -> None:
    args = parse_args()
    found: dict[str, Any] = {}
    imports: list[float] = []
    with tempfile.TemporaryDirectory(prefix="theodora-jobs-") as scratch:
        for name in args.jobs:
            job = JOBS["a" if name == "d" else name]
            job = replace(job, shape=TINY) if args.tiny else job
            folder = Path(scratch) / name
            model, data = folder / "model", folder / "rows.jsonl"
            tokens = write_rows(data, job, args)
            write_model(model, job, args.tokenizer)
            runs: dict[str, list[Any]] = {}
            for _ in range(args.rounds):
                imports.append(seconds_of([sys.executable, "-c", "import torch, transformers, trl"]))
                ways = evaluations(model, data) if name == "d" else trainings(model, data, job, args)
                for way, command in ways.items():
                    print(f"{name} {way} ...", file=sys.stderr, flush=True)
                    measure = seconds_of if name == "d" else clocked
                    try:
                        runs.setdefault(way, []).append(measure(command))
                    except subprocess.CalledProcessError as error:
                        print(f"failed: {error.stderr[-2000:]}", file=sys.stderr)
            found[name] = {way: summary(each, tokens * job.batch) for way, each in runs.items() if each}
            shutil.rmtree(folder)
    report = {
        "machine": describe_machine(),
        "settings": {name: str(value) for name, value in vars(args).items() if name != "output"},
        "imports": statistics.median(imports),
        "jobs": found,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=[*JOBS, "d"], default=[*JOBS, "d"], help="default: all")
    parser.add_argument("--ways", nargs="+", default=["dora", "lora", "peft-dora", "peft-lora"], help="default: all")
    parser.add_argument("--rounds", type=int, default=1, help="times that all take their turns; default: 1")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps; default: 100")
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers in the place of each")
    parser.add_argument("--rows", type=int, help="rows of data; default: the job's")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer to give the models")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/jobs.json"), help="JSON file")
    return parser.parse_args()


def trainings(model: Path, data: Path, job: Job, args: argparse.Namespace) -> dict[str, list[str]]:
    """The commands that train, by what they are called in the table."""
    output = data.parent / "out"
    shared = {"model": model, "data": data, "output": output}
    ours = {
        **shared,
        "per-device-train-batch-size": job.batch,
        "max-steps": args.steps,
        "max-length": 1024,
        "rank": 16,
        "alpha": 32,
        "learning-rate": 2e-4,
        "save-steps": 10 * args.steps,
        "held-out": 0,
    }
    peers = {**shared, "batch": job.batch, "steps": args.steps}
    ways: dict[str, list[str]] = {}
    for way in ("dora", "lora"):
        ways[way] = ["-m", "theodora", "train", *words({**ours, "method": way}), "--overwrite"]
        ways[f"peft-{way}"] = [str(HERE / "jobs_peer.py"), *words({**peers, "method": way})]
    return {way: command for way, command in ways.items() if way in args.ways}


def evaluations(model: Path, data: Path) -> dict[str, list[str]]:
    """The commands that evaluate."""
    few = data.with_name("few.jsonl")
    few.write_text("".join(f"{line}\n" for line in data.read_text(encoding="utf-8").splitlines()[:400]))
    return {"evaluate": [sys.executable, "-m", "theodora", "evaluate", *words({"model": model, "data": few})]}


def words(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def seconds_of(command: list[str]) -> float:
    """Wall-clock seconds of a process."""
    began = time.perf_counter()
    _run(command)
    return time.perf_counter() - began


def clocked(program: list[str]) -> Run:
    """A training run under the clock."""
    with tempfile.TemporaryDirectory(prefix="theodora-clock-") as folder, gpu_use() as use:
        times = Path(folder) / "times.json"
        began = time.time()
        _run([sys.executable, str(HERE / "jobs_clock.py"), str(times), *program])
        ended = time.time()
        found = json.loads(times.read_text(encoding="utf-8"))
    steps = found["steps"]
    timed = steps[min(WARM_UP, len(steps) // 2) :]
    busy = [share for at, share in use if timed[0][0] <= at <= timed[-1][1]]
    return Run(
        first_step=steps[0][1] - began,
        step=(timed[-1][1] - timed[0][0]) / len(timed),
        whole=ended - began,
        busy=statistics.mean(busy) if busy else None,
    )


def _run(command: list[str]) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment)


@contextmanager
def gpu_use() -> Iterator[list[tuple[float, float]]]:
    """(when, share of the last tenth of a second in which the first GPU ran anything), while the block lasts."""
    use: list[tuple[float, float]] = []
    if shutil.which("nvidia-smi") is None:
        yield use
        return
    query = ["nvidia-smi", "--id=0", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as process:

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                use.append((time.time(), float(line) / 100))

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield use
        finally:
            process.terminate()
            reader.join()


def write_rows(path: Path, job: Job, args: argparse.Namespace) -> float:
    """Rows of random words; the tokens that a row has on average."""
    draw, count = random.Random(0), args.rows or job.rows
    tokenizer = tokenizer_of(args.tokenizer)
    vocabulary = [w for w in tokenizer.get_vocab() if w.startswith("Ġ") and w[1:].isalpha() and w[1:].isascii()]
    names = [w[1:] for w in sorted(vocabulary)] or [f"word{i}" for i in range(4, 256)]
    path.parent.mkdir(parents=True, exist_ok=True)
    total = 0
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            length = draw.randint(*job.tokens)
            total += length
            said = [draw.choice(names) for _ in range(length)]
            split = max(1, length * 2 // 3)
            row = {"prompt": " ".join(said[:split]), "completion": " " + " ".join(said[split:])}
            file.write(json.dumps(row) + "\n")
    return total / count


def tokenizer_of(folder: Path | None) -> Any:
    if folder is None:
        import train_step

        return train_step.word_tokenizer()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def write_model(folder: Path, job: Job, tokenizer: Path | None) -> None:
    """The job's model with random weights, in bf16, in a process of its own, which frees its memory."""
    import multiprocessing

    process = multiprocessing.get_context("spawn").Process(target=_write_model, args=(folder, job, tokenizer))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit("the model could not be written")


def _write_model(folder: Path, job: Job, tokenizer: Path | None) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = dict(job.shape)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer_of(tokenizer).save_pretrained(folder)


def summary(runs: list[Any], tokens: float) -> dict[str, Any]:
    """Medians over the rounds."""
    if runs and isinstance(runs[0], float):
        return {"whole": statistics.median(runs), "runs": runs}
    columns = ("first_step", "step", "whole")
    found = {name: statistics.median(getattr(run, name) for run in runs) for name in columns}
    busy = [run.busy for run in runs if run.busy is not None]
    return {
        **found,
        "tokens_per_second": tokens / found["step"],
        "busy": statistics.median(busy) if busy else None,
        "runs": [asdict(run) for run in runs],
    }


def table(report: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        "| job | way | before the first step | a step | tokens/s | GPU busy | whole |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, ways in report["jobs"].items():
        for way, found in ways.items():
            if "step" not in found:
                lines.append(f"| {name} | {way} | | | | | {found['whole']:.1f} s |")
                continue
            busy = "" if found["busy"] is None else f"{found['busy']:.0%}"
            before = f"{found['first_step'] - report['imports']:.1f} s"
            rate = f"{found['tokens_per_second']:,.0f}"
            step, whole = f"{1000 * found['step']:.1f} ms", f"{found['whole']:.1f} s"
            lines.append(f"| {' | '.join((name, way, before, step, rate, busy, whole))} |")
    return "\n".join([*lines, f"\nImports of torch, transformers and TRL alone: {report['imports']:.1f} s."])


if __name__ == "__main__":
    main()
