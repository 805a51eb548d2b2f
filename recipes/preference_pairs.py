"""Pairs from a task with labels: the right label is the better answer, a wrong one of the set the worse.

    python recipes/study_data.py --output out/study/data
    python recipes/preference_pairs.py --data out/study/data

Writes NAME.pairs.train.jsonl, NAME.pairs.validation.jsonl and NAME.pairs.test.jsonl beside the files that they are made
of, with the same prompts in the same order. Each wrong label is as likely as any other, and the same every time.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from theodora.demo.task import write_jsonl

PARTS = ("train", "validation", "test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="the folder that study_data.py has written")
    parser.add_argument("--task", default="medical", help="medical, technical or legal. Default: medical.")
    parser.add_argument("--seed", type=int, default=0, help="of the wrong labels")
    arguments = parser.parse_args()
    parts = {part: read(arguments.data / f"{arguments.task}.{part}.jsonl") for part in PARTS}
    labels = sorted({label_of(row) for rows in parts.values() for row in rows})
    if len(labels) < 2:
        raise SystemExit(f"{arguments.task} has the labels {labels}; expected two at least, so that one can be wrong")
    for part, rows in parts.items():
        choice = random.Random(f"{arguments.seed} {part}")
        path = arguments.data / f"{arguments.task}.pairs.{part}.jsonl"
        write_jsonl(path, [as_pair(row, choice.choice([x for x in labels if x != label_of(row)])) for row in rows])
        print(f"{path}: {len(rows):,} pairs, {len(labels)} labels")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def label_of(row: dict[str, Any]) -> str:
    return row["completion"][-1]["content"]


def as_pair(row: dict[str, Any], wrong: str) -> dict[str, Any]:
    rejected = [{"role": "assistant", "content": wrong}]
    return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected}


if __name__ == "__main__":
    main()
