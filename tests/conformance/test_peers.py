"""PEFT's column, on the PEFT that is installed: what docs/conformance.md and the README say of it."""

import pytest

from theodora.conformance import suite

pytest.importorskip("peft")
# peft 0.21 calls a property of transformers 5.23 by its old name
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:peft")


def theirs(operation, variant, kind, dtype="bf16"):
    jobs = suite.plan(operations=[operation], variants=[variant], kinds=[kind], dtypes=[dtype], libraries=["peft"])
    ((row,),) = [suite.run_job(job) for job in jobs]
    return row


@pytest.mark.parametrize("kind", ["linear", "biased", "conv1d", "embed_tokens", "tied_head", "odd"])
@pytest.mark.parametrize("variant", ["lora", "dora", "dora-rslora-patterns"])
@pytest.mark.parametrize("operation", ["forward", "backward", "save-load"])
def test_what_is_sound_there_holds_the_same_bounds(operation, variant, kind):
    assert theirs(operation, variant, kind).status == "held"


@pytest.mark.parametrize(
    ("operation", "variant", "kind", "least"),
    [
        ("combine-cat", "dora", "linear", 0.1),
        ("to-lora", "dora", "linear", 0.1),
        ("load-transformers", "dora", "linear", 0.1),
        ("forward", "dora", "zero_rows", float("inf")),
        ("unmerge", "lora", "linear", 1e-4),
    ],
)
def test_what_goes_wrong_there_in_silence(operation, variant, kind, least):
    row = theirs(operation, variant, kind)
    assert row.status == "failed"
    assert row.error >= least


def test_what_fails_there_aloud():
    assert theirs("swap", "dora", "linear").status == "raised"
    assert theirs("swap", "lora", "linear").status == "held"


def test_float8_is_not_offered_there():
    assert theirs("forward", "lora", "linear", "float8").status == "not offered"


def test_layers_of_bitsandbytes():
    assert theirs("forward", "dora", "linear", "nf4").status == "held"
    assert theirs("forward", "lora", "linear", "int8").status == "held"
    assert theirs("inference", "dora", "linear", "int8").status == "raised"
    merged = theirs("merge", "lora", "linear", "nf4")
    assert merged.error > 10 * merged.bound  # rounded to four bits again
