"""Every family that transformers builds, through everything a user does: one table of what works and what is refused.

    python tests/sweep_families.py                          # all that are not in the results yet
    python tests/sweep_families.py gemma3 qwen3_5 --again
    python tests/sweep_families.py --table docs/models.md

Each family's tiny model is trained three steps by `theodora train` with defaults, evaluated, loaded, merged, verified
against the merged model, and served one request. Each runs in a process of its own with a time limit, forked from one
that has imported everything. Results are lines of JSON; a run goes on where the last one ended.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import signal
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import tiny_families

STEPS = ("build", "train", "evaluate", "load", "merge", "verify", "serve")
FIRST = (
    "qwen2 qwen3 qwen3_5 qwen3_5_text qwen3_5_moe qwen3_moe qwen3_next qwen2_moe qwen2_vl qwen2_5_vl qwen3_vl "
    "qwen3_vl_moe llama llama4 llama4_text mllama gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 "
    "gemma4_text gemma4_unified mistral mistral3 mistral4 ministral ministral3 mixtral phi phi3 phimoe gpt_oss gpt2 "
    "gpt_neox deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 glm glm4 glm4_moe glm4_moe_lite glm4v glm_moe_dsa "
    "granite granitemoe granitemoehybrid smollm3 smolvlm idefics3 olmo2 olmo3 olmoe falcon falcon_h1 mamba mamba2 "
    "lfm2 lfm2_moe lfm2_vl internvl llava llava_next llava_onevision paligemma cohere cohere2 seed_oss ernie4_5 "
    "ernie4_5_moe minimax_m2 nemotron nemotron_h bamba jamba exaone4 starcoder2 stablelm bloom opt kimi_linear "
    "kimi_k25 hunyuan_v1_dense"
)
"""Those that most people use come first."""
MODULES = (
    "fastapi.testclient",
    "trl.trainer.sft_trainer",
    *(f"theodora.{name}" for name in ("cli.evaluate", "cli.merge", "cli.train", "cli.verify", "export", "serve.app")),
    "theodora.train.run",
)
SAYS = {
    "works": "do all of it",
    "unserved": "(`unserved`) do all but `serve`, which says so when it starts",
    "refused": "(`refused`) are refused before training, with the reason",
    "fails": "(`fails`) do not do all of it",
    "unbuilt": "(`unbuilt`) were not tried: their default configuration does not become a tiny model here",
}
MARKS = "<!-- families: written by tests/sweep_families.py -->", "<!-- families: end -->"
SHORT = {
    "sees those that come after it": "an encoder: a token sees those that come after it",
    "is an encoder-decoder model": "an encoder-decoder",
    "pixel_values": "does not run without an image",
    "beside another request it says something else": "its attention is not for batches of transformers' own",
    "Invalid layer type": "a layer type that transformers' batches do not have",
    "TimmWrapperModel": "needs timm, which is not among the requirements",
}
ROWS = [{"prompt": f"Question {n}?", "completion": f" Answer {n}."} for n in range(4)]


def main() -> None:
    args = parse_args()
    done = {} if args.again else read_results(args.results)
    if args.table is not None:
        write_table(args.table, read_results(args.results))
        return
    import_everything()
    families = tiny_families.families()
    for name in args.families or sorted(families, key=lambda name: (name not in FIRST.split(), name)):
        if name in done:
            continue
        result = in_own_process(name, args.limit)
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(
            f"{name:28} {result['outcome']:8} {result['seconds']:5.1f} s  {result['at']} {result['why'][:150]}",
            flush=True,
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; default: all")
    parser.add_argument("--results", type=Path, default=Path("out/families.jsonl"), help="default: out/families.jsonl")
    parser.add_argument("--limit", type=int, default=120, help="seconds for one family; default: 120")
    parser.add_argument("--again", action="store_true", help="also what has a result")
    parser.add_argument("--table", type=Path, help="write the table into this file instead, between its marks")
    args = parser.parse_args()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    return args


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Family → its newest result."""
    if not path.is_file():
        return {}
    return {line["family"]: line for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def import_everything() -> None:
    """What each family's process needs, so that it does not take seconds in each."""
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for module in MODULES:
        importlib.import_module(module)


def in_own_process(name: str, limit: int) -> dict[str, Any]:
    """`try_family` in a forked process."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="theodora-family-") as scratch:
        told = Path(scratch) / "result.json"
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                try_alone(name, Path(scratch), limit)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if told.is_file():
            result = json.loads(told.read_text())
        else:
            at = (Path(scratch) / "at").read_text() if (Path(scratch) / "at").is_file() else "build"
            why = (
                "time limit" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else f"died ({status})"
            )
            result = {"outcome": "fails", "at": at, "why": why, "class": "", "steps": []}
    return {"family": name, **result, "seconds": round(time.monotonic() - start, 1)}


def try_alone(name: str, folder: Path, limit: int) -> None:
    """`try_family` in a process that has nothing else to do and ends after `limit` seconds; into result.json."""
    signal.alarm(limit)
    warnings.simplefilter("ignore")
    (folder / "result.json").write_text(json.dumps(try_family(name, folder)))


def try_family(name: str, folder: Path) -> dict[str, Any]:
    """Everything a user does with a model, in order; what happened."""
    import torch

    torch.manual_seed(0)
    steps: list[str] = []
    model_class = tiny_families.families()[name]
    found: dict[str, Any] = {"class": model_class.__name__, "steps": steps}
    output = io.StringIO()
    try:
        for step in STEPS:
            (folder / "at").write_text(step)
            began = time.monotonic()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                globals()[f"_{step}"](name, model_class, folder)
            steps.append(f"{step} {time.monotonic() - began:.1f}")
    except Refused as refusal:
        if "It says: RuntimeError" in str(refusal) or "'NoneType'" in str(refusal):
            return {**found, "outcome": "unbuilt", "at": step, "why": str(refusal)}  # sizes that do not fit together
        late = step != "train" or str(refusal).startswith(("Training left", "Training diverged"))
        outcome = "unserved" if step == "serve" else "fails" if late else "refused"
        return {**found, "outcome": outcome, "at": step, "why": str(refusal)}
    except BaseException as error:
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return {**found, "outcome": "fails" if step != "build" else "unbuilt", "at": step, "why": said[-1500:]}
    return {**found, "outcome": "works", "at": "", "why": ""}


class Refused(Exception):
    """A step ended with a message of Theodora's own."""


def _command(*argv: Any) -> None:
    from theodora.cli.main import _parse
    from theodora.errors import TheodoraError

    args = _parse(argv[0], [str(word) for word in argv[1:]])
    try:
        code = args.run(args)
    except TheodoraError as error:
        raise Refused(str(error)) from error
    if code:
        raise RuntimeError(f"exit code {code}")


def _build(name: str, model_class: Any, folder: Path) -> None:
    import tiny

    tiny_families.tiny_family(name, model_class).save_pretrained(folder / "model")
    tiny.tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def _train(name: str, model_class: Any, folder: Path) -> None:
    run = folder / "run"
    _command("train", "--model", folder / "model", "--data", folder / "data.jsonl", "--output", run, "--max-steps", 3)


def _evaluate(name: str, model_class: Any, folder: Path) -> None:
    run = folder / "run"
    _command(
        "evaluate",
        "--model",
        folder / "model",
        "--adapter",
        run,
        "--data",
        folder / "data.jsonl",
        "--limit",
        1,
        "--max-new-tokens",
        4,
    )


def _load(name: str, model_class: Any, folder: Path) -> None:
    """Also onto the class that the checkpoint is of, where another is loaded by default."""
    from theodora import load_adapter

    load_adapter(model_class.from_pretrained(folder / "model"), folder / "run")


def _merge(name: str, model_class: Any, folder: Path) -> None:
    _command("merge", folder / "run", "--output", folder / "merged")


def _verify(name: str, model_class: Any, folder: Path) -> None:
    _command("verify", folder / "run", folder / "merged", "--tokens", 32)


def _serve(name: str, model_class: Any, folder: Path) -> None:
    from types import SimpleNamespace

    from fastapi.testclient import TestClient
    from transformers.generation.continuous_batching import continuous_api

    continuous_api.gc = SimpleNamespace(collect=lambda: None)  # of a whole process's memory, twice: seconds

    from theodora.errors import TheodoraError
    from theodora.serve.app import create_app
    from theodora.serve.config import ServeConfig
    from theodora.serve.run import load_engine

    try:
        engine, tokenizer = load_engine(
            ServeConfig(model=str(folder / "model"), kv_tokens=2048, max_batch_tokens=256), {"run": folder / "run"}
        )
        engine.start()
    except TheodoraError as error:
        raise Refused(str(error)) from error
    try:
        client = TestClient(create_app(engine, tokenizer))
        answer = client.post("/v1/completions", json={"model": "run", "prompt": "Question 1?", "max_tokens": 4})
        if answer.status_code != 200:
            raise RuntimeError(f"status {answer.status_code}: {answer.text[:300]}")
    finally:
        engine.stop()


def write_table(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Put the table between the marks in a Markdown file."""
    import transformers

    counts = {outcome: [r for r in results.values() if r["outcome"] == outcome] for outcome in SAYS}
    lines = [f"transformers {transformers.__version__}, {len(results)} families:", ""]
    lines += [f"- {len(rows)} {SAYS[outcome]}" for outcome, rows in counts.items() if rows]
    lines += ["", "| family | class | result | why |", "|---|---|---|---|"]
    for name in sorted(results):
        found = results[name]
        result = found["outcome"] + (f" at {found['at']}" if found["outcome"] == "fails" else "")
        lines.append(f"| {name} | {found['class'] or '-'} | {result} | {reason(found['why'])} |")
    text = path.read_text(encoding="utf-8")
    before, after = text.partition(MARKS[0])[0], text.partition(MARKS[1])[2]
    path.write_text("\n".join([before + MARKS[0], "", *lines, "", MARKS[1] + after]), encoding="utf-8")


def reason(why: str) -> str:
    """The first sentence of a message, without places of the machine it ran on."""
    short = next((words for start, words in SHORT.items() if start in why), "")
    if not short:
        short = re.sub(r"/\S*/theodora-family-\w+/", "", why).replace("|", "/").strip().splitlines()[0] if why else ""
    return short if len(short) <= 160 else short[:157] + "…"


if __name__ == "__main__":
    main()
