"""One tenant's NaN beside others on a GPU: with CUDA graphs and without, batches that overlap, padding, pages."""

import contextlib

import pytest
import torch

import tiny
from serving import settled, trained
from theodora import AdapterConfig, inject_adapter, save_adapter
from theodora.adapters.state import trained_tensors
from theodora.serve.config import ServeConfig
from theodora.serve.engine import Engine
from theodora.serve.requests import Sampling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PROMPT = list(range(5, 100))
ODD = 200


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> an adapter's folder: one that is good, one that overflows, one with huge keys, one with a huge token."""
    root = tmp_path_factory.mktemp("adapters")
    save_adapter(trained(tiny.tiny_model(), "dora4"), root / "good")
    for name, targets, value in (("overflows", "all-linear", 3e4), ("keys", r".*k_proj", 2e4)):
        model = inject_adapter(tiny.tiny_model(), AdapterConfig(method="lora", rank=4, targets=targets))
        for key, tensor in trained_tensors(model).items():
            tensor.data.copy_(torch.randn_like(tensor))
            if "lora_B" in key:
                tensor.data.fill_(value)
        save_adapter(model, root / name)
    model = inject_adapter(tiny.tiny_model(), AdapterConfig(method="lora", rank=1, targets=r".*embed_tokens"))
    for key, tensor in trained_tensors(model).items():
        tensor.data.fill_(1e4 if "lora_B" in key else 1e-6)
        if "lora_A" in key:
            tensor.data[0, ODD] = 3e4
    save_adapter(model, root / "odd")
    return {path.name: path for path in root.iterdir()}


@contextlib.contextmanager
def engines(folders, dtype, graphs):
    config = ServeConfig(
        model="base", kv_tokens=65536, max_batch_tokens=512, max_batch=16, page_size=32, cuda_graphs=graphs, slots=4
    )
    engine = Engine(tiny.tiny_model(dtype=dtype).to("cuda"), config)
    for name, folder in folders.items():
        engine.load(name, folder)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def together(engine, *asked):
    """(tokens, log-probabilities, error) of requests that begin in one batch: adapter, prompt, tokens of each."""

    def submit(adapter, prompt, count):
        return engine.submit(prompt, Sampling(max_tokens=count, temperature=0.0), adapter, every_token=False)

    requests = engine.worker.manager.run_between_batches(lambda: [submit(*each) for each in asked])
    outputs = [request.updates.get(timeout=120) for request in requests]
    return [(output.generated_tokens, output.logprobs, output.error) for output in outputs]


def assert_alike(before, after, dtype):
    """The same answer, but for rounding, which differs by the size of a batch and can turn a token."""
    assert before[2] is after[2] is None
    allowed = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]
    for token, logprob, other, its in zip(*before[:2], *after[:2], strict=True):
        assert logprob == pytest.approx(its, abs=allowed)
        if token != other:
            return


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_not_finite_ends_its_own_requests_alone(folders, dtype, graphs):
    with engines(folders, dtype, graphs) as engine:
        if dtype != torch.float16:  # whose largest number is less
            ruin(engine, 1e38)
        ends = 0
        for start in range(0, 40, 20):  # other prompts, so that nothing of them is in the cache yet, and then it is
            others = (None, PROMPT[start:], 12), ("good", PROMPT[start:], 12), (None, [7], 12)
            for _ in range(2):
                beside = together(engine, (None, PROMPT[:20], 1), *others)
                for name in ("overflows", "keys"):
                    found = together(engine, (name, PROMPT[:20], 12), *others)
                    ends += found[0][2] is not None
                    for before, after in zip(beside[1:], found[1:], strict=True):
                        assert_alike(before, after, dtype)
        assert ends >= 4
        assert settled(engine)


def ruin(engine, value):
    """Make what `overflows` puts into a slot as large as its dtype allows: no file that is loaded holds that."""
    engine.mover.submit(lambda: None).result()  # by then they are where they are filled from
    for tensors in engine.adapters.get("overflows").modules.values():
        tensors.b_RO.fill_(value)


@pytest.mark.parametrize("graphs", [True, False])
def test_pages_of_what_was_not_finite_are_not_used_again(folders, graphs):
    with engines(folders, torch.float16, graphs) as engine:
        fine = together(engine, ("odd", PROMPT, 4))[0]
        assert fine[2] is None
        for _ in range(3):
            found = together(engine, ("odd", [*PROMPT[:40], ODD, *PROMPT], 4), (None, PROMPT, 4), ("odd", PROMPT, 4))
            assert "'odd'" in found[0][2]
            assert found[1][2] is None
            assert_alike(fine, found[2], torch.float16)
        assert settled(engine)
