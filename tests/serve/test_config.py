"""Configurations, keys and names of hosts that make no sense, and those that do."""

from types import SimpleNamespace

import pytest
import torch

from theodora.errors import ConfigError
from theodora.serve.config import ServeConfig
from theodora.serve.engine import _blocks, _window
from theodora.serve.guards import _host, read_keys


def test_every_field_that_makes_no_sense_is_named():
    with pytest.raises(ConfigError) as error:
        ServeConfig(model="m", slots=0, max_rank=-1, grace=-0.5, max_queue=0, port=0)
    told = str(error.value)
    for says in (
        "slots is 0; expected more than 0",
        "max_rank is -1; expected more than 0",
        "grace is -0.5; expected at",
    ):
        assert says in told
    assert told.count("\n") == 3
    with pytest.raises(ConfigError, match="max_batch"):
        ServeConfig(model="m", max_batch="many")


def test_a_base_model_goes_by_its_own_name_or_by_another():
    assert ServeConfig(model="folder/m").name == "folder/m"
    assert ServeConfig(model="folder/m", served_name="short").name == "short"


@pytest.mark.parametrize(
    ("content", "says"), [(None, "cannot be read"), (b"\xff\xfe\x00", "cannot be read"), (b" \n\n", "holds no key")]
)
def test_a_file_of_keys_that_protects_nothing_is_refused(tmp_path, content, says):
    if content is not None:
        (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        read_keys(str(tmp_path / "keys"))


@pytest.mark.parametrize(
    ("header", "host"),
    [("localhost:8000", "localhost"), ("LOCALHOST", "localhost"), ("[::1]:8000", "::1"), ("[::1]", "::1"), ("", "")],
)
def test_hosts_with_and_without_ports(header, host):
    assert _host(header) == host


@pytest.mark.parametrize(
    ("device", "config", "window", "blocks"),
    [
        ("cpu", {}, 32768, 1024),
        ("cpu", {"kv_tokens": 100, "page_size": 16}, 100, 7),
        ("cpu", {"max_length": 50}, 50, 1024),
        ("cuda", {}, 40000, None),  # what fits
        ("cuda", {"kv_tokens": 1000}, 1000, 4),
    ],
)
def test_prompt_and_answer_fit_into_the_cache(device, config, window, blocks):
    text = SimpleNamespace(max_position_embeddings=40000)
    model = SimpleNamespace(device=torch.device(device), config=SimpleNamespace(get_text_config=lambda: text))
    config = ServeConfig(model="m", **config)
    assert _window(model, config) == window
    assert _blocks(config, model.device) == blocks
