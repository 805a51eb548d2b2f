"""What each of several processes does in the tests of sharding (`test_sharding.py`); no test itself.

All jobs run one after the other in the same processes, which are started once. What a job returns, or raises, in each
process is the test's to look at.
"""

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import theodora
from theodora import AdapterConfig, inject_adapter
from theodora.conformance import suite
from theodora.conformance.cases import KINDS
from theodora.conformance.trial import Trial
from theodora.errors import ConfigError
from theodora.kernels.base_weight import PlainWeight
from theodora.kernels.sharded_weight import GatheredWeight, ShardedWeight, whole
from theodora.layers import base, norm_cache
from theodora.train import sharding
from tiny import tiny_model

IDS = torch.randint(3, 200, (4, 12), generator=torch.Generator().manual_seed(0))
JOBS: dict[str, Callable[[Any, Path], Any]] = {}


def job(function):
    JOBS[function.__name__] = function
    return function


def run(index: int, count: int, on_a_machine: int, folder: Path, names: list[str]) -> None:
    """Do the jobs, and leave what they found in a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(index), "WORLD_SIZE": str(count)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=index, world_size=count)
    processes = SimpleNamespace(count=count, index=index, count_here=on_a_machine)
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = JOBS[name](processes, folder)
        except Exception:
            found[name] = traceback.format_exc()
        torch.save(found, folder / f"found{index}.pt")
    dist.barrier()
    dist.destroy_process_group()


def adapted(family="llama", **config):
    """A model in training mode whose adapter has moved away from its start; equal for equal arguments."""
    torch.manual_seed(0)
    model = inject_adapter(tiny_model(family, tied=config.pop("tied", False)), AdapterConfig(rank=2, **config)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def steps(model, ids, average=lambda parameters: 0, accumulation=1, of=None):
    """Three steps; the losses of the parts and what the adapter is afterwards."""
    parameters = trained(of or model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(3):
        for part in ids.chunk(accumulation):
            loss = model(input_ids=part, labels=part).loss / accumulation
            loss.backward()
            losses.append(loss.item() * accumulation)
        average(parameters)
        optimizer.step()
        optimizer.zero_grad()
    return losses, [parameter.detach().clone() for parameter in parameters]


def sharded_steps(processes, model, **options):
    sharding.shard_model(model, options.pop("how", "fsdp2"), processes, **options)
    here = IDS.chunk(processes.count)[processes.index]
    return steps(model, here, lambda parameters: sharding.average_gradients(parameters, processes))


def alone(processes, **config):
    return steps(adapted(**config), IDS, accumulation=processes.count)


def largest(found, expected):
    """The largest difference of two lists of tensors."""
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


@job
def trains_as_one_process(processes, folder):
    return sharded_steps(processes, adapted()), alone(processes)


@job
def gathers(processes, folder):
    """Bytes that a forward and backward pass sends: as told beforehand, and as FSDP2 asks torch for."""
    model, sent = adapted(), 0
    sharding.shard_model(model, "fsdp2", processes)
    told = sharding.bytes_gathered(model)

    def counting(gather):
        def counted(output, given, *args, **kwargs):
            nonlocal sent
            sent += (processes.count - 1) * given.numel() * given.element_size()
            return gather(output, given, *args, **kwargs)

        return counted

    names = [name for name in ("all_gather_into_tensor", "all_gather_single") if hasattr(dist, name)]
    before = {name: getattr(dist, name) for name in names}
    for name, gather in before.items():
        setattr(dist, name, counting(gather))
    try:
        model(input_ids=IDS, labels=IDS).loss.backward()
    finally:
        for name, gather in before.items():
            setattr(dist, name, gather)
    return told, sent


@job
def trains_as_ddp(processes, folder):
    model = adapted()
    wrapped = DistributedDataParallel(model)
    here = IDS.chunk(processes.count)[processes.index]
    return steps(wrapped, here, of=model), sharded_steps(processes, adapted())


@job
def trains_offloaded_and_checkpointed(processes, folder):
    model = adapted("gpt2")  # its weights are (I, O): norms are sums over processes
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": theodora.checkpoint_contexts})
    found = sharded_steps(processes, model, cpu_offload=True)
    return found, alone(processes, family="gpt2")


@job
def trains_hybrid(processes, folder):
    return sharded_steps(processes, adapted(), how="hsdp"), alone(processes)


@job
def counts(processes, folder):
    """How often the norm of a weight is computed, and values are looked at, in three steps, train() before each."""
    found = {"norms": 0, "looks": 0}
    content, norms = norm_cache.content, GatheredWeight.norm_squared

    def counted_content(*tensors):
        found["looks"] += 1
        return content(*tensors)

    def counted_norms(self):
        found["norms"] += 1
        return norms(self)

    model = adapted()
    sharding.shard_model(model, "fsdp2", processes)
    norm_cache.content, GatheredWeight.norm_squared = counted_content, counted_norms
    try:
        model(input_ids=IDS, labels=IDS).loss.backward()
        first = dict(found)
        for _ in range(3):
            model(input_ids=IDS, labels=IDS).loss.backward()
    finally:
        norm_cache.content, GatheredWeight.norm_squared = content, norms
    layers = sum(isinstance(module, base.AdapterLayer) for module in model.modules())
    return {"layers": layers, "first": first, "then": found}


@job
def notices_a_change(processes, folder):
    model = adapted()
    sharding.shard_model(model, "fsdp2", processes)
    model(input_ids=IDS)
    changed = adapted()
    with torch.no_grad():
        for each in (model, changed):
            each.get_submodule("model.layers.0.mlp.down_proj").weight.mul_(1.5)
    return largest([model(input_ids=IDS).logits], [changed(input_ids=IDS).logits])


@job
def norms(processes, folder):
    """‖W‖² and ‖W + s·B·A‖ of weights that are cut by rows or columns, evenly or not, or not at all here."""
    mesh = init_device_mesh("cpu", (processes.count,))
    torch.manual_seed(3)
    found = []
    for outputs, inputs, dim, transposed in [(7, 6, 0, False), (6, 8, 1, False), (5, 8, 0, True), (1, 4, 0, False)]:
        w = torch.randn(outputs, inputs, dtype=torch.float64)
        a, b = torch.randn(2, inputs, dtype=torch.float64), torch.randn(outputs, 2, dtype=torch.float64)
        held = w.T.contiguous() if transposed else w
        weight = ShardedWeight(distribute_tensor(held, mesh, [Shard(dim)]), transposed)
        norm_sq = weight.norm_squared()
        plain = PlainWeight(w)
        expected = plain.dora_norm(a, b, 0.5, plain.norm_squared())
        found += [
            largest([norm_sq], [plain.norm_squared()]),
            largest([weight.dora_norm(a, b, 0.5, norm_sq)], [expected]),
        ]
        found += [largest([weight.dense()], [w]), largest([weight.rows(torch.tensor([0]))], [w[:1]])]
    return found


@job
def begins_alike(processes, folder):
    """Adapters that processes drew by numbers of their own are the first one's."""
    torch.manual_seed(processes.index)
    model = inject_adapter(tiny_model("llama"), AdapterConfig(rank=2))
    sharding.shard_model(model, "fsdp2", processes)
    return trained(model)[0].detach().clone()


@job
def is_told_apart(processes, folder):
    """What a layer's weight is before, between and during passes."""
    model = adapted()
    sharding.shard_model(model, "fsdp2", processes)
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    seen = [type(layer.current_weight).__name__]
    layer.register_forward_hook(lambda *_: seen.append(type(layer.current_weight).__name__))
    model(input_ids=IDS)
    bytes_here = sum(p.to_local().numel() for p in model.parameters() if hasattr(p, "to_local"))
    return seen, type(layer.current_weight).__name__, bytes_here, sum(p.numel() for p in adapted().parameters())


@job
def lives_on(processes, folder):
    """Evaluating, switching, saving by one process alone, merging and unmerging, as without sharding."""
    model, plain = adapted(), adapted()
    inject_adapter(model, AdapterConfig(rank=2), "second")
    inject_adapter(plain, AdapterConfig(rank=2), "second")
    for each in (model, plain):
        theodora.set_adapter(each, "default")
    sharding.shard_model(model, "fsdp2", processes)
    found = {}

    def compare(what):
        with torch.no_grad():
            found[what] = largest([model(input_ids=IDS).logits], [plain(input_ids=IDS).logits])

    model.eval(), plain.eval()
    compare("eval")
    for each in (model, plain):
        theodora.set_adapter(each, "second")
    compare("switched")
    for each in (model, plain):
        theodora.set_adapter(each, "default")
    with theodora.adapter_disabled(model), theodora.adapter_disabled(plain):
        compare("disabled")
    if processes.index == 0:
        theodora.save_adapter(model, folder / "sharded")
        theodora.save_adapter(plain, folder / "plain")
    dist.barrier()
    before = [p.to_local().clone() for p in model.parameters() if hasattr(p, "to_local")]
    for each in (model, plain):
        theodora.merge_adapter(each)
    compare("merged")
    layer = "model.layers.1.mlp.down_proj"
    found["merged weight"] = largest(
        [model.get_submodule(layer).current_weight.dense()], [plain.get_submodule(layer).weight]
    )
    found["base beside it"] = largest(
        [model.get_submodule(layer).base_weight.dense()], [plain.get_submodule(layer).base_weight.dense()]
    )
    for each in (model, plain):
        theodora.unmerge_adapter(each)
    compare("unmerged")
    after = [p.to_local() for p in model.parameters() if hasattr(p, "to_local")]
    found["unmerged weights"] = largest(after, before)
    return found


def refusal(call):
    try:
        call()
    except ConfigError as error:
        return str(error)
    return None


@job
def refuses(processes, folder):
    model = adapted()
    sharding.shard_model(model, "fsdp2", processes)
    tied = adapted(tied=True, targets=["embed_tokens", "lm_head"])
    sharding.shard_model(tied, "fsdp2", processes)
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    return {
        "remove": refusal(lambda: theodora.remove_adapter(tied_layer(processes))),
        "inject": refusal(lambda: inject_adapter(sharded_base(processes), AdapterConfig(rank=2))),
        "merge tied": refusal(lambda: theodora.merge_adapter(tied)),
        "layer": refusal(lambda: layer(torch.randn(2, 48))),
        "twice": refusal(lambda: sharding.shard_model(model, "fsdp2", processes)),
        "hybrid": refusal(lambda: sharding.shard_model(adapted(), "hsdp", processes)),
    }


def sharded_base(processes):
    model = tiny_model("llama")
    fully_shard(model, mesh=init_device_mesh("cpu", (processes.count,)))
    return model


def tied_layer(processes):
    """A model of which a single layer is sharded, too, so that another class is on top of ours."""
    model = adapted()
    fully_shard(model.get_submodule("model.layers.0.mlp.down_proj"), mesh=init_device_mesh("cpu", (processes.count,)))
    return model


@job
def comes_off(processes, folder):
    """The adapter is taken off a sharded model, which goes on as the base."""
    model, plain = adapted(), tiny_model("llama")
    sharding.shard_model(model, "fsdp2", processes)
    model(input_ids=IDS)
    theodora.remove_adapter(model)
    with torch.no_grad():
        return largest([model(input_ids=IDS).logits], [plain(input_ids=IDS).logits])


def sharded_by_accelerate(model, processes, efficient):
    """As `accelerate launch --use_fsdp --fsdp_version 2` does it, adapter included; on a CPU it does not by itself."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=efficient
    )
    stub = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        device=torch.device("cpu"),
        is_main_process=processes.index == 0,
    )
    return fsdp2_prepare_model(stub, model)


@job
def trains_as_accelerate_shards(processes, folder):
    model = sharded_by_accelerate(adapted(), processes, efficient=True)
    assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    losses, parts = steps(model, IDS.chunk(processes.count)[processes.index])
    found = losses, [part.full_tensor() for part in parts]
    return found, alone(processes)


@job
def lives_on_as_accelerate_shards(processes, folder):
    model, plain = sharded_by_accelerate(adapted(), processes, efficient=False), adapted()
    found = {}
    model.eval(), plain.eval()
    with torch.no_grad():
        for _ in range(2):
            found["eval"] = largest([model(input_ids=IDS).logits], [plain(input_ids=IDS).logits])
        with theodora.adapter_disabled(model), theodora.adapter_disabled(plain):
            found["disabled"] = largest([model(input_ids=IDS).logits], [plain(input_ids=IDS).logits])
    model.train()
    theodora.save_adapter(model, folder / f"by_all{processes.index}")
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if processes.index == 0:
        model.save_pretrained(folder / "gathered", state_dict=gathered)
        theodora.save_adapter(plain, folder / "by_one")
    dist.barrier()
    return found, refusal(lambda: theodora.merge_adapter(model))


def quantised(**config):
    """An adapted tiny model in NF4, whose numbers lie in a floating point dtype."""
    torch.manual_seed(0)
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    for block in model.model.layers:
        for path, module in list(block.named_modules()):
            if type(module) is nn.Linear:
                new = Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=False,
                    compute_dtype=torch.float32,
                    quant_type="nf4",
                    quant_storage=torch.float32,
                )
                new.weight = Params4bit(
                    module.weight.data, requires_grad=False, quant_type="nf4", quant_storage=torch.float32, module=new
                )
                block.set_submodule(path, new)
    model = inject_adapter(model.to("cpu"), AdapterConfig(rank=2, **config)).train()
    with torch.no_grad():
        for parameter in trained(model):
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@job
def trains_quantised(processes, folder):
    model = quantised()
    found = sharded_steps(processes, model)
    plain = quantised()
    expected = steps(plain, IDS, accumulation=processes.count)
    model.eval(), plain.eval()
    with torch.no_grad():
        difference = largest([model(input_ids=IDS).logits], [plain(input_ids=IDS).logits])
    layer = "model.layers.1.mlp.down_proj"
    held, other = model.get_submodule(layer).current_weight, plain.get_submodule(layer).current_weight
    differences = [
        difference,
        largest([held.dense()], [other.dense()]),
        largest([held.norm_squared()], [other.norm_squared()]),
    ]
    cut = model.get_submodule(layer).weight
    return (
        found,
        expected,
        differences,
        (cut.to_local().numel(), cut.numel()),
        refusal(lambda: theodora.merge_adapter(model)),
    )


class ShardedTrial(Trial):
    """A trial whose models are sharded once their adapters have their numbers."""

    processes: Any = None

    def subject(self, **seeds):
        subject = super().subject(**seeds)
        sharding.shard_model(subject.model, "fsdp2", self.processes)
        weight = subject.weight
        subject.weight = lambda kind: whole(weight(kind))
        return subject


CONFORMING = ["forward", "backward", "inference", "switch", "disable", "merge", "save-load"]


@job
def conforms(processes, folder):
    """The conformance suite's rows on sharded models; what did not hold, and how much did."""
    ShardedTrial.processes, plain = processes, suite.Trial
    suite.Trial = ShardedTrial
    kinds = [kind for kind in KINDS if kind not in ("tied_head", "experts")]  # experts are refused, see test_experts
    try:
        jobs = suite.plan(
            operations=CONFORMING,
            variants=["dora"],
            dtypes=["fp32"],
            kinds=kinds,
            libraries=["theodora"],
        )
        rows = [row for each in jobs for row in suite.run_job(each)]
    finally:
        suite.Trial = plain
    return [row for row in rows if row.status != "held"], len(rows), {row.operation for row in rows}


@job
def averages(processes, folder):
    """Means of gradients, of those that some processes lack, and of those that all lack."""
    torch.manual_seed(0)
    all_, some, none = (nn.Parameter(torch.randn(3, 2)) for _ in range(3))
    half = nn.Parameter(torch.randn(5).bfloat16())
    all_.grad = torch.full_like(all_, float(processes.index))
    half.grad = torch.ones_like(half)
    if processes.index == 0:
        some.grad = torch.ones_like(some)
    sent = sharding.average_gradients([all_, some, none, half], processes)
    return sent, all_.grad, some.grad, none.grad, half.grad
