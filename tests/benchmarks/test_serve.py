"""The server's benchmark on a tiny model: every batch is answered, PEFT's as well."""

import json
import shlex

import scripts

SMALL = "--shape tiny --dtype fp32 --rank 4 --adapters 1 3 --peft-adapters 3 --batch 4 --prompt 5 --tokens 4 --rounds 1"


def test_the_table(tmp_path, monkeypatch):
    scripts.run(monkeypatch, "benchmarks/serve.py", *shlex.split(SMALL), "--output", tmp_path / "serve.json")
    rows = json.loads((tmp_path / "serve.json").read_text(encoding="utf-8"))["rows"]
    assert [row["adapters"] for row in rows] == ["base", "1", "3"]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert rows[2]["peft_tokens_per_second"] > 0
