"""Two models in one process, on the fast path and off it in any order: neither takes anything from the other."""

import copy
import gc
import itertools
import pickle
import sys

import pytest
from peft import LoraConfig, get_peft_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from steps import IDS, adapted, expected, needs_triton, same, step
from theodora import accelerate, accelerate_peft, restore_peft
from theodora.fastpath import attention as attention_file
from theodora.fastpath.accelerate import off_the_fast_path, restore_model, speed_up_model
from theodora.fastpath.attention import keep_attention
from theodora.kernels import fused
from tiny import tiny_model

ORDERS = [
    order
    for order in itertools.permutations(["+a", "+b", "-a", "-b"])
    if order.index("+a") < order.index("-a") and order.index("+b") < order.index("-b")
]


def file_of(model):
    return sys.modules[type(model).__module__]


class Places:
    """What transformers calls for its models' rotary embeddings and attention."""

    def __init__(self, *models):
        keep_attention.cache_clear()  # what tests of packed rows have left in place
        gc.collect()  # models of the tests before
        self.files = {file_of(model) for model in models}
        self.own = {file: file.apply_rotary_pos_emb for file in self.files}
        self.attention = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def are_ours(self, *models):
        """Whether exactly these models have rotary embeddings of ours, and, if there are any, attention."""
        fast = {file for file in self.files if file.apply_rotary_pos_emb is not self.own[file]}
        attention = ALL_ATTENTION_FUNCTIONS["sdpa"] is not self.attention
        return fast == {file_of(model) for model in models} and attention == bool(models)


@pytest.fixture(scope="module", autouse=True)
def what_was_there_before_is_not_looked_at_again():
    """Or each collection would take a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("families", [("llama", "llama"), ("llama", "mistral")], ids=" ".join)
def test_any_order(families):
    models = dict(zip("ab", map(tiny_model, families), strict=True))
    places, on = Places(*models.values()), set()
    for sign, name in itertools.chain(*ORDERS):
        (speed_up_model if sign == "+" else restore_model)(models[name])
        (on.add if sign == "+" else on.remove)(name)
        assert places.are_ours(*(models[name] for name in on))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["", "pickle"])
def test_a_copy_counts_for_itself(copied):
    model = tiny_model()
    places = Places(model)
    speed_up_model(model)
    other = copied(model)
    restore_model(model)
    assert places.are_ours(other)
    restore_model(other)
    assert places.are_ours()


def test_a_model_that_is_deleted_does_not_count():
    model, other = tiny_model(), tiny_model()
    places = Places(model)
    speed_up_model(model)
    speed_up_model(other)
    restore_model(other)
    del model
    gc.collect()
    assert places.are_ours()


def test_twice_is_once():
    model = tiny_model()
    places = Places(model)
    for _ in range(2):
        speed_up_model(model)
    assert places.are_ours(model)
    restore_model(model)
    assert places.are_ours()


def test_a_model_that_is_off_for_a_while():
    model, other = adapted(), adapted()
    places = Places(model)
    speed_up_model(model)
    speed_up_model(other)
    with off_the_fast_path(model):
        assert places.are_ours(other)
        restore_model(other)
        assert places.are_ours()
    assert places.are_ours(model)
    restore_model(model)
    assert places.are_ours()


@pytest.mark.parametrize("first", ["ours", "peft's"])
def test_beside_a_model_of_pefts(first):
    ours, pefts = adapted(), get_peft_model(tiny_model(), LoraConfig(r=3, use_dora=True))
    places = Places(ours)
    accelerate(ours)
    accelerate_peft(pefts)
    off = [lambda: restore_model(ours), lambda: restore_peft(pefts)]
    for leave in off if first == "ours" else reversed(off):
        assert places.are_ours(ours)
        leave()
    assert places.are_ours()


@needs_triton
def test_the_other_model_is_as_fast_as_alone(monkeypatch):
    """Its rotary embeddings are ours, and its magnitudes learn from the outputs that attention keeps."""
    counts, own = {"turned": 0, "from outputs": 0}, (attention_file.rotate, fused.compose_backward_from_output)

    def counted(name, function):
        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(attention_file, "rotate", counted("turned", own[0]))
    monkeypatch.setattr(fused, "compose_backward_from_output", counted("from outputs", own[1]))
    model, other = adapted(), adapted()
    wanted = expected(other)
    speed_up_model(model)
    speed_up_model(other)
    restore_model(model)
    counts.update(dict.fromkeys(counts, 0))
    same(step(other), wanted)
    assert counts == {"turned": 2, "from outputs": 3}


@needs_triton
def test_what_somebody_has_put_on_top_stays_and_goes_through(monkeypatch):
    model = adapted()
    places = Places(model)
    speed_up_model(model)
    ours = file_of(model).apply_rotary_pos_emb
    monkeypatch.setattr(file_of(model), "apply_rotary_pos_emb", lambda *args, **kwargs: ours(*args, **kwargs))
    theirs = file_of(model).apply_rotary_pos_emb
    restore_model(model)
    assert file_of(model).apply_rotary_pos_emb is theirs
    monkeypatch.setattr(attention_file, "rotate", lambda *_: pytest.fail("no model is on the fast path"))
    with_theirs = model(input_ids=IDS).logits
    monkeypatch.setattr(file_of(model), "apply_rotary_pos_emb", places.own[file_of(model)])
    assert with_theirs.equal(model(input_ids=IDS).logits)
