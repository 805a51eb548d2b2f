"""Configurations: YAML files, options of every type, words of the command line."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fuzz.fuzzing import damaged, files_under, fuzz, json_values, only_our_errors, text
from theodora import AdapterConfig, TrainConfig
from theodora.cli.main import main
from theodora.cli.train import read_yaml
from theodora.config import OPTION_NAMES
from theodora.errors import ConfigError, TheodoraError
from theodora.parse import parse_yaml, to_yaml
from theodora.train.arguments import sft_arguments

NAMES = st.one_of(
    st.sampled_from([*sorted(OPTION_NAMES), "output_dir", "resume_from_checkpoint", "warmup_ratio", "optim", "fp16"]),
    text,
)
values = json_values(
    NAMES, st.sampled_from(["all-linear", "auto", "1e-3", "true", "(", "a{99999999999}", "nan", "q_proj"])
)
RECIPE = b"""model: m
data: d.jsonl
output: o
rank: 16
targets: [q_proj, v_proj]
rank_pattern: {q_proj: 4}
learning_rate: 2e-4
trainer: {optim: adafactor}
"""


def check(config: TrainConfig | TheodoraError) -> None:
    """A configuration that was accepted can be written down and read again, and TRL's is ours or refused."""
    if isinstance(config, TheodoraError):
        return
    again = TrainConfig.from_options(parse_yaml(to_yaml(config.to_options())))
    assert repr(again) == repr(config)  # NaN differs from itself
    only_our_errors(lambda: sft_arguments(config, Path("checkpoints")))


@fuzz(150)
@given(st.dictionaries(NAMES, values, max_size=6))
@example({"seed": 10**30})
@example({"learning_rate": float("inf")})
@example({"alpha": 10**400})
@example({"resume_from_checkpoint": [1]})
@example({"rank_pattern": {5: 4}})
@example({"targets": "(" * 5000})
@example({"modules_to_save": [""]})
@example({"output": "a\0b"})
@example({"output": "\ud800"})
@example({"trainer": {1: 2}})
def test_options_of_every_kind(options):
    check(only_our_errors(lambda: TrainConfig.from_options({"model": "m", "data": "d", "output": "o"} | options)))


@fuzz(60)
@given(st.dictionaries(st.sampled_from([f.name for f in fields(AdapterConfig)]), values, max_size=4))
def test_adapter_configurations_of_every_kind(options):
    only_our_errors(lambda: AdapterConfig(**options))


@fuzz(100)
@given(
    st.one_of(
        damaged(RECIPE), st.binary(max_size=60), st.dictionaries(NAMES, values).map(lambda v: json.dumps(v).encode())
    )
)
@example(b"a: !!python/object/apply:os.system ['touch owned']")
@example(b"? !!python/name:os.system\n: 1")
@example(b"model: !!int ''")
@example(b"model: !!bool x")
@example(b"model: !!timestamp x")
@example(b"model: 2001-99-99")
@example(b"model: 0x" + b"f" * 9000)
@example(b"[" * 3000)
@example(b"a: &a [*a]\n")
@example(b"a: &a {b: *a}\n")
@example(b"? [a]\n: b")
@example(b"1: 2")
@example(b"'': &x {<<: *x}")
def test_yaml_of_every_kind(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("config")
    (folder / "recipe.yaml").write_bytes(content)
    options = only_our_errors(lambda: read_yaml(str(folder / "recipe.yaml")))
    if not isinstance(options, TheodoraError):
        check(only_our_errors(lambda: TrainConfig.from_options(options)))
    assert files_under(folder) == {folder / "recipe.yaml": content}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("a: !!python/object/apply:os.system ['touch owned']", "python/object"),
        ("rank: 8\nrank: 16", "'rank' twice"),
        ("trainer:\n  optim: a\n  optim: b", "'optim' twice"),
        ("max-steps: 1\nmax_steps: 2", "max_steps twice"),
        ("1: 2", "the name 1 is no text"),
        ("model: !!int ''", "no valid YAML"),
        ("model: 2001-99-99", "no valid YAML"),
        ("[" * 3000, "nested too deeply"),
        ("a: &a [*a]", "aliases stand for more"),
        (
            "a0: &a0 [x, x]\n"
            + "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))
            + "\nrank: *a39",
            "aliases stand for more",
        ),
    ],
)
def test_yaml_that_is_refused(content, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(content)
    with pytest.raises(ConfigError, match=what):
        read_yaml("recipe.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_yaml_keeps_merge_keys(tmp_path):
    (tmp_path / "recipe.yaml").write_text("trainer: &t {optim: a, seed: 1}\nmore: {<<: *t, seed: 2}\n")
    assert read_yaml(str(tmp_path / "recipe.yaml"))["more"] == {"optim": "a", "seed": 2}


@fuzz(60)
@given(
    st.lists(st.one_of(text, st.sampled_from(["--rank", "--targets", "--config", "--max-steps=", "--rank-pattern"])))
)
def test_words_of_the_command_line(words):
    """Every command answers with an exit code of its own, whatever it is given."""
    for command in ("train", "evaluate", "chat", "info", "merge", "bench"):
        argv = [command, *words, "--rank=0"] if command == "train" else [command, "/nowhere", "--nothing", *words]
        assert main(argv) in (0, 1, 2)


def test_an_error_message_cannot_drive_the_terminal(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("{}")
    name = "\x1b]0;owned\x07\x1b[2J"
    assert (
        main(["train", "--model", f"/nowhere/{name}", "--data", f"{tmp_path}/{name}", "--output", str(tmp_path / "o")])
        == 1
    )
    said = capsys.readouterr().err
    assert "owned" in said
    assert "\x1b" not in said
    assert "\x07" not in said
