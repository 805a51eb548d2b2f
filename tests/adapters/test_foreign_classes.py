"""Other libraries change the class of our layers in place, as we do: adapters go on working, or it is said why not."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

import theodora
from theodora import (
    AdapterConfig,
    ConfigError,
    accelerate,
    inject_adapter,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
    unmerge_adapter,
)
from tiny import tiny_model

PATH = "model.layers.1.mlp.down_proj"
IDS = torch.arange(3, 11).view(2, 4)


def adapted(**options):
    model = inject_adapter(tiny_model("llama"), AdapterConfig(rank=2, **options)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def reclass(module):
    """As `fully_shard` does it."""
    module.__class__ = type("Foreign" + type(module).__name__, (type("Foreign", (), {}), type(module)), {})


WAYS = {"a class of its own": reclass, "weight_norm": weight_norm}


def logits(model):
    return model(IDS).logits


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=WAYS)
def topped(request):
    """A model with a foreign class on top of one adapted layer, and its logits before that."""
    model = adapted()
    before = logits(model)
    WAYS[request.param](model.get_submodule(PATH))
    return model, before


def test_it_runs_and_trains(topped):
    model, before = topped
    close(logits(model), before)
    with torch.no_grad():
        close(logits(model), before)
    logits(model).sum().backward()
    assert model.get_submodule(PATH).active.lora_A.grad.any()
    close(logits(copy.deepcopy(model)), before)


def test_it_is_saved(topped, tmp_path):
    model, before = topped
    save_adapter(model, tmp_path / "adapter")
    close(logits(load_adapter(tiny_model("llama"), tmp_path / "adapter")), before)


def test_it_takes_other_adapters_and_switches(topped):
    model, before = topped
    inject_adapter(model, AdapterConfig(rank=2), "second")
    close(logits(model), logits(tiny_model("llama")))
    remove_adapter(model, "second")
    theodora.set_adapter(model, "default")
    close(logits(model), before)


def test_merging_under_a_class_on_top():
    model = adapted()
    before = logits(model)
    reclass(model.get_submodule(PATH))
    close(logits(merge_adapter(model)), before)
    refuses(model, lambda: remove_adapter(model), PATH)
    close(logits(unmerge_adapter(model)), before)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("first", [True, False])
def test_a_weight_made_in_each_pass_cannot_be_merged_into(first, method):
    model = tiny_model("llama")
    if first:
        weight_norm(model.get_submodule(PATH))
    model = inject_adapter(model, AdapterConfig(rank=2, method=method))
    if not first:
        weight_norm(model.get_submodule(PATH))
    keys, before = model.state_dict().keys(), logits(model)
    with pytest.raises(ConfigError, match=rf"{PATH}: its weight is made in each pass"):
        merge_adapter(model)
    assert model.state_dict().keys() == keys
    assert torch.equal(logits(model), before)


def classes(model):
    return {path: type(module) for path, module in model.named_modules()}


def refuses(model, act, named):
    """Whether `act` raises, and all is as it was."""
    before, expected, asked = classes(model), logits(model), {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ConfigError, match=rf"another library(?s:.*){named}"):
        act()
    assert classes(model) == before
    assert torch.equal(logits(model), expected)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == asked


def test_it_is_not_taken_off(topped):
    model, _ = topped
    refuses(model, lambda: remove_adapter(model), PATH)


def test_it_is_taken_off_once_the_other_class_is_gone():
    model = adapted()
    module = model.get_submodule(PATH)
    weight_norm(module)
    remove_parametrizations(module, "weight")
    remove_adapter(model)
    assert classes(model) == classes(tiny_model("llama"))
    close(logits(model), logits(tiny_model("llama")))


def test_what_stands_below_is_the_module_s_own():
    model = tiny_model("llama")
    weight_norm(model.get_submodule(PATH))
    before, expected = classes(model), logits(model)
    remove_adapter(inject_adapter(model, AdapterConfig(rank=2)))
    assert classes(model) == before
    assert torch.equal(logits(model), expected)


def test_rows_of_tokens_are_not_taken_off():
    model = adapted(targets=("q_proj",), trainable_token_indices=(3, 5))
    reclass(model.model.embed_tokens)
    refuses(model, lambda: remove_adapter(model), "model.embed_tokens: ForeignTokenRowsEmbedding")


@pytest.mark.parametrize("part", ["mlp", "input_layernorm"])
def test_the_fast_path_is_not_left(part, tmp_path):
    model = accelerate(adapted())
    save_adapter(model, tmp_path / "adapter")
    path = f"model.layers.1.{part}"
    reclass(model.get_submodule(path))
    for act in (
        lambda: accelerate(model),
        lambda: remove_adapter(model),
        lambda: inject_adapter(model, AdapterConfig(rank=2), "second"),
        lambda: load_adapter(model, tmp_path / "adapter", "second"),
    ):
        refuses(model, act, f"{path}: ForeignF")


def test_pefts_layers_stay_fast():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    theodora.accelerate_peft(model)
    path = "base_model.model.model.layers.1.input_layernorm"
    reclass(model.get_submodule(path))
    refuses(model, lambda: theodora.restore_peft(model), path)
    refuses(model, lambda: theodora.accelerate_peft(model), path)


@pytest.fixture
def mesh():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shard(model, mesh):
    for layer in model.model.layers:
        fully_shard(layer.mlp.down_proj, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # a layer's output is a view: no in-place adds
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_fully_sharded_models(method, mesh):
    model = adapted(method=method)
    before = logits(model)
    shard(model, mesh)
    close(logits(model), before)
    logits(model).sum().backward()
    refuses(model, lambda: remove_adapter(model), f"{PATH}: FSDPAdaptedLinear")
    with pytest.raises(ConfigError, match="the adapter itself is sharded"):
        merge_adapter(model)
    close(logits(model), before)


def test_a_sharded_model_takes_no_adapter(mesh):
    model = tiny_model("llama")
    shard(model, mesh)
    with pytest.raises(ConfigError, match="DTensor"):
        inject_adapter(model, AdapterConfig(rank=2))
