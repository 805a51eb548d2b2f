"""`theodora schema`: a JSON Schema of the YAML that `train` and `compare` read, for editors.

example:
  theodora schema > theodora.schema.json
  theodora schema compare > theodora-compare.schema.json

Editors with a YAML language server then complete names, show what they mean, and underline what is unknown, in a file
that begins with the line `# yaml-language-server: $schema=theodora.schema.json`. TRL's fields that a run passes through
are described as the installed TRL describes them.
"""

from __future__ import annotations

import argparse
from typing import Any

from theodora.adapter_config import LARGEST_NUMBER, AdapterConfig
from theodora.cli.imports import imports
from theodora.cli.json_schema import DIALECT, Schema, described, properties_of, type_schema
from theodora.config import SAME_AS, TRAIN_BOUNDS, TrainConfig

_ADAPTER_BOUNDS: dict[str, Schema] = {
    "rank": {"minimum": 1, "maximum": LARGEST_NUMBER},
    "alpha": {"exclusiveMinimum": 0},
    "dropout": {"minimum": 0, "exclusiveMaximum": 1},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `theodora schema`."""
    parser.add_argument(
        "command",
        nargs="?",
        choices=sorted(_SCHEMAS),
        default="train",
        metavar="|".join(sorted(_SCHEMAS, reverse=True)),
        help="the command that reads the file. Default: train (plan reads the same)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the schema."""
    from theodora.cli.console import print_json

    print_json(_SCHEMAS[args.command]())
    return 0


def train_schema() -> Schema:
    """The schema of `theodora train --config FILE`. Nothing is required: what is missing may be a flag."""
    with imports():
        from theodora.train.passed_on import passed_options, words_of

    own = properties_of(TrainConfig, leave_out=["adapter", "trainer"])
    adapter = properties_of(AdapterConfig)
    for name, (least, inclusive) in TRAIN_BOUNDS.items():
        own[name]["minimum" if inclusive else "exclusiveMinimum"] = least
    own["replay_share"] |= {"minimum": 0, "exclusiveMaximum": 1}
    for name, bounds in _ADAPTER_BOUNDS.items():
        adapter[name] |= bounds
    indices = adapter["trainable_token_indices"]
    indices |= {"type": [*indices["type"], "string"], "pattern": r"^\s*\d+(\s*,\s*\d+)*\s*$"}  # as a flag gives them
    for name in ("max_steps", "bf16"):  # transformers' and Axolotl's words for what holds by default
        own[name] = _or(own[name], -1 if name == "max_steps" else "auto")
    own["reward_weights"]["items"] = type_schema(float)
    if words := words_of("lr_scheduler_type"):
        own["lr_scheduler_type"] = {**own["lr_scheduler_type"], "enum": list(words)}
    passed: dict[str, Schema] = {}
    for option in passed_options():
        words = words_of(option.name)
        known: Schema = {"enum": list(words)} if words else type_schema(option.hint)
        kind = {"enum": [False, None, 0, "", [], {}]} if option.refused else known
        passed[option.name] = described(kind, option.description, None if option.refused else option.default)
    same = {given: _same_as(own[name], name, values) for given, (name, values) in SAME_AS.items()}
    text = "Any other fields of trl.SFTConfig, by name; they may stand beside the other options, too."
    trainer: Schema = {"description": text, "type": ["object", "null"], "additionalProperties": False}
    first = {"model": own.pop("model"), "data": own.pop("data"), "output": own.pop("output")}
    return _mapping(
        "A training run of Theodora: theodora train --config FILE",
        {**first, **adapter, **own, **passed, "trainer": {**trainer, "properties": passed}, **same},
    )


def compare_schema() -> Schema:
    """The schema of `theodora compare FILE`."""
    with imports():
        from theodora.compare.config import BOUNDS, SCORES, CompareConfig, DataConfig
        from theodora.compare.methods import METHODS, OBJECTIVES, POLICY, Variant
        from theodora.train.grpo_options import TYPES

    own = properties_of(CompareConfig)
    for name, least in BOUNDS.items():
        own[name]["minimum"] = least
    data = properties_of(DataConfig)
    data["score"] = {**data["score"], "anyOf": [{"enum": list(SCORES)}, {"pattern": r"\.py:"}]}
    data["labels"]["items"] = type_schema(str)
    a_set = {"type": "object", "properties": data, "required": ["train"], "additionalProperties": False}
    own["data"]["additionalProperties"] = {"anyOf": [{"type": "string"}, a_set]}
    rates = {"type": ["number", "string", "array"], "items": type_schema(float)}
    own["learning_rates"] |= {"items": type_schema(float), "additionalProperties": rates}
    for name in ("seeds", "tuning_seeds", "ranks"):
        own[name]["items"] = {"type": "integer"}
    variant = properties_of(Variant, leave_out=["rank", "options", "policy"])
    variant["reward_weights"]["items"] = own["reward_weights"]["items"] = type_schema(float)
    adapter = {name: schema for name, schema in properties_of(AdapterConfig).items() if name not in ("method", "rank")}
    entry = {
        **adapter,
        **{name: type_schema(TYPES[name]) for name in POLICY},
        **variant,
        "method": {"description": variant["method"]["description"], "enum": list(METHODS)},
        "name": {"description": variant["name"]["description"], "type": ["string", "null"]},
        "ranks": {**own["ranks"], "type": ["array", "integer"]},
        "learning_rates": {"description": own["learning_rates"]["description"], **rates},
        "objective": {**variant["objective"], "enum": list(OBJECTIVES)},
    }
    named = {"type": "object", "properties": entry, "required": ["method"], "additionalProperties": False}
    own["methods"] |= {"items": {"anyOf": [{"enum": list(METHODS)}, named]}}
    return _mapping("A comparison of methods: theodora compare FILE", own)


def _mapping(title: str, properties: dict[str, Schema]) -> Schema:
    return {
        "$schema": DIALECT,
        "title": title,
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _or(schema: Schema, word: Any) -> Schema:
    """The schema, or this one value."""
    shown = {name: schema[name] for name in ("description", "default") if name in schema}
    return {**shown, "anyOf": [{k: v for k, v in schema.items() if k not in shown}, {"const": word}]}


def _same_as(schema: Schema, name: str, values: dict[Any, Any]) -> Schema:
    """Another name of an option, which is understood; truth values may stand for its words."""
    shown = {"description": f"The same as {name}.", "deprecated": True}
    kept = {key: value for key, value in schema.items() if key not in ("description", "default")}
    return {**shown, "anyOf": [kept, {"enum": [*values, None]}]}


_SCHEMAS = {"train": train_schema, "compare": compare_schema}
