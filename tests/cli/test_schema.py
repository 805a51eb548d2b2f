"""The schemas that editors get: they accept what `from_options` accepts, and refuse what `coerce` refuses."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from theodora import AdapterConfig, TrainConfig
from theodora.cli.arguments import field_docstrings
from theodora.cli.main import main
from theodora.cli.train import read_yaml
from theodora.coerce import coerce, type_hints
from theodora.compare.config import CompareConfig
from theodora.config import OPTION_NAMES, SAME_AS
from theodora.errors import ConfigError
from theodora.parse import parse_yaml, to_yaml
from theodora.train.arguments import sft_arguments

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
NEEDED = {"model": "gpt2", "data": "train.jsonl", "output": "runs/first"}
VALUES = [
    *(None, True, False, "true", "auto", "none", "x", "a,b", "", "-1", "3", "1e-3", " 0.5 ", "1_000", "0x10"),
    *(-1, 0, 1, 3, 0.5, 1.5, 4.0, 2**40, [], ["q_proj"], [1, 2], {}, {"q_proj": 4}, {"q_proj": 2.5}, "cosine", "nf4"),
]


@pytest.fixture(scope="module")
def schemas():
    """As the command prints them."""
    import contextlib
    import io

    printed = {}
    for name in ("train", "compare"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(["schema", name]) == 0
        printed[name] = json.loads(out.getvalue())
        Draft202012Validator.check_schema(printed[name])
    return printed


@pytest.fixture(scope="module")
def wrong_in(schemas):
    validators = {name: Draft202012Validator(schema) for name, schema in schemas.items()}
    return lambda options, name="train": [error.message for error in validators[name].iter_errors(options)]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_valid(recipe, wrong_in):
    name = "compare" if recipe.name.startswith("study") else "train"
    assert wrong_in(read_yaml(str(recipe)), name) == []


def test_the_record_of_a_run_is_valid(wrong_in, tiny_model_dir, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one", "completion": "two"}\n' * 4)
    run = ["train", "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "run"), "--held-out", "0"]
    assert (
        main([*run, "--model", str(tiny_model_dir("gpt2")), "--max-steps", "1", "--optim", "adafactor", "--json"]) == 0
    )
    assert wrong_in(read_yaml(str(tmp_path / "run" / "config.yaml"))) == []


def test_the_record_of_a_comparison_is_valid(wrong_in):
    config = CompareConfig.from_options({**NEEDED, "data": {"own": "rows.jsonl"}, "learning_rates": {"default": [1]}})
    assert wrong_in(parse_yaml(to_yaml(config.to_options())), "compare") == []


def test_every_option_is_there_with_its_docstring(schemas):
    properties = schemas["train"]["properties"]
    assert properties.keys() >= OPTION_NAMES | SAME_AS.keys()
    for config_class in (TrainConfig, AdapterConfig):
        for name, text in field_docstrings(config_class).items():
            if name not in ("adapter", "trainer"):
                assert properties[name]["description"] == " ".join(text.split())
    assert properties["rank"]["default"] == 8
    assert properties["method"]["enum"] == ["dora", "lora", "full"]
    assert "cosine" in properties["lr_scheduler_type"]["enum"]
    assert "adafactor" in properties["optim"]["enum"]
    assert "NEFTune" in properties["neftune_noise_alpha"]["description"]
    assert properties["num_generations"]["description"].endswith("(Of grpo.)")
    assert all(schema.get("description") for schema in properties.values())


@pytest.mark.parametrize("name", sorted(OPTION_NAMES - {"trainer"}))
def test_it_agrees_with_the_program(name, wrong_in):
    config_class = AdapterConfig if name in {f.name for f in fields(AdapterConfig)} else TrainConfig
    for value in VALUES:
        told = wrong_in({name: value})
        try:
            coerce(value, type_hints(config_class)[name])
            TrainConfig.from_options({**NEEDED, name: value}, granted=[name])
        except ValueError:  # a type that it cannot be
            assert told or (name, value) in {("bf16", "auto")}, value
        except ConfigError:
            pass  # of the wrong size, or at odds with another: a schema tells the former alone
        else:
            # sft_arguments has the last word on these, and refuses what is unknown
            assert not told or name in ("lr_scheduler_type", "report_to"), (value, told)


def test_what_is_out_of_range_is_told(wrong_in):
    wrong = {"rank": 0, "dropout": 1, "learning_rate": 0, "max_length": 1, "replay_share": 1.0, "save_total_limit": 0}
    assert len(wrong_in(wrong)) == len(wrong)
    assert wrong_in({"max_steps": -1, "bf16": "auto"}) == []


@pytest.mark.parametrize("name", ["lora_r", "learning_rat", "dataset_text", "eval_batch"])
def test_unknown_names_are_refused(name, wrong_in):
    assert "Additional properties are not allowed" in wrong_in({name: 1})[0]
    assert "Additional properties are not allowed" in wrong_in({"trainer": {name: 1}})[0]


def test_trls_fields_stand_beside_the_others_or_under_trainer(wrong_in):
    passed = {"optim": "adafactor", "neftune_noise_alpha": 5, "beta": "0.05", "num_generations": 4}
    assert wrong_in(passed) == wrong_in({"trainer": passed}) == []
    assert len(wrong_in({"optim": "adafactory", "neftune_noise_alpha": "much", "push_to_hub": True})) == 3
    assert wrong_in({"trainer": {"rank": 8}})


def test_other_names_for_options_are_known(wrong_in):
    assert wrong_in({"output_dir": "runs/x", "warmup_ratio": 0.03, "assistant_only_loss": True}) == []
    assert wrong_in({"warmup_ratio": "long"})


def test_defaults_of_trls_fields_are_those_of_a_run(schemas, tmp_path):
    arguments = sft_arguments(TrainConfig(**NEEDED), tmp_path)
    for name, schema in schemas["train"]["properties"]["trainer"]["properties"].items():
        if schema.get("default", "auto") != "auto":  # which TRL has resolved by now
            found = getattr(arguments, name)
            assert getattr(found, "value", found) == schema["default"], name


def test_mistakes_in_a_comparison_are_told(wrong_in):
    good = {"model": "gpt2", "output": "out", "data": {"a": "rows.jsonl", "b": {"train": "b.jsonl", "score": "f1"}}}
    assert wrong_in(good, "compare") == []
    assert wrong_in({"data": {"a": {"validation": 0.1}}}, "compare")
    assert wrong_in({"methods": ["lora", "qlora"]}, "compare")
    assert wrong_in({"methods": [{"method": "dora", "rnk": 8}]}, "compare")
    assert wrong_in({"steps": 0}, "compare")
