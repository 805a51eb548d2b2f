"""Names and numbers that steer what shows them: escape sequences, markup, Markdown, NaN, and streams that end."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from theodora.cli import main as cli

# One folder below another: `[/]` has a slash in it.
STEERING = (
    "[/]a\x1b[2J\x1b]0;t\x07\x9b2J\u202e\u2066\u200b\u2028[bold]b[/bold]c|d`e<script>f</script>\n# g\n\n---\n$h $i"
)
LONG = "x" * 250
BYTES = "\udcff\udc9b2J"
ODD = " -'\"\\é e\u0301 :smile: {body} %s "
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028\u202e\u2066]")


@pytest.fixture
def theodora(capsys):
    """Run a command, and give what it said on both streams; nothing of it may steer a terminal."""

    def run(*argv: object, code: int = 0, says: str = "") -> tuple[str, str]:
        found = cli.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert found == code, err
        for text in (out, err):
            assert not STEERS.search(text), text
            assert "MarkupError" not in text
        assert says in out + err
        return out, err

    return run


def training(model: Path, rows: Path, output: Path) -> list[object]:
    small = ["--rank", 2, "--max-steps", 1, "--held-out", 0, "--targets", "q_proj", "--per-device-train-batch-size", 2]
    return ["train", "--model", model, "--data", rows, "--output", output, *small]


@pytest.fixture(scope="module")
def trained(tiny_model_dir, rows, tmp_path_factory):
    """An adapter in a folder whose path has such names all the way."""
    root = tmp_path_factory.mktemp("names")
    folder = root / STEERING
    folder.parent.mkdir(parents=True)
    model, data = root / STEERING.rpartition("/")[0] / "model", folder.parent / "rows.jsonl"
    shutil.copytree(tiny_model_dir(), model)
    shutil.copy(rows, data)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert cli.main([str(word) for word in training(model, data, folder)]) == 0
    (folder.parent / "said").write_text(said.getvalue(), encoding="utf-8")
    return folder


def test_a_run_says_names_as_they_are(trained):
    said = (trained.parent / "said").read_text(encoding="utf-8")
    assert not STEERS.search(said)
    assert "[bold]b[/bold]" in "".join(said.split())


@pytest.mark.parametrize("name", [LONG, ODD], ids=["long", "odd"])
def test_folders_of_any_name_are_read(name, trained, theodora, tmp_path):
    shutil.copytree(trained, tmp_path / name)
    theodora("info", tmp_path / name)
    theodora("inspect", tmp_path / name, "--json")


def test_a_folder_whose_name_is_no_text_is_read_or_refused_in_words(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / BYTES)
    assert cli.main(["info", str(tmp_path / BYTES)]) in (0, 1)
    err = capsys.readouterr().err
    assert "unexpected" not in err
    assert not STEERS.search(err)


@pytest.mark.long
@pytest.mark.parametrize("name", [LONG, ODD], ids=["long", "odd"])
def test_a_run_writes_into_folders_of_any_name(name, theodora, rows, tiny_model_dir, tmp_path):
    theodora(*training(tiny_model_dir(), rows, tmp_path / name))
    assert (tmp_path / name / "adapter_model.safetensors").is_file()


def test_a_folder_that_no_record_can_name_is_refused_at_once(theodora, rows, tiny_model_dir, tmp_path):
    theodora(*training(tiny_model_dir(), rows, tmp_path / BYTES), code=2, says="halves of characters")
    assert not list(tmp_path.iterdir())


def test_a_model_card_holds_names_as_text(trained):
    card = (trained / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    assert set(yaml.safe_load(front)) == {"library_name", "pipeline_tag", "tags"}
    assert "\x1b" not in card
    prose = re.sub(r"(?<!\\)(`+)(?!`).*?(?<!`)\1(?!`)", "", body, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<script>", prose)
    assert not re.findall(r"^# g", body, re.MULTILINE)
    assert not re.findall(r"^---$", body, re.MULTILINE)


@pytest.mark.long
def test_what_a_run_writes_runs_it_again(trained, theodora):
    record = yaml.safe_load((trained / "config.yaml").read_text(encoding="utf-8"))
    assert record["output"] == str(trained)
    theodora("train", "--config", trained / "config.yaml", "--overwrite")


@pytest.mark.parametrize(
    "command",
    [
        ["info"],
        ["inspect"],
        ["info", "--json"],
        ["info", "--base-model", "{}/none"],
        ["evaluate", "--no-exact-match", "--data", "{}/../rows.jsonl", "--model"],
        ["merge", "--output", "{}-merged"],
        ["export", "--to", "peft", "--tokens", "8", "--output", "{}-peft"],
        ["verify", "--tokens", "8", "{}"],
        ["merge", "--output", "{}"],
        ["bench", "--methods", "lora"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_every_command_takes_names_as_names(command, trained, theodora, capsys):
    code = cli.main([*(word.replace("{}", str(trained)) for word in command), str(trained)])
    out, err = capsys.readouterr()
    assert code in (0, 1, 2)
    assert "unexpected" not in err
    for text in (out, err):
        assert not STEERS.search(text)
    if "--json" in command:
        assert json.loads(out)["path"] == str(trained)


def test_escape_sequences_of_an_adapter_are_shown(adapter, tmp_path, theodora):
    folder = tmp_path / "a"
    shutil.copytree(adapter(), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "\x1b]0;pwn\x07\x1b[2J\u202ex"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    theodora("info", folder, says="\\x1b]0;pwn\\x07\\x1b[2J\\u202ex")


def test_what_a_model_says_is_shown_and_obeyed_by_nobody(tmp_path):
    from theodora.cli.conversation import Answer
    from theodora.cli.conversation_view import view
    from theodora.terminal import Terminal

    stream = io.StringIO()
    console = Terminal(file=stream, force_terminal=True, color_system=None, width=60)
    for width in (60, 120):
        console.print(view({"base": Answer(text="[/]\x1b[2Jyes\u202e\x9bm", tokens=3, seconds=1.0)}, width))
    assert "[/]\\x1b[2Jyes\\u202e\\x9bm" in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()


@pytest.fixture
def says_nan(tiny_model_dir, tmp_path):
    """A model whose last norm is not finite, in the one value that is given."""

    def make(value: float = float("nan")) -> Path:
        folder = tmp_path / "nan"
        shutil.copytree(tiny_model_dir(), folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][0] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_says_nan_is_an_error_and_no_json(value, says_nan, rows, theodora):
    model = says_nan(value)
    out, err = theodora("evaluate", "--model", model, "--data", rows, "--json", code=1)
    assert out == ""
    told = " ".join(err.split())
    assert f"The model {model} gives no finite numbers: its loss on {rows} is nan" in told
    assert "row 1, 2, 3" in told or re.search(r"in row \d+, \d+", told)


def test_json_on_standard_output_is_json_for_every_reader(trained, theodora):
    for command in (["info", trained, "--json"], ["inspect", trained, "--json"]):
        out, _ = theodora(*command)
        assert out.isascii()
        json.loads(out, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


# What follows needs a process: the interpreter's own streams, and its end.

COMMAND = [sys.executable, "-c", "import sys; from theodora.cli.main import main; sys.exit(main())"]


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    words = {"THEODORA": " ".join(f"'{word}'" for word in COMMAND), **environment}
    line = "set -o pipefail; theodora() { " + words.pop("THEODORA") + ' "$@"; }; ' + line
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env={**os.environ, **words},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=200,
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("end", "code"), [("| true", 0), ("2>&1 | head -1", 0), (">&-", 0), (">&- 2>&-", 0), (">/dev/full", 1)]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_run_outlives_whoever_reads_it(end, code, unbuffered, tiny_model_dir, rows, tmp_path):
    words = " ".join(f"'{word}'" for word in training(tiny_model_dir(), rows, tmp_path / "run"))
    done = shell(f"theodora {words} {end}", tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    if code:
        assert "No space left on device" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_stream_without_the_characters_is_no_failure(encoding, trained, tmp_path):
    line = " ; ".join(f'theodora {command} "$FOLDER"' for command in ("info", "inspect", "info --json"))
    done = shell(line, tmp_path, PYTHONIOENCODING=encoding, FOLDER=str(trained), LC_ALL="C")
    assert done.returncode == 0
    assert "Error" not in done.stderr
