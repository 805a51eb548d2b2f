"""Configurations, keys and names of hosts that make no sense, and those that do."""

from types import SimpleNamespace

import pytest
import torch

from theodora.errors import ConfigError
from theodora.serve.api_keys import read_keys
from theodora.serve.config import ServeConfig
from theodora.serve.guards import host_of
from theodora.serve.window import page_count, window_of


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
    ("content", "says"),
    [
        (None, "cannot be read"),
        (b"\xff\xfes\x00e\x00", "is UTF-16 .*; expected UTF-8"),
        (b"s\x00e\x00c\x00r\x00e\x00t\x00", "holds NUL bytes"),
        (b"secret\xff", "is no UTF-8: .* at byte 6"),
        (b" \n\n", "holds no key"),
        (b"\xef\xbb\xbf# ours\r\n\r\n", "holds no key"),
        (b"secret-1\nsecret-2 # of Alice\n", "line 2 has a # after a blank"),
        ("secret-1\nsecret\u200b-2\n".encode(), "line 2 holds characters that are not seen"),
        (b"secret\x1b[A\n", "line 1 holds characters that are not seen"),
    ],
)
def test_a_file_of_keys_that_protects_nothing_is_refused(tmp_path, content, says):
    if content is not None:
        (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ConfigError, match=says) as caught:
        read_keys(str(tmp_path / "keys"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_file_of_keys_has_comments_and_any_ends_of_lines(tmp_path, mark, end):
    lines = ["# Alice", "  secret-1\t", "", "#secret-2", "zweiter Schlüssel", "a#b#c "]
    (tmp_path / "keys").write_bytes(mark + end.join(lines).encode())
    assert read_keys(str(tmp_path / "keys")) == {"secret-1", "zweiter Schlüssel", "a#b#c"}


def test_keys_that_others_read_or_guess_are_warned_of(tmp_path, caplog):
    (tmp_path / "keys").write_text("abc\n")
    (tmp_path / "keys").chmod(0o644)
    read_keys(str(tmp_path / "keys"))
    assert [message.split(str(tmp_path / "keys"))[1] for message in caplog.messages] == [
        " has a key of less than 8 characters, which can be guessed",
        " can be read by every user of this machine, keys and all; chmod 600 mends that",
    ]
    caplog.clear()
    (tmp_path / "keys").write_text("a-long-enough-key\n")
    (tmp_path / "keys").chmod(0o600)
    read_keys(str(tmp_path / "keys"))
    assert not caplog.messages


@pytest.mark.parametrize(
    ("header", "host"),
    [("localhost:8000", "localhost"), ("LOCALHOST", "localhost"), ("[::1]:8000", "::1"), ("[::1]", "::1"), ("", "")],
)
def test_hosts_with_and_without_ports(header, host):
    assert host_of(header) == host


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
    assert window_of(model, config) == window
    assert page_count(config, model.device) == blocks
