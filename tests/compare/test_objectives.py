"""Objectives side by side: pairs for all, of which sft learns the better answer."""

import json
import re

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from theodora import AdapterConfig, TrainConfig, inject_adapter, save_adapter, train
from theodora.adapters.models import load_model
from theodora.compare import CompareConfig, worker
from theodora.compare.material import read_splits
from theodora.errors import ConfigError, DataError, UsageError
from theodora.files.names import WEIGHTS_NAME
from tiny import tiny_model
from train.rewarded import reward, saved

METHODS = ["lora", {"method": "lora", "objective": "dpo"}, {"method": "dora", "objective": "simpo", "beta": 1.0}]


@pytest.fixture
def pairs(tmp_path):
    words = ("even", "odd")
    rows = [{"prompt": f"{n}?", "chosen": words[n % 2], "rejected": words[1 - n % 2]} for n in range(60)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(path), "validation": 8, "test": 16, "score": "labels"}
    return {"data": {"parity": data}, "methods": METHODS, "learning_rates": [1e-2], "reference": ["lora"]}


def test_objectives_are_compared(run, pairs, undrawn):
    records = run(**pairs, steps=12)
    finals = {record.method: record for record in records.values() if record.phase == "final"}
    assert finals.keys() == {"lora", "lora-dpo", "dora-simpo"}
    assert {record.status for record in finals.values()} == {"ok"}, finals
    for record in finals.values():
        assert 0 <= record.score <= 1
        assert record.general_loss > 0
    first = {name: record.losses[0][1] for name, record in finals.items()}
    assert first["lora-dpo"] == pytest.approx(0.6931472, abs=1e-5)
    assert finals["lora-dpo"].losses[-1][1] < first["lora-dpo"]
    assert first["lora"] > 1  # of a token, not of a pair


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ({"method": "lora", "objective": "kto"}, "objective is 'kto'; expected one of sft, dpo"),
        ({"method": "full", "objective": "dpo"}, "no adapter to switch off"),
        ({"method": "lora", "beta": 0.1}, "of an objective other than sft"),
        ({"method": "lora", "objective": "dpo", "replay": 0.1}, "replay is of sft"),
    ],
)
def test_what_makes_no_sense_is_refused(method, told, options):
    with pytest.raises(ConfigError, match=told):
        CompareConfig.from_options(options | {"methods": [method]})


GRPO = {"method": "lora", "objective": "grpo", "num_generations": 4}
REWARDED = ["token_f1", reward("low"), "length:3"]


@pytest.fixture(scope="session")
def ends(tmp_path_factory):
    """A model whose answers end."""
    return saved(tiny_model(), tmp_path_factory.mktemp("ends"))


@pytest.fixture
def rewarded(pairs, ends):
    data = {"parity": {**pairs["data"]["parity"], "max_new_tokens": 5}}
    return {
        **pairs,
        "model": ends,
        "data": data,
        "methods": ["lora", GRPO, {"method": "dora", "objective": "dpo"}],
        "reward": REWARDED,
        "reward_weights": [0.1, 1.0, 0.1],
        "steps": 4,
        "batch_size": 6,
    }


class TestRewards:
    def test_grpo_is_compared_with_the_others(self, run, rewarded, tmp_path, undrawn):
        methods = ["full", *rewarded["methods"], {**GRPO, "name": "more", "steps_per_generation": 2, "beta": 0.1}]
        allowed = [REWARDED[1].rpartition(":")[0]]
        options = {**rewarded, "methods": methods, "learning_rates": [1e-3, 3e-2], "steps": 12}
        records = run(**options, allow_code=allowed)
        assert {record.status for record in records.values()} == {"ok"}, records
        finals = {record.method: record for record in records.values() if record.phase == "final"}
        assert finals.keys() == {"full", "lora", "lora-grpo", "dora-dpo", "more"}
        assert "kl" not in finals["full"].judged["parity"]  # which has nothing to switch off
        before = records["base"].judged["parity"]
        assert "kl" not in before
        for record in finals.values():
            found = record.judged["parity"]
            weighted = 0.1 * found["rewards/token_f1"] + found["rewards/low"] + 0.1 * found["rewards/length"]
            assert record.reward == pytest.approx(weighted, abs=1e-6)
            assert record.method == "full" or found["kl"] > 0
            assert 1 <= found["length"] <= 5
            assert 0 <= record.score <= 1
            assert record.general_loss > 0
        learned = max(finals["lora-grpo"].reward, finals["more"].reward)
        assert learned > max(before["reward"], finals["dora-dpo"].reward) + 0.02
        assert finals["lora"].drawn == finals["dora-dpo"].drawn == 0
        assert 12 * 6 * 4 <= finals["lora-grpo"].drawn <= 12 * 6 * 4 * 5
        assert len(pq.read_table(tmp_path / "out" / "results.parquet")["reward_low"]) == len(records)
        page = (tmp_path / "out" / "report.html").read_text()
        for words in ("What answers are worth", "tokens drawn to learn from", "token_f1", "Neither tokens nor time"):
            assert words in page
        assert f"{before['reward']:.3f}" in page

    def test_what_is_there_is_not_run_again(self, run, rewarded, monkeypatch, undrawn, tmp_path):
        allowed = [REWARDED[1].rpartition(":")[0]]
        options = rewarded | {"general": None, "curve_points": 0}
        done = []
        judge = worker.judge

        def stops(*args, **kwargs):
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(kwargs)
            return judge(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(worker, "judge", stops)
            with pytest.raises(KeyboardInterrupt):
                run(**options, allow_code=allowed)
        first = run(**options, allow_code=allowed)
        again = {key: record.seconds for key, record in first.items()}
        assert again == {key: record.seconds for key, record in run(**options, allow_code=allowed).items()}
        with pytest.raises(UsageError, match=r"reward.*token_f1"):
            run(**{**options, "reward": [*REWARDED, "exact_match"], "reward_weights": []}, allow_code=allowed)

    def test_reward_models_judge_and_stay_the_same(self, run, rewarded, ends, pairs, tmp_path, undrawn):
        asked = {"model": ends, "data": pairs["data"]["parity"]["train"], "objective": "reward", "max_steps": 1}
        train(TrainConfig.from_options({**asked, "output": str(tmp_path / "judge"), "held_out": 0}))
        judge = str(tmp_path / "judge")
        options = rewarded | {"methods": [GRPO, {"method": "lora", "objective": "dpo"}], "reward": [judge]}
        options |= {"reward_weights": [], "reference": [], "general": None, "curve_points": 0}
        records = run(**options)
        assert {record.status for record in records.values()} == {"ok"}, records
        assert all(record.judged["parity"]["rewards/judge"] for record in records.values() if record.phase == "final")
        tensors = load_file(tmp_path / "judge" / WEIGHTS_NAME)  # (as large as before, as after training anew)
        save_file({name: tensor * 2 for name, tensor in tensors.items()}, tmp_path / "judge" / WEIGHTS_NAME)
        with pytest.raises(UsageError, match=r"contents.*judge"):
            run(**options)

    def test_it_goes_on_from_an_adapter(self, run, rewarded, ends, tmp_path, undrawn):
        """Which stays what the model is compared with."""
        model = inject_adapter(load_model(ends, dtype="float32"), AdapterConfig(method="lora", rank=3))
        for name, tensor in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(tensor, std=0.1)
        save_adapter(model, tmp_path / "adapter")
        begun = {"from_adapter": str(tmp_path / "adapter"), "learning_rates": [1e-6]}
        methods = ["lora", *({**kind, **begun} for kind in (GRPO, {"method": "lora", "objective": "dpo"}))]
        options = rewarded | {"methods": methods, "reward": ["token_f1", "length:3"], "reward_weights": []}
        records = run(**options)
        assert {record.status for record in records.values()} == {"ok"}, records
        finals = {record.method: record for record in records.values() if record.phase == "final"}
        grpo, dpo = (finals[f"lora+from-adapter-{name}"] for name in ("grpo", "dpo"))
        assert grpo.rank is None
        assert dpo.losses[0][1] == pytest.approx(0.6931472, abs=1e-5)
        for record in (grpo, dpo):  # nothing was learned, and so it is the adapter's
            assert record.judged["parity"]["kl"] == pytest.approx(0, abs=1e-5)
        assert abs(grpo.loss - records["base"].other_losses["parity"]) > 1e-3
        wrong = {"methods": [{**GRPO, **begun, "method": "dora"}]}
        with pytest.raises(DataError, match="is one of lora; expected one of dora"):
            run(**options | wrong | {"output": str(tmp_path / "other"), "reference": ["dora+from-adapter-grpo"]})

    def test_dropout_is_off_where_answers_are_compared(self, run, rewarded, monkeypatch, undrawn):
        seen, train_light = [], worker.train_light

        def noted(model, *args, **kwargs):
            seen.append({module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)})
            return train_light(model, *args, **kwargs)

        monkeypatch.setattr(worker, "train_light", noted)
        methods = [
            {"method": "lora", "dropout": 0.2, "name": n, "objective": o} for n, o in (("a", "sft"), ("b", "dpo"))
        ]
        run(**rewarded | {"methods": methods, "reference": ["a"], "reward": [], "reward_weights": [], "steps": 1})
        assert seen == [{0.2}, {0.0}]

    def test_a_file_cannot_name_code(self, options, rewarded):
        given = options | rewarded
        with pytest.raises(ConfigError, match=r"reward is .*rewarded.py:low.*--reward"):
            CompareConfig.from_options(given)
        CompareConfig.from_options(given, granted=["reward"])
        CompareConfig.from_options(given, allow_code=[REWARDED[1].rpartition(":")[0]])

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"reward": [], "reward_weights": []}, "reward is missing, which lora-grpo learns from"),
            ({"reward_weights": [1.0]}, "reward_weights: expected 3, one for each"),
            ({"methods": [{**GRPO, "reward_weights": [1.0]}]}, "reward_weights: expected 3, one for each"),
            ({"methods": [{**GRPO, "reward_weights": ["much"]}]}, "expected a list of numbers"),
            ({"methods": [{"method": "lora", "num_generations": 4}]}, "num_generations: of objective grpo alone"),
            ({"methods": [{**GRPO, "method": "full"}]}, "no adapter to switch off"),
            ({"methods": [{**GRPO, "replay": 0.1}]}, "grpo learns no plain text"),
            ({"methods": [{**GRPO, "from_adapter": "a", "rank": 3}]}, "there is no option rank"),
            ({"methods": [{**GRPO, "from_adapter": "a", "alpha": 3}]}, "alpha: the adapter in 'a' says that already"),
            ({"methods": [{**GRPO, "from_adapter": "a", "method": "pissa"}]}, "of lora or dora"),
            ({"reward_timeout": 0}, "reward_timeout is 0"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, changes, told, options, rewarded):
        with pytest.raises(ConfigError, match=re.escape(told)):
            CompareConfig.from_options(options | rewarded | changes, granted=["reward"])

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"methods": [{**GRPO, "name": "cold", "temperature": 0}]}, "cold: .*temperature is 0"),
            ({"methods": [{**GRPO, "name": "free", "loss_type": "cispo"}]}, "free: .*cispo needs epsilon_high"),
            (
                {"methods": [{**GRPO, "name": "long", "max_completion_length": 600}]},
                "max_completion_length is 600, and max_length",
            ),
            ({"methods": [{**GRPO, "name": "odd", "generation_batch_size": 20}]}, "a step has 24 completions"),
            ({"reward": ["taste"], "reward_weights": []}, "'taste' is no reward"),
        ],
    )
    def test_before_anything_is_loaded(self, changes, told, options, rewarded):
        given = {**options, **rewarded, **changes}
        given["methods"] = [*rewarded["methods"], *changes.get("methods", [])]
        config = CompareConfig.from_options(given, granted=["reward"])
        with pytest.raises((ConfigError, DataError), match=f"(?s){told}"):
            read_splits(config)

    def test_columns_that_a_function_needs(self, run, rewarded, monkeypatch):
        monkeypatch.setattr(worker, "load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
        with pytest.raises(
            DataError, match=r"(?s)data.parity: .*needs 'n' and 'kind'; the rows have prompt, completion, reference"
        ):
            run(**{**rewarded, "reward": [reward("of_rows")], "reward_weights": []}, allow_code=[REWARDED[1][:-4]])
