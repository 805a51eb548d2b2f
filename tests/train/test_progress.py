from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import TrainerControl

from theodora.terminal import Terminal
from theodora.train import progress


def test_the_first_step_is_left_out_of_the_warm_rate(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    view, state = progress.ProgressView(Terminal(quiet=True)), SimpleNamespace(max_steps=3, global_step=0)
    view.on_train_begin(None, state, None)
    assert view.warm_tokens_per_second == 0
    tokens = 0
    for seconds, seen in ((60, 100), (10, 200), (30, 200)):
        clock.now += seconds
        tokens += seen
        state.global_step += 1
        view.on_step_end(None, state, None)
        view.on_log(None, state, TrainerControl(), {"loss": 1.0, "learning_rate": 0.1, "num_tokens": tokens})
        if state.global_step == 1:
            assert view.warm_tokens_per_second == view.mean_tokens_per_second == pytest.approx(100 / 60)
    assert view.mean_tokens_per_second == pytest.approx(5)
    assert view.warm_tokens_per_second == pytest.approx(10)


@pytest.mark.parametrize("begins_at", [0, 5000])
def test_lines_that_come_several_at_once_are_no_faster(begins_at, monkeypatch):
    """On a GPU the host is steps ahead, and waits for their figures at once where it has to evaluate."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    view, state = progress.ProgressView(Terminal(quiet=True)), SimpleNamespace(max_steps=90, global_step=0)
    view.count_tokens_from(begins_at)
    view.on_train_begin(None, state, None)
    rates = []
    for _ in range(30):
        clock.now += 0.6
        for _ in range(3):
            state.global_step += 1
            view.on_step_end(None, state, None)
        for step in range(state.global_step - 2, state.global_step + 1):
            logs = {"loss": 1.0, "learning_rate": 0.1, "num_tokens": begins_at + 100 * step}
            view.on_log(None, state, TrainerControl(), logs)
            clock.now += 1e-4
            rates.append(view.pace()["tokens_per_second"])
    assert rates[60:] == pytest.approx([500] * 30, rel=0.15)
    assert max(rates) < 600


def test_a_step_that_an_evaluation_follows_has_one_line(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1)
    view = progress.ProgressView(Console(file=StringIO(), width=100))
    state = SimpleNamespace(max_steps=2, global_step=0)
    view.on_train_begin(None, state, None)
    for step, evaluates in ((1, False), (2, True)):
        state.global_step = step
        view.on_step_end(None, state, None)
        view.on_log(None, state, TrainerControl(should_evaluate=evaluates), {"loss": 1.0, "learning_rate": 0.1})
    view.on_log(None, state, TrainerControl(), {"eval_loss": 0.5})
    lines = view.console.file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/2", "step 2/2"]
    assert "held-out 0.5000" in lines[1]
