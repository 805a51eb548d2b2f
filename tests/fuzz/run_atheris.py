"""Fuzzing guided by coverage: `python tests/fuzz/run_atheris.py jsonl -max_total_time=60` (make fuzz-atheris).

libFuzzer changes bytes and keeps what reaches new branches, in the reader named first. It ends with an error at the
first exception that is none of ours, and leaves the input as crash-…; put that into the tests beside this file.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["theodora", "yaml"]):
    from theodora.cli.train import read_yaml
    from theodora.config import TrainConfig
    from theodora.data.files import READERS
    from theodora.data.problems import Problems
    from theodora.errors import TheodoraError
    from theodora.files.adapter import read_adapter
    from theodora.files.names import CONFIG_NAME, WEIGHTS_NAME

FOLDER = Path(tempfile.mkdtemp(prefix="theodora-atheris-"))
CONFIG = b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "use_dora": true}'


def rows(suffix: str, data: bytes) -> None:
    path = FOLDER / f"data{suffix}"
    path.write_bytes(data)
    for _ in READERS["." + suffix.split(".")[1]](path, Problems("data")):
        pass


def recipe(data: bytes) -> None:
    path = FOLDER / "recipe.yaml"
    path.write_bytes(data)
    TrainConfig.from_options({"model": "m", "data": "d", "output": "o"} | read_yaml(str(path)))


def adapter(name: str, data: bytes) -> None:
    other = {CONFIG_NAME: CONFIG, WEIGHTS_NAME: b"\x02" + bytes(7) + b"{}"} | {name: data}
    for file, content in other.items():
        (FOLDER / file).write_bytes(content)
    read_adapter(FOLDER)


TARGETS = {
    "jsonl": lambda data: rows(".jsonl", data),
    "json": lambda data: rows(".json", data),
    "csv": lambda data: rows(".csv", data),
    "gzip": lambda data: rows(".jsonl.gz", data),
    "parquet": lambda data: rows(".parquet", data),
    "yaml": recipe,
    "config": lambda data: adapter(CONFIG_NAME, data),
    "safetensors": lambda data: adapter(WEIGHTS_NAME, data),
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"Say which reader: {', '.join(TARGETS)}")
    read = TARGETS[sys.argv.pop(1)]

    def one(data: bytes) -> None:
        with contextlib.suppress(TheodoraError):
            read(data)

    os.environ["HF_HUB_OFFLINE"] = "1"
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
