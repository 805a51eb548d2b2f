"""Parts of the plug-in that need no engine: tensor parallelism's cuts, refusals, versions."""

from types import SimpleNamespace

import pytest
import torch

from theodora import vllm_plugin
from theodora.functional import dora_norm, dora_scale
from theodora.vllm_plugin import layers, loading

RANKS, SLOTS, RANK = 2, 2, 3


def _dora_class(name):
    import vllm.lora.layers as theirs

    return next(
        cls
        for cls in layers.with_dora(tuple(vars(theirs)[n] for n in theirs.__all__ if n.endswith("WithLoRA")))
        if cls.__name__ == name
    )


def _layer(name, rank, weight, a, b, slices, **attributes):
    """One rank's layer, put together without an engine: its part of W, and A and B in slot 0."""
    module = _dora_class(name).__new__(_dora_class(name))
    torch.nn.Module.__init__(module)
    base = torch.nn.Module()
    base.weight = torch.nn.Parameter(weight)
    for key, value in attributes.pop("base", {}).items():
        setattr(base, key, value)
    module.base_layer = base
    module.tp_size, module.tp_rank = RANKS, rank
    module.output_slices, module.n_slices = tuple(slices), len(slices)
    module.lora_a_stacked = tuple(torch.stack([t, torch.zeros_like(t)])[:, None] for t in a)
    module.lora_b_stacked = tuple(torch.stack([t, torch.zeros_like(t)])[:, None] for t in b)
    module.dora_scales = torch.ones(SLOTS + 1, sum(slices))
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


def _problem(out, inside, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w, a, b = (torch.randn(shape, generator=generator) for shape in ((out, inside), (RANK, inside), (out, RANK)))
    m = torch.rand(out, generator=generator) + 0.5
    return w, a, b, m, dora_scale(m, dora_norm(w, a, b, 1.0))


def test_a_column_parallel_layer_has_g_of_its_own_rows():
    w, a, b, m, g = _problem(12, 8)
    for rank in range(RANKS):
        rows = slice(6 * rank, 6 * (rank + 1))
        layer = _layer(
            "ColumnParallelLinearWithDora",
            rank,
            w[rows],
            [a],
            [b[rows]],
            [6],
            is_merged_col_linear=False,
            output_size=6,
        )
        layer.set_scales(0, layer.compute_scales(0, m, 7))
        torch.testing.assert_close(layer.dora_scales[0], g[rows])
        assert bool((layer.dora_scales[1:] == 1).all())


def test_a_fused_gate_up_is_cut_in_both_halves():
    """Phi-3's gate_up_proj: one adapter, and each rank has a piece of the gate and a piece of the up."""
    w, a, b, m, g = _problem(16, 8)
    for rank in range(RANKS):
        rows = torch.cat([torch.arange(4) + 4 * rank, torch.arange(4) + 8 + 4 * rank])
        layer = _layer(
            "ColumnParallelLinearWithDora", rank, w[rows], [a], [b[rows]], [8], is_merged_col_linear=True, output_size=8
        )
        layer.set_scales(0, layer.compute_scales(0, m, 7))
        torch.testing.assert_close(layer.dora_scales[0], g[rows])


def test_packed_qkv_with_fewer_kv_heads_than_ranks():
    """Two ranks share the one key and value head; k is not adapted."""
    q, v = _problem(8, 8, 1), _problem(4, 8, 2)
    k_w = torch.randn(4, 8)
    for rank in range(RANKS):
        rows = slice(4 * rank, 4 * (rank + 1))
        weight = torch.cat([q[0][rows], k_w, v[0]])
        none = torch.zeros(RANK, 8), torch.zeros(4, RANK)
        layer = _layer(
            "MergedQKVParallelLinearWithDora",
            rank,
            weight,
            [q[1], none[0], v[1]],
            [q[2][rows], none[1], v[2]],
            [4, 4, 4],
            output_ids=(rank, 0, 0),
        )
        layer.set_scales(0, layer.compute_scales(0, [q[3], None, v[3]], 7))
        expected = torch.cat([q[4][rows], torch.ones(4), v[4]])
        torch.testing.assert_close(layer.dora_scales[0], expected)


def test_a_row_parallel_layer_sums_the_norm_over_the_ranks(monkeypatch):
    import vllm.distributed
    from vllm.model_executor.layers import linear

    w, a, b, m, g = _problem(6, 12)
    halves = [slice(0, 6), slice(6, 12)]
    total = sum(dora_norm(w[:, part], a[:, part], b, 1.0).square() for part in halves)
    others = 7
    seen = []

    def reduce(sent):
        seen.append(sent[:-2])
        return torch.cat([total, sent[-2:] + torch.tensor([others, others**2])])

    monkeypatch.setattr(vllm.distributed, "tensor_model_parallel_all_reduce", reduce)
    monkeypatch.setattr(linear, "RowParallelLinear", torch.nn.Module)  # what the stand-in for the base layer is
    for rank, part in enumerate(halves):
        layer = _layer("RowParallelLinearWithDora", rank, w[:, part], [a[:, part]], [b], [6])
        layer.set_scales(0, layer.compute_scales(0, m, 7))
        torch.testing.assert_close(layer.dora_scales[0], g, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sum(seen), total)
    others = 6  # the other rank is at another adapter: vLLM goes through a set, whose order is each process's own
    with pytest.raises(RuntimeError, match="another rank"):
        layer.compute_scales(0, m, 7)


def test_a_packed_weights_norm_is_the_same_also_where_terms_cancel():
    w, a, b, _, _ = _problem(10, 8)
    b[3] = torch.linalg.lstsq(a.T.double(), -w[3].double()).solution.float()
    w[3] = -(b[3] @ a) * (1 + 1e-6)  # the update all but erases the row
    layer = _layer("ColumnParallelLinearWithDora", 0, w, [a], [b], [10])
    layers.note_row_norms(layer.base_layer)
    expected = dora_norm(w.double(), a.double(), b.double(), 1.0).float()
    apply = lambda base, x, bias: x @ w.T  # noqa: E731
    layer.base_layer.quant_method = SimpleNamespace(apply=apply)
    layer.base_layer.weight = torch.nn.Parameter(torch.empty(0))
    norm = layer.adapted_norm(slice(0, 10), 0, 0, 7)
    torch.testing.assert_close(norm, expected, rtol=1e-4, atol=1e-7)


def test_a_quantised_base_and_odd_layers_are_refused():
    w, a, b, _, _ = _problem(4, 8)
    layer = _layer("ColumnParallelLinearWithDora", 0, w, [a], [b], [4], dora_plain=True, dora_unproved=None)

    class Fp8LinearMethod:
        pass

    layer.base_layer.quant_method = Fp8LinearMethod()
    assert "quantised (Fp8LinearMethod)" in layer.unfit()
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    layer.base_layer.quant_method = UnquantizedLinearMethod.__new__(UnquantizedLinearMethod)
    assert layer.unfit() is None
    layer.dora_plain = False
    assert "in its own way" in layer.unfit()
    layer.dora_plain, layer.dora_unproved = True, "it is off by 0.5"
    assert "could not prove that it serves DoRA right in this vLLM: it is off by 0.5" in layer.unfit()


def test_fully_sharded_lora_and_experts_are_refused():
    lora = SimpleNamespace(theodora_magnitudes={"model.layers.0.mlp.experts.3.up_proj": torch.ones(4)})
    manager = SimpleNamespace(
        packed_modules={"model.layers.0.mlp.experts": ["model.layers.0.mlp.experts.3.up_proj"]},
        modules={"model.layers.0.mlp.experts": torch.nn.Module()},
    )
    with pytest.raises(ValueError, match=r"(?s)--fully-sharded-loras.*experts.*merge the adapter"):
        loading.check(lora, manager, SimpleNamespace(fully_sharded_loras=True), "a")


def test_the_entry_point_is_the_one_vllm_reads():
    from importlib.metadata import entry_points

    found = [e for e in entry_points(group="vllm.general_plugins") if e.name == "theodora"]
    assert found
    assert found[0].load() is vllm_plugin.register
