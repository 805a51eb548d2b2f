"""Work is bounded as a whole: what layers, columns, expressions and templates of a file may cost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from theodora import metered, paths
from theodora.cli.main import main
from theodora.data import files, load_examples, tokenize, unfolded_size
from theodora.errors import ConfigError, DataError
from theodora.files.tokenizer import load_tokenizer
from theodora.serve.chats import chat_text
from theodora.serve.protocol import ChatRequest

HUGE = 10**9
BART = {"model_type": "bart", "architectures": ["BartForCausalLM"]}
TROCR = {"num_hidden_layers": None, "model_type": "trocr", "architectures": ["TrOCRForCausalLM"]}


@pytest.fixture
def evaluate(tmp_path: Path, rows: Path, tiny_model_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]):
    """Evaluate a copy of the tiny model whose configuration says something else; gives what the command said."""

    def run(config: dict[str, Any], junk: str = "") -> str:
        folder = Path(shutil.copytree(tiny_model_dir(), tmp_path / "model"))
        told = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in (told | config).items() if v is not None}))
        if junk:
            (folder / junk).write_text("junk")
        assert main(["evaluate", "--model", str(folder), "--data", str(rows), "--json"]) == 1
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"num_hidden_layers": HUGE}, "num_hidden_layers: 1000000000, but the weights hold only 21 tensors"),
        ({**BART, "decoder_layers": HUGE}, "decoder_layers: 1000000000, but the weights hold only 21 tensors"),
        ({"text_config": {"vision": {"depths": [2, HUGE]}}}, "text_config.vision.depths: 1000000000"),
        ({"model_type": "mixtral", "num_local_experts": HUGE}, "num_local_experts: 1000000000"),
        ({"num_hidden_layers": 10**200}, "num_hidden_layers: 1000"),
    ],
)
def test_layers_are_counted_before_memory_is_taken(evaluate, config, told):
    assert told in " ".join(evaluate(config, junk="x.safetensors").split())


@pytest.mark.parametrize(
    "config",
    [
        {**TROCR, "decoder_layers": 4000, "d_model": 8, "decoder_attention_heads": 2, "decoder_ffn_dim": 8},
        {"vocab_size": 10**11},
        {"intermediate_size": 10**11},
        {"hidden_size": 10**8},
    ],
)
@pytest.mark.filterwarnings("ignore")  # transformers finds these sizes odd, and says so
def test_a_model_is_built_no_larger_than_its_weights(evaluate, config):
    """What no name of a field gives away is stopped while it is built."""
    said = " ".join(evaluate(config).split())
    assert "describes a model of more than" in said
    assert "the weights hold only 21 tensors" in said
    (name, value), *_ = sorted(config.items(), key=lambda item: -item[1] if isinstance(item[1], int) else 0)
    assert f"{name}: {value}" in said


def repeated(text: str, times: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, dtype=np.int32)), pa.array([text]))


def parquet(path: Path) -> Path:
    pq.write_table(pa.table({"prompt": repeated("a" * 10_000, 2000), "completion": repeated("b", 2000)}), path)
    return path


def nested_parquet(path: Path) -> Path:
    turns = pa.ListArray.from_arrays(np.arange(0, 4001, 2, dtype=np.int32), repeated("a" * 10_000, 4000))
    pq.write_table(pa.table({"prompt": turns, "completion": repeated("b", 2000)}), path)
    return path


def deltas(path: Path) -> Path:
    """Each value is stored as what differs from the one before: nothing."""
    table = pa.table({"text": ["a" * 10_000] * 2000})
    pq.write_table(table, path, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"})
    return path


def fixed(path: Path) -> Path:
    values = pa.array([[b"a" * 10_000]] * 2000, pa.list_(pa.binary(10_000)))
    pq.write_table(pa.table({"text": ["a"] * 2000, "beside": values}), path)
    return path


def nulls(path: Path) -> Path:
    pq.write_table(pa.table({"text": pa.nulls(2_000_000, pa.string())}), path)
    return path


def write_stream(table: pa.Table, path: Path, **options: Any) -> None:
    settings = pa.ipc.IpcWriteOptions(**options)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema, options=settings) as writer:
        writer.write_table(table)


def saved(column: Callable[[int], Any]) -> Callable[[Path], Path]:
    def save(path: Path) -> Path:
        Dataset.from_dict({"text": ["a"]}).save_to_disk(str(path))
        table = pa.table({"text": column(2000)})
        write_stream(table, path / "data-00000-of-00001.arrow")
        info = json.loads((path / "dataset_info.json").read_text())
        (path / "dataset_info.json").write_text(json.dumps(info | {"features": None}))
        return path

    return save


def list_views(times: int) -> Any:
    return pa.ListViewArray.from_arrays(
        pa.array([0] * times, pa.int32()), pa.array([1000] * times, pa.int32()), pa.array(["abcd" * 20] * 1000)
    )


def run_ends(times: int) -> Any:
    return pa.RunEndEncodedArray.from_arrays(pa.array([times], pa.int32()), pa.array(["a"]))


SOURCES: dict[str, Callable[[Path], Path]] = {
    "a.parquet": parquet,
    "nested.parquet": nested_parquet,
    "deltas.parquet": deltas,
    "fixed.parquet": fixed,
    "nulls.parquet": nulls,
    "dictionary": saved(lambda times: repeated("a" * 10_000, times)),
    "list_view": saved(list_views),
    "run_end_encoded": saved(lambda times: run_ends(times * 10_000)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_rows_unfold_no_further_than_is_plausible(name, tmp_path, monkeypatch):
    """Some kilobytes stand for 20 MB or more, and take little memory; the allowances are lowered here."""
    monkeypatch.setattr(unfolded_size, "ANY_FILE", 1 << 20)
    monkeypatch.setattr(unfolded_size, "MOST_COMPRESSED", 100)
    monkeypatch.setattr(files, "_DELTAS_AT_ONCE", 1 << 20)
    source = SOURCES[name](tmp_path / name)
    pool, usual = pa.proxy_memory_pool(pa.system_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(DataError, match=r"unfolds to .* expected at most"):
            load_examples(source)
    finally:
        pa.set_memory_pool(usual)
    assert pool.max_memory() < 6 << 20


@pytest.mark.parametrize("name", ["list_view", "run_end_encoded"])
def test_columns_that_datasets_does_not_know_are_refused(name, tmp_path):
    """Small enough to be opened, they are not: datasets has no such columns."""
    with pytest.raises(DataError, match=rf"cannot be read: Arrow type {name}<.* does not have a datasets dtype"):
        load_examples(SOURCES[name](tmp_path / name))


def test_a_user_may_allow_more(tmp_path, monkeypatch):
    source = parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(unfolded_size, "ANY_FILE", 1 << 20)
    with pytest.raises(DataError, match="THEODORA_UNFOLDED_GB=8"):
        load_examples(source)
    monkeypatch.setenv("THEODORA_UNFOLDED_GB", "0.5")
    assert len(load_examples(source)) == 2000
    monkeypatch.setenv("THEODORA_UNFOLDED_GB", "lots")
    with pytest.raises(DataError, match="THEODORA_UNFOLDED_GB is 'lots'; expected a number of gigabytes"):
        load_examples(source)


def test_one_large_value_in_a_dictionary_is_not_unfolded_for_a_batch(tmp_path):
    """Honest data: a long system prompt in each row is read, and counted as what it is."""
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"prompt": repeated("long " * 1000, 5000), "completion": list(map(str, range(5000)))}), path
    )
    examples = load_examples(path)
    assert len(examples) == 5000
    assert examples.dataset[4999]["prompt"] == "long " * 1000


def test_compressed_buffers_of_a_saved_data_set_are_not_opened(tmp_path):
    Dataset.from_dict({"text": ["a"] * 100}).save_to_disk(str(tmp_path / "saved"))
    table = pa.table({"text": ["a" * 1000] * 1000})
    write_stream(table, tmp_path / "saved" / "data-00000-of-00001.arrow", compression="zstd")
    with pytest.raises(DataError, match=r"the buffers in data-00000-of-00001.arrow are compressed"):
        load_examples(tmp_path / "saved")


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)
FAR_MORE = "chat template does far more than a conversation"


@pytest.fixture
def with_template(tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    """A copy of the tiny model whose tokenizer brings a chat template; the allowance is lowered from 512 MB."""
    monkeypatch.setattr(metered, "ALLOWED", 8 << 20)

    def copy(template: str) -> Path:
        folder = Path(shutil.copytree(tiny_model_dir(), tmp_path / "model"))
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return copy


@pytest.mark.parametrize("template", [LOOPS, DOUBLING])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_template_is_stopped(command, template, with_template, rows, tmp_path, capsys):
    output = ["--output", str(tmp_path / "run")] if command == "train" else []
    code = main([command, "--model", str(with_template(template)), "--data", str(rows), *output])
    assert code in (1, 2)
    assert FAR_MORE in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("template", [LOOPS, DOUBLING])
def test_a_server_refuses_what_its_template_makes_of_a_chat(template, with_template):
    tokenizer = load_tokenizer(with_template(template))
    asked = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "hello"}]})
    with pytest.raises(ConfigError, match=FAR_MORE):
        chat_text(tokenizer, asked)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"rank_pattern": {f"(?:.{{1,9}}){{1,4}}[!#]{n}": 4 for n in range(2000)}}, "s together to compare"),
        ({"rank_pattern": {"((((((a{10}){10}){10}){10}){10}){10}){10}": 4}}, "repeats more than 100,000 times"),
        ({"target_modules": "(a{1000}){1000}"}, "repeats more than 100,000 times"),
        ({"target_modules": "(?:.{1,9}){1,30}[!#]"}, "s together to compare"),
        ({"target_modules": [f"name{n}" for n in range(100_001)]}, "100,001 names together"),
    ],
)
def test_expressions_of_an_adapter_are_bounded(
    changed, told, adapter, rows, tiny_model_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(paths, "PATIENCE", 0.2)
    folder = Path(shutil.copytree(adapter("lora8"), tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changed))
    arguments = ["evaluate", "--model", str(tiny_model_dir()), "--adapter", str(folder), "--data", str(rows), "--json"]
    assert main(arguments) in (1, 2)
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_row_is_not_tokenised_beyond_what_is_kept(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("theodora.data.tokens._TEXT_AT_ONCE", 10_000)
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "question ", "completion": "ab" * 100_000}, {"prompt": "q" * 100_000, "completion": "a"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(tiny_model_dir())
    given: list[int] = []
    encode = type(tokenizer).__call__

    def counted(self: Any, text: Any, *rest: Any, **named: Any) -> Any:
        given.extend(map(len, text if isinstance(text, list) else []))
        return encode(self, text, *rest, **named)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    found = tokenize(load_examples(path), tokenizer, max_length=64, use_chat_template=False)
    assert [len(row) for row in found["input_ids"]] == [64]  # nothing to learn is left of the other
    assert max(given) == 10_000
