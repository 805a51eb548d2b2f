"""Files that want code to run or an address to be asked: only the user grants it, on the command line or in Python."""

import json
import shlex
import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow.parquet as pq
import pytest
import transformers
import yaml
from datasets import Dataset, Features, Json, List, Value

from exports import write_llama
from theodora import TrainConfig
from theodora.adapters.models import load_model
from theodora.cli import train as command
from theodora.cli.main import Parser, main
from theodora.data import load_examples
from theodora.errors import CheckpointError, DataError, TheodoraError
from theodora.export.gguf_files import load_gguf
from theodora.parse import to_yaml
from theodora.train.report import resume_command

OLD_TRANSFORMERS = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 20)
ADDRESS = "http://127.0.0.1:9/secret"


@pytest.fixture
def own_code(tmp_path, tiny_model_dir) -> Path:
    """A model that brings its own classes; their file leaves `ran` beside the folder."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir(), folder)
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig):\n    model_type = 'own'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
    )
    auto = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    change(folder / "config.json", model_type="own", auto_map=auto)
    return folder


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def recipe(tmp_path, own_code, rows):
    """Writes a recipe for two steps on that model, with more lines."""

    def write(**more) -> str:
        base = {"model": str(own_code), "data": str(rows), "output": str(tmp_path / "out"), "bf16": False}
        steps = {"max_steps": 2, "save_steps": 1, "rank": 2, "held_out": 0, "per_device_train_batch_size": 2}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(base | steps | more))
        return str(tmp_path / "recipe.yaml")

    return write


@pytest.mark.parametrize(
    "asking",
    [
        {"trust_remote_code": True},
        {"trust-remote-code": "yes"},
        {"trainer": {"trust_remote_code": True}},
        {"model_init_kwargs": {"trust_remote_code": True}},
        {"trainer": {"model_init_kwargs": '{"trust_remote_code": true}'}},
        {"model_init_kwargs": {"attn_implementation": "a-stranger/attention"}},
        {"model_init_kwargs": {"text_config": {"_attn_implementation": "a-stranger/attention@main:f"}}},
        {"model_init_kwargs": {"use_kernels": True}},
    ],
    ids=str,
)
def test_a_recipe_does_not_run_code_of_the_model(recipe, tmp_path, capsys, asking):
    assert main(["train", "--config", recipe(**asking)]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config", "subfolder", "gguf_file"])
def test_a_recipe_does_not_lead_past_the_model_that_was_checked(recipe, capsys, name):
    """Kernels and layers are looked for in the folder that the user names, not in one beside it."""
    assert main(["train", "--config", recipe(model_init_kwargs={name: "../other"})]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"model_init_kwargs makes no sense: - {name}: " in said


@pytest.mark.parametrize("kept", ["weights_only", "use_safetensors"])
def test_a_recipe_does_not_open_pickles(recipe, capsys, kept):
    assert main(["train", "--config", recipe(model_init_kwargs={kept: False}), "--trust-remote-code"]) == 2
    assert "safetensors alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asking", "flag"),
    [
        ({"report_to": "wandb"}, "--report-to wandb"),
        ({"report_to": ["tensorboard", "trackio"]}, "--report-to tensorboard trackio"),
        ({"report_to": "all"}, "--report-to all"),
        ({"trackio_space_id": "a-stranger/space"}, "--trackio-space-id a-stranger/space"),
        ({"trainer": {"trackio_bucket_id": "a-stranger/bucket"}}, "--trackio-bucket-id a-stranger/bucket"),
        ({"deepspeed": "ds.json"}, "--deepspeed ds.json"),
        ({"push_to_hub": "a-stranger/x"}, "--push-to-hub a-stranger/x"),
        ({"hub_token": "hf_0"}, "HF_TOKEN"),
    ],
    ids=str,
)
def test_a_recipe_does_not_send_anything(recipe, tmp_path, capsys, asking, flag):
    assert main(["train", "--config", recipe(**asking)]) == 2
    assert flag in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_does_not_run_a_file_for_its_rewards(recipe, tmp_path, capsys):
    file = tmp_path / "own.py"
    file.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\ndef f(completions): return []\n")
    for reward in (f"{file}:f", ["exact_match", f"{file}:f"]):
        for asking in ({"reward": reward}, {"trainer": {"reward": reward}}):
            assert main(["train", "--config", recipe(objective="grpo", **asking)]) == 2
            assert "runs Python code in the files that it names" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.long
def test_a_run_goes_on_with_what_its_user_grants_again(recipe, tmp_path, capsys):
    assert main(["train", "--config", recipe(trust_remote_code=True), "--trust-remote-code"]) == 0
    assert (tmp_path / "ran").exists()
    record = tmp_path / "out" / "config.yaml"
    assert yaml.safe_load(record.read_text())["trust_remote_code"] is True
    assert record.read_text().splitlines()[0].endswith("--overwrite --trust-remote-code")
    capsys.readouterr()

    assert main(["train", "--config", str(record), "--resume"]) == 2
    refusal = capsys.readouterr().err
    assert "The run began with it" in refusal
    assert "pass --trust-remote-code" in refusal
    assert main(["train", "--config", str(record), "--resume", "--trust-remote-code", "--max-steps", "3"]) == 0
    assert "theodora chat" in (said := capsys.readouterr().out)
    assert "--trust-remote-code" in said


def test_a_record_does_not_grant_what_the_run_began_with(tmp_path, recipe, capsys, monkeypatch):
    """The same without the runs."""
    began: list[TrainConfig] = []
    monkeypatch.setattr(import_module("theodora.train"), "train", lambda config, **_: began.append(config))
    record = recipe(trust_remote_code=True, resume=None, overwrite=False)
    assert main(["train", "--config", record, "--resume"]) == 2
    assert "The run began with it" in (refusal := capsys.readouterr().err)
    assert "pass --trust-remote-code" in refusal
    assert main(["train", "--config", record, "--resume", "--trust-remote-code"]) == 0
    assert main(["train", "--config", record, "--no-trust-remote-code"]) == 0
    assert [config.trust_remote_code for config in began] == [True, False]


def test_the_command_that_goes_on_grants_the_same(tmp_path, recipe):
    """What is printed after Ctrl-C can be pasted as it stands."""
    grants = {"report_to": ("wandb", "tensorboard"), "trust_remote_code": True}
    trainer = {"deepspeed": {"train_batch_size": 'a "b"'}, "trackio_space_id": "me/my space"}
    config = TrainConfig(model="m", data="d", output=str(tmp_path / "a b"), trainer=trainer, **grants)
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "config.yaml").write_text(to_yaml(config.to_options()))
    parser = Parser()
    command.add_arguments(parser)
    args, args.other_options = parser.parse_known_args(shlex.split(resume_command(config))[2:])
    again = command.read_config(args)
    assert (again.report_to, again.trust_remote_code, again.resume) == (config.report_to, True, True)
    assert json.loads(again.trainer["deepspeed"]) == trainer["deepspeed"]
    assert again.trainer["trackio_space_id"] == "me/my space"


@pytest.fixture
def comparison(tmp_path, tiny_model_dir, rows):
    """A comparison whose score is a file that leaves `ran` when it runs."""
    (tmp_path / "score.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\ndef f(answer, reference):\n    return 0.5\n"
    )
    sums = {"train": str(rows), "validation": 4, "test": 4, "score": f"{tmp_path / 'score.py'}:f", "max_new_tokens": 2}
    options = {
        "model": str(tiny_model_dir()), "output": str(tmp_path / "out"), "data": {"sums": sums}, "methods": ["lora"],
        "ranks": [2], "learning_rates": [1e-3], "seeds": 1, "steps": 1, "curve_points": 0, "bf16": False,
    }  # fmt: skip
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(options))
    return tmp_path / "compare.yaml"


@pytest.mark.parametrize("allowed", [[], ["other.py"]])
def test_a_comparison_does_not_run_a_file(comparison, tmp_path, capsys, allowed):
    given = [word for file in allowed for word in ("--allow-code", str(tmp_path / file))]
    assert main(["compare", str(comparison), *given]) == 2
    assert f"--allow-code {tmp_path / 'score.py'}" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_a_comparison_runs_the_file_that_is_allowed(comparison, tmp_path):
    assert main(["compare", str(comparison), "--seconds", "0", "--allow-code", str(tmp_path / "score.py")]) == 0
    assert (tmp_path / "ran").exists()


def test_a_comparison_does_not_trust_the_model(comparison, capsys):
    comparison.write_text(comparison.read_text() + "trust_remote_code: true\n")
    assert main(["compare", str(comparison)]) == 2
    assert "pass --trust-remote-code" in capsys.readouterr().err


def test_a_comparison_trusts_the_model_when_its_user_does(comparison, own_code, tmp_path):
    given = ["--model", str(own_code), "--seconds", "0", "--allow-code", str(tmp_path / "score.py")]
    assert main(["compare", str(comparison), *given]) == 1
    (tmp_path / "ran").unlink()  # the score's
    assert main(["compare", str(comparison), *given, "--trust-remote-code"]) == 0
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "wanted",
    [
        {"attn_implementation": "a-stranger/attention"},
        {"_attn_implementation": "a-stranger/attention@main"},
        {"attn_implementation": {"": "paged|a-stranger/attention:f"}},
        {"experts_implementation": "sonicmoe"},
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["evaluate", "merge", "chat"])
def test_a_model_does_not_name_kernels_to_fetch(tiny_model_dir, adapter, tmp_path, rows, capsys, command, wanted):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir(), model)
    change(model / "config.json", **wanted)
    given = {
        "evaluate": ["--model", str(model), "--data", str(rows)],
        "merge": [str(adapter()), "--base-model", str(model), "--output", str(tmp_path / "merged")],
        "chat": [str(model)],
    }
    assert main([command, *given[command]]) == 1
    error = capsys.readouterr().err
    assert "which would be fetched from the hub and run" in error
    assert "--trust-remote-code" in error


@pytest.mark.parametrize("base", ["a-stranger/model", "/elsewhere"])
def test_an_adapter_beside_a_model_does_not_change_it(tiny_model_dir, adapter, tmp_path, base):
    """transformers would put it on, or load the base that it names."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir(), model)
    shutil.copytree(adapter(), model, dirs_exist_ok=True)
    change(model / "adapter_config.json", base_model_name_or_path=base)
    if OLD_TRANSFORMERS:
        with pytest.raises(CheckpointError, match=r"move its adapter_config\.json into a folder of its own"):
            load_model(model)
    else:
        assert not hasattr(load_model(model), "peft_config")


@pytest.mark.skipif(OLD_TRANSFORMERS, reason="it is refused there, by transformers")
def test_an_adapter_beside_a_gguf_file_does_not_say_what_is_loaded(tmp_path):
    writer = pytest.importorskip("gguf").GGUFWriter(tmp_path / "m.gguf", "llama")
    for name in ("block_count", "head_count", "head_count_kv"):
        getattr(writer, f"add_{name}")(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(8)
    write_llama(writer, 8)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "a-stranger/model"}))
    model, _, _ = load_gguf(tmp_path / "m.gguf", "float32")
    assert model.config.vocab_size == 8


@pytest.fixture
def opened(monkeypatch):
    """What datasets decodes of rows but JSON: each would open the path or address that stands there."""
    seen = []

    def decode(self, value, **_):
        seen.append(value)
        raise OSError(f"opens {value}")

    for name in ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh"):
        if (feature := getattr(datasets.features, name, None)) is not None:
            monkeypatch.setattr(feature, "decode_example", decode)
    return seen


STORED = {"bytes": Value("binary"), "path": Value("string")}
PLACE = {"bytes": None, "path": ADDRESS}
# The column's storage, its value, and what the data set says that it is.
COLUMNS = {
    "image": (STORED, PLACE, {"_type": "Image"}),
    "local": (STORED, {"bytes": None, "path": "/etc/passwd"}, {"_type": "Image"}),
    "inside a zip": (STORED, {"bytes": None, "path": f"zip://a.png::{ADDRESS}"}, {"_type": "Image"}),
    "audio": (STORED, PLACE, {"_type": "Audio"}),
    "video": (STORED, PLACE, {"_type": "Video"}),
    "pdf": (STORED, PLACE, {"_type": "Pdf"}),
    "list": (List(STORED), [PLACE, PLACE], {"_type": "List", "feature": {"_type": "Image"}}),
    "struct": ({"inner": STORED}, {"inner": PLACE}, {"inner": {"_type": "Image"}}),
    "deep": (
        List({"parts": List(STORED)}),
        [{"parts": [PLACE]}],
        {"_type": "List", "feature": {"parts": {"_type": "List", "feature": {"_type": "Image"}}}},
    ),
    "beside JSON": (
        {"inner": STORED, "more": Json()},
        {"inner": PLACE, "more": {"a": 1}},
        {"inner": {"_type": "Image"}, "more": {"_type": "Json"}},
    ),
}


def saved(folder: Path, column: str, name: str = "extra") -> Path:
    """A saved data set with that column beside prompts and completions."""
    stored, value, said = COLUMNS[column]
    features = Features({"prompt": Value("string"), "completion": Value("string"), name: stored})
    pairs = {"prompt": ["a", "b", "c", "d"], "completion": ["b", "c", "d", "e"]}
    Dataset.from_dict(pairs | {name: [value] * 4}, features=features).save_to_disk(folder)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["features"][name] = said
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize("kind", ["saved", "parquet"])
@pytest.mark.parametrize("column", COLUMNS)
def test_a_data_set_opens_nothing(tmp_path, opened, column, kind):
    source = saved(tmp_path / "saved", column)
    if kind == "parquet":
        loaded = datasets.load_from_disk(str(source))
        said = json.dumps({"info": {"features": loaded.features.to_dict()}})
        pq.write_table(loaded.data.table.replace_schema_metadata({"huggingface": said}), tmp_path / "rows.parquet")
        source = tmp_path / "rows.parquet"
    examples = load_examples(source)
    assert next(iter(examples.dataset)) == {"prompt": "a", "completion": "b"}
    assert [part.what for part in examples.left_out] == ["the column 'extra'"]
    assert opened == []


def test_a_column_that_is_used_opens_nothing_either(tmp_path, opened):
    talk = [{"role": "user", "content": [{"type": "image", "image": PLACE}, {"type": "text", "text": "What is it?"}]}]
    talk += [{"role": "assistant", "content": [{"type": "text", "text": "A cat.", "image": None}]}]
    part = {"type": Value("string"), "text": Value("string"), "image": STORED}
    features = Features({"messages": List({"role": Value("string"), "content": List(part)})})
    filled = [{**turn, "content": [{"text": None, "image": None, **p} for p in turn["content"]]} for turn in talk]
    Dataset.from_dict({"messages": [filled]}, features=features).save_to_disk(tmp_path / "d")
    info = json.loads((tmp_path / "d" / "dataset_info.json").read_text())
    info["features"]["messages"]["feature"]["content"]["feature"]["image"] = {"_type": "Image"}
    (tmp_path / "d" / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="parts of type image"):
        load_examples(tmp_path / "d")
    assert opened == []


def enough(*_: object) -> None:
    raise TheodoraError("enough")


@pytest.mark.parametrize("command", ["evaluate", "train", "compare"])
def test_no_command_opens_what_a_row_points_to(tmp_path, opened, tiny_model_dir, command, capsys, monkeypatch):
    monkeypatch.setattr(import_module("theodora.train.run"), "_train", enough)  # by then all rows are read
    source, model = str(saved(tmp_path / "saved", "image")), str(tiny_model_dir())
    small = ["--max-steps", "1", "--rank", "2", "--held-out", "0"]
    options = {"model": model, "output": str(tmp_path / "out"), "data": {"d": {"train": source, "validation": 1}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(options | {"methods": ["lora"], "ranks": [2], "steps": 1}))
    given = {
        "evaluate": ["--model", model, "--data", source, "--no-exact-match", "--json"],
        "train": ["--model", model, "--data", source, "--output", str(tmp_path / "out"), *small],
        "compare": [str(tmp_path / "c.yaml"), "--seconds", "0"],
    }
    assert main([command, *given[command]]) == (command == "train"), capsys.readouterr().err
    assert opened == []


@pytest.mark.parametrize(
    "elsewhere", [ADDRESS, "/etc/passwd", "file:///etc/passwd", f"zip://a.csv::{ADDRESS}", "s3://bucket/rows.csv"]
)
@pytest.mark.parametrize("said_by", ["the README", "the builder"])
def test_a_data_set_of_the_hub_does_not_lead_elsewhere(monkeypatch, elsewhere, said_by):
    def refuse(*_: object) -> None:
        raise AssertionError("is asked")

    configs = [{"config_name": "default", "data_files": [{"split": "train", "path": ["a.csv", elsewhere]}]}]
    card = SimpleNamespace(data=SimpleNamespace(to_dict=lambda: {"configs": configs}))
    builder = SimpleNamespace(
        config=SimpleNamespace(data_files={"train": ["hf://datasets/a/b@1/a.csv", elsewhere]}),
        download_and_prepare=refuse,
    )
    monkeypatch.setattr("datasets.load_dataset_builder", refuse if said_by == "the README" else lambda *_: builder)
    if said_by == "the README":
        monkeypatch.setattr("huggingface_hub.DatasetCard.load", lambda name: card)
    with pytest.raises(DataError, match="not on the Hub"):
        load_examples("owner/name")


@pytest.mark.parametrize("outside", ["../elsewhere/data-00000-of-00001.arrow", "/elsewhere.arrow"])
def test_a_saved_data_set_stays_within_its_folder(tmp_path, outside):
    folder = saved(tmp_path / "saved", "image")
    shutil.copytree(folder, tmp_path / "elsewhere")
    change(folder / "state.json", _data_files=[{"filename": outside}])
    with pytest.raises(DataError, match="outside"):
        load_examples(folder)
