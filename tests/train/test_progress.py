from types import SimpleNamespace

import pytest

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
        view.on_log(None, state, None, {"loss": 1.0, "learning_rate": 0.1, "num_tokens": tokens})
        if state.global_step == 1:
            assert view.warm_tokens_per_second == view.mean_tokens_per_second == pytest.approx(100 / 60)
    assert view.mean_tokens_per_second == pytest.approx(5)
    assert view.warm_tokens_per_second == pytest.approx(10)
