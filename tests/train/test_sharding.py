"""FSDP2 under our adapters: processes that share a base do what one process does, and DDP; and what is refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from crash.killing import fork_server
from theodora import ConfigError
from theodora.train.sharding import asked_of_accelerate, why_not
from train import sharded_jobs

# Sums of gradients over processes and over accumulated parts round alike but for their order.
ROUNDING = 1e-6
FOUR = ["trains_hybrid"]


def launched(folder: Path, count: int, on_a_machine: int, names: list[str]):
    """Job → what each process found."""
    context = fork_server()
    arguments = count, on_a_machine, folder, names
    processes = [context.Process(target=sharded_jobs.run, args=(index, *arguments)) for index in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        process.kill()
    found = [torch.load(folder / f"found{index}.pt", weights_only=False) for index in range(count)]
    return {name: [each[name] for each in found] for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder):
    """What two processes found."""
    return launched(folder, 2, 2, [name for name in sharded_jobs.JOBS if name not in FOUR])


def of(found, job):
    values = found[job]
    errors = [value for value in values if isinstance(value, str)]
    assert not errors, errors[0]
    return values


def check_same(values):
    """The adapters are the same after three steps, and so are the mean losses."""
    for (losses, adapter), (other_losses, other) in values:
        assert sharded_jobs.largest(adapter, other) < ROUNDING
        assert len(losses) == 3
        assert other_losses
    assert sharded_jobs.largest(values[0][0][1], values[-1][0][1]) == 0


@pytest.mark.parametrize("job", ["trains_as_one_process", "trains_as_ddp", "trains_offloaded_and_checkpointed"])
def test_training_is_that_of_one_process(two, job):
    check_same(of(two, job))


def test_losses_are_those_of_one_process(two):
    (first, alone), (second, _) = of(two, "trains_as_one_process")
    each = [loss for pair in zip(first[0], second[0], strict=True) for loss in pair]
    assert each == pytest.approx(alone[0], abs=1e-5)


def test_hybrid_training_is_that_of_one_process(tmp_path):
    check_same(of(launched(tmp_path, 4, 2, FOUR), "trains_hybrid"))


def test_a_norm_is_computed_once(two):
    for found in of(two, "counts"):
        assert found["first"] == found["then"] == {"norms": found["layers"], "looks": found["layers"]}


def test_a_change_of_the_shards_is_noticed(two):
    assert max(of(two, "notices_a_change")) < 1e-5


def test_norms_of_shards_are_those_of_the_whole(two):
    for found in of(two, "norms"):
        assert max(found) < 1e-12


def test_what_lies_here_is_a_share(two):
    for seen, after, here, whole in of(two, "is_told_apart"):
        assert seen == ["ShardedWeight", "GatheredWeight"]
        assert after == "ShardedWeight"
        assert here < 0.6 * whole


def test_adapters_begin_alike(two):
    first, second = of(two, "begins_alike")
    assert torch.equal(first, second)


def test_a_sharded_model_lives_on(two, folder):
    for found in of(two, "lives_on"):
        assert {what: value for what, value in found.items() if not value < 1e-5} == {}
        assert found["unmerged weights"] == 0
    saved, expected = (load_file(folder / which / "adapter_model.safetensors") for which in ("sharded", "plain"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in saved)


def test_its_file_says_what_a_whole_models_says(two, folder):
    of(two, "lives_on")
    texts = [(folder / which / "adapter_config.json").read_text() for which in ("sharded", "plain")]
    assert texts[0] == texts[1]
    files = [safe_open(folder / which / "adapter_model.safetensors", "pt") for which in ("sharded", "plain")]
    assert files[0].metadata() == files[1].metadata()


def test_an_adapter_comes_off(two):
    assert max(of(two, "comes_off")) == 0


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("remove", "model.layers.0.mlp.down_proj: FSDPAdaptedLinear"),
        ("inject", "DTensor"),
        ("merge tied", "lm_head: its weight is sharded, and shared with another module"),
        ("layer", "call the model in every process instead of one of its layers"),
        ("twice", "sharded already"),
        ("hybrid", "give --sharding fsdp2, which is the same there"),
    ],
)
def test_what_cannot_be_done_is_refused(two, what, says):
    for found in of(two, "refuses"):
        assert says in found[what]


def test_what_is_gathered_is_told(two):
    for told, sent in of(two, "gathers"):
        assert told == sent > 0


def test_gradients_are_averaged(two):
    for sent, everywhere, some, none, half in of(two, "averages"):
        assert sent == (3 * 6 + 3) * 4 + (5 + 1) * 2
        assert torch.equal(everywhere, torch.full((3, 2), 0.5))
        assert torch.equal(some, torch.full((3, 2), 0.5))
        assert none is None
        assert torch.equal(half, torch.ones(5).bfloat16())


def test_training_where_accelerate_shards_the_adapter_too(two):
    check_same(of(two, "trains_as_accelerate_shards"))


def test_what_accelerate_has_sharded_is_saved(two, folder):
    for differences, refused in of(two, "lives_on_as_accelerate_shards"):
        assert max(differences.values()) < 1e-5
        assert "the adapter itself is sharded" in refused
    expected = load_file(folder / "by_one" / "adapter_model.safetensors")
    for which in ("by_all0", "by_all1", "gathered"):
        saved = load_file(folder / which / "adapter_model.safetensors")
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[key], expected[key]) for key in saved)


def test_nf4_is_sharded(two):
    values = of(two, "trains_quantised")
    check_same([(found, expected) for found, expected, *_ in values])
    for *_, differences, share, refused in values:
        assert max(differences) < 1e-5
        assert share[0] / share[1] == 0.5
        assert "quantised and sharded" in refused


def test_the_conformance_suite_holds(two):
    for broken, count, operations in of(two, "conforms"):
        assert not broken
        assert count >= len(operations) * 6
        assert operations == set(sharded_jobs.CONFORMING)


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        (None, None),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}, None),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb_4bit_quant_storage=bfloat16"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"LLM.int8"),
        ({"quant_method": "gptq"}, "GPTQ cannot be sharded"),
        ({"quant_method": "fp8"}, "fine-grained FP8 cannot be sharded"),
    ],
)
def test_what_can_be_sharded_is_known_before_loading(quantization, says):
    found = why_not(SimpleNamespace(quantization_config=quantization), "fsdp2")
    assert (found is None) if says is None else (says in found)


def test_what_accelerate_was_asked_for(monkeypatch):
    assert asked_of_accelerate() is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="--sharding fsdp2"):
        asked_of_accelerate()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert asked_of_accelerate() == "fsdp2"
