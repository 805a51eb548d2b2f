"""What is settled before a model loads: whether it fits, whether its weights are cut, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig

from theodora import plan
from theodora.adapters.quantized import loading_options
from theodora.config import TrainConfig
from theodora.errors import ConfigError
from theodora.train import beforehand, graphed, processes
from theodora.train.processes import Processes
from theodora.train.report import describe_network

GPU = torch.device("cuda", 0)
MODEL = LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=8)
ROWS = Dataset.from_dict({"labels": [[1, 2, 3], [-100] * 5 + [4]]})
FITS, SPLITS, FAILS = (
    plan.Verdict(*how, None, None, said)
    for how, said in (
        ((True, False), ""),
        ((False, True), "2 rows at once would fit."),
        ((False, False), "far too large"),
    )
)


def config_of(**options):
    return TrainConfig.from_options({"model": "m", "data": "d", "output": "o"} | options)


@pytest.fixture
def settled(monkeypatch):
    """What is settled with verdicts on paper: of whole weights, and of cut ones."""

    def settle(whole, cut=FAILS, *, device=GPU, others=None, model_config=MODEL, **options):
        asked = []

        def fits(config, machine, *, length, dtype, model_config):
            asked.append((config.sharding, machine, length, dtype))
            found = whole if config.sharding == "none" else cut
            if isinstance(found, Exception):
                raise found
            return found

        count, answers = 1 if others is None else 2, iter(others or ())  # of the other process, one after the other
        monkeypatch.setattr(beforehand.plan, "fits", fits)
        monkeypatch.setattr(
            beforehand.plan, "machine", lambda gpus, device: plan.Machine(device=device, memory=80, gpus=gpus)
        )
        monkeypatch.setattr(Processes, "gather", lambda self, value: [value, next(answers)])
        monkeypatch.setattr(Processes, "count_here", property(lambda self: self.count))
        monkeypatch.setattr(processes, "_HERE", [Processes(count=count, sharding=options.pop("given", None))])
        config = config_of(**options)
        return beforehand.settle(config, model_config, device, "bfloat16", ROWS), asked

    return settle


def test_a_run_that_fits_says_nothing(settled):
    found, asked = settled(FITS)
    assert (found.notes, found.processes.sharding) == ([], None)
    ((how, machine, length, dtype),) = asked
    assert (how, machine.gpus, length, dtype) == ("none", 1, 6, torch.bfloat16)


def test_a_batch_that_will_be_cut_is_said(settled):
    assert settled(SPLITS)[0].notes == ["2 rows at once would fit."]


def test_a_run_without_room_for_a_row_is_refused(settled):
    with pytest.raises(ConfigError, match="far too large"):
        settled(FAILS)


def test_a_model_that_does_not_run_on_paper_is_trained(settled):
    (note,) = settled(IndexError("at layer 3\nand more"))[0].notes
    assert note.endswith("beforehand: IndexError: at layer 3")


def test_what_cannot_be_read_is_left_to_loading(settled):
    assert settled(FAILS, model_config=None)[0].notes == []
    assert settled(FAILS, device=torch.device("mps"))[0].notes == []


@pytest.mark.parametrize(
    ("whole", "cut", "elsewhere", "how"),
    [
        (FITS, FITS, False, None),
        (FITS, FITS, True, "fsdp2"),  # another process' GPU is smaller
        (SPLITS, FITS, True, "fsdp2"),
        (SPLITS, SPLITS, True, None),
        (FAILS, SPLITS, True, "fsdp2"),
        (SPLITS, IndexError(), True, None),
    ],
)
def test_weights_are_cut_where_whole_ones_do_not_fit(settled, whole, cut, elsewhere, how):
    found, _ = settled(whole, cut, others=[elsewhere, True])
    assert found.processes.sharding == how
    assert any("sharding auto is fsdp2" in note for note in found.notes) == (how is not None)
    if how is not None:
        assert Processes.here() is found.processes


def test_other_weights_stay_whole(settled):
    assert settled(SPLITS, FITS, others=[True], quantize="int8")[0].processes.sharding is None
    found, asked = settled(FITS, others=[], sharding="none")
    assert (found.processes.sharding, len(asked)) == (None, 1)
    found, asked = settled(FITS, others=[], device=torch.device("cpu"))
    assert (found.processes.sharding, asked[0][1].memory) == (None, 40)


@pytest.mark.parametrize("given", ["fsdp2", "hsdp"])
def test_weights_that_are_to_be_cut_are_judged_as_such(settled, given):
    found, asked = settled(FAILS, FITS, others=[], given=given)
    assert (found.processes.sharding, asked[0][0]) == (given, given)


@pytest.mark.parametrize(
    ("options", "stored", "says"),
    [
        ({}, None, None),
        ({"quantize": "nf4"}, None, None),
        ({"quantize": "int8"}, None, "LLM.int8"),
        ({"quantize": "int4"}, None, "torchao cannot be sharded"),
        ({"quantize": "fp8"}, None, "float8"),
        ({"base_dtype": "fp8"}, None, "float8"),
        ({}, {"quant_method": "gptq", "bits": 4}, "GPTQ cannot be sharded"),
        ({}, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb_4bit_quant_storage=bfloat16"),
    ],
)
def test_what_cannot_be_cut_is_known_from_options_and_configuration(options, stored, says):
    model_config = LlamaConfig(**({} if stored is None else {"quantization_config": stored}))
    found = beforehand.why_not_cut(config_of(**options), model_config, "fsdp2")
    assert found is None if says is None else says in found


@pytest.mark.parametrize(("sharded", "storage"), [(True, torch.bfloat16), (False, torch.uint8)])
def test_nf4_is_stored_as_the_model_where_it_is_cut(sharded, storage):
    found = loading_options(
        LlamaConfig(),
        "m",
        quantize="nf4",
        dtype=torch.bfloat16,
        compute=None,
        device=torch.device("cpu"),
        keep=(),
        auto_class=None,
        adapted=True,
        trust_remote_code=False,
        sharded=sharded,
    )
    assert found["quantization_config"].bnb_4bit_quant_storage == storage


def test_a_model_of_the_hub_is_looked_at_in_passing():
    small = LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=32000)
    config, machine = config_of(model="org/on-the-hub"), plan.Machine(device="cuda", memory=24 * 2**30)
    found = plan.fits(config, machine, length=128, model_config=small)
    assert found.fits
    assert found.estimate is None  # nothing was built


def test_sharded_weights_run_as_no_graph(monkeypatch):
    monkeypatch.setattr(processes, "_HERE", [Processes(count=2, sharding="fsdp2")])
    trainer = SimpleNamespace(
        args=SimpleNamespace(
            device=torch.device("cpu"), torch_compile=False, torch_empty_cache_steps=None, optim="adamw_torch"
        ),
        accelerator=SimpleNamespace(scaler=None),
        model=AutoModelForCausalLM.from_config(MODEL),
    )
    assert graphed.why_no_graph(trainer) == "the weights are sharded"
    monkeypatch.setattr(processes, "_HERE", [Processes(count=2)])
    assert graphed.why_no_graph(trainer) is None


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (None, "2 processes; each sent 5.0 kB a step, the gradients"),
        ("fsdp2", "the gradients, and 7.0 kB of frozen weights, gathered in each pass"),
        ("hsdp", "the gradients, and within its machine 7.0 kB of frozen weights, gathered in each pass"),
    ],
)
def test_what_crossed_the_network(how, says):
    result = SimpleNamespace(processes=2, bytes_per_step=5000, sharding=how, gathered_bytes_per_step=7000)
    assert describe_network(result).endswith(says)
