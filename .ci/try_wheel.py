"""Try the wheel as a stranger would, who has it and nothing of this repository: `make test-wheel`.

    python .ci/try_wheel.py PYTHON bare     without any extra: the commands, a run, and what is said of what is missing
    python .ci/try_wheel.py PYTHON whole    with the extras that EXTRAS names: what they are for

PYTHON is that of the environment the wheel is installed in. Commands run in a new folder, without a network.
"""

from __future__ import annotations

import http.cookiejar
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("completion", "demo", "serve", "studio")
"""Those that `make test-wheel` installs for the second part: the others want a GPU or a cluster."""
ROWS = "".join(json.dumps({"prompt": f"{n} + 1 =", "completion": str(n + 1)}) + "\n" for n in range(8))
TRAIN = "train --model tiny --data rows.jsonl --max-steps 2 --per-device-train-batch-size 2 --max-length 64"
# What to type without an extra -> the extra that the error has to name.
LACKING = {
    "completion bash": "completion",
    "serve tiny": "serve",
    "studio --no-browser": "studio",
    "export run --to gguf --output model.gguf": "demo",
    f"{TRAIN} --quantize nf4 --output nf4": "quant",
    f"{TRAIN} --launcher ray --num-workers 2 --output ray": "ray",
}
# Packages that no extra brings.
LACKING_PACKAGES = {f"{TRAIN} --report-to {name} --output {name}": name for name in ("tensorboard", "wandb", "trackio")}
_SECONDS = 300


class Stranger:
    """Somebody in a folder of their own, with the environment's `theodora`."""

    def __init__(self, python: Path, folder: Path) -> None:
        self._python, self._folder = python, folder
        kept = {name: os.environ[name] for name in ("LANG", "LD_LIBRARY_PATH") if name in os.environ}
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        home = {"HOME": str(folder), "THEODORA_CACHE": str(folder / "cache")}
        self._environment = {**kept, **home, "PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}

    def types(self, words: str, *, fails: bool = False) -> str:
        """What `theodora WORDS` prints, both streams; it has to end well, or with an error in words."""
        done = self._run([str(self._python.with_name("theodora")), *words.split()])
        told = done.stdout + done.stderr
        if (done.returncode != 0) is not fails or "Traceback" in told:
            sys.exit(f"theodora {words}: exit code {done.returncode}\n{told}")
        print(f"theodora {words}: {'refused, as it should be' if fails else 'works'}", flush=True)
        return done.stdout if not fails else told

    def python(self, code: str, **variables: str) -> str:
        """What Python code prints."""
        done = self._run([str(self._python), "-c", code], **variables)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        return done.stdout

    @contextmanager
    def starts(self, words: str, until: str) -> Iterator[str]:
        """The part in brackets of what a server prints when it is ready; it is ended afterwards."""
        command = [str(self._python.with_name("theodora")), *words.split()]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=self._folder, env=self._environment, **options)
        assert process.stdout is not None
        told = ""
        try:
            for line in process.stdout:
                told += line
                if found := re.search(until, line):
                    yield found[1]
                    print(f"theodora {words}: works", flush=True)
                    return
            sys.exit(f"theodora {words} ended:\n{told}")
        finally:
            process.terminate()
            process.wait(_SECONDS)

    def _run(self, command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
        environment = self._environment | variables
        return subprocess.run(
            command, cwd=self._folder, env=environment, capture_output=True, text=True, timeout=_SECONDS
        )


def main() -> None:
    """Try one of the two environments."""
    python, part = Path(sys.argv[1]).absolute(), {"bare": bare, "whole": whole}[sys.argv[2]]
    with tempfile.TemporaryDirectory() as folder:
        stranger = Stranger(python, Path(folder))
        make = (
            "import tiny, sys; tiny.tiny_model().save_pretrained('tiny'); tiny.tiny_tokenizer().save_pretrained('tiny')"
        )
        stranger.python(make, PYTHONPATH=str(ROOT / "tests"))
        Path(folder, "rows.jsonl").write_text(ROWS, encoding="utf-8")
        stranger.types(f"{TRAIN} --output run")
        part(stranger)
    print(f"The wheel works: {sys.argv[2]}")


def bare(stranger: Stranger) -> None:
    """What works without extras; what does not says which one it wants."""
    nothing_is_missing(stranger)
    stranger.types("--version")
    commands = re.findall(r"^  ([a-z]+) {2,}", stranger.types("--help"), re.M)
    assert len(commands) > 15, commands
    for command in commands:
        stranger.types(f"{command} --help")
    found = json.loads(stranger.types("doctor --json"))
    assert found["works"], found
    told = stranger.types("doctor")
    for name, extra in found["extras"].items():
        assert not extra["installed"], f"{name} is there: this is no empty environment"
        assert f"theodora[{name}]" in told, told
    assert json.loads(stranger.types("schema"))["properties"]["model"]
    for words in (
        "info run",
        "inspect run",
        "evaluate --model tiny --adapter run --data rows.jsonl",
        "merge run --output merged",
    ):
        stranger.types(words)
    stranger.types("verify run merged")
    stranger.types("plan --model tiny --data rows.jsonl --output planned")
    for words, extra in LACKING.items():
        told = stranger.types(words, fails=True)
        assert found["extras"][extra]["pip"] in " ".join(told.split()), told
    for words, package in LACKING_PACKAGES.items():
        told = stranger.types(words, fails=True)
        assert f"pip install {package}" in " ".join(told.split()), told


def nothing_is_missing(stranger: Stranger) -> None:
    """Every file of src/theodora is in the wheel."""
    there = stranger.python("import theodora; print(theodora.__file__)").strip()
    assert str(ROOT / "src") not in there, f"{there} is not the wheel"
    source = ROOT / "src" / "theodora"
    wanted = [path.relative_to(source) for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    missing = sorted(str(name) for name in wanted if not (Path(there).parent / name).exists())
    assert not missing, f"the wheel lacks {', '.join(missing)}: tool.setuptools.package-data in pyproject.toml"


def whole(stranger: Stranger) -> None:
    """What the extras are for."""
    found = json.loads(stranger.types("doctor --json"))
    assert all(found["extras"][name]["installed"] for name in EXTRAS), found["extras"]
    assert "theodora" in stranger.types("completion bash")
    stranger.types("export run --to gguf --output model.gguf")
    with stranger.starts("studio --no-browser --port 0", r"(http://127\.0\.0\.1:\S+)") as address:
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
        page = browser.open(address, timeout=_SECONDS).read().decode()
        asked = re.findall(r'(?:src|href)="(/static/[^"]+)"', page)
        asked += [f"/static/{path.name}" for path in (ROOT / "src/theodora/studio/static").iterdir()]
        assert asked
        for name in set(asked):
            assert browser.open(address.split("/?")[0] + name, timeout=_SECONDS).read()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with stranger.starts(f"serve tiny --adapter mine=run --port {port}", r"(http://127)"):
        address = f"http://127.0.0.1:{port}/v1/completions"
        body = json.dumps({"model": "mine", "prompt": "1 + 1 =", "max_tokens": 2}).encode()
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        for attempt in range(_SECONDS):  # it tells its address a moment before it listens there
            try:
                answer = json.load(urllib.request.urlopen(request, timeout=_SECONDS))
                break
            except urllib.error.HTTPError:
                raise
            except urllib.error.URLError:
                assert attempt < _SECONDS - 1, "nothing answers"
                time.sleep(1)
        assert answer["usage"]["completion_tokens"]


if __name__ == "__main__":
    main()
