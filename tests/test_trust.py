"""Which values of an option ask for something that only the user can grant, and the flags that grant it."""

import pytest

from theodora.errors import ConfigError
from theodora.trust import check_code_granted, check_granted, grant_flags


@pytest.mark.parametrize(
    "options",
    [
        {"trust_remote_code": value}
        for value in (False, None, "false", "False", " no ", 0, "off", "", "null")
    ]
    + [{"report_to": value} for value in ("none", "tensorboard", ["tensorboard"], [], (), "none,tensorboard", [None])]
    + [{"reward": value} for value in ("exact_match", ["format:a.py:f", "length:9"], [], 3)]
    + [{"trainer": {"deepspeed": None, "trackio_static_space_id": False}}, {"trainer": "nothing"}, {"trainer": None}],
    ids=str,
)  # fmt: skip
def test_what_asks_for_nothing_passes(options):
    check_granted(options)
    assert grant_flags(options) == ""


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"trust_remote_code": True}, " --trust-remote-code"),
        ({"trust_remote_code": "y"}, " --trust-remote-code"),
        ({"trust_remote_code": ["false"]}, " --trust-remote-code"),
        ({"report_to": "tensorboard, wandb"}, " --report-to tensorboard wandb"),
        ({"report_to": "Tensorboard WANDB"}, " --report-to Tensorboard WANDB"),
        ({"report_to": {"a": 1}}, " --report-to '{'\"'\"'a'\"'\"': 1}'"),
        ({"trainer": {"deepspeed": {"a": 1}}}, " --deepspeed '{\"a\": 1}'"),
        ({"reward": "my own.py:f"}, " --reward 'my own.py:f'"),
        ({"reward": ["exact_match", "own.py:f"]}, " --reward exact_match own.py:f"),
        ({"trackio_space_id": "me/my space"}, " --trackio-space-id 'me/my space'"),
    ],
    ids=str,
)
def test_what_asks_is_refused_until_it_is_granted(options, flags):
    assert grant_flags(options) == flags
    name = flags.split()[0].removeprefix("--").replace("-", "_")
    with pytest.raises(ConfigError, match="only you can grant") as caught:
        check_granted(options, granted=["model"])
    assert f"pass{flags}" in str(caught.value)
    check_granted(options, granted=[name])


def test_a_file_is_allowed_by_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "score.py").touch()
    (tmp_path / "link.py").symlink_to("score.py")
    for allowed in ("score.py", "./score.py", str(tmp_path / "score.py"), "link.py"):
        check_code_granted({"d": "score.py:f"}, [allowed])
    for allowed in ("", ".", "other.py", "score.py:f"):
        with pytest.raises(ConfigError, match=r"data\.d: .* pass --allow-code score\.py"):
            check_code_granted({"d": "score.py:f"}, [allowed])


def test_flags_to_copy_are_words_of_a_shell_and_hold_no_orders_to_a_terminal():
    assert grant_flags({"report_to": "a b"}) == " --report-to a b"
    assert grant_flags({"deepspeed": "my file.json"}) == " --deepspeed 'my file.json'"
    assert grant_flags({"deepspeed": "x\x1b[2J.json"}) == r" --deepspeed $'x\x1b[2J.json'"
