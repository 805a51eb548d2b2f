"""Models that transformers' batches change are refused at the start, and others are not."""

import pytest
import torch
import transformers

from serving import expected
from theodora.serve.config import ServeConfig
from theodora.serve.engine import Engine
from theodora.serve.errors import Unavailable
from theodora.serve.requests import Sampling
from theodora.serve.run import load_engine
from theodora.serve.trial import Trial
from tiny import tiny_model, tiny_tokenizer

LONGROPE = {
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 64,
    },
}


def engine(model, **config):
    return Engine(model, ServeConfig(model="base", kv_tokens=512, max_batch_tokens=256, max_batch=8, **config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "says"),
    [
        # It attends to other requests, and to no cache; in transformers 5.24 it asks the cache of pages for its length.
        ("bloom", "(beside another request it says something else|no attribute 'get_seq_length')"),
        ("stablelm", "(size of tensor|a paged attention cache)"),  # its layers fail in a batch
        ("mamba", "Invalid (layer|group) type"),  # no attention at all
    ],
)
def test_a_model_that_batches_change_does_not_start(family, says, dtype, capfd, caplog):
    made = engine(tiny_model(family, dtype=dtype))
    with pytest.raises(Unavailable, match=rf"base \(model type {family}\) cannot be served in batches: .*{says}"):
        made.start()
    assert not made.ready()
    assert "Traceback" not in capfd.readouterr().err + caplog.text
    made.stop()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2", "starcoder2", "mixtral"])
def test_others_start(family, dtype):
    if (family, dtype) == ("gemma2", torch.float16):
        pytest.skip("its attention, without a kernel, is refused in float16: the test below")
    made = engine(tiny_model(family, dtype=dtype))
    try:
        made.start()
        assert made.ready()
        assert made.worker.restarts == made.under_way() == 0
        made.start()  # does nothing
    finally:
        made.stop()


def test_a_mixture_that_is_configured_for_training_starts(tmp_path):
    """Its balancing loss fits no batch of requests."""
    model = tiny_model("mixtral")
    model.config.output_router_logits = True
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    made, _ = load_engine(ServeConfig(model=str(tmp_path), device="cpu", kv_tokens=512))
    try:
        made.start()
        assert made.ready()
    finally:
        made.stop()


def test_scores_in_float16_are_refused_with_the_way_out():
    """No mask keeps apart what overflows before it is added."""
    made = engine(tiny_model("gemma2", dtype=torch.float16))
    if transformers.__version__.startswith("5.17."):
        pytest.skip("its attention has a kernel there")
    with pytest.raises(Unavailable, match=r"does not keep requests apart in float16, but does in bfloat16 .*--dtype"):
        made.start()


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_windows_shorter_than_the_trial(length):
    made = engine(tiny_model(), max_length=length)
    try:
        made.start()
        assert made.ready()
    finally:
        made.stop()


def test_the_distance_ends_where_tokens_part():
    trial = Trial.of(tiny_model(), 512)
    own = [expected(tiny_model(), prompt, trial.count) for prompt in trial.prompts]
    assert trial.distance(own) < 1e-5
    (tokens, logprobs), other = own
    row = trial.logprobs_2CV[0]
    parted = [tokens[0], int(row[1].argmin()), 3, 3], [logprobs[0], float(row[1].min()) + 0.6, -50.0, -50.0]
    assert trial.distance([parted, other]) == pytest.approx(0.6 / 6, abs=1e-4)  # 2 tokens of one, 4 of the other


def test_capped_scores_are_served_capped():
    made = engine(tiny_model("gemma2", attn_logit_softcapping=0.5, attn_implementation="eager"))
    prompt = [n % 250 + 3 for n in range(40)]
    try:
        made.start()
        request = made.submit(prompt, Sampling(max_tokens=16, temperature=0.0))
        while not (output := request.updates.get(timeout=60)).is_finished():
            pass
    finally:
        made.stop()
    with torch.no_grad():
        tokens = expected(tiny_model("gemma2", attn_logit_softcapping=0.5, attn_implementation="eager"), prompt, 16)[0]
        assert output.generated_tokens == tokens != expected(tiny_model("gemma2"), prompt, 16)[0]


def test_longrope_is_served_up_to_where_its_frequencies_change():
    """Beyond, a long request would change the frequencies of the short ones beside it."""
    made = engine(tiny_model("phi3", **LONGROPE), page_size=16)
    assert made.window == 64
    try:
        made.start()
        long, short = [[n % 250 + 3 for n in range(length)] for length in (48, 30)]
        requests = [made.submit(prompt, Sampling(max_tokens=16, temperature=0.0)) for prompt in (long, short)]
        for prompt, request in zip((long, short), requests, strict=True):
            while not (output := request.updates.get(timeout=60)).is_finished():
                pass
            assert output.generated_tokens == expected(tiny_model("phi3", **LONGROPE), prompt, 16)[0]
    finally:
        made.stop()
