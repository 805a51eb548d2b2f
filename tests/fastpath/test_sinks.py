"""Models with sinks on the fast path are the same models: logits, gradients, windows, masks and packed rows."""

import copy
import gc
import inspect
from statistics import fmean

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, masking_utils
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.llama import modeling_llama as llama

import tiny_families
from formula import DEVICE, error
from theodora import AdapterConfig, accelerate, inject_adapter, kernels
from theodora.fastpath import sinks
from theodora.fastpath.accelerate import FastPath, checkpoint_activations, restore_model, speed_up_model
from theodora.fastpath.masks import EAGER_MASKS, Causal, Unbuilt, causal_of, whole_rows
from theodora.fastpath.packed_attention import SEQUENCES, Sequences
from theodora.kernels.sink_attention import sink_attention_reference, takes
from theodora.train.packed_rows import attention_by_bounds, bounds_of, takes_bounds

GPU = DEVICE == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
CACHE = "cache" if "cache" in inspect.signature(masking_utils.create_causal_mask).parameters else "past_key_values"


def tiny(**options):
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 2}
    kinds = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    kinds["experts_implementation"] = "eager"
    model = GptOssForCausalLM(GptOssConfig(**sizes, **heads, **{**kinds, **options})).to(DEVICE, DTYPE)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
        for name in ("q_proj", "k_proj"):  # scores that differ
            torch.nn.init.normal_(getattr(layer.self_attn, name).weight, std=0.5)
    return model.train()


@pytest.fixture
def calls(monkeypatch):
    """The windows and bounds that ours was asked for; without a GPU it stands in plain torch."""
    made = []

    def attention(*args):
        made.append((args[5], args[6] if len(args) > 6 else None))
        return (sinks_attention if GPU else sink_attention_reference)(*args)

    sinks_attention = sinks.sink_attention
    monkeypatch.setattr(sinks, "sink_attention", attention)
    if not GPU:
        monkeypatch.setattr(sinks, "takes", lambda *_: True)
    return made


def outcome(model, ids, **others):
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False, **others).logits
    logits.float().square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def packed(lengths):
    ids = torch.randint(3, 128, (1, sum(lengths)), device=DEVICE)
    positions = torch.cat([torch.arange(n, device=DEVICE) for n in lengths])[None]
    return ids, {"position_ids": positions, SEQUENCES: Sequences(bounds_of(positions), max(lengths))}


def wanted(model, run):
    """What `run` gives of the model as it is, and on a GPU, where that is in bfloat16, of a copy in float32."""
    return run(model), run(copy.deepcopy(model).float()) if GPU else None


def same(found, expected):
    plain, exact = expected
    if exact is None:
        return all(error(one, other.double()) < 1e-5 for one, other in zip(found, plain, strict=True))
    off, off_plain = (fmean(map(error, tensors, exact)) for tensors in (found, plain))
    return off <= 1.5 * off_plain


@pytest.mark.parametrize("trained", ["adapter", "everything"])
def test_whole_rows(trained, calls):
    model, ids = tiny(), torch.randint(3, 128, (3, 12), device=DEVICE)
    if trained == "adapter":
        inject_adapter(model, AdapterConfig(method="dora", rank=2, targets=["q_proj", "v_proj"]))
    expected = wanted(model, lambda model: outcome(model, ids))
    assert trained == "adapter" or model.model.layers[0].self_attn.sinks.grad.abs().sum() > 0
    accelerate(model)
    with whole_rows():
        found = outcome(model, ids)
    assert calls == [(5, None), (None, None)]
    assert same(found, expected)


@pytest.mark.parametrize("window", [5, 64])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows(checkpointing, window, calls):
    """Each sequence as if it were alone, which gpt-oss itself does not see to."""
    model, lengths = tiny(sliding_window=window), (7, 12, 1, 9)
    ids, others = packed(lengths)

    def each_alone(model):
        model.zero_grad()
        logits = torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, dim=1)], dim=1)
        logits.float().square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = wanted(model, each_alone)
    accelerate(model)
    if checkpointing:
        checkpoint_activations(model)
    model.zero_grad()
    with attention_by_bounds():
        logits = model(ids, use_cache=False, **others).logits
    logits.float().square().mean().backward()  # outside of the block, as what is recomputed is
    assert [call[0] for call in calls] == ([window, None, None, window] if checkpointing else [window, None])
    assert all(call[1] is others[SEQUENCES].bounds_N for call in calls)
    assert same([logits.detach(), *(p.grad for p in model.parameters())], expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_recomputed_knows_what_its_mask_said(checkpointing, calls):
    model, ids = tiny(), torch.randint(3, 128, (2, 12), device=DEVICE)
    expected = wanted(model, lambda model: outcome(model, ids))
    accelerate(model)
    if checkpointing:
        checkpoint_activations(model)
    model.zero_grad()
    with whole_rows():
        logits = model(ids, use_cache=False).logits
    logits.float().square().mean().backward()
    assert len(calls) == 4 if checkpointing else 2
    assert same([logits.detach(), *(p.grad for p in model.parameters())], expected)


def test_under_a_mask_the_models_own_function_runs(calls):
    model, ids = tiny(), torch.randint(3, 128, (3, 12), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    runs = (lambda model: outcome(model, ids, attention_mask=mask)), (lambda model: outcome(model, ids))
    expected = [wanted(model, run) for run in runs]
    accelerate(model)
    assert same(outcome(model, ids, attention_mask=mask), expected[0])
    with whole_rows():  # says nothing of padding
        assert same(outcome(model, ids, attention_mask=mask), expected[0])
    assert same(outcome(model, ids), expected[1])
    full = torch.full((12, 12), torch.finfo(DTYPE).min, device=DEVICE, dtype=DTYPE).triu(1)[None, None]
    full = full.expand(3, 1, 12, 12)
    with whole_rows():
        outcome(model, ids, attention_mask=full)
    assert not calls


def test_generating_goes_on_as_it_did(calls):
    model, ids = tiny().eval(), torch.randint(3, 128, (2, 9), device=DEVICE)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, **settings)
    accelerate(model)
    assert GPU or torch.equal(model.generate(ids, **settings), expected)
    with whole_rows():
        assert GPU or torch.equal(model.generate(ids, **settings), expected)


def asked_for(windowed, length=12, **others):
    """What transformers asks its mask function for, for gpt-oss or with other options."""
    asked = []
    config = GptOssConfig(sliding_window=5, attn_implementation="eager", **others.pop("config", {}))
    create = masking_utils.create_sliding_window_causal_mask if windowed else masking_utils.create_causal_mask
    create = others.pop("create", create)
    given = {"inputs_embeds": torch.zeros(2, length, 8), "attention_mask": None, CACHE: None} | others
    known = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    known["eager"] = lambda **options: asked.append(options)
    try:
        create(config, **given)
    finally:
        del known["eager"]
    return asked[0]


def test_what_a_mask_says():
    assert causal_of(asked_for(False)) == Causal(None)
    assert causal_of(asked_for(True)) == Causal(5)
    chunked = masking_utils.create_chunked_causal_mask
    past = tiny()(torch.ones(2, 3, dtype=torch.long, device=DEVICE), use_cache=True).past_key_values
    packed_positions = torch.arange(6).repeat(2, 2)
    for windowed in (True, False):
        for others in (
            {"attention_mask": torch.ones(2, 12, dtype=torch.long)},
            {CACHE: past},
            {"position_ids": packed_positions},
            {"or_mask_function": lambda b, h, q, k: k < 2},
            {"and_mask_function": lambda b, h, q, k: k > 2},
            {"config": {"is_causal": False}},
            {"create": chunked, "config": {"attention_chunk_size": 5}},
        ):
            assert causal_of(asked_for(windowed, **others)) is None, others


def test_a_mask_is_there_for_whoever_wants_a_tensor():
    built = []

    def build():
        built.append(torch.arange(4.0).view(1, 1, 2, 2))
        return built[0]

    asked = {"batch_size": 1, "q_length": 2, "kv_length": 2}
    mask, scores = Unbuilt.of(Causal(None), build, asked), torch.ones(3, 2, 2, 2)
    assert isinstance(mask, torch.Tensor)
    assert (mask.shape, mask.dtype, mask.dim(), mask.device.type) == ((1, 1, 2, 2), torch.float32, 4, "cpu")
    assert mask.is_floating_point()
    assert not mask.requires_grad
    assert not built
    for found in (scores + mask, mask[:, :, :, :2] + scores, torch.add(scores, mask), scores + mask.to(scores.dtype)):
        assert torch.equal(found, scores + torch.arange(4.0).view(1, 1, 2, 2))
    assert torch.equal(torch.cat([mask, mask], dim=-1), torch.cat([built[0]] * 2, dim=-1))
    assert torch.equal(mask == 0, built[0] == 0)
    assert torch.equal(copy.deepcopy(mask), built[0])
    assert len(built) == 1


def test_no_layer_is_left_without_a_mask(calls):
    """One layer's attention is another function, of which we know nothing."""
    model, ids = tiny(), torch.randint(3, 128, (2, 12), device=DEVICE)
    expected = wanted(model, lambda model: outcome(model, ids))
    accelerate(model)
    own, ours = sinks._attention_of(gpt_oss).original(), gpt_oss.eager_attention_forward
    forward = gpt_oss.GptOssAttention.forward

    def another(self, *args, **kwargs):
        gpt_oss.eager_attention_forward = own if self.layer_idx == 1 else ours
        try:
            return forward(self, *args, **kwargs)
        finally:
            gpt_oss.eager_attention_forward = ours

    for layer in model.model.layers:
        layer.self_attn.forward = another.__get__(layer.self_attn)
    with whole_rows():
        found = outcome(model, ids)
    assert same(found, expected)
    assert calls == [(5, None)]
    ids, others = packed((5, 7))
    with attention_by_bounds(), pytest.raises(RuntimeError, match="does not go by where its sequences begin"):
        model(ids, use_cache=False, **others)


def test_what_bounds_do_not_reach_is_an_error(calls):
    model = accelerate(tiny(attention_dropout=0.1))
    ids, others = packed((5, 7))
    with attention_by_bounds():
        for untold in (model, accelerate(tiny())):
            with pytest.raises(RuntimeError, match="was not told where its sequences begin"):
                untold(ids, use_cache=False, position_ids=others["position_ids"])
        with pytest.raises(RuntimeError, match="does not know dropout"):
            model(ids, use_cache=False, **others)
    with pytest.raises(RuntimeError, match="any other than causal"):  # under a mask that was built
        model.eval()(ids, use_cache=False, **others)
    assert not calls


def test_which_models_take_bounds(calls):
    model = tiny()
    assert not takes_bounds(model, 64)
    accelerate(model)
    assert takes_bounds(model, 64)
    assert takes_bounds(model, None)
    assert not takes_bounds(accelerate(tiny(attention_dropout=0.1)), 64)
    restore_model(model)
    assert not takes_bounds(model, 64)


def test_everything_is_put_back():
    gc.collect()  # what other tests have left
    own, masks = gpt_oss.eager_attention_forward, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["eager"]
    model = tiny()
    assert speed_up_model(model).sinks
    assert str(FastPath(sinks=True)) == "attention with sinks"
    assert gpt_oss.eager_attention_forward is not own
    other = copy.deepcopy(model)
    restore_model(model)
    assert EAGER_MASKS.on
    assert sinks.has_fast_sinks(other)
    assert not sinks.has_fast_sinks(model)
    del other
    gc.collect()
    assert gpt_oss.eager_attention_forward is own
    assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["eager"] is masks
    assert not EAGER_MASKS.on


def test_reference_kernels_are_the_models_own(calls):
    model = accelerate(tiny())
    with whole_rows(), kernels.reference():
        outcome(model, torch.randint(3, 128, (2, 12), device=DEVICE))
    assert not calls


def test_functions_are_known_by_what_they_compute():
    own = sinks._attention_of(gpt_oss).original()
    assert sinks._computes_sinks(own)
    with torch.autocast(DEVICE, torch.bfloat16), torch.device("meta"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert sinks._computes_sinks(own)
        finally:
            torch.set_default_dtype(torch.float32)
    assert not sinks._computes_sinks(llama.eager_attention_forward)
    assert not sinks._computes_sinks(gpt2.eager_attention_forward)

    def sinks_that_are_scaled(module, q, k, v, mask, scaling, dropout, s_aux, **_):
        return sink_attention_reference(q, k, v, s_aux * scaling, scaling), None

    assert not sinks._computes_sinks(sinks_that_are_scaled)


@pytest.mark.parametrize("family", ["granitemoe_swa", "mimo_v2_flash", "hy_v4", "deepseek_v4"])
def test_other_families_with_sinks(family, calls, monkeypatch):
    """Among them one whose layers ask whether their mask is a tensor, and make it longer, as their keys are."""
    file = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    assert sinks._computes_sinks(file.eager_attention_forward)
    monkeypatch.setattr(sinks, "takes", lambda q, k, v: q.shape[2:] == k.shape[2:] and (not GPU or takes(q, k, v)))
    model = tiny_families.tiny_family(family, tiny_families.families()[family]).to(DEVICE, DTYPE).eval()
    ids = torch.randint(3, 100, (2, 13), device=DEVICE)
    expected = wanted(model, lambda model: [model(ids, use_cache=False).logits])
    accelerate(model)
    with whole_rows():
        found = [model(ids, use_cache=False).logits]
    assert same(found, expected)
    assert bool(calls) == (family != "hy_v4")  # whose mask is always built
