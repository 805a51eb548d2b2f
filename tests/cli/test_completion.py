"""`theodora completion`: a script for each shell, and what bash makes of it."""

import contextlib
import io
import shutil
import subprocess
import sys

import pytest
import shtab

from theodora.cli.completion import SHELLS, whole_parser
from theodora.cli.main import COMMANDS, main
from theodora.config import OPTION_NAMES


@pytest.fixture(scope="module")
def scripts():
    written = {}
    for shell in SHELLS:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(["completion", shell]) == 0
        written[shell] = out.getvalue()
    return written


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_and_option_is_in_it(shell, scripts):
    for group in COMMANDS.values():
        assert all(name in scripts[shell] for name in group)
    for name in OPTION_NAMES - {"trainer"}:
        assert "--" + name.replace("_", "-") in scripts[shell] or name.replace("_", "-") in scripts[shell]
    assert "neftune-noise-alpha" in scripts[shell]
    assert "paged_adamw_8bit" in scripts[shell]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_console_changes_nothing_of_it(shell, scripts):
    assert scripts[shell].rstrip("\n") == shtab.complete(whole_parser(shtab), shell=shell).rstrip("\n")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_reads_it(shell, scripts, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not here")
    (tmp_path / "script").write_text(scripts[shell])
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True, timeout=60)


TYPED = {
    "tra": {"train"},
    "com": {"combine", "compare", "completion"},
    "train --ran": {"--rank", "--rank-pattern"},
    "train --method ": {"dora", "full", "lora"},
    "train --packing ": {"true", "false"},
    "train --optim adaf": {"adafactor"},
    "train --lr-scheduler-type pol": {"polynomial"},
    "train --targets q_proj --epsilon-h": {"--epsilon-high"},
    "plan --gp": {"--gpus"},
    "schema ": {"train", "compare"},
    "serve model --max-q": {"--max-queue"},
    "train --data rows.js": {"rows.jsonl"},
    "train --push": {"--push-to-hub"},
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
def test_bash_completes(scripts, tmp_path):
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "script").write_text(
        scripts["bash"]
        + 'typed() { COMP_WORDS=(theodora); while [ $# -gt 0 ]; do COMP_WORDS+=("$1"); shift; done\n'
        + "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()\n"
        + '_shtab_theodora theodora "${COMP_WORDS[$COMP_CWORD]}" "${COMP_WORDS[$((COMP_CWORD - 1))]}"\n'
        + 'echo "${COMPREPLY[*]}"; }\n'
        + "".join("typed " + " ".join(f"'{word}'" for word in line.split(" ")) + "\n" for line in TYPED)
    )
    found = subprocess.run(["bash", "script"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    completed = dict(zip(TYPED, map(set, map(str.split, found.stdout.splitlines())), strict=True))
    assert completed == TYPED


def test_without_shtab_the_line_that_installs_it_is_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'theodora[completion]'" in capsys.readouterr().err
