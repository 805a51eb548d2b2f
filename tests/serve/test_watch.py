"""What is not finite stays with its own request: nobody else's bits change, whatever it shares with them."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers.generation.continuous_batching.requests import RequestStatus

import tiny
from theodora import AdapterConfig, inject_adapter, save_adapter
from theodora.errors import CheckpointError
from theodora.serve.config import ServeConfig
from theodora.serve.engine import Engine
from theodora.serve.errors import Unavailable
from theodora.serve.paged_cache import with_finite_keys
from theodora.serve.processors import KEY, RoutedProcessors
from theodora.serve.requests import Sampling
from theodora.serve.watch import OutputNotFinite, Watch

PROMPT = list(range(5, 75))  # more than two pages
ODD = 200  # a token that some adapters cannot stand


@pytest.fixture
def ruined_dir(tmp_path):
    """`ruined_dir(change, targets)`: the folder of an adapter after `change(name, parameter)`, finite in float32."""
    made = iter(range(100))

    def save(change, targets="all-linear", method="lora"):
        torch.manual_seed(1)
        model = inject_adapter(tiny.tiny_model(), AdapterConfig(method=method, rank=4, targets=targets))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                    change(name, parameter)
        folder = tmp_path / f"ruined{next(made)}"
        save_adapter(model, folder)
        return folder

    return save


def everywhere(name, parameter):
    if "lora_B" in name:
        parameter.fill_(1e38)


def at_one_token(name, parameter):
    if "lora_embedding_A" in name or "lora_A" in name:
        parameter[..., ODD] = 1e30
    if "lora_embedding_B" in name or "lora_B" in name:
        parameter.fill_(1e20)


def submit(engine, adapter, prompt=PROMPT, count=12, **settings):
    return engine.submit(prompt, Sampling(max_tokens=count, temperature=0.0, **settings), adapter, every_token=False)


def together(engine, *asked):
    """(tokens, log-probabilities, error) of requests that begin in one batch; each is arguments of `submit`."""
    requests = engine.worker.manager.run_between_batches(lambda: [submit(engine, *each) for each in asked])
    outputs = [request.updates.get(timeout=60) for request in requests]
    for request, output in zip(requests, outputs, strict=True):
        assert (output.error is not None) == isinstance(request.problem, OutputNotFinite)
    return [(output.generated_tokens, output.logprobs, output.error) for output in outputs]


@pytest.mark.parametrize("chunk", [512, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_that_overflows_changes_no_bit_of_the_others(engine_of, ruined_dir, dtype, chunk):
    engine = engine_of("llama", "dora4", model=tiny.tiny_model().to(dtype), max_batch_tokens=chunk, prefix_reuse=False)
    engine.load("ruined", ruined_dir(everywhere))
    for short in (PROMPT, [7]):
        others = (None, short, 8), ("dora4", short, 8)
        # A request of one token in its place, so that the batches are of the same sizes.
        beside = together(engine, (None, PROMPT[:20], 1), *others)
        found = together(engine, ("ruined", PROMPT[:20], 8), *others)
        assert found[1:] == beside[1:]
        assert "The output of 'ruined' is not finite" in found[0][2]
        assert str(dtype).removeprefix("torch.") in found[0][2]


def test_a_sequence_without_a_new_token_is_not_judged_by_the_row_of_another():
    processors = RoutedProcessors()
    processors.watch = Watch(8, torch.device("cpu"))
    processors.watch.begin(torch.tensor([0, 3, 6, 8]), 8)
    processors.watch._not_finite_T[:3] = 1
    # The last one's prompt goes on in the next batch; its row of the logits is the batch's first token's.
    rows = torch.zeros(7, 3, dtype=torch.int32)
    rows[6] = torch.tensor([0, 1, ~2])
    scores = torch.zeros(1, 3, tiny.VOCAB_SIZE)
    scores[0, [0, 2]] = torch.nan
    processors(torch.zeros(1, 8), scores, rows)
    told = torch.zeros(2, 3, dtype=torch.int32)
    processors.sample(scores, told)
    assert told[1].view(torch.float32).isnan().tolist() == [True, False, False]


def test_what_is_not_finite_at_one_token_ends_there_and_its_pages_are_not_used_again(engine_of, ruined_dir):
    engine = engine_of()
    engine.load("odd", ruined_dir(at_one_token, targets=r".*embed_tokens"))
    fine, alone = together(engine, ("odd", PROMPT), (None, PROMPT))
    assert fine[2] is None
    for _ in range(2):  # a second time, when the pages before the token are shared
        found = together(engine, ("odd", [*PROMPT, ODD, *PROMPT]), (None, PROMPT), ("odd", PROMPT))
        assert found[0][2] is not None
        for before, after in ((alone, found[1]), (fine, found[2])):
            assert before[0] == after[0]
            assert before[1] == pytest.approx(after[1], abs=1e-4)
    assert together(engine, ("odd", [*PROMPT, ODD]))[0][2] is not None


def test_a_prompt_of_many_batches_ends_at_the_one_that_is_not_finite(engine_of, ruined_dir):
    """Its last tokens alone would be finite: what was not has zeros for its keys."""
    engine = engine_of(max_batch_tokens=16, max_batch=4)
    engine.load("odd", ruined_dir(at_one_token, targets=r".*embed_tokens"))
    wrong, right = together(engine, ("odd", [5, ODD, *PROMPT]), (None, PROMPT))
    assert wrong[2] is not None
    assert right[0] == together(engine, (None, PROMPT))[0][0]


def test_a_token_that_is_not_finite_ends_the_answer_that_comes_to_it(engine_of, ruined_dir):
    engine = engine_of()
    engine.load("odd", ruined_dir(at_one_token, targets=r".*embed_tokens"))
    request = engine.submit(PROMPT, Sampling(max_tokens=9, temperature=0.0, allowed=(ODD,)), "odd")
    updates = [request.updates.get(timeout=60)]
    while not updates[-1].is_finished() and updates[-1].error is None:
        updates.append(request.updates.get(timeout=60))
    assert [len(update.generated_tokens) for update in updates] == [1, 1]
    assert "'odd'" in updates[-1].error
    assert math.isfinite(updates[-1].logprobs[0])


def test_keys_that_are_finite_in_float16_do_not_outweigh_the_mask(engine_of, ruined_dir):
    """They are of another request, and the mask's largest negative number, -65504, is less than such a score."""
    engine = engine_of("llama", "dora4", model=tiny.tiny_model().half(), prefix_reuse=False)
    engine.load("large", ruined_dir(lambda name, p: p.fill_(2e4) if "lora_B" in name else None, r".*k_proj"))
    others = (None, PROMPT), ("dora4", PROMPT)
    beside = together(engine, (None, PROMPT[:20], 1), *others)
    assert together(engine, ("large", PROMPT[:20], 1), *others)[1:] == beside[1:]


@pytest.mark.parametrize(
    ("change", "targets", "what"),
    [
        (lambda name, p: p.fill_(1e5) if "lora_B" in name else None, r".*q_proj", "s·B"),
        (lambda name, p: p.fill_(1e5) if "lora_A" in name else None, r".*v_proj", "A"),
    ],
)
def test_what_overflows_in_the_models_dtype_is_refused_before_it_is_served(
    engine_of, ruined_dir, change, targets, what
):
    folder = ruined_dir(change, targets)
    engine_of().load("fine", folder)
    half = engine_of(model=tiny.tiny_model().half())
    with pytest.raises(CheckpointError, match=rf"{what} is not finite on this model's weights, in float16"):
        half.load("ruined", folder)
    assert half.adapters.names() == []


def test_a_magnitude_over_an_infinite_norm_is_refused(engine_of, ruined_dir):
    def change(name, parameter):  # B·A is finite, and its square is not
        if "lora_B" in name:
            parameter.fill_(1e25)

    with pytest.raises(CheckpointError, match=r"m / ‖W \+ s·B·A‖ is not finite"):
        engine_of().load("ruined", ruined_dir(change, r".*q_proj", "dora"))


def test_a_base_model_that_is_not_finite_says_so():
    model = tiny.tiny_model()
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = math.nan
    engine = Engine(model, ServeConfig(model="base", kv_tokens=512, max_batch_tokens=64, max_batch=4))
    with pytest.raises(Unavailable, match=r"base cannot be served: its output is not finite.*float32"):
        engine.start()


def test_one_row_of_the_base_model_that_is_not_finite_ends_the_prompts_that_have_it(engine_of):
    model = tiny.tiny_model()
    model.get_input_embeddings().weight.data[ODD] = math.nan
    engine = engine_of("llama", "dora4", model=model)
    wrong, right, other = together(engine, (None, [3, ODD, 4]), (None, PROMPT), ("dora4", PROMPT))
    assert "The base model's output is not finite" in wrong[2]
    assert right[2] is other[2] is None
    assert all(map(math.isfinite, right[1]))


def test_a_prompt_whose_score_is_no_number_ends_with_an_error(engine_of):
    """The last layer's output at a token inside the prompt is in nobody's keys, and in no logits but those scored."""
    model = tiny.tiny_model()
    norm = model.model.norm.forward

    def odd(hidden):
        y = norm(hidden)
        return torch.where((hidden[..., :1] == hidden[0, 1, 0]) & (hidden.shape[1] > 20), math.nan, y)

    engine = engine_of(model=model)
    model.model.norm.forward = odd
    request = submit(engine, None, PROMPT, 1, prompt_logprobs=0)
    assert request.updates.get(timeout=60).error is not None
    assert isinstance(request.problem, OutputNotFinite)
    assert submit(engine, None, PROMPT, 1).updates.get(timeout=60).error is None


def test_attention_whose_scores_are_float16_is_refused():
    model = tiny.tiny_model().half()
    model.set_attn_implementation("eager")
    engine = Engine(model, ServeConfig(model="base", kv_tokens=512, max_batch_tokens=64, max_batch=4))
    with pytest.raises(Unavailable, match=r"base .*does not keep requests apart in float16"):
        engine.start()


def test_batches_that_overlap_pass_by_what_has_ended(engine_of, ruined_dir, caplog):
    """On a GPU a request that ends with an error is in the next batch already."""
    engine = engine_of()
    engine.load("ruined", ruined_dir(everywhere))
    together(engine, ("ruined", PROMPT), ("ruined", PROMPT))
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    ended, others = [], []
    manager = engine.worker.manager
    request = engine.submit(PROMPT, Sampling(max_tokens=1, temperature=0.0))
    request.updates.get(timeout=60)

    def future(status, new=True):
        state = SimpleNamespace(
            request_id=f"r{len(others)}", status=status, logit_processor_kwargs={KEY: replace(request, problem=None)}
        )
        others.append(state)
        return SimpleNamespace(state=state, has_new_token=new)

    decoding, over = RequestStatus.DECODING, RequestStatus.FINISHED
    batch = [future(decoding), future(decoding, new=False), future(over), future(decoding), future(decoding, new=False)]
    scheduler = SimpleNamespace(set_request_cancellation=ended.append, block_new_requests=True)
    manager.output_router = SimpleNamespace(fail_and_deliver=lambda state, _: ended.append(state.request_id))
    # Outputs: those of requests with a new token first.
    logprobs = [-1.0, math.nan, math.nan, math.nan, -2.0]
    kept, tokens, told = manager.without_not_finite(
        SimpleNamespace(scheduler=scheduler), batch, [5, 6, 7, 8, 9], logprobs
    )
    assert ended == ["r1", "r1", "r3", "r3"]
    assert kept == [batch[0], batch[2], batch[4]]
    assert tokens == [5, 6]  # what is over has its token taken and thrown away
    assert told[0] == -1.0
    assert not scheduler.block_new_requests


def test_keys_that_a_kernel_writes_by_itself_are_made_finite_before():
    watch = Watch(8, torch.device("cpu"))
    watch.begin(torch.tensor([0, 1, 2, 3]), 3)
    key, value = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    key[0, 1, 1, 2] = math.inf
    attend = with_finite_keys(lambda module, q, k, v, cache, *rest, **others: (k, v, rest, others))
    k, v, *rest = attend(None, None, key, value, SimpleNamespace(watch=watch), 1, causal=True)
    assert k[0, :, 1].abs().sum() == v[0, :, 1].abs().sum() == 0
    assert torch.equal(k[:, :, [0, 2]], key[:, :, [0, 2]])
    assert rest == [(1,), {"causal": True}]
    assert watch.not_finite().tolist() == [False, True, False]
    assert attend(None, None, key, value, object(), 1)[0] is key  # another's cache
