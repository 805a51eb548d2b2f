"""Answers of a mixed batch against each adapter alone, on a model of its own, by plain forward passes."""

import asyncio
import itertools
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from serving import ADAPTERS, alone, expected, settled
from theodora import AdapterConfig, inject_adapter, save_adapter
from theodora.errors import CheckpointError, ConfigError
from theodora.serve import adapters as serve_adapters
from theodora.serve import requests as serve_requests
from theodora.serve.batching import NotRun, RoutedManager, Router
from theodora.serve.config import ServeConfig
from theodora.serve.engine import Engine
from theodora.serve.errors import Busy, Unavailable, UnknownModel
from theodora.serve.requests import Sampling
from theodora.serve.slots import Slots
from theodora.serve.slotted import Routing, SlottedLayer, SlotTensors, slot
from tiny import FAMILIES, tiny_model

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 30, 40], [n % 250 + 3 for n in range(80)]]


def ask(engine, prompt, adapter=None, count=8, temperature=0.0, every_token=False, **options):
    sampling = Sampling(max_tokens=count, temperature=temperature, **options)
    return engine.submit(prompt, sampling, adapter, every_token=every_token)


def answer(request):
    output = request.updates.get(timeout=60)
    assert output.error is None
    return output.generated_tokens


def check(request, model, prompt, count=8):
    output = request.updates.get(timeout=60)
    tokens, logprobs = expected(model, prompt, count)
    assert output.error is None
    assert output.generated_tokens == tokens
    assert output.logprobs == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_answers_as_each_adapter_alone(family, engine_of, adapter_dir):
    engine = engine_of(family, *ADAPTERS, slots=6)
    asked = [(p, name) for p, name in itertools.product(PROMPTS, (None, *ADAPTERS))]
    requests = [ask(engine, prompt, name) for prompt, name in asked]
    for request, (prompt, name) in zip(requests, asked, strict=True):
        check(request, alone(family, name, name and adapter_dir(name, family)), prompt)
    assert settled(engine)


def test_more_adapters_than_slots_take_turns(engine_of, adapter_dir):
    engine = engine_of("llama", *ADAPTERS, slots=2, max_batch=4)
    asked = [(p, name) for p, name in itertools.product(PROMPTS, (None, *ADAPTERS))]
    requests = [ask(engine, prompt, name) for prompt, name in asked]
    for request, (prompt, name) in zip(requests, asked, strict=True):
        check(request, alone("llama", name, name and adapter_dir(name)), prompt)
    assert len(engine.slots) == 2
    assert engine.slots.swaps >= len(ADAPTERS)
    assert settled(engine)


def test_prefixes_are_reused_within_an_adapter_and_not_across(engine_of, adapter_dir):
    engine = engine_of("llama", "dora4", "lora8", page_size=16)
    cache = engine.worker.manager.batch_processor.cache
    found, search = [], cache.search_prefix_match
    cache.search_prefix_match = lambda *asked: found.append(search(*asked)) or found[-1]
    prompt = PROMPTS[2]
    for name in (None, "dora4", "lora8", None, "dora4", "lora8"):
        check(ask(engine, prompt, name), alone("llama", name, name and adapter_dir(name)), prompt)
    assert found[:3] == [0, 0, 0]
    assert set(found[3:]) <= {64, 80}  # transformers 5.17 matches the last page, too


def test_an_adapter_of_a_used_name_finds_no_prefix_of_the_old_one(engine_of, adapter_dir):
    engine = engine_of("llama", "dora4", page_size=16)
    check(ask(engine, PROMPTS[2], "dora4"), alone("llama", "dora4", adapter_dir("dora4")), PROMPTS[2])
    assert engine.unload("dora4")
    other = adapter_dir("dora4", seed=1)
    engine.load("dora4", other)
    check(ask(engine, PROMPTS[2], "dora4"), alone("llama", "dora4", other), PROMPTS[2])


def test_adapters_come_and_go_between_answers(engine_of, adapter_dir):
    engine = engine_of("llama", "lora1", slots=2)
    running = ask(engine, PROMPTS[0], "lora1", count=60)
    for _ in range(2):
        for name in ("dora4", "lora8", "head", "rows"):
            engine.load(name, adapter_dir(name))
            request = ask(engine, PROMPTS[1], name)
            assert engine.unload(name)
            check(request, alone("llama", name, adapter_dir(name)), PROMPTS[1])  # unloaded while in use
            with pytest.raises(UnknownModel):
                ask(engine, PROMPTS[1], name)
    check(running, alone("llama", "lora1", adapter_dir("lora1")), PROMPTS[0], 60)
    assert engine.adapters.names() == ["lora1"]
    assert settled(engine)


def test_long_prompts_are_read_in_parts(engine_of, adapter_dir):
    engine = engine_of("llama", "dora4", "head", max_batch_tokens=32, max_batch=8)
    for prompt, name in itertools.product(PROMPTS, ("dora4", "head")):
        requests = [ask(engine, prompt[n:], name) for n in range(3)]
        for n, request in enumerate(requests):
            check(request, alone("llama", name, adapter_dir(name)), prompt[n:])


def test_every_request_of_a_full_batch_can_have_the_likeliest_tokens(engine_of, adapter_dir):
    engine = engine_of("llama", "dora4", max_batch=16, max_batch_tokens=32)
    requests = [ask(engine, PROMPTS[1], "dora4", top_logprobs=n % 3 * 10) for n in range(20)]
    check(requests[0], alone("llama", "dora4", adapter_dir("dora4")), PROMPTS[1])
    for n, request in list(enumerate(requests))[1:]:
        output = request.updates.get(timeout=60)
        assert output.error is None
        for at, token in enumerate(output.generated_tokens if n % 3 else []):
            tokens, values = request.tops[at]
            assert (len(tokens), tokens[0]) == (n % 3 * 10, token)  # greedy: the picked one is the likeliest
            assert values[0] == pytest.approx(output.logprobs[at], abs=1e-6)
    assert engine.worker.restarts == 0


def test_a_seed_decides_whatever_else_is_in_the_batch(engine_of):
    engine = engine_of("llama", "dora4", "lora8")
    asked = {"adapter": "dora4", "count": 12, "temperature": 0.9, "seed": 7}
    alone = answer(ask(engine, PROMPTS[0], **asked))
    others = [ask(engine, PROMPTS[2][n:], "lora8", 20, 1.0, seed=n, top_p=0.8, top_logprobs=2) for n in range(5)]
    assert answer(ask(engine, PROMPTS[0], **asked)) == alone
    assert answer(ask(engine, PROMPTS[0], **{**asked, "seed": 8})) != alone
    for request in others:
        answer(request)


def test_what_cannot_run_is_refused_and_harms_nobody(engine_of):
    engine = engine_of("llama", max_batch=2, max_queue=1)
    for prompt, says in (([], "empty"), ([1] * 600, "600 tokens"), ([3, 272], "outside"), ([-1], "outside")):
        with pytest.raises(ConfigError, match=says):
            ask(engine, prompt)
    with pytest.raises(UnknownModel, match="nobody"):
        ask(engine, [5], "nobody")
    requests = [ask(engine, [5], count=50) for _ in range(3)]
    with pytest.raises(Busy):
        ask(engine, [5])
    assert [len(answer(request)) for request in requests] == [50] * 3
    assert settled(engine)


def test_a_cancelled_request_ends_and_the_others_go_on(engine_of, adapter_dir):
    engine = engine_of("llama", "dora4", max_batch=4)
    requests = [ask(engine, PROMPTS[0], "dora4", 100, every_token=True) for _ in range(6)]  # two of them wait
    requests[0].updates.get(timeout=60)
    for request in (*requests[1:3], requests[5]):
        engine.cancel(request)
        engine.cancel(request)
    last = [list(updates(request))[-1] for request in (requests[0], requests[3], requests[4])]
    assert [len(output.generated_tokens) for output in last] == [100] * 3
    assert settled(engine)


def updates(request):
    while True:
        output = request.updates.get(timeout=60)
        yield output
        if output.is_finished():
            return


def test_a_worker_that_fails_tells_and_is_replaced(engine_of, adapter_dir, monkeypatch):
    engine = engine_of("llama", "dora4")
    model, fail = engine.model, [True]

    def once(*_):
        if fail.pop() if fail else False:
            raise RuntimeError("out of memory, say")

    handle = model.model.layers[0].register_forward_pre_hook(once)
    failed = [ask(engine, PROMPTS[0], "dora4") for _ in range(3)]
    assert all("out of memory, say" in request.updates.get(timeout=60).error for request in failed)
    handle.remove()
    deadline = time.monotonic() + 60
    while not engine.ready() and time.monotonic() < deadline:
        time.sleep(0.02)
    check(ask(engine, PROMPTS[0], "dora4"), alone("llama", "dora4", adapter_dir("dora4")), PROMPTS[0])
    assert engine.worker.restarts == 1
    assert settled(engine)


def test_a_worker_that_fails_again_and_again_is_given_up(engine_of):
    engine = engine_of("llama")
    engine.model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    deadline = time.monotonic() + 60
    while engine.worker.failure is None and time.monotonic() < deadline:
        try:
            assert ask(engine, [5]).updates.get(timeout=60).error
        except Unavailable:
            time.sleep(0.02)
    assert not engine.ready()
    with pytest.raises(Unavailable, match="division by zero"):
        ask(engine, [5])


def test_a_load_that_runs_out_of_memory_leaves_layers_that_work(engine_of, adapter_dir, monkeypatch):
    engine = engine_of("llama", "lora1")  # on some of the layers, which are to get more room
    forgotten, grouped = [], []
    monkeypatch.setattr(engine.worker.manager, "forget_graphs", lambda: forgotten.append(True))
    group = serve_adapters.group_slotted
    monkeypatch.setattr(serve_adapters, "group_slotted", lambda model: grouped.append(group(model)))
    before = {path: layer.slotted_weights()[0] for path, layer in engine.slotted_layers().items()}
    new, room = SlottedLayer._new, iter(range(9))  # the fifth layer, whose module is new, gets half of its tensors

    def full(layer, *shape):
        if next(room, None) is None:
            raise torch.OutOfMemoryError("out of memory")
        return new(layer, *shape)

    with monkeypatch.context() as patch:
        patch.setattr(SlottedLayer, "_new", full)
        with pytest.raises(torch.OutOfMemoryError):
            engine.load("lora8", adapter_dir("lora8"))
    after = engine.slotted_layers()
    assert any(after[path].slotted_weights()[0] is not tensor for path, tensor in before.items())
    assert forgotten
    assert grouped
    for name in (None, "lora1"):
        check(ask(engine, PROMPTS[0], name), alone("llama", name, name and adapter_dir(name)), PROMPTS[0])
    engine.load("lora8", adapter_dir("lora8"))
    check(ask(engine, PROMPTS[0], "lora8"), alone("llama", "lora8", adapter_dir("lora8")), PROMPTS[0])


def test_a_slot_that_was_filled_in_part_is_emptied():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in "ab"})
    layers = {name: slot(module, Routing(2), 1) for name, module in model.items()}
    slots = Slots(2, lambda: layers)
    whole = SlotTensors(torch.ones(1, 4), torch.ones(1, 4), None)
    with pytest.raises(RuntimeError):  # b's do not fit
        slots.place(1, lambda: {"a": whole, "b": SlotTensors(torch.ones(1, 5), torch.ones(1, 5), None)}, ())
    assert slots.place(2, lambda: {"b": whole}, ()) == 1
    assert not layers["a"].slotted_weights()[0].any()


def test_half_precision_and_a_tied_head(engine_of, adapter_dir):
    engine = engine_of("llama", "dora4", model=tiny_model("llama", tied=True, dtype=torch.bfloat16))
    requests = [ask(engine, prompt, name) for prompt, name in itertools.product(PROMPTS, (None, "dora4"))]
    answers = [answer(request) for request in requests]
    assert answers[0] != answers[1]
    assert [len(tokens) for tokens in answers] == [8] * 6


def test_requests_that_outgrow_the_cache_begin_again(engine_of, adapter_dir):
    engine = engine_of("llama", "dora4", "lora8", kv_tokens=64, page_size=16, max_batch=4)
    names = ("dora4", "lora8", None)
    requests = [ask(engine, PROMPTS[0], name, count=25) for name in names]  # 32 tokens each
    for request, name in zip(requests, names, strict=True):
        check(request, alone("llama", name, name and adapter_dir(name)), PROMPTS[0], 25)
    assert settled(engine)


def test_the_model_is_the_base_outside_of_batches(engine_of):
    engine = engine_of("llama", "dora4")
    ids = torch.tensor([PROMPTS[0]])
    paged = engine.model.config._attn_implementation
    engine.model.set_attn_implementation("sdpa")  # paged attention runs in batches alone
    try:
        with torch.no_grad():
            torch.testing.assert_close(engine.model(ids).logits, alone("llama", None, None)(ids).logits)
    finally:
        engine.model.set_attn_implementation(paged)


def test_an_engine_that_does_not_start_says_why(monkeypatch):
    engine = Engine(tiny_model(), ServeConfig(model="base", kv_tokens=512))

    def no_memory(_):
        raise RuntimeError("no memory for keys and values")

    monkeypatch.setattr(RoutedManager, "_create_batch_processor", no_memory)
    with pytest.raises(Unavailable, match="does not start: no memory for keys"):
        engine.start()
    with pytest.raises(Unavailable, match="starting"):
        ask(engine, [5])
    engine.worker.start_again()  # as after a failure
    with pytest.raises(Unavailable, match="no memory for keys"):
        ask(engine, [5])
    assert not engine.ready()
    engine.stop()
    assert engine.model.config._attn_implementation == "sdpa"
    monkeypatch.undo()
    again = Engine(engine.model, ServeConfig(model="base", kv_tokens=512))
    again.start()  # whose trial asks the model with its own attention
    assert again.ready()
    again.stop()


def test_a_request_that_the_worker_does_not_take_is_over(engine_of, monkeypatch):
    engine = engine_of("llama", "dora4")
    monkeypatch.setattr(engine.worker.manager, "add_request", lambda *_, **__: None)
    with pytest.raises(Unavailable):
        ask(engine, [5], "dora4")
    assert settled(engine)
    engine.stop()
    with pytest.raises(Unavailable, match="stopping"):
        ask(engine, [5])


def test_loading_while_the_worker_is_busy_or_fails_or_is_gone(engine_of, adapter_dir):
    engine = engine_of("llama")
    manager, begun, go = engine.worker.manager, threading.Event(), threading.Event()
    busy = threading.Thread(target=manager.run_between_batches, args=(lambda: begun.set() or go.wait(60),))
    busy.start()
    assert begun.wait(60)
    with pytest.raises(NotRun, match=r"the worker was busy for 0\.05 s"):
        manager.run_between_batches(lambda: None, timeout=0.05)
    assert not manager.tasks  # nor is it run later
    go.set()
    busy.join(60)

    entered = threading.Event()

    def fails(*_):
        entered.set()
        deadline = time.monotonic() + 60
        while not manager.tasks and time.monotonic() < deadline:
            time.sleep(0.01)
        raise RuntimeError("out of memory, say")

    handle = engine.model.model.layers[0].register_forward_pre_hook(fails)
    request = ask(engine, [5])
    assert entered.wait(60)  # before the load, which must not find the worker between batches
    with pytest.raises(Unavailable, match="not loaded: the worker failed: out of memory, say; try again soon"):
        engine.load("dora4", adapter_dir("dora4"))
    assert engine.adapters.names() == []
    assert "out of memory" in request.updates.get(timeout=60).error
    handle.remove()
    while not engine.ready():
        time.sleep(0.01)
    engine.worker.manager.stop(block=True)
    engine.load("dora4", adapter_dir("dora4"))  # nobody is in the way
    assert engine.adapters.names() == ["dora4"]


def test_answers_for_an_event_loop_that_has_closed_hold_up_nobody():
    class Closing:
        def is_closed(self):  # when it is asked, it has not yet
            return False

        def call_soon_threadsafe(self, *_):
            raise RuntimeError("Event loop is closed")

    closed, closing = asyncio.new_event_loop(), Closing()
    closed.close()
    requests = {
        name: serve_requests.Request(name, [5], None, Sampling(max_tokens=1), loop=loop)
        for name, loop in (("closed", closed), ("closing", closing), ("thread", None))
    }
    over = []
    output = [SimpleNamespace(request_id=name, is_finished=lambda: True) for name in ("gone", *requests)]
    Router(requests.get, over.append).deliver_batch(output)
    assert requests["thread"].updates.get(timeout=60) is output[-1]
    assert over == list(requests.values())


def test_adapters_that_no_slot_can_hold_are_refused(engine_of, adapter_dir, tmp_path):
    engine = engine_of("llama", "lora1", max_rank=4)
    with pytest.raises(CheckpointError, match=r"has rank 8; this server takes ranks up to 4 \(--max-rank\)"):
        engine.load("lora8", adapter_dir("lora8"))
    config = AdapterConfig(rank=2, modules_to_save=("lm_head",))
    save_adapter(inject_adapter(tiny_model(), config), tmp_path / "full")
    with pytest.raises(CheckpointError, match=r"serve the merged model:\n  - lm_head\.weight: trained in full"):
        engine.load("full", tmp_path / "full")
    model = inject_adapter(tiny_model(), AdapterConfig(method="dora", rank=2, targets="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.fill_(3e38)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(0)
    save_adapter(model, tmp_path / "huge")
    engine.model.model.layers[0].mlp.up_proj.weight.data.mul_(1e-3)
    with pytest.raises(CheckpointError, match="not finite on this model's weights"):
        engine.load("huge", tmp_path / "huge")
    assert engine.adapters.names() == ["lora1"]
