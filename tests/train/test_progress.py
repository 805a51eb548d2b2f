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
