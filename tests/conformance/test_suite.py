"""The suite itself: ours holds, in a fast selection of everything; bugs that people have shipped are seen."""

import json

import pytest
import torch
from torch.nn import functional as F

from theodora import functional, kernels
from theodora.cli.main import main
from theodora.conformance import suite, table
from theodora.conformance.cases import DTYPES, KINDS, VARIANTS
from theodora.conformance.operations import OPERATIONS
from theodora.conformance.quantised import LIBRARIES as QUANTISED
from theodora.layers.base import AdapterLayer
from theodora.layers.linear import LinearAdapterLayer

SLOW = {"compile", "compile-inductor", "swap-compiled"}
QUICK = [key for key in OPERATIONS if key not in SLOW]


def ours(operation, variants=("lora", "dora"), dtypes=("fp32", "bf16"), kinds=()):
    jobs = suite.plan(operations=[operation], variants=variants, dtypes=dtypes, kinds=kinds, libraries=["theodora"])
    return [row for job in jobs for row in suite.run_job(job)]


def broken(rows):
    return [
        f"{r.operation} {r.variant} {r.kind} {r.dtype}: {r.what or r.message} {r.error} > {r.bound}"
        for r in rows
        if r.status != "held"
    ]


NOT_JUDGED = {
    "dropout-cost": {"embed_tokens", "experts"},  # a lookup is no product, and experts have one each
    "import-mlx": {"embed_tokens", "experts"},  # MLX gives DoRA's embeddings other magnitudes
    "mixed-batch": {"experts"},  # not served
}


@pytest.mark.parametrize("operation", QUICK)
def test_ours_holds_in_every_dtype_on_every_layer(operation):
    rows = ours(operation, dtypes=[dtype for dtype in DTYPES if dtype not in QUANTISED])
    judged = {row.kind for row in rows if (row.variant, row.dtype) == ("dora", "bf16")}
    assert judged == set(KINDS) - NOT_JUDGED.get(operation, set())
    assert not broken(rows)


@pytest.mark.parametrize("operation", QUICK)
def test_ours_holds_on_layers_of_libraries(operation):
    assert not broken(ours(operation, ["dora"], list(QUANTISED), ["linear", "biased", "zero_rows", "odd"]))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ("lora", "dora")])
def test_ours_holds_with_every_adapter(variant):
    rows = [row for key in ("inject", "backward", "merge", "save-load") for row in ours(key, [variant], ["fp16"])]
    assert not broken(rows)


@pytest.mark.parametrize("operation", ["compile", "swap-compiled"])
def test_ours_holds_compiled(operation):
    assert not broken(ours(operation, ["dora"], ["bf16"], ["linear", "conv1d", "embed_tokens"]))


# Bugs -----------------------------------------------------------------------------------------------------------------


def drop_magnitude(monkeypatch):
    """DoRA served as LoRA."""
    parts = LinearAdapterLayer.parts
    monkeypatch.setattr(
        LinearAdapterLayer,
        "parts",
        lambda self, one_token=False: suite.replace(parts(self, one_token), magnitude_O=None, norm_O=None),
    )


def drop_magnitude_on_merging(monkeypatch):
    def merged(self, name):
        a, b = self.adapters[name].factors()
        return functional.merged_weight(self.base_weight.dense(), a, b, self.adapters[name].scale).detach()

    monkeypatch.setattr(AdapterLayer, "merged_weight", merged)


def scale_the_bias(monkeypatch):
    """As torchtune's DoRA layer does."""

    def linears(x, layers, x_lora=None, stack=None):
        outputs = []
        for part in layers:
            if part.a_RI is None:
                outputs.append(F.linear(x, part.weight.dense(), part.bias_O))
                continue
            z = functional.lora_linear(x, part.weight.dense(), part.bias_O, part.a_RI, part.b_OR, part.scale)
            if part.magnitude_O is not None:
                z = (z * functional.dora_scale(part.magnitude_O, part.norm_O)).to(x.dtype)
            outputs.append(z)
        return outputs

    monkeypatch.setattr(kernels, "adapted_linears", linears)


def keep_a_stale_norm(monkeypatch):
    """The norm of the first pass for ever."""
    norm = AdapterLayer.norm
    kept = {}

    def stale(self, adapter, one_token=False):
        return kept.setdefault(id(adapter), norm(self, adapter, one_token))

    monkeypatch.setattr(AdapterLayer, "norm", stale)


def norm_of_the_base(monkeypatch):
    """‖W‖ instead of ‖W + s·B·A‖."""
    monkeypatch.setattr(
        AdapterLayer, "new_norm", lambda self, a, b, scale: self.base_weight.dense().float().norm(dim=1)
    )


def norm_over_columns(monkeypatch):
    """The paper's "column-wise", of the wrong layout."""

    def norm(self, a, b, scale):
        wrong = (self.base_weight.dense().float() + scale * b @ a).norm(dim=0)
        rows = self.current_weight.shape[0]
        return torch.cat([wrong, wrong, wrong, wrong, wrong])[:rows].detach()

    monkeypatch.setattr(AdapterLayer, "new_norm", norm)


def transpose_merged(monkeypatch):
    """A square weight merged the wrong way round shows no shape error; here rows are rolled instead."""
    merged = AdapterLayer.merged_weight
    monkeypatch.setattr(AdapterLayer, "merged_weight", lambda self, name: merged(self, name).roll(1, 0))


def ignore_rslora(monkeypatch):
    from theodora.config import AdapterConfig

    monkeypatch.setattr(AdapterConfig, "scale", lambda self, rank, alpha: alpha / rank)


def norm_in_bfloat16(monkeypatch):
    """g in bfloat16, whose steps are as large as what training changes."""
    norm = AdapterLayer.new_norm
    monkeypatch.setattr(AdapterLayer, "new_norm", lambda self, a, b, scale: norm(self, a, b, scale).bfloat16().float())


def merge_leaves_rounding(monkeypatch):
    """Unmerging by subtraction, as everybody does."""

    def unmerge(self):
        if self.merged_adapter is not None:
            base = self.base_parameter
            update = self.weight.detach() - base.detach()
            base.data = (self.weight.detach() * 1.001 - update).to(base.dtype)
            self.weight = base
        self.norm_cache.invalidate()
        self._set_aside = self.merged_adapter = None

    monkeypatch.setattr(AdapterLayer, "unmerge", unmerge)


def swap_forgets_magnitudes(monkeypatch):
    from theodora.adapters import swap_weights

    write = swap_weights._write

    def without(layer, name, tensors, own_scale, writes):
        problem = write(layer, name, tensors, own_scale, writes)
        magnitude = layer.adapters[name].magnitude
        writes[:] = [(mine, theirs) for mine, theirs in writes if mine is not magnitude]
        return problem

    monkeypatch.setattr(swap_weights, "_write", without)


BUGS = {
    drop_magnitude: ("forward", "dora", "bf16"),
    drop_magnitude_on_merging: ("merge", "dora", "bf16"),
    scale_the_bias: ("forward", "dora", "bf16"),
    keep_a_stale_norm: ("changed", "dora", "bf16"),
    norm_of_the_base: ("forward", "dora", "bf16"),
    norm_over_columns: ("forward", "dora", "bf16"),
    transpose_merged: ("merge", "lora", "bf16"),
    ignore_rslora: ("forward", "lora-rslora", "bf16"),
    norm_in_bfloat16: ("forward", "dora", "fp32"),
    merge_leaves_rounding: ("unmerge", "lora", "bf16"),
    swap_forgets_magnitudes: ("swap", "dora", "bf16"),
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_makes_rows_fail(bug, monkeypatch):
    operation, variant, dtype = BUGS[bug]
    kinds = ["linear", "biased", "conv1d"]
    assert not broken(ours(operation, [variant], [dtype], kinds))
    bug(monkeypatch)
    rows = ours(operation, [variant], [dtype], kinds)
    # Merging checks itself, too, and raises.
    seen = {row.kind for row in rows if row.status == "failed" or "do not do what base and adapter do" in row.message}
    assert seen >= ({"biased"} if bug is scale_the_bias else set(kinds))


@pytest.mark.parametrize("share", [0.02])
@pytest.mark.parametrize("operation", ["forward", "merge"])
def test_bounds_are_so_near_that_magnitudes_two_percent_off_are_seen_in_bfloat16(operation, share, monkeypatch):
    scale = functional.dora_scale
    off = lambda m, norm: scale(m, norm) * (1 + share)  # noqa: E731
    monkeypatch.setattr("theodora.kernels.fused.dora_scale", off)
    monkeypatch.setattr(functional, "dora_scale", off)
    rows = ours(operation, ["dora"], ["bf16"], ["linear", "biased", "conv1d", "tied_head"])
    assert all(row.status == "failed" for row in rows)


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_prints_tables_and_writes_every_row(tmp_path, capsys):
    file = tmp_path / "rows.json"
    words = ["merge", "unmerge", "dora", "bf16", "linear", "embed_tokens", "theodora"]
    assert main(["conformance", "--only", *words, "--json", str(file), "--workers", "1", "--full"]) == 0
    shown = capsys.readouterr().out
    assert "All 4 rows of Theodora's hold" in shown
    rows = json.loads(file.read_text())["rows"]
    assert {(row["operation"], row["kind"]) for row in rows} == {
        (o, k) for o in ("merge", "unmerge") for k in ("linear", "embed_tokens")
    }
    assert all(row["status"] == "held" for row in rows)


def test_the_command_fails_with_a_row_of_ours(monkeypatch, capsys):
    drop_magnitude(monkeypatch)
    assert main(["conformance", "--only", "forward", "dora", "linear", "bf16", "theodora", "--workers", "1"]) == 1
    assert "do not hold" in capsys.readouterr().out


def test_a_mistyped_name_is_named(capsys):
    assert main(["conformance", "--only", "merg"]) == 2
    assert "merge" in capsys.readouterr().err


def test_the_names_are_listed(capsys):
    assert main(["conformance", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for names in (OPERATIONS, VARIANTS, KINDS, DTYPES) for name in names)


def test_without_peft_its_column_is_empty(monkeypatch):
    monkeypatch.setattr(suite, "find_spec", lambda name: None)
    assert {job.library for job in suite.plan(operations=["forward"])} == {"theodora"}


def test_a_library_that_raises_or_refuses_is_a_row_of_each_kind(monkeypatch):
    class Odd:
        def __init__(self, model, variant, kinds):
            if "odd" in kinds:
                raise KeyError("lora_magnitude_vector")
            raise ValueError("not supported")

    monkeypatch.setattr(suite, "_library", lambda name: Odd)
    rows = suite.run_job(suite.Job("peft", "forward", "dora", "bf16", ("linear", "odd"), "cpu"))
    assert [(row.kind, row.status) for row in rows] == [("linear", "refused"), ("odd", "raised")]
    assert "lora_magnitude_vector" in rows[1].message
    assert table.tally(rows).refused == 1
