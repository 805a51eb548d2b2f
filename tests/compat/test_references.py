"""Preference and reward trainers compare an injected policy with what it was when they began, and with nothing else."""

from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTTrainer,
)
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from theodora import (
    AdapterConfig,
    ConfigError,
    accelerate,
    adapter_disabled,
    inject_adapter,
    load_adapter,
    merge_adapter,
    reference_model,
    remove_adapter,
    save_adapter,
)
from theodora.adapters.state import trained_tensors
from tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch", "ignore::UserWarning:trl")

IDS = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))
PAIRS = [{"prompt": f"{i} and", "chosen": " one more", "rejected": " nothing at all"} for i in range(8)]
LABELLED = [{"prompt": f"{i} and", "completion": [" one", " no"][i % 2], "label": i % 2 == 0} for i in range(8)]
PROMPTS = [{"prompt": f"{i} and"} for i in range(8)]


def moved(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in trained_tensors(model).values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """A base in a folder, and the folder of an adapter on it that has been trained."""
    folder = tmp_path_factory.mktemp("sft")
    tiny_model("llama").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    save_adapter(moved(inject_adapter(model, AdapterConfig(rank=2))), folder / "sft")
    return folder


def policy(sft, **config):
    model = AutoModelForCausalLM.from_pretrained(sft / "base")
    return (
        load_adapter(model, sft / "sft", trainable=True)
        if not config
        else inject_adapter(model, AdapterConfig(**config))
    )


def arguments(kind, folder, **more):
    return kind(
        output_dir=str(folder),
        max_steps=3,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **more,
    )


ONLINE = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
KINDS = {
    "dpo": (DPOTrainer, DPOConfig, PAIRS, {"max_length": 64}),
    "precomputed": (DPOTrainer, DPOConfig, PAIRS, {"max_length": 64, "precompute_ref_log_probs": True}),
    "kto": (KTOTrainer, KTOConfig, LABELLED, {"max_length": 64}),
    "grpo": (GRPOTrainer, GRPOConfig, PROMPTS, ONLINE),
    "rloo": (RLOOTrainer, RLOOConfig, PROMPTS, ONLINE),
}


def trainer_of(kind, model, folder, **more):
    trainer, config, rows, options = KINDS[kind]
    given = {name: more.pop(name) for name in ("ref_model", "peft_config") if name in more}
    if "num_generations" in options:
        given["reward_funcs"] = lambda completions, **_: [float(len(set(text))) for text in completions]
    return trainer(
        model,
        args=arguments(config, folder, **options | more),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        **given,
    )


def history(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


@pytest.mark.parametrize(
    "config", [{}, {"rank": 2}, {"rank": 2, "method": "lora", "dropout": 0.5}], ids=["sft", "new", "lora"]
)
@pytest.mark.parametrize("kind", ["dpo", "precomputed"])
def test_the_first_loss_of_dpo_is_that_of_a_coin(kind, config, sft, tmp_path):
    trainer = trainer_of(kind, policy(sft, **config), tmp_path)
    trainer.train()
    first, *later = history(trainer, "loss")
    assert first == pytest.approx(0.693147, abs=2e-6)
    assert all(abs(loss - first) > 1e-3 for loss in later[1:])


@pytest.mark.parametrize("kind", ["kto", "grpo", "rloo"])
def test_nothing_has_been_learned_when_it_begins(kind, sft, tmp_path):
    trainer = trainer_of(kind, policy(sft), tmp_path)
    trainer.train()
    first, *later = history(trainer, "rewards/chosen" if kind == "kto" else "kl")
    assert first == pytest.approx(0, abs=1e-6)
    assert all(abs(value) > 1e-5 for value in later[1:])


def test_the_policy_is_compared_with_its_own_twin(sft, tmp_path):
    model = policy(sft)
    with torch.no_grad():
        before = model(IDS).logits
    trainer = trainer_of("grpo", model, tmp_path)
    trainer.train()
    reference = trainer.ref_model
    with torch.no_grad():
        assert torch.equal(reference(input_ids=IDS).logits, before)
        assert not torch.equal(model(IDS).logits, before)
    own = {id(p) for p in model.parameters()}
    extra = sum(p.numel() for p in reference.parameters() if id(p) not in own)
    assert extra == sum(tensor.numel() for tensor in trained_tensors(model).values())


def test_a_copied_policy_is_a_reference_already(sft, tmp_path):
    trainer = OnlineDPOTrainer(
        policy(sft),
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=arguments(OnlineDPOConfig, tmp_path, max_new_tokens=4, max_length=64),
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=tiny_tokenizer(),
    )
    with torch.no_grad():
        torch.testing.assert_close(trainer.ref_model(IDS).logits, policy(sft)(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fast", [False, True], ids=["", "accelerated"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_reference_stays_what_it_was_wherever_it_is_entered(family, tied, fast):
    base = tiny_model(family, tied=tied)
    model = moved(
        inject_adapter(tiny_model(family, tied=tied), AdapterConfig(rank=2, init="pissa", modules_to_save=("lm_head",)))
    )
    if fast:
        accelerate(model)
    twin, plain = reference_model(model, "default"), reference_model(model)
    with torch.no_grad():
        was, words = model(IDS).logits, model.generate(IDS, max_new_tokens=4, do_sample=False)
        moved(model)
        assert not torch.allclose(model(IDS).logits, was)
        assert torch.equal(twin(IDS).logits, was)
        assert torch.equal(twin.get_output_embeddings()(twin.base_model(IDS).last_hidden_state), was)
        assert torch.equal(twin.generate(IDS, max_new_tokens=4, do_sample=False), words)
        assert torch.equal(plain(IDS).logits, base(IDS).logits)
    assert not any(parameter.requires_grad for parameter in (*twin.parameters(), *plain.parameters()))
    assert {p for p in model.parameters() if p.requires_grad} == set(trained_tensors(model).values())
    assert type(plain) is type(base)


def test_what_a_trainer_hung_on_the_policy_does_not_reach_the_reference(sft, tmp_path):
    """TRL patches `forward` on the object: what it keeps of the policy's own must not run in a later reference."""
    model = policy(sft)
    trainer_of("dpo", model, tmp_path).train()
    twin = reference_model(model)
    with torch.no_grad():
        assert torch.equal(twin(IDS).logits, tiny_model("llama")(IDS).logits)


def test_a_base_weight_that_trains_is_the_references_own():
    model = inject_adapter(tiny_model("llama"), AdapterConfig(rank=2))
    model.model.norm.weight.requires_grad_(True)
    twin = reference_model(model, "default")
    with torch.no_grad():
        was = twin(IDS).logits
        model.model.norm.weight += 1
        assert torch.equal(twin(IDS).logits, was)


class UnderDisabled(torch.nn.Module):
    """What looks like a reference, and follows the policy wherever it is entered past `forward`."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, *args, **kwargs):
        with adapter_disabled(self.inner):
            return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("dpo", {"sync_ref_model": True}, "sync_ref_model=False"),
        ("grpo", {"sync_ref_model": True}, "sync_ref_model=False"),
        ("dpo", {"peft_config": LoraConfig(target_modules=["q_proj"])}, "peft_config"),
        ("kto", {"peft_config": LoraConfig(target_modules=["q_proj"])}, "peft_config"),
    ],
)
def test_what_cannot_be_right_is_refused_at_once(kind, more, said, sft, tmp_path):
    with pytest.raises(ConfigError, match=said):
        trainer_of(kind, policy(sft), tmp_path, **more)


def test_a_reference_that_would_follow_is_refused(sft, tmp_path):
    model = policy(sft)
    with pytest.raises(ConfigError, match="reference_model"):
        trainer_of("dpo", model, tmp_path, ref_model=UnderDisabled(model))


def test_sft_with_a_second_adapter_of_pefts_is_refused(sft):
    with pytest.raises(ConfigError, match="peft_config"):
        SFTTrainer(policy(sft), train_dataset=Dataset.from_list(PAIRS), peft_config=LoraConfig())


def test_pefts_adapters_of_transformers_are_refused_while_ours_are_there(sft):
    model = policy(sft)
    for method in (model.add_adapter, model.load_adapter, partial(get_peft_model, model)):
        with pytest.raises(ConfigError, match=r"theodora\.remove_adapter"):
            method(LoraConfig(target_modules=["q_proj"]))
    remove_adapter(model)
    try:
        model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    except ValueError as error:  # transformers 5.24 wants PEFT 0.22, which there was not yet
        if "The version of PEFT you are using is not compatible" not in str(error):
            raise


def test_other_models_get_the_reference_they_always_got(sft, tmp_path):
    trainer = trainer_of("grpo", AutoModelForCausalLM.from_pretrained(sft / "base"), tmp_path)
    own = {id(parameter) for parameter in trainer.model.parameters()}
    assert not any(id(parameter) in own for parameter in trainer.ref_model.parameters())


def test_a_merged_adapter_has_no_reference():
    model = merge_adapter(inject_adapter(tiny_model("llama"), AdapterConfig(rank=2)))
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        reference_model(model, "default")
