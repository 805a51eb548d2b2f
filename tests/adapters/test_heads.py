"""Models for a task: their heads are trained in full, saved, and loaded both ways with PEFT."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from theodora import (
    AdapterConfig,
    CheckpointError,
    ConfigError,
    inject_adapter,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
)
from theodora.adapters.state import adapter_layers, trained_tensors
from tiny import FAMILIES, VOCAB_SIZE, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")

IDS = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
ENCODERS = ("bert", "roberta", "distilbert", "electra")
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": 0,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "embedding_size": 32,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
}
TASKS = {
    "SEQ_CLS": (AutoModelForSequenceClassification, {"num_labels": 3}),
    "TOKEN_CLS": (AutoModelForTokenClassification, {"num_labels": 3}),
    "QUESTION_ANS": (AutoModelForQuestionAnswering, {}),
}
TARGETS = {
    "llama": ["q_proj", "up_proj"],
    "qwen2": ["q_proj"],
    "gpt2": ["c_attn"],
    "bert": ["query"],
    "roberta": ["query"],
    "distilbert": ["q_lin"],
    "electra": ["query"],
}
CASES = [(task, family) for task in TASKS for family in TARGETS]


def made(task, family, seed=0):
    auto, more = TASKS[task]
    settings = SMALL if family in ENCODERS else {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, **FAMILIES[family]}
    torch.manual_seed(seed)
    return auto.from_config(AutoConfig.for_model(family, **settings | more)).eval()


def results(model):
    with torch.no_grad():
        out = model(IDS)
    return out.logits if "logits" in out else torch.stack([out.start_logits, out.end_logits])


def moved(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def field(folder, name):
    return json.loads((folder / "adapter_config.json").read_text())[name]


@pytest.mark.parametrize(("task", "family"), CASES)
def test_pefts_adapters_of_a_task_are_read(task, family, tmp_path):
    theirs = get_peft_model(made(task, family), LoraConfig(task_type=task, target_modules=TARGETS[family], r=4))
    moved(theirs).save_pretrained(tmp_path / "p")
    ours = load_adapter(made(task, family), tmp_path / "p")
    torch.testing.assert_close(results(ours), results(theirs), rtol=0, atol=1e-5)

    save_adapter(ours, tmp_path / "again")
    again = PeftModel.from_pretrained(made(task, family), tmp_path / "again")
    torch.testing.assert_close(results(again), results(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("task", "family"), CASES)
def test_a_head_is_trained_in_full_by_itself_and_saved(task, family, tmp_path):
    """On another head, as another process draws it, the adapter gives the same numbers."""
    model = moved(inject_adapter(made(task, family), AdapterConfig(rank=4)))
    names = [name for name, _ in model.named_children() if name in ("score", "classifier", "qa_outputs")]
    assert any(path.split(".")[0] in names for path in trained_tensors(model))
    assert not any(path.split(".")[0] in names for path in adapter_layers(model))
    save_adapter(model, tmp_path / "a")
    assert field(tmp_path / "a", "task_type") == task

    backbone = {
        key: tensor
        for key, tensor in made(task, family).state_dict().items()
        if key.startswith(f"{model.base_model_prefix}.")
    }
    for load in (load_adapter, PeftModel.from_pretrained):
        another = made(task, family, seed=5)
        another.load_state_dict(backbone, strict=False)
        loaded = load(another, tmp_path / "a")
        torch.testing.assert_close(results(loaded), results(model), rtol=0, atol=1e-5)


def test_a_head_comes_back_when_the_adapter_goes(tmp_path):
    model = made("SEQ_CLS", "llama")
    before = results(model)
    moved(inject_adapter(model))
    after = results(model)
    assert torch.allclose(results(merge_adapter(model)), after, atol=1e-5)
    remove_adapter(model)
    assert torch.equal(results(model), before)


def test_what_names_of_heads_a_model_lacks_is_no_matter_but_a_lost_head_is(tmp_path):
    theirs = get_peft_model(made("SEQ_CLS", "llama"), LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "p")
    bert = made("SEQ_CLS", "bert")
    with pytest.raises(CheckpointError, match=r"classifier\.weight: its module was trained in full"):
        load_adapter(bert, tmp_path / "p")


def test_an_adapter_of_a_task_says_so_where_a_model_is_for_another(tmp_path):
    save_adapter(inject_adapter(made("SEQ_CLS", "llama")), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"for SEQ_CLS:(.|\n)*score\.weight: no such parameter"):
        load_adapter(tiny_model("llama"), tmp_path / "a")


def from_checkpoint(auto, folder, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return auto.from_pretrained(folder, **more)


@pytest.fixture
def bert_folder(tmp_path):
    """A masked language model, whose checkpoint has no pooler."""
    from transformers import AutoModelForMaskedLM

    AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **SMALL)).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_what_is_new_in_the_backbone_is_trained_in_full_too(bert_folder, tmp_path):
    model = from_checkpoint(AutoModelForSequenceClassification, bert_folder, num_labels=3).eval()
    moved(inject_adapter(model))
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= set(trained_tensors(model))
    save_adapter(model, tmp_path / "a")
    again = from_checkpoint(AutoModelForSequenceClassification, bert_folder, num_labels=3).eval()
    torch.testing.assert_close(results(load_adapter(again, tmp_path / "a")), results(model), rtol=0, atol=1e-5)


def test_any_new_head_is_trained_in_full(bert_folder):
    model = from_checkpoint(AutoModelForMultipleChoice, bert_folder)
    assert "classifier.weight" in trained_tensors(inject_adapter(model))


def test_a_new_head_beside_a_language_model_is_trained_in_full(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"))
    model.v_head = torch.nn.Linear(32, 1)
    trained = trained_tensors(inject_adapter(model))
    assert {"v_head.weight", "v_head.bias"} <= set(trained)
    assert not any(path.startswith("lm_head") for path in trained)


@pytest.mark.parametrize("config", [{"targets": ("score",)}, {"targets": r".*score"}, {"exclude": ("score",)}])
def test_a_new_head_at_low_rank_or_left_out_is_refused(config, tiny_model_dir):
    model = from_checkpoint(AutoModelForSequenceClassification, tiny_model_dir("llama"), num_labels=3)
    with pytest.raises(ConfigError, match=r"on no disk(.|\n)*score"):
        inject_adapter(model, AdapterConfig(**config))


def test_a_head_that_is_on_disk_may_have_a_low_rank(tiny_model_dir, tmp_path):
    model = from_checkpoint(AutoModelForSequenceClassification, tiny_model_dir("llama"), num_labels=3)
    model.save_pretrained(tmp_path / "base")
    model = from_checkpoint(AutoModelForSequenceClassification, tmp_path / "base").eval()
    moved(inject_adapter(model, AdapterConfig(rank=2, targets=("score", "q_proj"))))
    assert "score" in adapter_layers(model)
    save_adapter(model, tmp_path / "a")
    assert field(tmp_path / "a", "task_type") is None  # PEFT would wrap the head
    base = from_checkpoint(AutoModelForSequenceClassification, tmp_path / "base").eval()
    torch.testing.assert_close(
        results(PeftModel.from_pretrained(base, tmp_path / "a")), results(model), rtol=0, atol=1e-5
    )


def test_other_models_have_no_heads_and_their_own_task(tmp_path):
    t5 = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", vocab_size=272, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )
    backbone = AutoModel.from_config(AutoConfig.for_model("llama", vocab_size=272, **FAMILIES["llama"]))
    for model, task in ((tiny_model("llama"), "CAUSAL_LM"), (t5, "SEQ_2_SEQ_LM"), (backbone, None)):
        inject_adapter(model, AdapterConfig(targets=r".*\.(q|q_proj)"))
        assert not any("lora" not in path and "magnitude" not in path for path in trained_tensors(model))
        save_adapter(model, tmp_path / str(task))
        assert field(tmp_path / str(task), "task_type") == task


@pytest.mark.parametrize("task", ["SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"])
def test_pefts_adapters_of_tasks_without_heads_are_read(task, tmp_path):
    def new():
        torch.manual_seed(0)
        if task == "FEATURE_EXTRACTION":
            return AutoModel.from_config(AutoConfig.for_model("llama", vocab_size=272, **FAMILIES["llama"])).eval()
        return AutoModelForSeq2SeqLM.from_config(
            AutoConfig.for_model("t5", vocab_size=272, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        ).eval()

    def out(model):
        given = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if task == "SEQ_2_SEQ_LM" else {})
        with torch.no_grad():
            return model(**given)[0]

    theirs = moved(get_peft_model(new(), LoraConfig(task_type=task, target_modules="all-linear")))
    theirs.save_pretrained(tmp_path / "p")
    torch.testing.assert_close(out(load_adapter(new(), tmp_path / "p")), out(theirs), rtol=0, atol=1e-5)
