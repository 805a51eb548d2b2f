"""Which answers a model finds likelier, by itself and beside its base."""

import json

import pytest
import torch
import torch.nn.functional as F

from theodora import AdapterConfig, DataError, inject_adapter, merge_adapter, save_adapter
from theodora.adapters.models import load_model
from theodora.cli.main import main
from theodora.data import load_examples
from theodora.evaluate import evaluate, evaluate_preferences
from theodora.evaluate.preferences import _auc
from theodora.evaluate.scores import LossNotFinite

PAIRS = [
    {"prompt": f"{a} + 3 =", "chosen": f" {a + 3}" + "." * (a % 3), "rejected": f" {a * 3}" + "!" * (a % 4)}
    for a in range(1, 9)
]
JUDGED = [{"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"} for row in PAIRS
          for kind in ("chosen", "rejected")]  # fmt: skip


@pytest.fixture
def source(tmp_path):
    def written(rows, kind="any"):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_examples(path, kind=kind)

    return written


@pytest.fixture
def adapted(tiny_model):
    model = inject_adapter(tiny_model().double(), AdapterConfig(rank=4))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def logp(model, tokenizer, row, answer):
    """By the definition: one answer at a time, in float64."""
    prompt, whole = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + answer))
    whole = [*whole, tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0, :-1].double()
    each = F.log_softmax(logits, dim=-1)[torch.arange(len(whole) - 1), whole[1:]]
    return float(each[len(prompt) - 1 :].sum()), len(whole) - len(prompt)


def test_they_are_sums_and_means_over_the_answers(adapted, tiny_model, tiny_tokenizer, source):
    scores = evaluate_preferences(adapted, tiny_tokenizer, source(PAIRS), use_chat_template=False, batch_size=3)
    base = tiny_model().double()
    found = {}
    for name, model in (("policy", adapted), ("base", base)):
        found[name] = [
            [logp(model, tiny_tokenizer, row, row[kind]) for kind in ("chosen", "rejected")] for row in PAIRS
        ]
    rewards = [[(own[0] - ref[0], own[1]) for own, ref in zip(*both, strict=True)]
               for both in zip(found["policy"], found["base"], strict=True)]  # fmt: skip
    for name, pairs in {**found, "rewards": rewards}.items():
        own, count = getattr(scores, name), len(pairs)
        assert own.better == pytest.approx(sum(good for (good, _), _ in pairs) / count, abs=1e-5)
        assert own.worse == pytest.approx(sum(bad for _, (bad, _) in pairs) / count, abs=1e-5)
        assert own.margin == pytest.approx(own.better - own.worse)
        assert own.better_per_token == pytest.approx(sum(good / n for (good, n), _ in pairs) / count, abs=1e-5)
        assert own.accuracy == sum(good > bad for (good, _), (bad, _) in pairs) / count
        assert own.accuracy_per_token == sum(good / n > bad / m for (good, n), (bad, m) in pairs) / count
        assert own.auc is None
    assert scores.tokens == sum(n for pair in found["base"] for _, n in pair)
    assert (scores.better, scores.worse) == (8, 8)
    assert 0 < scores.rewards.accuracy < 1  # neither sign is one that all pairs have


def test_merged_it_is_the_same_and_has_its_base(adapted, tiny_model, tiny_tokenizer, source):
    scores = evaluate_preferences(adapted, tiny_tokenizer, source(PAIRS))
    plain = evaluate_preferences(tiny_model().double(), tiny_tokenizer, source(PAIRS))
    assert (plain.base, plain.rewards) == (None, None)
    assert plain.policy.to_dict() == pytest.approx(scores.base.to_dict(), abs=1e-5)
    merged = evaluate_preferences(merge_adapter(adapted), tiny_tokenizer, source(PAIRS))
    assert merged.policy.to_dict() == pytest.approx(scores.policy.to_dict(), abs=1e-4)
    assert merged.base.to_dict() == pytest.approx(scores.base.to_dict(), abs=1e-4)


def test_judged_answers(adapted, tiny_tokenizer, source):
    pairs = evaluate_preferences(adapted, tiny_tokenizer, source(PAIRS))
    judged = evaluate_preferences(adapted, tiny_tokenizer, source(JUDGED))
    for name in ("policy", "base", "rewards"):
        one, other = getattr(pairs, name), getattr(judged, name)
        assert one.margin == pytest.approx(other.margin, abs=1e-5)
        assert other.accuracy is None
        assert 0 < other.auc < 1
    assert judged.tokens == pairs.tokens
    with pytest.raises(DataError, match="all 8 answers are good; expected some of each kind"):
        evaluate_preferences(adapted, tiny_tokenizer, source([row for row in JUDGED if row["label"]]))


def test_the_area_under_the_curve():
    assert _auc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 0.0])) == 1.0
    assert _auc(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])) == (0.5 + 0 + 1 + 0) / 4


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (PAIRS[0], "preference"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
          "rejected_response": "c"}, "preference"),
        (JUDGED[0], "unpaired"),
        ({"prompt": "a", "completion": "b", "kto_tag": "False"}, "unpaired"),
        ({"prompt": "a", "completion": "b", "label": 3}, "prompt-completion"),
        ({"text": "a", "label": True}, "text"),
    ],
)  # fmt: skip
def test_rows_are_recognised_by_their_columns(row, found, source):
    assert source([row]).format == found


def test_what_is_wrong_is_said(tiny_model, tiny_tokenizer, source):
    with pytest.raises(DataError, match="expected pairs of answers, or answers with a verdict"):
        evaluate_preferences(tiny_model(), tiny_tokenizer, source([{"prompt": "a", "completion": "b"}]))
    with pytest.raises(DataError, match="holds pairs of answers, which evaluate_preferences scores"):
        evaluate(tiny_model(), tiny_tokenizer, source(PAIRS))
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(LossNotFinite, match=r"in answer 1, 2, .* of the 16 scored together"):
        evaluate_preferences(model, tiny_tokenizer, source(PAIRS))


class TestCommand:
    @pytest.fixture
    def folder(self, tiny_model_dir, tmp_path):
        model = inject_adapter(load_model(tiny_model_dir("llama")), AdapterConfig(rank=4))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        save_adapter(model, tmp_path / "adapter")
        return tmp_path / "adapter"

    def asked(self, capsys, *arguments):
        code = main(["evaluate", *map(str, arguments)])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed

    def test_it_tells_them_of_base_and_adapter(self, folder, source, tmp_path, capsys):
        source(PAIRS)
        rows = ("--model", folder, "--data", tmp_path / "rows.jsonl")
        printed = self.asked(capsys, *rows)
        assert "8 rows read as preferences" in printed.err
        words = printed.out.splitlines()[0].split()
        assert words == ["base", "adapter", "reward/β"]
        assert "better answer likelier" in printed.out
        found = json.loads(self.asked(capsys, *rows, "--json").out)
        assert found["better"] == 8
        assert found["rewards"]["margin"] == pytest.approx(found["policy"]["margin"] - found["base"]["margin"])
        assert len(json.loads(self.asked(capsys, *rows, "--json", "--limit", 2).out)["base"]) == 8

    def test_of_a_model_alone_and_judged_answers(self, tiny_model_dir, source, tmp_path, capsys):
        source(JUDGED)
        rows = ("--model", tiny_model_dir("llama"), "--data", tmp_path / "rows.jsonl")
        printed = self.asked(capsys, *rows).out
        assert "AUC" in printed
        assert "base" not in printed
        assert "right label likeliest" in self.asked(capsys, *rows, "--labels", "auto", "--no-exact-match").out
