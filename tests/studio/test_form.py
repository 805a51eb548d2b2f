"""The form: every option of a run, with its help; what is typed means what it means on a command line."""

import pytest

from theodora.cli.train import GROUPS
from theodora.config import OPTION_NAMES, TrainConfig
from theodora.parse import parse_yaml
from theodora.studio.form import check, form, typed_of

FIELDS = {field["name"]: field for group in form() for field in group["fields"]}


def test_every_option_has_its_field_and_help():
    assert OPTION_NAMES - FIELDS.keys() == {"trust_remote_code", "push_to_hub", "resume", "adapter"} & OPTION_NAMES
    assert FIELDS.keys() <= {name for _, names in GROUPS.values() for name in names} | {"trainer"}
    assert all(field["help"] for field in FIELDS.values())
    assert (FIELDS["method"]["kind"], FIELDS["method"]["choices"]) == ("choice", ["dora", "lora", "full"])
    assert (FIELDS["packing"]["kind"], FIELDS["packing"]["default"]) == ("truth", "no")
    assert FIELDS["rank_pattern"]["kind"] == "pairs"


def test_what_is_typed_is_what_the_command_takes():
    typed = {
        "model": "m",
        "data": " d ",
        "output": "o",
        "targets": "q_proj v_proj",
        "rank_pattern": "q_proj=4",
        "packing": "yes",
        "learning_rate": "1e-4",
        "held_out": "0.1",
        "alpha": "",
        "trainer": "optim: adafactor",
    }
    found = check(typed)
    assert found["problems"] == {}
    config = TrainConfig.from_options(parse_yaml(found["yaml"]))
    assert (config.adapter.targets, dict(config.adapter.rank_pattern)) == (("q_proj", "v_proj"), {"q_proj": 4})
    assert (config.packing, config.learning_rate, config.held_out) == (True, 1e-4, 0.1)
    assert dict(config.trainer) == {"optim": "adafactor"}
    assert "--targets q_proj v_proj" in found["command"]
    again = typed_of(found["options"])
    assert TrainConfig.from_options(check(again)["options"]) == config


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ({"rank": "0"}, "rank"),
        ({"rank": ["x"]}, "rank"),
        ({"learning_rate": "-1"}, "learning_rate"),
        ({"packing": "perhaps"}, "packing"),
        ({"rank_pattern": "q_proj"}, "rank_pattern"),
        ({"method": "qlora"}, "method"),
        ({"trainer": "- a"}, "trainer"),
        ({"trainer": "rank: 3"}, "trainer"),
        ({"trainer": "a: [1"}, "trainer"),
        ({"nonsense": "1"}, "nonsense"),
        ({"model": "a\0b"}, "model"),
    ],
)
def test_problems_stand_at_their_fields(typed, name):
    assert name in check({"model": "m", "data": "d", "output": "o"} | typed)["problems"]


def test_what_a_file_cannot_grant_is_no_matter_of_the_page():
    typed = {"model": "m", "data": "d", "output": "o", "objective": "grpo", "reward": "code.py:function"}
    assert "--reward" in str(check(typed)["problems"])
    assert check({"model": "m", "data": "d", "output": "o", "trust_remote_code": True})["problems"]


def test_hostile_words_are_words_of_the_command():
    found = check({"model": "m; rm -rf /", "data": "$(x)", "output": "a b"})
    assert "--model 'm; rm -rf /'" in found["command"]
    assert parse_yaml(found["yaml"]) == {"model": "m; rm -rf /", "data": "$(x)", "output": "a b"}
