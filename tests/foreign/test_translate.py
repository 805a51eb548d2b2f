"""Whose a file is; that no rule loses a value or trips over one; and the recipe that is written."""

import pytest
import yaml

from theodora.config import OPTION_NAMES, TrainConfig
from theodora.errors import ConfigError
from theodora.foreign import axolotl, axolotl_data, llama_factory, translate, unsloth
from theodora.foreign.reading import Reading, read_fields
from theodora.foreign.written import as_yaml

TABLES = {
    "axolotl": axolotl.RULES,
    "data": axolotl_data.DATA_RULES,
    "llama-factory": llama_factory.RULES,
    "model": unsloth._MODEL,
    "adapter": unsloth._ADAPTER,
    "training": unsloth._TRAINING,
}
VALUES = [True, False, 0, 1, 4, -1.5, "", "x", "a,b", "auto", "cosine", [], ["x"], [{}], {}, {"x": 1}, [[1]], 10**400]
LINES = (
    "base_model: gpt2\nadapter: lora\nlora_target_linear: true\ndatasets: [{path: rows.jsonl, type: chat_template}]\n"
)


@pytest.mark.parametrize("table", TABLES)
def test_no_rule_loses_a_value_or_trips_over_one(table, trl_checks):
    for name in TABLES[table]:
        for value in VALUES:
            reading = Reading(table, trl_checks)
            read_fields(reading, {name: value}, TABLES[table])
            if not reading.problems:
                reading.finish({name: value})
            assert reading.notes or reading.problems, (name, value)
            assert reading.options.keys() <= OPTION_NAMES | trl_checks.keys(), (name, value)


@pytest.mark.parametrize("tool", ["axolotl", "llama-factory"])
def test_names_that_mark_one_tool_are_not_the_others(tool):
    assert not axolotl.MARKS & llama_factory.MARKS
    assert {"axolotl": axolotl.MARKS, "llama-factory": llama_factory.MARKS}[tool].isdisjoint(OPTION_NAMES)


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        (
            "base_model: gpt2\nmodel_name_or_path: gpt2",
            "r.yaml",
            "may be of two tools: Axolotl has base_model; LLaMA-F",
        ),
        ("learning_rate: 1", "r.yaml", "is it a recipe already?"),
        ("other: 1", "r.yaml", "Found other"),
        ("- a", "r.yaml", "holds list"),
        ("", "r.yaml", "holds NoneType"),
        ("a: [", "r.yaml", "no YAML that can be read"),
        ("{", "r.json", "no JSON that can be read"),
        ("1: 2", "r.yaml", "expected names of fields"),
        ("!!python/object/apply:os.system ['ls']", "r.yaml", "no YAML that can be read"),
    ],
)
def test_a_file_that_is_not_clear_is_refused_with_what_was_found(text, name, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        translate(tmp_path / name)
    assert words in str(error.value)


def test_whose_it_is_can_be_said(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(LINES + "cutoff_len: 512\n")
    with pytest.raises(ConfigError, match="--from axolotl or llama-factory"):
        translate(path)
    assert translate(path, "axolotl").options["max_length"] == 512
    for name, tool in (("r.yaml", "unsloth"), ("r.py", "axolotl"), ("none.yaml", "axolotl"), ("none.py", None)):
        with pytest.raises(ConfigError):
            translate(tmp_path / name, tool)


def test_a_missing_field_of_ours_is_told(tmp_path):
    (tmp_path / "r.yaml").write_text(LINES.replace("base_model: gpt2\n", ""))
    with pytest.raises(ConfigError, match="model is missing"):
        translate(tmp_path / "r.yaml")


def test_the_recipe_holds_what_has_no_counterpart_and_where_each_option_came_from(tmp_path, trl_checks):
    path = tmp_path / "r.yaml"
    path.write_text(
        LINES + 'odd: "two\\nlines \\e[31m"\nlora_target_modules: [q_proj]\nchat_template: "# x\\n model: y"\n'
    )
    found = translate(path, None, trl_checks)
    text = as_yaml(found, "recipes/\x1b[31mr\n.yaml")
    assert "\x1b" not in text
    assert all(line.startswith("#") for line in text.partition("\n\n")[0].splitlines())
    assert "#   odd: " in text
    assert "model: gpt2  # base_model\n" in text
    assert yaml.safe_load(text) == found.options
    assert TrainConfig.from_options(yaml.safe_load(text)) == TrainConfig.from_options(found.options)
