"""SIGKILL at any moment: a run goes on from its last whole checkpoint and ends with the same bits, and no file under a
final name is ever half of one.

A few kills here; `make test-kills` kills THEODORA_KILLS times (250 unless told otherwise) and says where they hit.
"""

import os
import random

import pytest

from crash import jobs
from crash.killing import Killing

WAYS = ("at a file operation", "at a moment", "while writing")


@pytest.fixture(scope="module")
def killing(inputs, tmp_path_factory) -> Killing:
    return Killing(inputs, tmp_path_factory.mktemp("killed"), random.Random(os.environ.get("THEODORA_SEED", "0")))


@pytest.mark.parametrize("name", ["accumulation", "merge", "requantise", "convert"])
def test_a_killed_job_comes_to_the_same(name, killing):
    for way in WAYS[:2]:
        killing.survive(name, way)


@pytest.mark.timeout(3600)
@pytest.mark.skipif("THEODORA_KILLS" not in os.environ, reason="minutes: make test-kills")
def test_many_kills(killing, capsys):
    wanted, names = int(os.environ["THEODORA_KILLS"]), list(jobs.jobs())
    for turn in range(10 * wanted):
        if killing.kills.total() >= wanted:
            break
        killing.survive(names[turn % len(names)], WAYS[turn // len(names) % len(WAYS)])
    with capsys.disabled():
        print(f"\n{killing.kills.total()} kills survived")
        for title, counted in (("by job", killing.kills), ("while", killing.places)):
            print(f"  {title}: " + ", ".join(f"{name} {count}" for name, count in sorted(counted.items())))
    assert killing.kills.total() >= wanted
