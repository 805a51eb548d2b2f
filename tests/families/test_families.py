"""A sample of `make families`: each through everything that a user does."""

import json

import pytest
import torch

import sweep_families
import tiny_families
from crash.killing import fork_server

LONG = pytest.mark.long
WORK = ("gemma3", "granitemoe")
UNSERVED = ("qwen3_5", "llama4", "gemma4")
REFUSED = {"bert": "sees those that come after", "blip": "does not run on text alone"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="each family has a forked process, in which CUDA does not start")
@pytest.mark.parametrize("name", [*WORK, UNSERVED[0], *(pytest.param(n, marks=LONG) for n in UNSERVED[1:]), *REFUSED])
def test_a_family(name, tmp_path):
    # (not forked from this one, whose threads would be missing there)
    process = fork_server().Process(target=sweep_families.try_alone, args=(name, tmp_path, 100))
    process.start()
    process.join()
    found = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    expected = "works" if name in WORK else "unserved" if name in UNSERVED else "refused"
    assert found["outcome"] == expected, json.dumps(found)
    if name in REFUSED:
        assert found["at"] == "train"
        assert REFUSED[name] in found["why"]


def test_every_family_has_a_class():
    families = tiny_families.families()
    assert families["gemma3"].__name__ == "Gemma3ForConditionalGeneration"
    assert families["llama"].__name__ == "LlamaForCausalLM"


def test_the_table(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{sweep_families.MARKS[0]}\nold\n{sweep_families.MARKS[1]}\nafter\n", encoding="utf-8")
    why = "/tmp/theodora-family-x/model is an encoder-decoder model (t5): it reads"
    row = {"family": "t5", "class": "T5", "outcome": "refused", "at": "train", "why": why, "steps": [], "seconds": 1}
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps(row) + "\n", encoding="utf-8")
    sweep_families.write_table(page, sweep_families.read_results(results))
    text = page.read_text(encoding="utf-8")
    assert "| t5 | T5 | refused | an encoder-decoder |" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
