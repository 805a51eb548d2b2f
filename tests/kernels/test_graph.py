"""GraphedStep does what the step does: for real on a GPU, elsewhere with a recorder in the place of CUDA's."""

import copy

import pytest
import torch
from torch import nn

import recorder
from theodora.kernels import graph
from theodora.kernels.graph import GraphedStep

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CLOSE = (
    {"rtol": 1e-4, "atol": 1e-5} if CUDA else {"rtol": 0, "atol": 0}
)  # cuBLAS may add up in another order in a graph


@pytest.fixture(autouse=True)
def recording(monkeypatch):
    if not CUDA:
        recorder.install(monkeypatch)


class Twins:
    """One model that runs as it is and one that runs graphed, and their optimizers."""

    def __init__(self, **settings):
        made = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(settings.pop("dropout", 0.0)), nn.Linear(16, 4))
        self.models = [made.to(DEVICE), copy.deepcopy(made).to(DEVICE)]
        for model in self.models:
            model.unused = nn.Parameter(torch.ones(3, device=DEVICE))
        self.optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.1) for m in self.models]
        self.plain = self._step(self.models[0])
        self.graphed = GraphedStep(self._step(self.models[1]), list(self.models[1].parameters()), **settings)

    @staticmethod
    def _step(model):
        def step(inputs):
            loss = (model(inputs["x"]) - inputs["y"]).square().mean()
            loss.backward()
            return loss.detach(), (inputs["x"].sum(),)

        return step

    def run(self, rows, update=True):
        """One call of both; their results and gradients are equal."""
        inputs = {"x": torch.randn(rows, 8, device=DEVICE), "y": torch.randn(rows, 4, device=DEVICE)}
        torch.manual_seed(rows)
        expected = self.plain(inputs)
        torch.manual_seed(rows)
        found = self.graphed(inputs)
        torch.testing.assert_close(found, expected, **CLOSE)
        for one, other in zip(*(m.parameters() for m in self.models), strict=True):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                torch.testing.assert_close(other.grad, one.grad, **CLOSE)
        if update:
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return found


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_it_is_the_step(dropout):
    twins = Twins(dropout=dropout)
    for _ in range(6):
        twins.run(3)
    assert twins.graphed.replays == 4
    assert twins.graphed.why_not is None
    for one, other in zip(*(m.parameters() for m in twins.models), strict=True):
        torch.testing.assert_close(other, one, **CLOSE)


def test_gradients_add_up_wherever_the_capture_falls():
    for before in range(3):
        twins = Twins()
        for _ in range(before):
            twins.run(3)
        for call in range(9):
            twins.run(3 if call % 4 else 5, update=call % 3 == 2)
        assert twins.graphed.replays


def test_the_result_is_overwritten():
    twins = Twins(warmup=1)
    twins.run(3)
    first = twins.run(3)[0]
    kept = first.clone()
    twins.run(3)
    assert not torch.equal(first, kept)


def test_rare_shapes_and_more_than_asked_for_run_as_they_are():
    twins = Twins(most_shapes=1)
    for rows in range(20, 40):
        twins.run(rows)
    twins.run(20)
    assert not twins.graphed.replays
    for _ in range(5):
        twins.run(3)
    for _ in range(9):
        twins.run(4)
    assert twins.graphed.replays == 2


def test_a_parameter_that_moved_is_captured_anew():
    twins = Twins(warmup=1)
    for _ in range(3):
        twins.run(3)
    weight = twins.models[1][0].weight
    weight.data = weight.data.clone()
    for _ in range(3):
        twins.run(3)
    assert twins.graphed.replays == 4


def test_what_fails_runs_as_it_is_and_says_why(monkeypatch):
    def broken(step, pool):
        step()
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(graph, "record", broken)
    if CUDA:
        pytest.skip("there it fails for real, below")
    twins = Twins()
    for _ in range(5):
        twins.run(3, update=False)
    assert twins.graphed.why_not == "operation not permitted"
    assert not twins.graphed.replays


def test_memory_that_is_missing_for_another_shape_is_given_back():
    twins = Twins()
    for _ in range(4):
        twins.run(3, update=False)
    plain, full = twins.graphed._step, iter([True])

    def short_of_memory(inputs):
        result = plain(inputs)
        if next(full, False):
            raise torch.OutOfMemoryError("out of memory")
        return result

    twins.graphed._step = short_of_memory
    twins.run(7, update=False)
    assert "no memory" in twins.graphed.why_not
    replays = twins.graphed.replays
    twins.run(3)
    assert twins.graphed.replays == replays


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("what", ["waits", "draws on the host"])
def test_a_step_that_depends_on_the_host_is_not_captured(what):
    twins = Twins()
    plain = twins.graphed._step

    def step(inputs):
        result = plain(inputs)
        return (result[0] + (0 * result[0].item() if what == "waits" else 0 * torch.rand(()).item()), result[1])

    twins.graphed._step = step
    for _ in range(4):
        twins.run(3, update=False)
    assert not twins.graphed.replays
    assert ("synchroniz" if what == "waits" else "random numbers") in twins.graphed.why_not
    assert torch.cuda.get_sync_debug_mode() == 0
