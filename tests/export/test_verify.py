"""Comparing two forms of one model."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from safetensors.torch import load_file, save_file

from exports import adapter_folder
from theodora import merge_checkpoint
from theodora.cli.main import main
from theodora.errors import CheckpointError, UsageError
from theodora.export import verify
from theodora.export.predictions import Predictions, difference
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def adapter(tmp_path, tiny_model_dir):
    return adapter_folder(tmp_path / "adapter", tiny_model_dir())


def test_a_merged_model_agrees_with_its_adapter(adapter, tmp_path):
    merge_checkpoint(adapter, tmp_path / "merged")
    found = verify(str(adapter), str(tmp_path / "merged"))
    assert found.passed
    assert found.kinds == ("adapter", "model")
    assert found.difference.first is None
    assert found.difference.largest < 1e-4
    assert found.effect is not None
    assert found.effect.kl_mean > 1e-3


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounding_has_its_own_bound(adapter, tmp_path, dtype):
    merge_checkpoint(adapter, tmp_path / "merged", dtype=dtype)
    assert verify(str(adapter), str(tmp_path / "merged")).passed
    assert not verify(str(adapter), str(tmp_path / "merged"), bound=1e-5).passed


def test_dropped_magnitudes_are_found(adapter, tmp_path):
    """What more than one engine does with a DoRA adapter: serve it as plain LoRA."""
    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: t for k, t in tensors.items() if "magnitude" not in k}, broken / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    merge_checkpoint(broken, tmp_path / "merged", dtype="bf16")
    assert not verify(str(adapter), str(tmp_path / "merged")).passed


def test_a_lost_adapter_is_found_however_faint(tmp_path, tiny_model_dir):
    faint = adapter_folder(tmp_path / "faint", tiny_model_dir(), size=2e-3)
    found = verify(str(faint), str(tiny_model_dir()), bound=10, kl_bound=10)
    assert found.lost
    assert not found.passed


def test_an_adapter_that_does_nothing_is_said(tmp_path, tiny_model_dir):
    same = adapter_folder(tmp_path / "same", tiny_model_dir(), size=0)
    found = verify(str(same), str(tiny_model_dir()))
    assert any("changes next to nothing" in note for note in found.notes)


def test_the_numbers_are_those_of_the_definitions():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 9, generator=generator), torch.randn(40, 9, generator=generator)
    found = difference(Predictions(a), Predictions(b))
    p, q = a.double().softmax(1), b.double().softmax(1)
    kl = (p * (p / q).log()).sum(1)
    assert found.kl_mean == pytest.approx(float(kl.mean()))
    assert found.kl_max == pytest.approx(float(kl.max()))
    assert found.largest == pytest.approx(float((a - b).abs().max()))
    differs = [int(t) for t in range(40) if a[t].argmax() != b[t].argmax()]
    assert found.first == differs[0]
    assert found.agreeing == (40 - len(differs)) / 40


def test_nan_fails_every_bound():
    a = torch.zeros(3, 4)
    b = a.clone()
    b[1, 2] = math.nan
    found = difference(Predictions(a), Predictions(b))
    assert math.isinf(found.largest)
    assert math.isinf(found.kl_mean)


def test_the_command(adapter, tmp_path, tiny_model_dir, capsys):
    merge_checkpoint(adapter, tmp_path / "merged")
    text = tmp_path / "probe.txt"
    text.write_text("The liver is the largest gland. " * 3)
    assert main(["verify", str(adapter), str(tmp_path / "merged"), "--text", str(text), "--tokens", "20"]) == 0
    assert "agree" in capsys.readouterr().out
    assert main(["verify", str(adapter), str(tiny_model_dir()), "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"] is False
    assert printed["difference"]["positions"] == 256
    assert main(["verify", str(adapter), str(tmp_path / "nowhere" / "x")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert main(["verify", str(adapter), str(tmp_path / "merged"), "--text", "missing.txt"]) == 2


class _Completions(BaseHTTPRequestHandler):
    """A small server of `/v1/completions` on a tiny model, as vLLM answers."""

    model = None
    by_id = True
    with_logprobs = True

    def log_message(self, *_args):
        pass

    def do_GET(self):
        self._answer({"data": [{"id": "base"}, {"id": "law"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.by_id and "return_tokens_as_token_ids" in asked:
            self.send_error(400)
            return
        choices = []
        for index, ids in enumerate(asked["prompt"]):
            with torch.no_grad():
                log_p = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(0)
            top = log_p.topk(asked["logprobs"])
            name = (lambda i: f"token_id:{i}") if self.by_id else (lambda i: tiny_tokenizer().decode([i]))
            scores = {name(int(i)): float(v) for v, i in zip(top.values, top.indices, strict=True)}
            choices.append({"index": index, "logprobs": {"top_logprobs": [scores]} if self.with_logprobs else None})
        self._answer({"choices": choices})

    def _answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(adapter):
    from theodora import load_adapter

    handler = type("Handler", (_Completions,), {"model": load_adapter(tiny_model(), adapter)})
    httpd = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield handler, f"http://127.0.0.1:{httpd.server_port}/v1"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.mark.parametrize("by_id", [True, False])
def test_a_server_is_compared_by_its_log_probabilities(server, adapter, tiny_model_dir, by_id):
    handler, url = server
    handler.by_id = by_id
    for a, b in ((str(adapter), f"{url}#law"), (f"{url}#law", str(adapter))):
        found = verify(a, b, tokens=12)
        assert found.passed
        assert found.difference.measure == "logprob"
        assert found.difference.positions == 12
        assert found.difference.largest < 1e-4
    wrong = verify(str(tiny_model_dir()), f"{url}#law", tokens=12)
    assert not wrong.passed


def test_what_a_server_cannot_answer_is_said(server, adapter):
    handler, url = server
    with pytest.raises(UsageError, match="base, law"):
        verify(str(adapter), url)
    with pytest.raises(CheckpointError, match="no 'med'"):
        verify(str(adapter), f"{url}#med")
    with pytest.raises(UsageError, match="Two servers"):
        verify(f"{url}#law", f"{url}#base")
    handler.with_logprobs = False
    with pytest.raises(CheckpointError, match="without log-probabilities"):
        verify(str(adapter), f"{url}#law", tokens=4)
    with pytest.raises(CheckpointError, match="does not answer"):
        verify(str(adapter), "http://127.0.0.1:9/v1")


def test_a_form_that_lacks_what_comparing_needs_is_told(adapter, tmp_path, tiny_model_dir):
    merge_checkpoint(adapter, tmp_path / "merged")
    for file in (tmp_path / "merged").glob("token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer to make tokens of the probe text with"):
        verify(str(tmp_path / "merged"), str(adapter))
    assert verify(str(adapter), str(tmp_path / "merged"), tokens=16).passed  # the adapter's own do
    with pytest.raises(UsageError, match="The probe text has no tokens"):
        verify(str(adapter), str(tmp_path / "merged"), text="")


def test_another_way_to_cut_the_text_and_another_vocabulary(adapter, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["The"])
    tiny_model().save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    found = verify(str(adapter), str(tmp_path / "other"), text="So. The end.", tokens=10)
    assert found.notes[0].endswith("/other cuts the probe text otherwise, from token 4 on.")
    tiny_model(vocab_size=259).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"has 272 tokens and .*small 259: these are different models"):
        verify(str(adapter), str(tmp_path / "small"), text="So.")


def test_a_server_behind_a_key_and_without_v1_in_its_address(server, adapter, monkeypatch):
    handler, url = server
    seen = []
    ask = handler.do_GET
    handler.do_GET = lambda self: (seen.append((self.path, self.headers["Authorization"])), ask(self))
    monkeypatch.setenv("THEODORA_API_KEY", "secret")
    assert verify(str(adapter), f"{url.removesuffix('/v1')}/#law", tokens=4).passed
    assert seen[0] == ("/v1/models", "Bearer secret")


def test_a_server_that_gives_too_few_answers(server, adapter):
    handler, url = server
    answer = handler._answer
    handler._answer = lambda self, content: answer(
        self, {"choices": content["choices"][1:]} if "choices" in content else content
    )
    with pytest.raises(CheckpointError, match=r"gave \d+ answers to \d+ prompts"):
        verify(str(adapter), f"{url}#law", tokens=4)
