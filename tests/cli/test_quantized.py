"""Commands on quantised bases, and on adapters that were trained on them."""

import io
import json
import logging

import pytest
import torch

from theodora import AdapterConfig, inject_adapter, save_adapter
from theodora.adapters import quantized
from theodora.adapters.models import load_model
from theodora.adapters.quantized import quantization_of
from theodora.adapters.state import trained_tensors
from theodora.cli.main import main
from theodora.serve.config import ServeConfig
from theodora.serve.run import load_engine

pytest.importorskip("bitsandbytes")

NF4 = "bitsandbytes nf4, double-quantised"


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "rows.jsonl")


@pytest.fixture
def folder(tiny_model_dir, tiny_tokenizer, tmp_path):
    load_model(tiny_model_dir(), quantize="nf4").save_pretrained(tmp_path / "quantised")
    tiny_tokenizer.save_pretrained(tmp_path / "quantised")
    return str(tmp_path / "quantised")


@pytest.fixture
def adapter_on(tmp_path):
    """Makes an adapter on a base that is quantised as it is loaded, or as it is stored."""

    def make(base, quantize=None, name="adapter"):
        model = inject_adapter(load_model(base, quantize=quantize), AdapterConfig(rank=4))
        with torch.no_grad():
            for parameter in trained_tensors(model).values():
                parameter += 0.05 * torch.randn_like(parameter)
        save_adapter(model, tmp_path / name)
        return str(tmp_path / name)

    return make


@pytest.fixture
def call(capsys):
    def run(*arguments):
        code = main([*map(str, arguments)])
        output = capsys.readouterr()
        assert code == 0, output.err
        return output

    return run


def test_evaluate_takes_the_base_of_training(call, data, tiny_model_dir, adapter_on):
    adapter = adapter_on(tiny_model_dir(), "nf4")
    arguments = ("evaluate", "--model", tiny_model_dir(), "--data", data, "--no-exact-match", "--json")
    output = call(*arguments, "--adapter", adapter)
    assert f"The base is quantised as it was in training: {NF4}, " in output.err
    assert "--quantize none loads it as it is stored" in output.err
    with pytest.warns(UserWarning, match=r"away from those .*quantised") as warned:
        other = call(*arguments, "--adapter", adapter, "--quantize", "none")
    assert len(warned) == 1
    assert json.loads(output.out)["loss"] != json.loads(other.out)["loss"]
    assert f"The model is quantised: {NF4}" in call(*arguments, "--quantize", "nf4").err


def test_what_evaluate_lacks_is_said_in_one_line(capsys, data, tiny_model_dir, adapter_on, monkeypatch):
    adapter = adapter_on(tiny_model_dir(), "nf4")
    monkeypatch.setattr(quantized, "_installed", lambda library: False)
    assert main(["evaluate", "--model", adapter, "--data", data]) == 2
    told = capsys.readouterr().err
    assert "quantize=nf4 wants bitsandbytes, which is not installed: pip install 'theodora[quant]'" in told
    assert "--quantize none takes the base as it is stored" in told
    assert "Traceback" not in told


def test_evaluate_chat_and_info_take_a_quantised_folder(call, data, folder, adapter_on, monkeypatch):
    adapter = adapter_on(folder)
    alone = call("evaluate", "--model", folder, "--data", data, "--no-exact-match", "--json")
    both = call("evaluate", "--model", adapter, "--data", data, "--no-exact-match", "--json")
    assert json.loads(alone.out)["loss"] != json.loads(both.out)["loss"]
    assert f"The model is quantised: {NF4}" in alone.err
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert f"quantised as it was in training: {NF4}" in call("chat", adapter, "--max-new-tokens", "2").err
    said = call("info", adapter).out
    assert f"trained on  {NF4}" in said
    assert "14 modules" in said


def test_chat_takes_the_base_of_training(call, tiny_model_dir, adapter_on, monkeypatch):
    adapter = adapter_on(tiny_model_dir(), "nf4")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert "--quantize none loads it as it is stored" in call("chat", adapter, "--max-new-tokens", "2").err


def test_info_says_what_it_was_trained_on(call, tiny_model_dir, adapter_on):
    adapter = adapter_on(tiny_model_dir(), "nf4")
    said = " ".join(call("info", adapter).out.split())
    assert f"trained on {NF4}, quantised as it was loaded (--quantize nf4)" in said
    assert "measured against the unquantised weights" in said
    assert json.loads(call("info", adapter, "--json").out)["trained_on"]["quantize"] == "nf4"
    assert "trained on" not in call("info", adapter_on(tiny_model_dir(), name="plain")).out


def test_serve_quantises_the_base_as_its_adapters_know_it(tiny_model_dir, adapter_on, caplog):
    base = str(tiny_model_dir())
    one, other = adapter_on(base, "nf4", "one"), adapter_on(base, "nf4", "other")
    config = ServeConfig(model=base, device="cpu", kv_tokens=512)
    with caplog.at_level(logging.WARNING, "theodora.serve.run"):
        engine, _ = load_engine(config, {"one": one, "other": other})
    assert quantization_of(engine.model).kind == "nf4"
    assert "quantised to nf4, on which its adapters were trained" in caplog.text
    with caplog.at_level(logging.WARNING, "theodora.serve.run"), pytest.warns(UserWarning, match="away from those"):
        engine, _ = load_engine(config, {"one": one, "plain": adapter_on(base, name="plain")})
    assert quantization_of(engine.model) is None
    assert "(one: nf4, plain: none)" in caplog.text


def test_compare_on_a_quantised_base(call, data, tiny_model_dir, tmp_path, capsys):
    study = {"model": str(tiny_model_dir()), "output": str(tmp_path / "study"), "quantize": "nf4", "data": {"q": data}}
    study |= {
        "methods": ["dora"],
        "ranks": [2],
        "learning_rates": [1e-3],
        "seeds": 1,
        "steps": 2,
        "batch_size": 2,
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    call("compare", tmp_path / "study.yaml")
    assert (tmp_path / "study" / "report.html").is_file()
    (tmp_path / "study.yaml").write_text(json.dumps(study | {"methods": ["full", "lora"]}))
    assert main(["compare", str(tmp_path / "study.yaml")]) != 0
    assert "quantize is nf4, and full trains the weights themselves" in capsys.readouterr().err


def test_inspect_of_a_run_on_a_quantised_base(call, data, tiny_model_dir, tmp_path):
    flags = ("--max-steps", "2", "--save-steps", "1", "--learning-rate", "1e-2", "--quantize", "nf4")
    call("train", "--model", tiny_model_dir(), "--data", data, "--output", tmp_path / "run", *flags)
    output = call("inspect", tmp_path / "run")
    assert "q_proj" in output.out + output.err
