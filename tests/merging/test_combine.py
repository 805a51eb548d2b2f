"""Combinations of adapters are what the formula on the weights says, in float64."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import formula
from theodora import (
    AdapterConfig,
    ConfigError,
    combine_adapters,
    inject_adapter,
    load_adapter,
    merge_adapter,
    quantize_base,
    remove_adapter,
    save_adapter,
    set_adapter,
)
from theodora.adapters.state import adapter_layers, find_state
from theodora.merging import fit
from theodora.merging.ties_dare import dare_mask, drop_and_rescale, merge_by_sign, trim, weighted_sum
from tiny import FAMILIES, tiny_model

INPUT = {"gpt2": "wte", "gpt_neox": "embed_in"}
IDS = torch.arange(3, 27).view(2, 12)
WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.3}


def move(model, size=0.15):
    state = find_state(model)
    with torch.no_grad():
        for name in state.configs:
            for layer in adapter_layers(model, name).values():
                for parameter in layer.adapters[name].parameters():
                    parameter += size * torch.randn_like(parameter)
            for parameter in state.full[name].values():
                parameter += size * torch.randn_like(parameter)
    return model


def three(family="llama", methods=("dora", "lora", "dora"), dtype=torch.float32, tied=False, **config):
    """A model with adapters of other ranks, scales, patterns, targets, starts and methods."""
    model = tiny_model(family, dtype=dtype, tied=tied)
    a, b, c = methods
    inject_adapter(model, AdapterConfig(method=a, rank=3, alpha=5, **config), "a")
    inject_adapter(model, AdapterConfig(method=b, rank=2, rslora=True, init="pissa", **config), "b")
    names = (INPUT.get(family, "embed_tokens"), "c_attn" if family == "gpt2" else "down_proj")
    if family in ("gpt_neox", "phi"):
        names = (names[0], "dense_4h_to_h" if family == "gpt_neox" else "fc1")
    inject_adapter(model, AdapterConfig(method=c, rank=4, targets=names, rank_pattern={names[1]: 1}), "c")
    return move(model).eval()


def weight_by(layer, name):
    """W' of one adapter from the written-out formula, (O, I), float64."""
    w = layer.base_weight.dense().double()
    if name not in layer.adapters:
        return w
    adapter = layer.adapters[name]
    a, b = (t.detach().double() for t in adapter.factors())
    eye = torch.eye(w.shape[1], dtype=torch.float64)
    if adapter.magnitude is None:
        return formula.lora(eye, w, None, a, b, adapter.scale).T
    return formula.dora(eye, w, None, a, b, adapter.scale, adapter.magnitude.detach().double()).T


def changes(layer):
    w = layer.base_weight.dense().double()
    return {name: weight_by(layer, name) - w for name in WEIGHTS if name in layer.adapters}


def wanted(method, path, found, density=0.6, seed=0, given=WEIGHTS):
    """The combined change of one weight, by the formula."""
    names, weights = list(found), [given[name] for name in found]
    if "dare" in method:
        found = {n: d * dare_mask(d.shape, density, seed, f"{n}/{path}") / density for n, d in found.items()}
    if method == "ties":
        found = {n: trim(d, density) for n, d in found.items()}
    if not method.endswith("ties"):
        return sum(given[n] * found[n] for n in names)
    scaled = torch.stack([w * found[n] for n, w in zip(names, weights, strict=True)])
    sign = scaled.sum(0).sign()
    agree = (scaled.sign() == sign) & (scaled != 0)
    return (scaled * agree).sum(0) / agree.sum(0).clamp_min(1)


def check(model, method, bound=1e-6, names=WEIGHTS, **kwargs):
    report = combine_adapters(model, list(names), list(names.values()), "sum", method, **kwargs)
    for path, layer in adapter_layers(model, "sum").items():
        expected = wanted(method, path, {n: d for n, d in changes(layer).items() if n in names}, given=names)
        w = layer.base_weight.dense().double()
        assert formula.error(weight_by(layer, "sum"), w + expected) < bound, path
        assert report.errors[path] == pytest.approx(formula.error(weight_by(layer, "sum") - w, expected), abs=1e-7)
    touched = {path for path, layer in adapter_layers(model).items() if names.keys() & layer.adapters.keys()}
    assert touched == adapter_layers(model, "sum").keys()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert find_state(model).active == "sum"
    return report


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


METHODS = {
    "linear": {},
    "cat": {},
    "ties": {"density": 0.6},
    "dare_linear": {"density": 0.6},
    "dare_ties": {"density": 0.6},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("methods", [("dora", "lora", "dora"), ("lora", "lora", "lora"), ("dora", "dora", "dora")])
def test_the_sum_of_the_weights(method, methods):
    report = check(three(methods=methods), method, **METHODS[method])
    assert report.method == ("lora" if set(methods) == {"lora"} else "dora")
    assert report.worst < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_family_and_its_outputs(family, tied, tmp_path):
    model = three(family, tied=tied)
    check(model, "linear")
    expected = logits(model)
    save_adapter(model, tmp_path / "sum")
    loaded = load_adapter(tiny_model(family, tied=tied), tmp_path / "sum").eval()
    assert torch.equal(logits(loaded), expected)
    merge_adapter(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    remove_adapter(model)
    assert torch.equal(logits(model), logits(tiny_model(family, tied=tied)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    check(three(dtype=dtype), "linear", bound=1e-14 if dtype == torch.float64 else 1e-6)


def test_on_a_quantised_base():
    model = quantize_base(tiny_model("llama", hidden_size=32, intermediate_size=48))
    inject_adapter(model, AdapterConfig(rank=2), "a")
    inject_adapter(model, AdapterConfig(rank=2, method="lora"), "b")
    check(move(model), "linear", names={"a": 0.5, "b": 0.5})


def test_one_adapter_alone_and_the_others_weights():
    model = three()
    for weight in (1.0, 0.0, -1.0):
        for layer in [check(model, "linear", names={"a": 1.0}), adapter_layers(model, "sum")][1].values():
            torch.testing.assert_close(weight_by(layer, "sum"), weight_by(layer, "a"), rtol=1e-5, atol=1e-6)
        remove_adapter(model, "sum")
        combine_adapters(model, ["a", "b"], [weight, 0.0], "sum")
        for layer in adapter_layers(model, "sum").values():
            w = layer.base_weight.dense().double()
            expected = w + weight * (weight_by(layer, "a") - w)
            torch.testing.assert_close(weight_by(layer, "sum"), expected, rtol=1e-5, atol=1e-6)
        remove_adapter(model, "sum")


@pytest.mark.parametrize("methods", [("lora", "lora", "lora"), ("dora", "lora", "dora")])
def test_svd_is_the_best_of_its_rank_and_says_how_good(methods):
    model = three(methods=methods)
    errors = []
    for rank in (1, 4, 9):
        report = combine_adapters(model, list(WEIGHTS), list(WEIGHTS.values()), f"r{rank}", "svd", rank=rank)
        errors.append(report.errors)
        for path, layer in adapter_layers(model, f"r{rank}").items():
            adapter, w = layer.adapters[f"r{rank}"], layer.base_weight.dense().double()
            change = wanted("linear", path, changes(layer))
            assert adapter.rank <= rank
            found = formula.error(weight_by(layer, f"r{rank}") - w, change)
            assert report.errors[path] == pytest.approx(found, abs=1e-7)
            if set(methods) == {"lora"}:
                tail = torch.linalg.svdvals(change)[rank:].norm() / change.norm()
                assert found == pytest.approx(float(tail), abs=1e-6)
    assert all(errors[0][path] >= errors[1][path] - 1e-7 >= errors[2][path] - 2e-7 for path in errors[0])
    assert max(errors[2].values()) < 1e-6


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_sparse_rules_at_a_lower_rank(method):
    model = three()
    report = combine_adapters(model, list(WEIGHTS), list(WEIGHTS.values()), "low", method, rank=12, density=0.6)
    for path, layer in adapter_layers(model, "low").items():
        w = layer.base_weight.dense().double()
        found = formula.error(weight_by(layer, "low") - w, wanted(method, path, changes(layer)))
        assert report.errors[path] == pytest.approx(found, abs=1e-7)
        assert layer.adapters["low"].rank <= 12
        assert found < 0.7


def test_a_seed_gives_the_same_and_another_another():
    found, model = [], three()
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        combine_adapters(model, ["a", "c"], [1, 1], name, "dare_linear", density=0.3, seed=seed)
        found.append(logits(model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = Conv1D(10, 6)
        self.linear = nn.Linear(10, 7)
        self.tall = nn.Linear(7, 1)
        self.wide = nn.Linear(1, 5, bias=False)
        nn.init.normal_(self.conv.bias)
        with torch.no_grad():
            self.linear.weight[3] = 0
            self.wide.weight.zero_()

    def forward(self, ids):
        return self.wide(self.tall(torch.tanh(self.linear(torch.tanh(self.conv(self.embed(ids)))))))


ALL = ("embed", "conv", "linear", "tall", "wide")


@pytest.mark.parametrize("method", METHODS)
def test_odd_shapes_biases_and_rows_of_zeros(method):
    model = Net()
    for name, config in (("a", {}), ("b", {"method": "lora", "rank": 3}), ("c", {"rank": 5})):
        inject_adapter(model, AdapterConfig(**{"rank": 2, "targets": ALL} | config), name)
    move(model)
    check(model, method, bound=2e-6, **METHODS[method])
    found = model(torch.arange(11))
    assert bool(torch.isfinite(found).all())
    exact = copy.deepcopy(model)
    merge_adapter(exact)
    torch.testing.assert_close(exact(torch.arange(11)), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("c", [0.0, 1e-12, -1e-12, 2e-4, -3e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_whose_base_is_taken_away(c, dtype):
    """c = 1 + Σ wᵢ (gᵢ − 1) may be zero or negative."""
    model = nn.Sequential(nn.Linear(40, 6)).to(dtype)
    inject_adapter(model, AdapterConfig(rank=2, targets=("0",)), "a")
    inject_adapter(model, AdapterConfig(rank=2, targets=("0",)), "b")
    layer = move(model)[0]
    with torch.no_grad():
        for name in "ab":
            adapter = layer.adapters[name]
            for row, g in ((0, 0.5 + c / 2), (1, -1.0), (2, 0.0)):
                norm = (layer.weight.double() + adapter.scale * adapter.lora_B.double() @ adapter.lora_A.double()).norm(
                    dim=1
                )
                adapter.magnitude[row] = g * norm[row]
    report = combine_adapters(model, ["a", "b"], [1, 1], "sum")
    held = layer.adapters["sum"]
    w = layer.weight.double()
    exact = weight_by(layer, "a") + weight_by(layer, "b") - w
    for row in range(6):
        assert formula.error(weight_by(layer, "sum")[row], exact[row]) < 1e-6
    assert bool((held.lora_B.abs() < 6e4).all())
    assert report.worst < 1e-6
    x = torch.randn(16, 40, dtype=dtype)
    bound = 1e-5 if dtype == torch.float32 else 4e-3
    assert formula.error(layer(x), x.double() @ exact.T + layer.bias.double()) < bound


def test_a_sum_of_more_rank_than_the_weight_takes_the_weights():
    model = nn.Sequential(nn.Linear(9, 4))
    for name in WEIGHTS:
        inject_adapter(model, AdapterConfig(rank=4, targets=("0",)), name)
    report = check(move(model), "linear")
    assert report.ranks == {"0": 4}


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("tied", [False, True])
def test_modules_trained_in_full_take_part(method, tied, tmp_path):
    model = tiny_model(tied=tied)
    inject_adapter(model, AdapterConfig(rank=2, modules_to_save=("lm_head",)), "a")
    inject_adapter(model, AdapterConfig(rank=2, targets=("lm_head", "q_proj")), "b")
    inject_adapter(model, AdapterConfig(rank=2, modules_to_save=("lm_head", "model.norm")), "c")
    move(model)
    state = find_state(model)
    original = {path: p.double() for path, p in state.originals.items()}
    full = {n: {path: p.double() - original[path] for path, p in state.full[n].items()} for n in WEIGHTS}
    set_adapter(model, "b")
    full["b"]["lm_head.weight"] = changes(model.lm_head)["b"]
    report = combine_adapters(model, list(WEIGHTS), list(WEIGHTS.values()), "sum", method, **METHODS[method])
    for path, parameter in find_state(model).full["sum"].items():
        found = {n: full[n][path] for n in WEIGHTS if path in full[n]}
        exact = original[path] + wanted(method, path, found)
        assert formula.error(parameter, exact) < 1e-7
        assert report.errors[path] < 1e-6
    assert "lm_head" not in adapter_layers(model, "sum")
    expected = logits(model)
    save_adapter(model, tmp_path / "sum")
    assert torch.equal(logits(load_adapter(tiny_model(tied=tied), tmp_path / "sum").eval()), expected)


def test_errors_of_a_sum_of_nothing_are_measured_on_the_weight():
    model = inject_adapter(tiny_model(), AdapterConfig(rank=2, modules_to_save=("lm_head",)), "a")
    report = combine_adapters(move(model), ["a"], [0], "none")
    assert report.errors["lm_head.weight"] == 0
    assert torch.equal(find_state(model).full["none"]["lm_head.weight"], find_state(model).originals["lm_head.weight"])


def test_weights_in_float8_that_are_trained_in_full_have_no_sum():
    model = quantize_base(tiny_model())
    inject_adapter(model, AdapterConfig(rank=2, targets=("q_proj",), modules_to_save=("layers.1.mlp.down_proj",)), "a")
    with pytest.raises(ConfigError, match=r"quantised and cannot be combined:\s+- model\.layers\.1\.mlp\.down_proj"):
        combine_adapters(model, ["a"], [1], "x")


@pytest.mark.parametrize("dora", [False, True])
def test_a_weight_without_factors_is_held_at_rank_1(dora):
    w, c = torch.randn(5, 7), torch.full((5,), 1.5 if dora else 1.0, dtype=torch.float64)
    held = fit.hold(w, fit.Wanted(c, c.new_zeros(5, 0), c.new_zeros(0, 7)), dora=dora, rank=None, dtype=torch.float32)
    assert (held.a_RI.shape, held.b_OR.shape) == ((1, 7), (5, 1))
    assert held.error < 1e-7


def test_lora_sums_need_no_more_than_the_ranks_added_up():
    model = three(methods=("lora", "lora", "lora"))
    report = check(model, "linear")
    assert report.ranks["model.layers.0.self_attn.q_proj"] == 3 + 2 * 2  # a PiSSA start counts twice
    assert report.ranks["model.embed_tokens"] == 4
    assert "dora" not in str(report)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["a", "z"], [1, 1], "x"), ["no adapter 'z'"]),
        (([], [], "x"), ["no adapters are named"]),
        ((["a", "a"], [1, 1], "x"), ["named 2 times"]),
        ((["a"], [1, 2], "x"), ["2 weights for 1 adapters"]),
        ((["a"], [float("nan")], "x"), ["weight nan"]),
        ((["a"], ["1"], "x"), ["weight '1'"]),
        ((["a"], [1], "x", "slerp"), ["'slerp'", "dare_ties"]),
        ((["a"], [1], "x", "ties"), ["needs a density"]),
        ((["a"], [1], "a.b"), ["cannot name"]),
        ((["a"], [1], "b"), ["already carries"]),
    ],
)
def test_what_makes_no_sense_changes_nothing(arguments, words):
    model = three()
    with pytest.raises(ConfigError) as caught:
        combine_adapters(model, *arguments)
    assert all(word in str(caught.value) for word in words)
    assert list(find_state(model).configs) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rank": 3}, "choose method='svd'"),
        ({"density": 0.5}, "none at all with linear"),
        ({"method": "ties", "density": 0.0}, "density is 0.0"),
        ({"method": "ties", "density": 1.5}, "density is 1.5"),
        ({"method": "svd", "rank": 0}, "rank is 0"),
    ],
)
def test_options_that_make_no_sense(options, word):
    with pytest.raises(ConfigError, match=word.replace("(", r"\(")):
        combine_adapters(three(), ["a"], [1], "x", **options)


def test_while_merged():
    model = three()
    merge_adapter(model)
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        combine_adapters(model, ["a"], [1], "x")


def test_the_rules_alone():
    one, two = torch.tensor([3.0, -1.0, 0.0, 0.5]), torch.tensor([-1.0, -2.0, 4.0, 0.0])
    assert trim(one, 0.5).tolist() == [3.0, -1.0, 0.0, 0.0]
    assert trim(one, 1.0).tolist() == one.tolist()
    assert trim(one, 0.1).tolist() == [0.0] * 4
    assert weighted_sum([one, two], [1, 2]).tolist() == [1.0, -5.0, 8.0, 0.5]
    assert merge_by_sign([one, two], [1, 1]).tolist() == [3.0, -1.5, 4.0, 0.5]
    assert merge_by_sign([one, two], [1, -1]).tolist() == [2.0, 2.0, -4.0, 0.5]
    # A seed goes on giving what it gave, in other versions and on other devices.
    drawn = dare_mask((4, 6), 0.5, 0, "a/q").int().flatten().tolist()
    assert "".join(map(str, drawn)) == "011111111001111111011010"
    kept = drop_and_rescale(torch.ones(200, 200), 0.25, 0, "k")
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert float(kept.mean()) == pytest.approx(1, abs=0.03)
    assert drop_and_rescale(torch.empty(3, 2, device="meta"), 0.5, 0, "k").is_meta  # drawn on the CPU, used elsewhere


def test_large_weights_by_randomised_singular_vectors(monkeypatch):
    torch.manual_seed(0)
    spectrum = torch.linspace(0, -3, 60, dtype=torch.float64).exp()
    u, v = (torch.linalg.qr(torch.randn(n, 60, dtype=torch.float64))[0] for n in (90, 70))
    exact = fit.truncated(u * spectrum, v.T, 8)
    monkeypatch.setattr(fit, "_EXACT_SVD", 10)
    state = torch.get_rng_state()
    found = fit.truncated(u * spectrum, v.T, 8)
    assert torch.equal(torch.get_rng_state(), state)
    matrix = (u * spectrum) @ v.T
    best, near = (float((matrix - b @ a).norm()) for b, a in (exact, found))
    assert best == pytest.approx(float(spectrum[8:].norm()), rel=1e-9)
    assert best <= near <= best * 1.001
    # When the error settles is relative: a weight of another size takes as many passes.
    for size in (2.0**-20, 2.0**20):
        b, a = fit.truncated(u * spectrum * size, v.T, 8)
        torch.testing.assert_close(b @ a / size, found[0] @ found[1], rtol=0, atol=1e-12)


def test_a_combination_saved_for_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = three()
    combine_adapters(model, list(WEIGHTS), list(WEIGHTS.values()), "sum")
    save_adapter(model, tmp_path / "sum")
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "sum").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-4)
