"""A server under clients that do everything clients do, for as long as is asked, and whether anything leaks.

    python benchmarks/soak.py --minutes 60                  # a small random model, on this machine

`theodora serve` runs in a process of its own with adapters at start, others that are loaded and unloaded, fewer slots
than adapters and fewer places in host memory. Clients ask for completions and chats, streamed and not, hang up in the
middle, name unknown models, send prompts that are too long, empty, or no JSON at all. Each answer's status is checked.
The server's memory and open files are read every few seconds; the last quarter of the run is held against the first
quarter's end. Exit code 1 if a status was wrong, the server died, something is still running at the end, or memory
grew by more than `--most-growth`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

WINDOW = 64
_UNDER_WAY = "theodora_running_requests", "theodora_waiting_requests"


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory(prefix="theodora-soak-") as scratch:
        folder = Path(scratch)
        make_files(folder, args.adapters)
        names = [f"a{index}" for index in range(args.adapters)]
        loaded = [word for name in names[: args.adapters // 2] for word in ("--adapter", f"{name}={folder / name}")]
        options = (
            f"--served-name base --port {args.port} --slots 4 --host-adapters 5 --max-queue 64 --max-length {WINDOW}"
        )
        command = [sys.executable, "-m", "theodora", "serve", folder / "model", "--adapter-folder", folder, *loaded]
        with (folder / "log.txt").open("wb") as log:
            process = subprocess.Popen([*command, *options.split()], stdout=log, stderr=log)
            try:
                found = soak(process, folder, names, args)
            finally:
                process.terminate()
                code = process.wait(60)
        if code not in (0, -signal.SIGTERM):  # uvicorn stops in good order, and then passes the signal on
            found["wrong"].append(f"the server ended with exit code {code}: {(folder / 'log.txt').read_text()[-2000:]}")
    sys.exit(report(found, args))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="default: 60")
    parser.add_argument("--clients", type=int, default=8, help="at once; default: 8")
    parser.add_argument("--adapters", type=int, default=12, help="half of them loaded at the start; default: 12")
    parser.add_argument(
        "--pause", type=float, default=0.2, help="mean seconds between a client's requests; default: 0.2"
    )
    parser.add_argument("--most-growth", type=float, default=8, help="MiB of memory; default: 8")
    parser.add_argument("--port", type=int, default=8765, help="default: 8765")
    parser.add_argument("--output", type=Path, help="JSON file with every sample")
    return parser.parse_args()


def make_files(folder: Path, adapters: int) -> None:
    """A small llama of random weights with a tokenizer, and adapters of several kinds and ranks."""
    import torch
    from random_folder import word_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    from theodora import AdapterConfig, inject_adapter, remove_adapter, save_adapter

    config = AutoConfig.for_model(
        "llama", vocab_size=256, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, max_position_embeddings=WINDOW,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "model")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    for index in range(adapters):
        inject_adapter(model, AdapterConfig(method="dora" if index % 3 else "lora", rank=1 + index % 8))
        save_adapter(model, folder / f"a{index}")
        remove_adapter(model)


def soak(process: Any, folder: Path, names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Run the clients; what was answered, what was wrong, and (seconds, MiB, open files) over time."""
    found: dict[str, Any] = {"answers": Counter(), "wrong": [], "samples": []}
    began = time.monotonic()
    while not healthy(args.port):
        if process.poll() is not None or time.monotonic() - began > 120:
            found["wrong"].append("the server did not start")
            return found
        time.sleep(0.5)
    began, over = time.monotonic(), threading.Event()
    threads = [
        threading.Thread(target=client, args=(folder, names, args, random.Random(n), found, over))
        for n in range(args.clients)
    ]
    for thread in threads:
        thread.start()
    while time.monotonic() - began < 60 * args.minutes and process.poll() is None:
        found["samples"].append((time.monotonic() - began, *usage(process.pid)))
        time.sleep(min(5.0, 60 * args.minutes / 40))
    over.set()
    for thread in threads:
        thread.join()
    time.sleep(2)
    _, metrics = ask(args.port, "GET", "/metrics")
    left = [line for line in metrics.decode().splitlines() if line.startswith(_UNDER_WAY)]
    found["wrong"] += [line for line in left if float(line.rsplit(" ", 1)[1])]
    return found


def healthy(port: int) -> bool:
    try:
        return ask(port, "GET", "/health")[0] == 200
    except OSError:
        return False


def usage(pid: int) -> tuple[float, int]:
    """MiB of memory that is the process's own, and its open files."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    own = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return own / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def client(
    folder: Path,
    names: list[str],
    args: argparse.Namespace,
    draw: random.Random,
    found: dict[str, Any],
    over: threading.Event,
) -> None:
    """One client after another: what is asked, and which statuses are right."""
    messages = [{"role": "user", "content": "word5 word6"}]
    while not over.is_set():
        name = draw.choice([*names, "base"])
        prompt = " ".join(f"word{draw.randint(4, 250)}" for _ in range(draw.randint(1, 20)))
        tokens, temperature = draw.randint(1, 24), draw.choice([0, 1])
        body: dict[str, Any] = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": temperature}
        chat = {"model": name, "messages": messages, "max_tokens": tokens}
        load = {"lora_name": name, "lora_path": str(folder / name)}
        served = {200, 404, 429}  # 404 while the adapter is not loaded
        kinds: dict[str, tuple[str, Any, set[int]]] = {
            "completion": ("/v1/completions", body, served),
            "chat": ("/v1/chat/completions", chat, served),
            "stream": ("/v1/completions", body | {"stream": True}, served),
            "hang up": ("/v1/completions", body | {"stream": True, "max_tokens": 40}, served),
            "load": ("/v1/load_lora_adapter", load, {200, 400, 409}),
            "unload": (
                "/v1/unload_lora_adapter",
                {"lora_name": name},
                {200, 404} | ({400} if name == "base" else set()),
            ),
            "unknown": ("/v1/completions", body | {"model": "nobody"}, {404}),
            "too long": ("/v1/completions", body | {"prompt": f"{prompt} " * (WINDOW + 1)}, {400, 404}),
            "empty": ("/v1/completions", body | {"model": "base", "prompt": ""}, {200, 400}),
            "no JSON": ("/v1/completions", b"{", {400, 422}),
        }
        kind = draw.choices(list(kinds), weights=[8, 4, 4, 3, 2, 1, 1, 1, 1, 1])[0]
        if name == "base" and kind == "load":
            continue
        path, sent, right = kinds[kind]
        try:
            status, _ = ask(args.port, "POST", path, sent, kind == "hang up")
        except (OSError, http.client.HTTPException) as error:
            found["wrong"].append(f"{kind}: {error!r}")
            status = 0
        found["answers"][f"{kind} {status}"] += 1
        if status and status not in right:
            found["wrong"].append(f"{kind} was answered with {status}")
        time.sleep(draw.expovariate(1 / args.pause))


def ask(port: int, method: str, path: str, sent: Any = None, hangs_up: bool = False) -> tuple[int, bytes]:
    """Send a request, and read the answer or, hanging up, its beginning; status and content."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        content = sent if sent is None or isinstance(sent, bytes) else json.dumps(sent)
        connection.request(method, path, content, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read(8) if hangs_up else answer.read()
    finally:
        connection.close()


def report(found: dict[str, Any], args: argparse.Namespace) -> int:
    """Print what was found; the exit code."""
    samples = found["samples"]
    quarter = max(1, len(samples) // 4)
    print(f"{sum(found['answers'].values()):,} requests in {args.minutes:g} minutes:")
    for name, count in sorted(found["answers"].items()):
        print(f"  {name:<20} {count:>8,}")
    grown = 0.0
    if len(samples) >= 8:
        early, late = samples[quarter // 2 : quarter], samples[-quarter:]
        (before, files), (after, files_after) = (
            (statistics.median(s[1] for s in part), statistics.median(s[2] for s in part)) for part in (early, late)
        )
        grown = after - before
        print(f"memory {before:.1f} MiB at the end of the first quarter, {after:.1f} in the last ({grown:+.1f})")
        print(f"open files {files:g} and {files_after:g}")
        found |= {"memory": [before, after], "files": [files, files_after]}
        if files_after > files + args.clients:
            found["wrong"].append(f"open files went from {files:g} to {files_after:g}")
    if grown > args.most_growth:
        found["wrong"].append(f"memory grew by {grown:.1f} MiB")
    for line, count in Counter(found["wrong"]).most_common(20):
        print(f"WRONG ({count}): {line}")
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    main()
