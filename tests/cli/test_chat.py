import io

import pytest
import torch
from rich.console import Console

from theodora import AdapterConfig, inject_adapter
from theodora.cli.conversation import Answer, Conversation
from theodora.cli.conversation_view import view
from theodora.cli.main import main


@pytest.fixture
def chat(monkeypatch, capsys):
    """Run the command on lines of piped input; gives the lines it prints."""

    def run(lines, *arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        console = Console(width=200, highlight=False)
        monkeypatch.setattr("theodora.cli.console.stdout", lambda: console)
        code = main(["chat", *map(str, arguments), "--max-new-tokens", "8"])
        output = capsys.readouterr()
        assert code == 0, output.err
        return output.out

    return run


def test_both_sides_answer_piped_questions(adapter, chat):
    output = chat(["hello", "/adapted", "again", "/base", "once more", "/exit", "never read"], adapter)
    speakers = [line.split(":")[0] for line in output.splitlines() if line.startswith(("base:", "adapted:"))]
    assert speakers == ["base", "adapted", "adapted", "base"]
    assert "> hello" in output
    assert "never read" not in output


def test_the_end_of_input_ends_the_chat_and_a_wrong_command_does_not(adapter, chat):
    output = chat(["/frobnicate", "", "hello"], adapter)
    assert "There is no /frobnicate" in output
    assert "adapted:" in output


def test_commands_are_listed_and_acknowledged(adapter, chat):
    output = chat(["/help", "/reset", "/system Be brief.", "/both"], adapter)
    for expected in (
        "let only the base model answer",
        "A new conversation.",
        "with a system message",
        "Both models answer",
    ):
        assert expected in output


def test_a_model_alone_has_one_side(tiny_model_dir, chat):
    output = chat(["hello", "/adapted"], "--model", tiny_model_dir("llama"))
    assert "base:" in output
    assert "adapted:" not in output
    assert "There is no adapter" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No model is named"),
        (["a", "--temperature", "-1", "--top-p", "0"], "--temperature is -1.0"),
        (["a", "--model", "b", "--adapter", "c"], "expected one of them"),
    ],
)
def test_bad_usage_is_said_before_anything_is_loaded(arguments, message, capsys):
    assert main(["chat", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def conversation(tiny_model, tiny_tokenizer):
    model = inject_adapter(tiny_model("llama"), AdapterConfig(rank=4)).eval()
    return Conversation(model, tiny_tokenizer, max_new_tokens=6)


def prompts_of(conversation, monkeypatch):
    """Record the text of every prompt that the model is given; it answers `ok`."""
    seen = []

    def generate(input_ids, streamer, **kwargs):
        seen.append(conversation.tokenizer.decode(input_ids[0]))
        streamer.put(input_ids)
        for token in conversation.tokenizer("ok", add_special_tokens=False)["input_ids"]:
            streamer.put(torch.tensor([token]))
        streamer.end()

    monkeypatch.setattr(conversation.model, "generate", generate, raising=False)
    return seen


def ask(conversation, speaker, question):
    return conversation.ask(speaker, question, show=lambda answer: None)


def test_each_side_keeps_its_own_history(conversation, monkeypatch):
    seen = prompts_of(conversation, monkeypatch)
    ask(conversation, "base", "one")
    ask(conversation, "base", "two")
    ask(conversation, "adapted", "three")
    assert "user\none" in seen[1]
    assert "assistant\nok" in seen[1]
    assert "one" not in seen[2]
    conversation.reset(system="Be brief.")
    ask(conversation, "base", "four")
    assert "system\nBe brief." in seen[3]
    assert "one" not in seen[3]


def test_without_a_template_each_question_stands_alone(tiny_model, tiny_tokenizer, monkeypatch):
    tiny_tokenizer.chat_template = None
    conversation = Conversation(tiny_model("llama"), tiny_tokenizer)
    seen = prompts_of(conversation, monkeypatch)
    ask(conversation, "base", "one")
    ask(conversation, "base", "two")
    assert seen == ["one", "two"]


def test_ctrl_c_keeps_what_was_said(conversation, monkeypatch):
    def generate(input_ids, streamer, **kwargs):
        streamer.put(input_ids)
        streamer.put(torch.tensor([3 + 10]))
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation.model, "generate", generate, raising=False)
    answer = ask(conversation, "base", "one")
    assert (answer.stopped, answer.finished, answer.tokens) == (True, True, 1)
    prompts = prompts_of(conversation, monkeypatch)
    ask(conversation, "base", "two")
    assert answer.text in prompts[0]


def test_the_oldest_turns_make_room_for_the_answer(conversation, monkeypatch):
    prompts_of(conversation, monkeypatch)
    for question in ("first " * 40, "second " * 30, "third"):  # the context window is 512 bytes
        answer = ask(conversation, "base", question)
    assert answer.forgot
    assert answer.text == "ok"


@pytest.mark.parametrize(("width", "together"), [(120, True), (60, False)])
def test_two_columns_if_there_is_room(width, together):
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    answers = {"base": Answer(text="left", finished=True), "adapted": Answer(text="right", finished=True)}
    console.print(view(answers, width))
    lines = console.file.getvalue().splitlines()
    assert any("left" in line and "right" in line for line in lines) is together


class Terminal(io.StringIO):
    """Keys that somebody types; what is a function is called instead."""

    def __init__(self, *typed):
        super().__init__()
        self.typed = list(typed)

    def isatty(self):
        return True

    def input(self, prompt):
        assert prompt == "> "
        if not self.typed:
            raise EOFError
        line = self.typed.pop(0)
        return line() if callable(line) else line


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("template", [True, False])
def test_on_a_terminal_it_greets_and_answers_grow(template, conversation, tiny_tokenizer, monkeypatch):
    from theodora.cli import chat

    if not template:
        tiny_tokenizer.chat_template = None
        conversation = Conversation(conversation.model, tiny_tokenizer, max_new_tokens=6)
    prompts_of(conversation, monkeypatch)
    keys = Terminal("", interrupt, "hello [bold]", "/exit", "never read")
    monkeypatch.setattr("sys.stdin", keys)
    monkeypatch.setattr("builtins.input", keys.input)
    console = Console(width=120, file=io.StringIO(), force_terminal=True, color_system=None, legacy_windows=False)
    chat.greet(console, "base[1]", "runs/mine", conversation)
    chat.talk(console, conversation)
    shown = console.file.getvalue()
    assert "runs/mine on base[1]" in shown  # names are no markup
    assert ("There is no chat template" in shown) == (not template)
    assert "/exit or Ctrl-D leaves" in shown
    assert shown.count("ok") >= 2  # both answers
    assert keys.typed == ["never read"]


def test_a_folder_beside_a_model_is_the_adapter(adapter, tiny_model_dir, chat):
    output = chat(["hello"], adapter, "--model", tiny_model_dir())
    assert "adapted:" in output
